"""The command `profile`, and the option --profile of the other commands, on a tiny model."""

from __future__ import annotations

import inspect
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cachegen import Profile, learn_profile
from hf_cachegen.cli import errors as cli_errors
from hf_cachegen.cli.options import learning_options
from hf_cachegen.cli.samples import draw, from_rows, from_text
from hf_cachegen.profiles import finding
from hf_cachegen.profiles.files import PROFILE_FILE
from hf_cachegen.profiles.learning import DEFAULT_TARGETS, journal, learning, moments
from tests.cli_support import LEARN, WORDS, ask, documented, encode, run, run_json, save_model, text

BOS = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "long.txt"
    path.write_text(text(1200), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory, model: Path, long_text: Path) -> Path:
    """The file of a profile."""
    folder = tmp_path_factory.mktemp("profiles")
    done = run("profile", "--model", model, "--text", long_text, "--out", folder, *LEARN)
    assert done.exit_code == 0, done.output
    return folder / PROFILE_FILE


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, model: Path, profile: Path) -> Path:
    """An artifact that needs the profile, which is not beside it."""
    folder = tmp_path_factory.mktemp("artifacts") / "klt"
    done = encode(model, folder, "--profile", profile)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def own(tmp_path: Path, model: Path) -> Path:
    """A copy of the model's folder to write a profile into."""
    return Path(shutil.copytree(model, tmp_path / "own"))


def test_profile_reports_what_it_learnt(tmp_path: Path, model: Path, long_text: Path, profile: Path) -> None:
    found = run_json("profile", "--model", model, "--text", long_text, "--out", tmp_path, *LEARN)
    assert found["profile"] == str(tmp_path / PROFILE_FILE)
    assert found["bytes"] == (tmp_path / PROFILE_FILE).stat().st_size
    learnt = Profile.load(tmp_path)
    assert found["digest"] == learnt.digest == Profile.load(profile).digest  # the same texts give the same profile
    assert found["samples"] == learnt.about["samples"] == 10
    assert 0 < found["components"] <= found["channels"] == 2 * 4 * 2 * 8
    assert found["rotation"] == "half"
    assert [row["level"] for row in found["levels"]] == [1, 2, 3]
    assert found["levels"][2]["kl"] <= 0.001 < found["levels"][0]["kl"]
    assert found["levels"][0]["bits_per_element"] < found["levels"][2]["bits_per_element"]
    assert documented("profile", found)


def test_profile_goes_into_the_models_own_folder_and_is_used_from_there(own: Path, long_text: Path) -> None:
    AutoModelForCausalLM.from_pretrained(own).to(torch.bfloat16).save_pretrained(own)
    done = run("profile", "--model", own, "--text", long_text, *LEARN)
    assert done.exit_code == 0, done.output
    learnt = Profile.load(own)
    assert learnt.about["fingerprint"]["dtype"] == "float32"  # where its divergence is not the rounding's
    for shown in (learnt.digest, "10 samples", "components kept", "level 3: KL 0.000", "bits per element"):
        assert shown in done.stdout
    folder = own.parent / "context"
    assert encode(own, folder).exit_code == 0
    found = run_json("inspect", folder)
    assert (found["dtype"], found["codec"]["config"]["transform"]) == ("bfloat16", "klt")
    assert run_json(*ask(folder, own))["new_tokens"] > 0
    assert run_json("verify", folder, "--model", own)["profile"] == learnt.digest
    assert encode(own, folder, "--profile", "none", "--overwrite").exit_code == 0
    assert run_json("inspect", folder)["profile"] is None


def test_profile_overwrites_only_with_the_option(tmp_path: Path, model: Path, long_text: Path, profile: Path) -> None:
    path = Path(shutil.copy(profile, tmp_path))
    command = ("profile", "--model", model, "--text", long_text, "--out", tmp_path, *LEARN, "--seed", 1)
    found = run_json(*command, code=cli_errors.USAGE)
    assert (found["error"]["type"], str(path) in found["error"]["message"]) == ("ArtifactExistsError", True)
    assert run_json(*command, "--overwrite")["digest"] == Profile.load(path).digest != Profile.load(profile).digest


