"""The command encode-dataset: each text once, by one or several processes, also after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from eval.reference import MODEL_PATH
from hf_cachegen import CacheGenCache
from hf_cachegen.cli.encode_dataset import INDEX_FILE, TextDataset, encode_rows, write_index
from hf_cachegen.errors import ArtifactExistsError, ConfigError
from tests.cli_support import documented, run, run_json, save_model
from tests.small_artifact import killed_between_renames
from tests.small_artifact import write as write_small

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
WAIT = 200.0
"""Time limit of a subprocess in seconds; far above its usual time."""
MODULE = ["-m", "hf_cachegen.encode_dataset"]
LAUNCH = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip

pytest.importorskip("datasets")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Write six rows with five different texts."""
    path = tmp_path / "texts.jsonl"
    rows = [{"context": f"line a-{n % 5}: REGISTER_CONTENT is <{n % 5}>\n" * 3} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(dataset: Path | str, out: Path, *more: str) -> list[str]:
    model = ["--model", str(MODEL_PATH), "--dtype", "bfloat16", "--device", "cpu"]
    return [*MODULE, "--dataset", str(dataset), *model, "--out", str(out), "--transform", "identity", *more]


def called(arguments_: list[str], tmp_path: Path, launch: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, "HF_DATASETS_CACHE": str(tmp_path / "datasets-cache")}
    return subprocess.run(
        [sys.executable, *(launch or []), *arguments_], env=environment, cwd=ROOT, capture_output=True, text=True,
        timeout=WAIT, check=False,
    )  # fmt: skip


def index(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / INDEX_FILE).read_text().splitlines()]


