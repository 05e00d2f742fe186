"""Run every example with the reference model, and look for the right answers in its output."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
REGISTERS = {
    found[1]: found[2]
    for path in (EXAMPLES / "documents").glob("*.txt")
    for found in re.finditer(r"^line ([\w-]+): REGISTER_CONTENT is <(\d+)>$", path.read_text("utf-8"), re.MULTILINE)
}


def main_of(name: str) -> Callable[[list[str]], None]:
    main: Callable[[list[str]], None] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    return main


def right_answers(printed: str) -> int:
    """Return the number of questions; check that the requested number follows each."""
    asked = re.findall(r"^> .* line ([\w-]+)\?\n(.*)$", printed, re.MULTILINE)
    for name, answer in asked:
        assert f"<{REGISTERS[name]}>" in answer, answer
    return len(asked)


def test_every_example_is_run() -> None:
    here = {"chat_over_a_document", "rag_many_documents", "stream_from_an_object_store"}
    assert set(SCRIPTS) == here | {"chat_server"}, "test_prefix_cache_docs.py runs the server"


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_documents_its_command(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert f"python examples/{name}.py" in text
    assert "MODEL" in text


def test_chat_over_a_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = main_of("chat_over_a_document")
    main(["--cache", str(tmp_path / "harbor")])
    first = capsys.readouterr().out
    assert right_answers(first) == 3
    written = (tmp_path / "harbor" / "cachegen.json").stat().st_mtime_ns
    main(["--cache", str(tmp_path / "harbor"), "--ask", "Tell me what is the REGISTER_CONTENT in line round-flag?"])
    assert right_answers(capsys.readouterr().out) == 1
    assert (tmp_path / "harbor" / "cachegen.json").stat().st_mtime_ns == written, "the document is prefilled once"


def test_rag_many_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = main_of("rag_many_documents")
    main(["--caches", str(tmp_path)])
    printed = capsys.readouterr().out
    assert right_answers(printed) == 3
    assert re.findall(r"\[(\w+)\]$", printed, re.MULTILINE) == ["station", "harbor", "museum"]
    assert "prefilled 3 of 3 documents" in printed
    main(["--caches", str(tmp_path)])
    assert "prefilled 0 of 3 documents" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--documents", str(tmp_path)])
    assert "expected text files (.txt) in" in capsys.readouterr().err


def test_stream_from_an_object_store(own_cache: None, capsys: pytest.CaptureFixture[str]) -> None:
    main_of("stream_from_an_object_store")(["--slo", "60"])
    printed = capsys.readouterr().out
    assert right_answers(printed) == 1
    assert "in time: True" in printed
    assert len(re.findall(r"^tokens \d+ to \d+: level \d, \d+ bytes$", printed, re.MULTILINE)) == 5