def test_an_interrupted_run_continues(
    tmp_path: Path, model: Path, long_text: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("profile", "--model", model, "--text", long_text, "--out", tmp_path, *LEARN)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal, "SECONDS_BETWEEN", 0.0)
        patch.setattr(journal, "SHARE_OF_TIME", 0)
        patch.setattr(learning.Measured, "of", killed)
        assert run(*command).exit_code != 0
    left = tmp_path / f"{PROFILE_FILE}.learning"
    assert list(tmp_path.iterdir()) == [left]
    other = run_json(*command, "--seed", 1, code=cli_errors.USAGE)
    assert str(left) in other["error"]["message"]
    with monkeypatch.context() as patch:
        patch.setattr(moments.Moments, "_add", killed)  # nothing is done twice
        assert run_json(*command)["digest"] == Profile.load(profile).digest
    assert list(tmp_path.iterdir()) == [tmp_path / PROFILE_FILE]
    left.write_bytes(b"left over")
    assert run_json(*command, "--overwrite", "--seed", 1)["digest"] != Profile.load(profile).digest
    assert not left.exists()


def test_progress_is_shown_where_stderr_is_no_terminal(tmp_path: Path, model: Path, long_text: Path) -> None:
    done = run("profile", "--model", model, "--text", long_text, "--out", tmp_path, *LEARN)
    assert done.exit_code == 0, done.output
    assert "hf-cachegen: note: learn: 8 of 8 samples" in done.stderr
    assert "learn: " not in done.stdout
    assert not logging.getLogger("hf_cachegen.profiles.learning").handlers


def test_profile_takes_its_options(tmp_path: Path, model: Path, long_text: Path) -> None:
    options = ("--target-kl", 5, 1, 0.1, "--floor", 2, "--group-layers", 1, "--no-undo-rotation", "--seed", 3)
    path = tmp_path / "mine.safetensors"
    found = run_json("profile", "--model", model, "--text", long_text, "--out", path, *LEARN, *options)
    assert (found["profile"], found["rotation"]) == (str(path), "none")
    about = Profile.load(path).about
    assert [about[name] for name in ("target_kl", "floor", "group_layers", "seed")] == [[5, 1, 0.1], 2, 1, 3]


def test_profile_from_samples_of_a_task(tmp_path: Path, model: Path) -> None:
    rows = [{"context": text(30, seed), "continuation": text(6, seed + 50)} for seed in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert run_json("profile", "--model", model, "--samples-jsonl", path, "--out", tmp_path)["samples"] == 6


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"context": "w1"}', '{"context": "w1", "continuation": 7}', '{"context": "", "continuation": ""}'],
    ids=["no-json", "list", "no-continuation", "number", "empty"],
)  # fmt: skip
def test_a_wrong_row_is_named(tmp_path: Path, model: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"context": "w1", "continuation": "w2"}}\n{line}\n', encoding="utf-8")
    found = run_json("profile", "--model", model, "--samples-jsonl", path, "--out", tmp_path, code=cli_errors.USAGE)
    assert "rows.jsonl, line 2: " in found["error"]["message"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "--text"),
        (["--text", "-", "--target-kl", 1, 1, -1], "target_kl"),
        (["--text", "-", "--samples", 3], "at least 5 samples, got 3"),
        (["--text", "-", "--context-tokens", 100_000, "--continuation-tokens", 1000], "at least 5 samples, got 0"),
    ],
    ids=["nothing", "target", "few", "short"],
)
def test_profile_refuses_wrong_options(tmp_path: Path, model: Path, options: list[object], named: str) -> None:
    command = ("profile", "--model", model, "--out", tmp_path / "o", *LEARN, *options)
    found = run_json(*command, code=cli_errors.USAGE, stdin=text(1200))
    assert named in found["error"]["message"]
    assert not (tmp_path / "o").exists()


def test_a_model_of_the_hub_has_no_folder_of_its_own() -> None:
    done = run("profile", "--model", "unknown/model", "--text", "-", stdin="w1")
    assert (done.exit_code, "expected --out" in done.stderr) == (cli_errors.USAGE, True)


