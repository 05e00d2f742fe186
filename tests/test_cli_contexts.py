"""The commands encode, generate and verify --model: from a text to an answer, on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from hf_cachegen.cli import errors as cli_errors
from tests.cli_support import run, run_json, save_model, text

CONTEXT_TOKENS = 120
POSITIONS = 64
"""Learnt positions of the tiny GPT-2."""
QUESTION = text(5, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "context.txt"
    path.write_text(f"{text(CONTEXT_TOKENS)}\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory, model: Path, document: Path) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "lossless"
    done = run("encode", document, "--model", model, "--out", folder, "--lossless", "--chunk-tokens", 50)
    assert done.exit_code == 0, done.output
    return folder


def reference_answer(model: Path, document: Path, **options: object) -> str:
    """Return the answer of the stock model without an artifact."""
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    words = f"{document.read_text(encoding='utf-8')} {QUESTION}"
    ids = tokenizer(words, return_tensors="pt")["input_ids"]
    output = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **options)
    answer: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return answer


def ask(artifact: Path, model: Path, *options: object) -> tuple[object, ...]:
    return ("generate", artifact, "--model", model, "--prompt", QUESTION, "--max-new-tokens", 12, *options)


def test_encode_reports_its_artifact(tmp_path: Path, model: Path, document: Path) -> None:
    folder = tmp_path / "context"
    found = run_json("encode", document, "--model", model, "--out", folder, "--protect-last", 8)
    assert found["artifact"] == str(folder)
    assert found["tokens"] == CONTEXT_TOKENS
    assert found["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert set(found["seconds"]) == {"prefill", "encode"}
    assert found["fingerprint"]["tokenizer"] is not None
    assert {**run_json("inspect", folder), "artifact": str(folder)}["levels"] == found["levels"]


def test_encode_notes_a_text_longer_than_the_model_was_trained_for(
    tmp_path: Path, model: Path, document: Path
) -> None:
    said = "120 tokens, the model was trained for 64"
    short = tmp_path / "short"
    shutil.copytree(model, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    done = run("encode", document, "--model", short, "--out", tmp_path / "a")
    assert done.exit_code == 0
    assert said in done.stderr
    assert said not in run("encode", document, "--model", model, "--out", tmp_path / "b").stderr
    assert run_json("encode", document, "--model", short, "--out", tmp_path / "c")["tokens"] == CONTEXT_TOKENS


def test_encode_refuses_a_text_beyond_the_learnt_positions_before_the_prefill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = save_model(tmp_path / "gpt2", "gpt2")

    def prefill(*_: object, **__: object) -> None:
        raise AssertionError("the model must not run")

    monkeypatch.setattr(GPT2LMHeadModel, "forward", prefill)
    command = ("encode", "-", "--model", short, "--out", tmp_path / "a")
    done = run(*command, stdin=text(POSITIONS + 1))
    assert done.exit_code == cli_errors.UNSUPPORTED
    assert f"{POSITIONS} learnt positions" in done.stderr
    assert "poor answers" not in done.stderr
    assert "note" not in done.stderr
    assert not (tmp_path / "a").exists()
    found = run_json(*command, stdin=text(POSITIONS + 1), code=cli_errors.UNSUPPORTED)
    assert found["error"]["type"] == "UnsupportedModelError"
    monkeypatch.undo()
    assert run_json(*command, stdin=text(POSITIONS))["tokens"] == POSITIONS


def test_encode_from_stdin_and_twice_gives_the_same_bytes(tmp_path: Path, model: Path, document: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("encode", document, "--model", model, "--out", first).exit_code == 0
    done = run("encode", "-", "--model", model, "--out", second, stdin=document.read_text(encoding="utf-8"))
    assert done.exit_code == 0
    assert f"{CONTEXT_TOKENS} tokens" in done.stdout
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_encode_overwrites_only_with_the_option(tmp_path: Path, model: Path, document: Path) -> None:
    command = ("encode", document, "--model", model, "--out", tmp_path / "context")
    assert run(*command).exit_code == 0
    assert run_json(*command, code=cli_errors.USAGE)["error"]["type"] == "ArtifactExistsError"
    assert run(*command, "--levels", 1, "--overwrite").exit_code == 0
    assert len(run_json("inspect", tmp_path / "context")["levels"]) == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--levels", 4], "levels"),
        (["--lossless", "--transform", "delta"], "transform"),
        (["--steps", 1, 2, 0], "steps"),
        (["--dtype", "float8"], "--dtype"),
        (["--device", "abacus"], "--device"),
        (["--revision", "v2"], "a revision is for a model on the Hub"),
        (["--steps", 1, 2], "--steps"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else value,
)
def test_encode_refuses_wrong_options(
    tmp_path: Path, model: Path, document: Path, options: list[object], named: str
) -> None:
    found = run_json("encode", document, "--model", model, "--out", tmp_path / "o", *options, code=cli_errors.USAGE)
    assert named in found["error"]["message"]
    assert not (tmp_path / "o").exists()


def test_encode_needs_a_text_and_a_model(tmp_path: Path, model: Path) -> None:
    empty = run("encode", "-", "--model", model, "--out", tmp_path / "o", stdin=" \n")
    assert (empty.exit_code, "is empty" in empty.stderr) == (cli_errors.USAGE, True)
    absent = run("encode", "-", "--model", tmp_path / "none", "--out", tmp_path / "o", stdin="w1")
    assert (absent.exit_code, "cannot load" in absent.stderr) == (cli_errors.USAGE, True)


def test_generate_streams_the_answer_of_the_exact_model(lossless: Path, model: Path, document: Path) -> None:
    done = run(*ask(lossless, model))
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == reference_answer(model, document, do_sample=False)


def test_generate_as_json(lossless: Path, model: Path, document: Path) -> None:
    found = run_json(*ask(lossless, model))
    assert found["text"] == reference_answer(model, document, do_sample=False)
    assert (found["context_tokens"], found["question_tokens"]) == (CONTEXT_TOKENS, 5)
    assert 0 < found["new_tokens"] <= 12
    assert set(found["seconds"]) == {"load", "generate"}


def test_generate_with_beams(lossless: Path, model: Path, document: Path) -> None:
    done = run(*ask(lossless, model, "--num-beams", 3))
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == reference_answer(model, document, do_sample=False, num_beams=3)


def test_generate_reads_the_question_from_stdin(lossless: Path, model: Path) -> None:
    command = ("generate", lossless, "--model", model, "--max-new-tokens", 12)
    piped, given = run(*command, "--prompt", "-", stdin=QUESTION), run(*command, "--prompt", QUESTION)
    assert (piped.exit_code, given.exit_code) == (0, 0)
    assert piped.stdout == given.stdout


def test_an_empty_question_continues_the_context(lossless: Path, model: Path) -> None:
    found = run_json("generate", lossless, "--model", model, "--prompt", "", "--max-new-tokens", 3)
    assert (found["question_tokens"], 0 < found["new_tokens"] <= 3) == (0, True)


def test_sampling_is_repeatable(lossless: Path, model: Path) -> None:
    command = ask(lossless, model, "--sample", "--seed", 5, "--temperature", 2.0, "--top-k", 50, "--top-p", 0.99)
    assert run_json(*command)["text"] == run_json(*command)["text"]
    other = ask(lossless, model, "--sample", "--seed", 6, "--temperature", 2.0)
    assert run_json(*command)["text"] != run_json(*other)["text"]


@pytest.mark.parametrize(
    "option", [("--temperature", 0.5), ("--top-k", 5), ("--top-p", 0.5), ("--seed", 1)], ids=lambda option: option[0]
)
def test_sampling_options_need_sample(lossless: Path, model: Path, option: tuple[object, ...]) -> None:
    done = run(*ask(lossless, model, *option))
    assert done.exit_code == cli_errors.USAGE
    assert f"{option[0]} requires --sample" in done.stderr


@pytest.mark.parametrize("command", ["generate", "stream"])
@pytest.mark.parametrize("option", [
    ("--temperature", 0), ("--temperature", -1), ("--temperature", "nan"), ("--temperature", "1e-40"), ("--top-k", -1),
    ("--top-p", 1.5), ("--top-p", "nan"), ("--seed", -1), ("--seed", 1 << 64),
], ids=lambda option: "=".join(map(str, option)))  # fmt: skip
def test_sampling_options_out_of_range(
    lossless: Path, model: Path, command: str, option: tuple[object, ...]
) -> None:
    asked = (command, lossless, "--model", model, "--prompt", QUESTION, "--sample", *option)
    found = run_json(*asked, code=cli_errors.USAGE)
    assert f"'{option[0]}'" in found["error"]["message"]


def test_sampling_at_the_ends_of_the_ranges(lossless: Path, model: Path) -> None:
    for options in (("--temperature", 1e-6, "--seed", (1 << 64) - 1), ("--top-k", 0, "--top-p", 0, "--seed", 0)):
        assert run_json(*ask(lossless, model, "--sample", *options))["new_tokens"] > 0


def test_generate_refuses_a_level_that_does_not_exist(lossless: Path, model: Path) -> None:
    found = run_json(*ask(lossless, model, "--level", 3), code=cli_errors.USAGE)
    assert found["error"]["type"] == "LevelError"


def test_generate_at_a_coarser_level(tmp_path: Path, model: Path, document: Path) -> None:
    assert run("encode", document, "--model", model, "--out", tmp_path / "context").exit_code == 0
    for level in (1, 2, 3):
        assert run_json(*ask(tmp_path / "context", model, "--level", level))["new_tokens"] > 0


def test_other_weights_are_a_mismatch(tmp_path: Path, lossless: Path) -> None:
    other = save_model(tmp_path / "other", seed=1)
    assert run_json(*ask(lossless, other), code=cli_errors.MISMATCH)["error"]["type"] == "WrongWeightsError"
    found = run_json("verify", lossless, "--model", other, code=cli_errors.MISMATCH)
    assert found["error"]["type"] == "WrongWeightsError"


def test_another_architecture_is_a_mismatch(tmp_path: Path, lossless: Path) -> None:
    other = save_model(tmp_path / "other", "qwen3")
    found = run_json("verify", lossless, "--model", other, code=cli_errors.MISMATCH)
    assert found["error"]["type"] == "WrongModelError"


def test_a_local_model_has_no_revision(lossless: Path, model: Path) -> None:
    for command in (ask(lossless, model), ("verify", lossless, "--model", model)):
        found = run_json(*command, "--revision", "v2", code=cli_errors.USAGE)
        assert "a revision is for a model on the Hub" in found["error"]["message"]


def test_another_tokenizer_is_a_mismatch(tmp_path: Path, lossless: Path) -> None:
    other = save_model(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(other)
    assert run_json(*ask(lossless, other), code=cli_errors.MISMATCH)["error"]["type"] == "WrongTokenizerError"


def test_an_unsupported_model_is_named(tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", "rwkv")
    found = run_json(
        "encode", "-", "--model", other, "--out", tmp_path / "o", code=cli_errors.UNSUPPORTED, stdin=text(9)
    )
    assert found["error"]["type"] in ("UnsupportedModelError", "UnsupportedLayerError")


def test_verify_with_the_model(lossless: Path, model: Path) -> None:
    assert run_json("verify", lossless, "--model", model)["model"] == str(model)
    assert f"made with {model}" in run("verify", lossless, "--model", model).stdout


def test_an_artifact_without_a_fingerprint_belongs_to_no_model(tmp_path: Path, model: Path) -> None:
    from hf_cachegen import encode_kv
    from hf_cachegen.artifact import artifact

    artifact.write(encode_kv([torch.zeros(1, 1, 9, 8)], [torch.ones(1, 1, 9, 8)]), tmp_path / "bare")
    found = run_json("verify", tmp_path / "bare", "--model", model, code=cli_errors.MISMATCH)
    assert "no fingerprint" in found["error"]["message"]


def test_encode_meets_a_target(tmp_path: Path, model: Path, document: Path) -> None:
    (tmp_path / "after.txt").write_text(text(12, seed=4), encoding="utf-8")
    command = ("encode", document, "--model", model, "--transform", "identity", "--protect-last", 8)
    aimed = (*command, "--target-kl", 0.01, "--continuation", tmp_path / "after.txt")
    found = run_json(*aimed, "--out", tmp_path / "aimed")
    assert found["target_kl"]["target"] == 0.01
    assert found["target_kl"]["continuations"] == 9
    last = found["levels"][-1]
    assert last["low"] <= last["kl"] <= last["high"]
    assert last["kl"] <= 0.01
    shown = run("inspect", tmp_path / "aimed").output
    assert "KL in this context" in shown
    assert "was chosen for 0.01 nats" in shown.replace("\n", " ")
    said = run(*aimed, "--out", tmp_path / "again").stdout
    assert "was chosen for 0.01 nats" in said
    assert "(prefill and search " in said
    assert run_json(*command, "--out", tmp_path / "plain")["target_kl"] is None
    wrong = run_json(*command, "--continuation", document, "--out", tmp_path / "x", code=cli_errors.USAGE)
    assert "--continuation requires --target-kl" in wrong["error"]["message"]
