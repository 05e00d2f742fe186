"""The messages of errors: advice in terms of the command line, and no control characters."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cachegen import encode_kv, errors
from hf_cachegen.artifact import artifact
from hf_cachegen.cli import errors as cli_errors
from tests.cli_support import run_json

PACKAGE = Path(cli_errors.__file__).parent.parent


class Foreign:
    def __reduce__(self) -> Any:
        return print, ("ran",)


def message(*arguments: object, code: int) -> str:
    text: str = run_json(*arguments, code=code)["error"]["message"]
    return text


def text_file(path: Path, data: bytes = b"w1 w2") -> Path:
    path.write_bytes(data)
    return path


def tensors(folder: Path) -> Path:
    artifact.write(encode_kv([torch.randn(1, 2, 40, 8)], [torch.randn(1, 2, 40, 8)]), folder)
    return folder


def test_an_existing_output_is_reported_before_the_model_is_loaded(tmp_path: Path) -> None:
    document, there = text_file(tmp_path / "a.txt"), tensors(tmp_path / "there")
    command = ("encode", document, "--model", tmp_path / "no model", "--out", there)
    assert "use --overwrite" in message(*command, code=cli_errors.USAGE)
    assert "cannot load" in message(*command, "--overwrite", code=cli_errors.USAGE)
    saved = tmp_path / "past.pt"
    torch.save(((torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)),), saved)
    for options in ((saved, there), (there, saved, "--to", "legacy")):
        said = message("convert", *options, code=cli_errors.USAGE)
        assert "use --overwrite" in said
        assert "overwrite=True" not in said


@pytest.mark.parametrize("command", ["encode", "profile"])
def test_an_output_that_cannot_be_written_is_reported_before_the_model_is_loaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, model = text_file(tmp_path / "a.txt"), ("--model", tmp_path / "no model")
    arguments = (command, document, *model) if command == "encode" else (command, "--text", document, *model)
    said = message(*arguments, "--out", document / "inside", code=cli_errors.USAGE)
    assert f"{document} is a file" in said
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    said = message(*arguments, "--out", tmp_path / "new" / "out", code=cli_errors.USAGE)
    assert f"{tmp_path} cannot be written" in said


def test_python_advice_becomes_options(capsys: pytest.CaptureFixture[str]) -> None:
    error = errors.ProfileError("needs profile x: pass it as profile=, or learn one with hf_cachegen.learn_profile")
    assert cli_errors.report(error, ["--json"]) == cli_errors.PROFILE
    said = json.loads(capsys.readouterr().out)["error"]["message"]
    assert said == "needs profile x: pass it with --profile, or learn one with 'hf-cachegen profile'"


def test_the_advice_that_is_replaced_occurs_in_the_package() -> None:
    sources = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "cli"]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    assert not [advice for advice in cli_errors.ADVICE if advice not in text]


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["line", "json"])
def test_a_message_has_no_control_characters(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    error = errors.WrongDtypeError("made in \x1b]0;owned\x07\n\x9b31m red" + "a" * 300_000)
    assert cli_errors.report(error, options) == cli_errors.MISMATCH
    captured = capsys.readouterr()
    said = json.loads(captured.out)["error"]["message"] if options else captured.err.removesuffix("\n")
    assert said.isprintable()
    assert "made in \ufffd]0;owned\ufffd \ufffd31m reda" in said
    assert len(said) < 5000


def test_a_file_that_is_not_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_cachegen.cli.profiles.load_model", lambda *_, **__: (torch.nn.Linear(1, 1), None))
    wrong = text_file(tmp_path / "latin.txt", "caf\u00e9 w1".encode("latin-1"))
    for command in (
        ("encode", wrong, "--model", "m", "--out", tmp_path / "a"),
        ("profile", "--model", "m", "--out", tmp_path / "p", "--text", wrong),
        ("profile", "--model", "m", "--out", tmp_path / "p", "--samples-jsonl", wrong),
    ):
        said = message(*command, code=cli_errors.USAGE)
        assert f"{wrong} is not UTF-8 text" in said
        assert said.endswith("at byte 3")


def test_convert_omits_advice_to_run_code_from_a_file(tmp_path: Path) -> None:
    torch.save(Foreign(), tmp_path / "past.pt")
    said = message("convert", tmp_path / "past.pt", tmp_path / "out", code=cli_errors.ARTIFACT)
    assert said.endswith("or is damaged: it names print, which is not loaded")
    for data in (b"", b"no file of torch", b"\x80\x02}"):
        (tmp_path / "past.pt").write_bytes(data)
        said = message("convert", tmp_path / "past.pt", tmp_path / "out", code=cli_errors.ARTIFACT)
        assert "weights_only" not in said
        assert "still be loaded" not in said
