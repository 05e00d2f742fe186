"""The evaluation uses the package like any user: it imports only public names."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from eval import models
from eval.reference import MODEL_PATH
from hf_cachegen.errors import ConfigError, ProfileError

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "eval").rglob("*.py"))
PUBLIC = ("hf_cachegen", "hf_cachegen.errors", "hf_cachegen.stores", "hf_cachegen.streaming")


def imported(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name) of every import of the package in a file; the name is None for `import module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "hf_cachegen")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_cachegen":
            yield from ((str(node.module), alias.name) for alias in node.names)


def public(module: str) -> set[str]:
    """Return the public names of a module: its __all__, or, for the errors, its classes."""
    found = import_module(module)
    if hasattr(found, "__all__"):
        return set(found.__all__)
    return {name for name, value in vars(found).items() if inspect.isclass(value)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_public_names_are_imported(path: Path) -> None:
    for module, name in imported(path):
        assert module in PUBLIC, f"{module} is an inner module"
        assert name is None or name in public(module), f"{module} does not export {name}"


def test_a_profile_is_found_beside_its_model(tmp_path: Path) -> None:
    beside = models.find_profile("auto", str(MODEL_PATH))
    assert beside is not None
    named = models.find_profile(str(MODEL_PATH / models.PROFILE_FILE), "any")
    assert named is not None
    assert named.digest == beside.digest
    assert models.find_profile("none", str(MODEL_PATH)) is None
    assert models.find_profile("auto", str(tmp_path)) is None
    with pytest.raises(ProfileError, match="no profile"):
        models.find_profile(str(tmp_path), "any")


def test_a_model_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load the tokenizer"):
        models.load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot load the model"):
        models.load_model(str(tmp_path))


def test_the_package_does_not_load_the_evaluation() -> None:
    for path in (ROOT / "hf_cachegen").rglob("*.py"):
        names = {node.module for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                 if isinstance(node, ast.ImportFrom)}  # fmt: skip
        if path.name != "cli.py":  # its demonstration is on its way into the package
            assert not {name for name in names if name and name.split(".")[0] == "eval"}, path
