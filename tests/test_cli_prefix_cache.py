"""hf-cachegen prefix-cache: each command, with and without --json, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hf_cachegen.cache import CacheGenCache
from hf_cachegen.cli import main
from hf_cachegen.config import CacheGenConfig
from tests.cli_support import documented
from tests.prefix_cache_support import WIDTH, same_as_stock, small
from tests.tiny_models import make, shared, tokens

pytestmark = pytest.mark.usefixtures("own_cache")


def run(*arguments: Any, code: int = 0) -> str:
    found = CliRunner().invoke(main, ["prefix-cache", *map(str, arguments)])
    assert found.exit_code == code, found.output
    return found.output


def run_json(command: str, *arguments: Any) -> Any:
    found = json.loads(run(command, *arguments, "--json"))
    assert documented(f"prefix-cache {command}", found)
    return found


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    cache = small(tmp_path / "prefixes")
    for count in (40, 24):
        same_as_stock(shared("llama"), cache, tokens(count, count), do_sample=False)
    cache.flush()
    return tmp_path / "prefixes"


def test_ls_and_pin_and_prune(folder: Path) -> None:
    found = run_json("ls", folder)["prefixes"]
    assert sorted(row["tokens"] for row in found) == [32, 48]
    key = found[0]["key"]
    assert key[:16] in run("ls", folder)
    assert run_json("pin", folder, key[:10]) == {"folder": str(folder), "key": key, "pinned": True}
    assert "pinned" in run("ls", folder)
    assert run_json("prune", folder, "--to", "0")["removed"] > 0
    assert [row["key"] for row in run_json("ls", folder)["prefixes"]] == [key]
    run("pin", folder, key, "--off")
    assert "removed" in run("prune", folder, "--to", "0")
    assert run_json("ls", folder)["prefixes"] == []


def test_stats_are_those_of_all_processes(folder: Path) -> None:
    again = small(folder)
    same_as_stock(shared("llama"), again, tokens(40, 40), do_sample=False)
    again.flush()
    found = run_json("stats", folder)
    assert found["calls"] == 3
    assert found["hits"] == 1
    assert found["tokens_reused"] == 39
    assert "tokens reused  39" in run("stats", folder)


def test_verify(folder: Path) -> None:
    assert run_json("verify", folder)["damaged"] == []
    key = run_json("ls", folder)["prefixes"][0]["key"]
    path = folder / "blocks" / key[:2] / key
    path.write_bytes(path.read_bytes()[:-1])
    assert "was damaged" in run("verify", folder, code=1)
    assert run_json("verify", folder)["damaged"] == []


def test_import_and_export(folder: Path, tmp_path: Path) -> None:
    ids = tokens(40, 99)
    CacheGenCache.from_context(make("llama"), ids, CacheGenConfig(lossless=True)).save_pretrained(tmp_path / "artifact")
    assert run_json("import", tmp_path / "new", tmp_path / "artifact", "--block-tokens", WIDTH)["tokens"] == 40
    key = run_json("ls", tmp_path / "new")["prefixes"][0]["key"]
    assert run_json("export", tmp_path / "new", key, tmp_path / "out")["tokens"] == 40
    CacheGenCache.from_pretrained(tmp_path / "out", model=make("llama"))


def test_errors(folder: Path, tmp_path: Path) -> None:
    assert "there is no prefix cache" in run("ls", tmp_path / "nothing", code=3)
    assert "hexadecimal" in run("pin", folder, "nothing", code=2)
    assert "no stored block" in run("export", folder, "00", tmp_path / "out", code=3)
    run("prune", folder, "--to", "many", code=2)
