"""docs/prefix_cache.md and the example do what they say."""

from __future__ import annotations

import contextlib
import io
import json
import re
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from examples.chat_server import serve

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "eval" / "reference" / "model"
pytestmark = pytest.mark.usefixtures("own_cache")


def test_the_first_code_of_the_document_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "prefix_cache.md").read_text(encoding="utf-8")
    found = re.search(r"^```python\n(.*?)^```\n```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(found[1].replace("eval/reference/model", str(MODEL)), {})
    assert printed.getvalue() == found[2]


def test_the_chat_server_goes_on_after_a_restart(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "line brave-lamp: REGISTER_CONTENT is <48213>\n" * 12}]

    def session() -> dict[str, Any]:
        server = serve(str(MODEL), str(tmp_path / "prefixes"), 0, block_tokens=32, min_tokens=32)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.server_port}", json.dumps({"messages": messages}).encode()
        )
        with urllib.request.urlopen(request) as answer:
            found: dict[str, Any] = json.load(answer)
        server.shutdown()
        server.server_close()
        return found

    from hf_cachegen.prefix_cache.local import LocalTier

    first = session()
    assert first["reused"] == 0
    tier, waited = LocalTier(tmp_path / "prefixes", None), threading.Event()
    while tier.index.count() < first["computed"] // 32:
        waited.wait(0.1)
    messages += [{"role": "assistant", "content": first["content"]}, {"role": "user", "content": "Go on."}]
    second = session()
    assert second["reused"] >= first["computed"] - 32
    assert second["computed"] < second["reused"]