def files(out: Path) -> dict[str, tuple[int, bytes]]:
    """Return every file below `out`, with its modification time."""
    found = [path for path in out.rglob("*") if path.is_file() and path.name != INDEX_FILE]
    return {str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


@pytest.mark.slow
def test_each_text_is_encoded_once(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = called(arguments(texts, out), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "6 rows, 5 artifacts" in done.stdout
    rows = index(out)
    assert [row["row"] for row in rows] == list(range(6))
    assert rows[0]["artifact"] == rows[5]["artifact"]
    cache = CacheGenCache.from_pretrained(out / rows[1]["artifact"])
    assert cache.kv.geometry.tokens == rows[1]["tokens"]
    assert rows[1]["bytes"] == sum(path.stat().st_size for path in (out / rows[1]["artifact"]).iterdir())

    before, listed = files(out), (out / INDEX_FILE).read_bytes()
    killed_between_renames(out / rows[1]["artifact"])
    again = called(arguments(texts, out), tmp_path, LAUNCH)  # two processes, as accelerate launches them
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stderr.count(": 0 encoded") == 2
    assert files(out) == before
    assert (out / INDEX_FILE).read_bytes() == listed

    other = called(arguments(texts, out, "--levels", "2", "--limit", "1"), tmp_path)
    assert (other.returncode, "belongs to a different run" in other.stderr) == (2, True)
    assert files(out) == before
    assert (out / INDEX_FILE).read_bytes() == listed


@pytest.mark.slow
def test_two_processes_make_the_artifacts_of_one_also_after_a_kill(texts: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, *arguments(texts, killed)], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + WAIT
    while process.poll() is None and time.monotonic() < until and not list(killed.glob("*/cachegen.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(WAIT)
    kept = files(killed)
    whole = {name: kept[name] for path in killed.glob("*/cachegen.json") for name in kept if path.parent.name in name}
    assert whole
    assert not (killed / INDEX_FILE).exists()

    resumed = called(arguments(texts, killed), tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert {name: stamp for name, stamp in files(killed).items() if name in whole} == whole
    together = called(arguments(texts, tmp_path / "two"), tmp_path, LAUNCH)
    assert together.returncode == 0, together.stderr[-2000:]
    assert {name: data for name, (_, data) in files(killed).items()} == {
        name: data for name, (_, data) in files(tmp_path / "two").items()
    }
    assert index(killed) == index(tmp_path / "two")


def test_the_command_reports_as_json(texts: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    options = ("--dataset", texts, "--model", model, "--out", tmp_path / "out", "--device", "cpu", "--limit", 2)
    found = run_json("encode-dataset", *options)
    assert documented("encode-dataset", found)
    rows = index(tmp_path / "out")
    assert (found["rows"], found["artifacts"]) == (2, len({row["artifact"] for row in rows}))
    done = run("encode-dataset", *options)
    assert "process 0: 0 encoded" in done.stderr


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.jsonl", '{"context": "  "}\n', "row 0: expected a text in the column 'context'"),
        ("b.jsonl", '{"text": "x"}\n', "in the column 'context'; the columns are ['text']"),
        ("c.doc", "x", "expected a file of type"),
        ("d", None, "cannot load"),
        ("e.jsonl", '{"context": "a"}\n{bad\n', "cannot read"),
        ("f.json", "[" * 5000, "cannot read"),
    ],
    ids=["blank", "other-column", "other-suffix", "empty-folder", "damaged", "deep"],
)
def test_a_file_without_texts_is_refused(name: str, text: str | None, match: str, tmp_path: Path) -> None:
    place = tmp_path / name
    if text is None:
        place.mkdir()
    else:
        place.write_text(text)
    with pytest.raises(ConfigError) as caught:
        list(TextDataset(str(place)).rows())
    assert match in str(caught.value)


class Lengths:
    """A tokenizer with one token per character."""

    bos_token_id = eos_token_id = eos_token = None

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text)))}


class FakeEncoding:
    """An encoding whose artifacts are named by its name and the length of the text."""

    def __init__(self, name: str) -> None:
        self.own, self.tokenizer = name, Lengths()
        self.made: list[str] = []

    def name(self, ids: list[int], text: str) -> str:
        return f"{self.own}-{len(ids)}"

    def write(self, text: str, folder: Path) -> bool:
        write_small(folder)
        self.made.append(folder.name)
        return True


def run_of(name: str, out: Path, *texts: str) -> list[str]:
    """Run once over these texts; return the names of the artifacts that were written."""
    place = out.parent / "rows.jsonl"
    place.write_text("".join(json.dumps({"context": text}) + "\n" for text in texts))
    encoding: Any = FakeEncoding(name)
    out.mkdir(exist_ok=True)
    encode_rows(encoding, TextDataset(str(place)), out, 0, 1, False)
    write_index(out, 1)
    return encoding.made


def test_an_index_of_another_run_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_of("a", out, "w", "ww", "www") == ["a-1", "a-2", "a-3"]
    assert run_of("a", out, "w", "ww", "www") == []  # the same run
    assert run_of("a", out, "w", "ww", "www", "wwww") == ["a-4"]  # the same with more rows
    listed = (out / INDEX_FILE).read_bytes()
    for name, texts in (("b", ["w", "ww", "www", "wwww"]), ("a", ["w", "wwww", "www", "ww"])):
        with pytest.raises(ArtifactExistsError, match="is a different artifact"):
            run_of(name, out, *texts)
    with pytest.raises(ArtifactExistsError, match="row 2 would be lost"):
        run_of("a", out, "w", "ww")
    assert (out / INDEX_FILE).read_bytes() == listed
    assert not list(out.glob("b-*"))
    for own in (b"the user's own\n", b"[" * 100_000, b"\xff"):
        (out / INDEX_FILE).write_bytes(own)
        with pytest.raises(ArtifactExistsError, match="not an index"):
            run_of("a", out, "w")
        assert (out / INDEX_FILE).read_bytes() == own


def test_a_text_file_is_one_context(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("First line.\n\nSecond.\n")
    (row,) = TextDataset(str(tmp_path / "book.txt")).rows()
    assert row[1].startswith("First line.\n\nSecond.")


def test_a_local_data_set_has_no_revision(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("First line.")
    with pytest.raises(ConfigError, match="a revision is for a data set on the Hub"):
        list(TextDataset(str(tmp_path / "book.txt"), revision="v2").rows())


def test_wrong_arguments_are_usage_errors(tmp_path: Path) -> None:
    more = ("--transform", "klt", "--profile", "none")
    done = called(arguments(tmp_path / "no.jsonl", tmp_path / "out", *more), tmp_path)
    assert done.returncode == 2
    assert "requires a profile" in done.stderr