def test_the_learning_options_default_to_those_of_the_function() -> None:
    def command(**_: object) -> None:
        pass

    options = {parameter.name: parameter for parameter in learning_options(command).__click_params__}  # type: ignore[attr-defined]
    parameters = inspect.signature(learn_profile).parameters
    assert parameters["target_kl"].default == DEFAULT_TARGETS
    assert set(options) == {
        "target_kl", "floor", "group_layers", "across_layers", "undo_rotation", "predict_layers", "predict_rank",
        "seed",
    }  # fmt: skip
    for name, option in options.items():
        # click has a mark of its own for "no default"
        default = {"group_layers": None, "predict_layers": ()}.get(name, option.default)
        assert default == parameters[name].default


def test_a_text_is_cut_into_samples(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text(50), add_special_tokens=False)["input_ids"]
    starts = len(tokenizer("w1")["input_ids"]) - 1
    cut = from_text(tokenizer, text(50), 10 + starts, 5)
    assert [token for context, continuation in cut for token in context[starts:] + continuation] == ids[:45]
    assert {(len(context), len(continuation)) for context, continuation in cut} == {(10 + starts, 5)}
    assert [len(context) for context, _ in from_text(tokenizer, text(55), 10 + starts, 5)][-1] == 5 + starts
    assert from_text(tokenizer, text(9), 10 + starts, 5) == []


