"""A run is a folder: written before it begins, resumable, the same on two processes as on one."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from eval import codecs, transformers_quantised
from eval.baselines.joint import learn
from eval.examples import Dataset
from eval.models import load_model, load_tokenizer
from eval.reference import CALIBRATION_SEED, MODEL_PATH, held_out_lines, sample
from eval.run import Options, run, with_defaults
from eval.run_folder import RunFolder
from hf_cachegen import learn_profile
from hf_cachegen.errors import ConfigError

ROOT = Path(__file__).parents[1]
SMALL = "reference-lines:lines=10,questions=2"
CODECS = ("uniform-4", "delta")
WAIT = 200.0
"""Time limit of a subprocess in seconds; far above its usual time."""


def options(**changed: Any) -> Options:
    plain = {"model": str(MODEL_PATH), "dataset": SMALL, "codecs": CODECS, "limit": 3, "device": "cpu"}
    return Options(**{**plain, **changed})


def timeless(found: Any) -> Any:
    """Return the records without their times."""
    if isinstance(found, dict):
        return {name: timeless(value) for name, value in found.items() if not name.endswith("seconds")}
    return [timeless(value) for value in found] if isinstance(found, list) else found


def command(out: Path, *more: str) -> list[str]:
    arguments = [a for name in CODECS for a in ("--codec", name)]
    return ["-m", "eval", "run", "--model", str(MODEL_PATH), "--dataset", SMALL, *arguments, "--device", "cpu",
            "--out", str(out), *more]  # fmt: skip


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip
"""Without --multi_gpu accelerate ignores the number of processes on a machine without GPUs, and starts one."""


def called(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=WAIT, check=False
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    run(options(), out)
    return out


def test_a_run_is_a_folder(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == ["config.json", "metrics.json", "predictions.jsonl"]
    folder = RunFolder(finished)
    config, metrics = folder.config(), folder.metrics()
    assert config["asked"]["codecs"] == ["exact", *CODECS]
    assert config["asked"]["seed"] == 0
    (session,) = config["sessions"]
    assert session["versions"]["torch"]
    assert session["processor"]
    assert session["device"] == "cpu"
    variants = [(v["codec"], v["level"]) for v in metrics["variants"]]
    assert variants == [("exact", None), ("uniform-4", None), ("delta", 3), ("delta", 2), ("delta", 1)]
    exact, uniform, *delta = metrics["variants"]
    assert exact["kl"]["mean"] == 0
    assert exact["scores"]["line"]["mean"] == 1.0
    assert uniform["bits_per_element"] == pytest.approx(4.5)
    assert uniform["kl"]["mean"] > 0
    assert delta[0]["bytes"] > delta[1]["bytes"] > delta[2]["bytes"]
    assert delta[0]["kl"]["mean"] < delta[2]["kl"]["mean"]
    assert all(v["encode_seconds"] > 0 and v["decode_seconds"] > 0 for v in delta)
    assert {"k_bits", "v_bits", "k_error", "v_error"} == set(delta[0]["layers"][0])


def test_a_finished_run_is_scored_again_without_a_model(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (finished / "predictions.jsonl").read_bytes()
    monkeypatch.setattr("eval.run.load_model", lambda *_, **__: pytest.fail("nothing is left to measure"))
    metrics = run(options(), finished)
    assert (finished / "predictions.jsonl").read_bytes() == before
    assert metrics == RunFolder(finished).metrics()
    assert len(RunFolder(finished).config()["sessions"]) > 1


def test_finished_examples_are_not_run_again(finished: Path, tmp_path: Path) -> None:
    lines = (finished / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    (tmp_path / "predictions-000.jsonl").write_bytes(lines[0] + lines[1][:50])  # killed within the second example
    metrics = run(options(), tmp_path)
    again = (tmp_path / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    assert again[0] == lines[0]
    assert again[1] != lines[1]
    assert timeless(list(map(json.loads, again))) == timeless(list(map(json.loads, lines)))
    assert timeless(metrics) == timeless(RunFolder(finished).metrics())


def test_another_run_does_not_continue_in_this_folder(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seed: 0, now 1"):
        run(options(seed=1), finished)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="other files than a run"):
        run(options(), tmp_path)


def test_damaged_records_are_named(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    for text in ("{\n", "[]\n"):
        (tmp_path / "predictions-001.jsonl").write_text(text)
        with pytest.raises(ConfigError, match=r"predictions-001.jsonl is damaged"):
            run(options(), tmp_path)


def test_compressed_predictions_are_read(tmp_path: Path) -> None:
    lines = [json.dumps({"example": str(n)}) + "\n" for n in range(3)]
    (tmp_path / "predictions.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    assert [record["example"] for record in RunFolder(tmp_path).merge(["2", "0", "1"])] == ["2", "0", "1"]
    assert not (tmp_path / "predictions.jsonl").exists()
    (tmp_path / "predictions.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ConfigError, match="is damaged"):
        RunFolder(tmp_path).done()


def test_an_unfinished_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no metrics.json"):
        RunFolder(tmp_path).metrics()


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(finished: Path, tmp_path: Path) -> None:
    """accelerate launches the processes."""
    done = called([*LAUNCH, *command(tmp_path / "two", "--limit", "3")])
    assert done.returncode == 0, done.stderr[-2000:]
    folder = RunFolder(tmp_path / "two")
    assert folder.config()["sessions"][0]["processes"] == 2
    assert timeless(folder.metrics()) == timeless(RunFolder(finished).metrics())
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in finished.iterdir()}


@pytest.mark.slow
def test_a_killed_run_continues(tmp_path: Path) -> None:
    """The run is killed after its first example, interrupted after its second, then run to the end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background of a shell ignore it
    out = tmp_path / "killed"
    shard = out / "predictions-000.jsonl"
    for number, (signal_, code) in enumerate(((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)), 1):
        process = subprocess.Popen(
            [sys.executable, *command(out, "--limit", "8")], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        until = time.monotonic() + WAIT
        while process.poll() is None and time.monotonic() < until:
            if shard.exists() and shard.read_bytes().count(b"\n") >= number:
                process.send_signal(signal_)
                break
            time.sleep(0.05)
        _, stderr = process.communicate(timeout=WAIT)
        assert process.returncode == code, stderr.decode()[-2000:]
    assert b"the same command continues" in stderr
    first = shard.read_bytes().split(b"\n")[0]
    metrics = run(options(limit=8), out)
    assert metrics["examples"] == 8
    assert (out / "predictions.jsonl").read_bytes().split(b"\n")[0] == first
    assert len(RunFolder(out).config()["sessions"]) == 3


def test_examples_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of the 3 examples fits"):
        run(options(max_tokens=60), tmp_path / "none")
    with pytest.raises(ConfigError, match="needs"):
        run(options(max_tokens=60, too_long="error"), tmp_path / "error")
    run(options(max_tokens=150, too_long="middle", limit=1, codecs=("exact",)), tmp_path / "middle")
    (record,) = RunFolder(tmp_path / "middle").done().values()
    assert record["context_tokens"] < 150


def test_a_data_set_brings_its_chat_template_and_truncation() -> None:
    class Tokenizer:
        chat_template: str | None = "{{ messages }}"

    plain, asks = Dataset("plain", (), ()), Dataset("asks", (), (), chat_template=True, too_long="middle")
    found = with_defaults(options(), asks, Tokenizer())
    assert (found.chat_template, found.too_long) == (True, "middle")
    assert with_defaults(options(), plain, Tokenizer()).chat_template is False
    given = with_defaults(options(chat_template=False, too_long="error"), asks, Tokenizer())
    assert (given.chat_template, given.too_long) == (False, "error")
    Tokenizer.chat_template = None
    assert with_defaults(options(), asks, Tokenizer()).chat_template is False
    assert with_defaults(options(chat_template=True), plain, Tokenizer()).chat_template is True


def test_the_question_in_the_cache_and_perplexity(tmp_path: Path) -> None:
    rows = [{"context": "line a-b: REGISTER_CONTENT is <12345>\n", "question": "", "answers": [],
             "completion": "line c-d: REGISTER_CONTENT is <54321>\n"}]  # fmt: skip
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = f"jsonl:path={tmp_path / 'text.jsonl'},scores="
    found = run(options(dataset=spec, codecs=("identity",)), tmp_path / "loss")
    exact, *identity = found["variants"]
    assert exact["scores"] == {}
    assert "same_answer" not in exact
    assert exact["perplexity"]["mean"] > 1
    assert identity[-1]["perplexity"]["difference"] != 0
    inside = run(options(include_question=True, limit=1, codecs=("text",)), tmp_path / "inside")
    assert (inside["examples"], inside["questions"]) == (2, 2)
    text = inside["variants"][1]
    assert text["codec"] == "text"
    assert text["same_answer"]["mean"] == 1.0
    assert text["kl"]["mean"] == pytest.approx(0, abs=1e-3)
    assert text["prefill_seconds"] > 0


def test_every_installed_codec_runs(tmp_path: Path) -> None:
    found = run(options(codecs=("all",), limit=1, levels=(1,)), tmp_path)
    measured = [v["codec"] for v in found["variants"]]
    missing = RunFolder(tmp_path).config()["asked"]["unavailable"]
    assert [name for name in codecs.NAMES if name not in missing] == measured
    assert {"exact", "text", "uniform-3", "artifact", "lmcache", "kivi-2"} <= set(measured)
    assert {"lossless", "delta", "identity", "klt"} <= set(measured)
    by_name = {v["codec"]: v for v in found["variants"]}
    assert by_name["lossless"]["kl"]["mean"] == 0
    assert by_name["klt"]["level"] == 1
    assert set(codecs.TITLES) == {*codecs.NAMES, "released"}


def test_calibrated_baselines_run_with_a_basis(tmp_path: Path) -> None:
    tokenizer, model = load_tokenizer(str(MODEL_PATH)), load_model(str(MODEL_PATH), device="cpu")
    contexts = [tokenizer(held_out_lines(n, 30, 1).text).input_ids for n in (900, 901)]
    learn(model, contexts).save(tmp_path / "basis.safetensors")
    wanted = options(codecs=("kvtc", "pca"), limit=1, levels=(3,), basis=str(tmp_path / "basis.safetensors"))
    found = run(wanted, tmp_path / "run")
    assert [(v["codec"], v["level"]) for v in found["variants"]] == [("exact", None), ("kvtc", 3), ("pca", 3)]
    assert found["variants"][2]["decode_seconds"] is None
    assert 0 < found["variants"][2]["kl"]["mean"] < 1
    assert len(RunFolder(tmp_path / "run").config()["asked"]["basis"]["sha256"]) == 64


@pytest.mark.slow
def test_klt_runs_with_a_prediction_where_the_profile_has_one(tmp_path: Path) -> None:
    tokenizer, model = load_tokenizer(str(MODEL_PATH)), load_model(str(MODEL_PATH), dtype="float32", device="cpu")
    samples = [sample(tokenizer, "lines", CALIBRATION_SEED + n, 140) for n in range(5)]
    learn_profile(model, samples, predict_layers=(0,)).save(tmp_path / "profile.safetensors")
    wanted = options(codecs=("klt", "predict0"), limit=1, profile=str(tmp_path / "profile.safetensors"))
    plain, predicted = (
        [v for v in run(wanted, tmp_path / "run")["variants"] if v["codec"] == name] for name in ("klt", "predict0")
    )
    assert [v["level"] for v in predicted] == [v["level"] for v in plain] == [3, 2, 1]
    assert all(a["bytes"] < b["bytes"] for a, b in zip(predicted, plain, strict=True))
    with pytest.raises(ConfigError, match=r"predict1: the profile has predictors for the layers \[0\]"):
        run(options(codecs=("predict1",), limit=1, profile=wanted.profile), tmp_path / "other")


def test_a_compressed_run_is_the_same_run(tmp_path: Path) -> None:
    found = run(options(limit=1), tmp_path)
    RunFolder(tmp_path).compress()
    first = (tmp_path / "predictions.jsonl.gz").read_bytes()
    assert not (tmp_path / "predictions.jsonl").exists()
    assert run(options(limit=1), tmp_path) == found
    RunFolder(tmp_path).compress()
    assert (tmp_path / "predictions.jsonl.gz").read_bytes() == first


def test_codecs_that_cannot_be_used_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown codecs"):
        codecs.choose(["zip"], None)
    with pytest.raises(ConfigError, match="codec klt: the model has no profile"):
        codecs.choose(["klt"], None)
    with pytest.raises(ConfigError, match="codec kvtc: no basis"):
        codecs.choose(["kvtc"], None)
    monkeypatch.setattr(transformers_quantised, "missing", lambda name: f"{name} is away")
    with pytest.raises(ConfigError, match="hqq-4 is away"):
        codecs.choose(["hqq-4"], None)
    chosen, missing = codecs.choose(["all"], None)
    assert "hqq-4" not in chosen
    assert missing["hqq-4"] == "hqq-4 is away"


def test_the_command_line_refuses_wrong_levels(tmp_path: Path) -> None:
    done = called([sys.executable, *command(tmp_path, "--levels", "one")])
    assert done.returncode == 2
    assert "whole numbers with commas" in done.stderr