def test_a_context_begins_as_the_tokenizer_begins_a_text(model: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    cut = from_text(tokenizer, text(30), 10, 5)
    assert [context[0] for context, _ in cut] == [BOS] * 2
    assert {len(context) for context, _ in cut} == {10}
    rows = from_rows(tokenizer, ['{"context": "w1 w2", "continuation": "w3"}'], "rows")
    known = {word: number for number, word in enumerate(WORDS, 4)}
    assert rows == [([BOS, known["w1"], known["w2"]], [known["w3"]])]


def test_samples_are_drawn_evenly_and_repeatably() -> None:
    sources = [[([source], [number]) for number in range(count)] for source, count in enumerate((100, 2, 30))]
    drawn = draw(sources, 12, seed=0)
    assert [sum(context == [source] for context, _ in drawn) for source in range(3)] == [5, 2, 5]
    assert len({str(sample) for sample in drawn}) == 12
    assert draw(sources, 12, seed=0) == drawn != draw(sources, 12, seed=1)
    assert len(draw(sources, 1000, seed=0)) == 132


def test_inspect_shows_the_profile(encoded: Path, profile: Path, model: Path) -> None:
    digest = Profile.load(profile).digest
    assert run_json("inspect", encoded)["profile"] == {"digest": digest, "model": str(model), "place": None}
    shown = run("inspect", encoded).stdout
    assert digest in shown
    assert "is not included in the sizes" in shown
    assert "KL of samples" in shown
    kl = [row["kl"] for row in Profile.load(profile).about["measured"]]
    assert [row["profile_kl"] for row in run_json("inspect", encoded)["levels"]] == kl


def test_encode_reports_the_saving_of_a_profile(tmp_path: Path, model: Path, own: Path, profile: Path) -> None:
    advice = "encoded without a profile"
    assert advice in encode(model, tmp_path / "auto").stdout
    for options in (["--profile", "none"], ["--transform", "delta"], ["--lossless"], ["--profile", profile]):
        assert advice not in encode(model, tmp_path / "o", "--overwrite", *options).stdout


def test_inspect_and_verify_need_no_profile(encoded: Path) -> None:
    assert run_json("verify", encoded)["profile"] is None
    assert run("inspect", encoded, "--json").exit_code == 0


@pytest.mark.parametrize("command", ["generate", "verify"])
def test_decoding_takes_the_profile_that_the_artifact_names(
    tmp_path: Path, encoded: Path, profile: Path, model: Path, command: str
) -> None:
    def ready(folder: Path, *options: object) -> tuple[object, ...]:
        return ask(folder, model, *options) if command == "generate" else (command, folder, "--model", model, *options)

    digest = Profile.load(profile).digest
    for options in ([], ["--profile", "none"], ["--profile", tmp_path / "nowhere"]):
        finding._known.clear()  # earlier models may still keep it in use
        missing = run_json(*ready(encoded, *options), code=cli_errors.PROFILE)
        assert missing["error"]["type"] == "ProfileError"
    assert digest in run_json(*ready(encoded), code=cli_errors.PROFILE)["error"]["message"]
    for location in (profile, profile.parent):
        done = run(*ready(encoded, "--profile", location))
        assert done.exit_code == 0, done.output
    beside = Path(shutil.copytree(encoded, tmp_path / "beside"))
    shutil.copy(profile, beside)
    assert run(*ready(beside, "--profile", "none")).exit_code == 0
    assert run(*ready(beside)).exit_code == 0


@pytest.mark.parametrize("command", ["generate", "stream", "verify"])
def test_a_missing_model_is_reported_before_its_profile(tmp_path: Path, encoded: Path, command: str) -> None:
    prompt = [] if command == "verify" else ["--prompt", "w1"]
    found = run_json(command, encoded, "--model", tmp_path / "mistyped", *prompt, code=cli_errors.USAGE)
    assert "cannot load" in found["error"]["message"]


@pytest.mark.parametrize("command", ["generate", "stream", "verify"])
def test_another_model_is_reported_before_its_profile(tmp_path: Path, encoded: Path, command: str) -> None:
    """Its profile is missing because the model is another one."""
    other, prompt = save_model(tmp_path / "other", "qwen3"), [] if command == "verify" else ["--prompt", "w1"]
    for options in ([], ["--profile", "none"]):
        found = run_json(command, encoded, "--model", other, *prompt, *options, code=cli_errors.MISMATCH)["error"]
        assert found["type"] == "WrongModelError"
        assert str(other) in found["message"]


def test_verify_with_a_profile_alone(encoded: Path, profile: Path, tmp_path: Path) -> None:
    digest = Profile.load(profile).digest
    assert run_json("verify", encoded, "--profile", profile)["profile"] == digest
    assert f"with profile {digest}" in run("verify", encoded, "--profile", profile).stdout
    damaged = tmp_path / PROFILE_FILE
    damaged.write_bytes(profile.read_bytes()[:-1])
    run_json("verify", encoded, "--profile", damaged, code=cli_errors.PROFILE)


def test_another_models_profile_is_a_mismatch(tmp_path: Path, profile: Path) -> None:
    other = save_model(tmp_path / "other", "qwen3")
    done = encode(other, tmp_path / "o", "--profile", profile)
    assert (done.exit_code, (tmp_path / "o").exists()) == (cli_errors.MISMATCH, False)


@pytest.mark.parametrize(
    ("options", "given", "code", "named"),
    [
        (["--transform", "klt"], False, cli_errors.USAGE, "--transform klt requires a profile"),
        (["--transform", "klt", "--profile", "none"], False, cli_errors.USAGE, "--transform klt requires a profile"),
        (["--profile", "nowhere"], False, cli_errors.PROFILE, "nowhere; learn one"),
        (["--transform", "delta"], True, cli_errors.USAGE, "--profile LOCATION requires --transform klt"),
        (["--lossless"], True, cli_errors.USAGE, "--profile LOCATION requires --transform klt"),
        (["--levels", 2], True, cli_errors.USAGE, "conflicts with the profile, which has 3 levels"),
    ],
    ids=["no-profile", "none", "nowhere", "delta", "lossless", "levels"],
)
def test_encode_refuses_options_that_contradict_the_profile(
    tmp_path: Path, profile: Path, options: list[object], given: bool, code: int, named: str
) -> None:
    """Each error is raised before the model is loaded: the model does not exist here."""
    chosen = ["--profile", profile, *options] if given else options
    command = ("encode", "-", "--model", tmp_path / "none", "--out", tmp_path / "o", *chosen)
    found = run_json(*command, code=code, stdin="w1")
    assert named in found["error"]["message"]


def test_bars_are_drawn_for_people_at_a_terminal(
    tmp_path: Path, own: Path, long_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes a terminal for rich
    learnt = run("profile", "--model", own, "--text", long_text, *LEARN)
    made = encode(own, tmp_path / "context")
    asked = run(*ask(tmp_path / "context", own))
    for done, names in ((learnt, "learn step tables"), (made, "prefill encode"), (asked, "decode")):
        assert done.exit_code == 0, done.output
        assert all(re.search(rf"{name}( at \d+)?: ", done.stderr) for name in names.split())
    run_json(*ask(tmp_path / "context", own))  # nothing on stderr
    monkeypatch.delenv("FORCE_COLOR")
    assert "decode:" not in run(*ask(tmp_path / "context", own)).stderr
