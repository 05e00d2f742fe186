"""requirements-dev.txt can be installed on every Python that the project supports.

A run of the tests has one Python. For the others the tests read the metadata of the installed packages
(`Requires-Python`, markers).
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # a dependency of pytest there
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = re.findall(r"Python :: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.MULTILINE)


def pins_of(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line.split("  #")[0]) for line in lines if not line.startswith("#")]


PINS = pins_of("requirements-dev.txt")
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
BRINGS_ITS_OWN = {"torch"}  # CUDA or not, by platform and index: its dependencies are left to pip


def environment(python: str, extra: str = "") -> dict[str, str]:
    """Return the environment of markers: this machine with another Python."""
    return {**default_environment(), "python_version": python, "python_full_version": f"{python}.0", "extra": extra}


def holds(requirement: Requirement, python: str, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment(python, extra))


def pinned(python: str) -> dict[str, str]:
    """Return the version of each package for a Python."""
    return {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in PINS if holds(pin, python)}


def installed(name: str, version: str | None) -> metadata.Distribution | None:
    """Return the installed package, or None if it is not installed in this version."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    return found if found.version.split("+")[0] == version else None


def test_the_pins_are_for_the_supported_pythons() -> None:
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(30) if f"3.{minor}.0" in allowed] == PYTHONS
    for path in ("README.md", "CONTRIBUTING.md", "Makefile"):
        assert f"{PYTHONS[0]} to {PYTHONS[-1]}" in (ROOT / path).read_text(encoding="utf-8"), path


@pytest.mark.parametrize("python", PYTHONS)
def test_a_package_is_pinned_once_to_one_version(python: str) -> None:
    names = [canonicalize_name(pin.name) for pin in PINS if holds(pin, python)]
    assert sorted(names) == sorted(set(names))
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in PINS)


@pytest.mark.parametrize("python", PYTHONS)
def test_a_pinned_version_can_be_installed(python: str) -> None:
    """A release that refuses an older Python needs another line, with a marker."""
    refused, seen = {}, 0
    for name, version in pinned(python).items():
        found = installed(name, version)
        needs = found.metadata.get("Requires-Python", "") if found else ""
        seen += found is not None
        if f"{python}.0" not in SpecifierSet(needs):
            refused[f"{name}=={version}"] = needs
    assert not refused
    assert seen > len(PINS) // 2


@pytest.mark.parametrize("python", PYTHONS)
def test_the_dependencies_of_a_package_are_pinned(python: str) -> None:
    pins, missing, seen = pinned(python), set[str](), set[tuple[str, str]]()
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    waiting = [("hf_cachegen", needed) for each in lists for needed in map(Requirement, each)]
    waiting += [("requirements-dev.txt", Requirement(name)) for name in pins]
    while waiting:
        by, needed = waiting.pop()
        name = canonicalize_name(needed.name)
        if name not in {*pins, "hf-cachegen"}:
            missing.add(f"{name}, for {by}")
        found = None if name in BRINGS_ITS_OWN else installed(name, pins.get(name))
        for extra in {"", *needed.extras} if found else ():
            if (name, extra) not in seen:
                seen.add((name, extra))
                waiting += [
                    (name, each) for each in map(Requirement, found.requires or []) if holds(each, python, extra)
                ]
    assert not missing
    assert len(seen) > len(pins) // 2


def steps_of(*arguments: str) -> list[str]:
    """Return the commands that make would run."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "-n", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True).stdout.splitlines()


@needs_make
def test_test_oldest_installs_the_oldest_allowed_releases(tmp_path: Path) -> None:
    oldest = tmp_path / "oldest"
    steps = steps_of(f"OLDEST={oldest}", f"{oldest}/.requirements")
    floors = [re.sub(r">=([\d.]+)(,<\d+)?$", r"==\1", needed) for needed in PROJECT["dependencies"]]
    assert all(re.fullmatch(r"[a-z_]+==[\d.]+", floor) for floor in floors)
    installs = [line.split() for line in steps if "pip install" in line]
    assert [word for word in installs[-1] if "==" in word] == floors
    assert all(floors[0] in words for words in installs), "torch comes first, wherever from, and is not replaced"


@needs_make
@pytest.mark.parametrize("python", PYTHONS)
def test_the_pins_of_test_oldest_accept_the_oldest(python: str, tmp_path: Path) -> None:
    """A pinned package that refuses the oldest release of a dependency is left out, so that pip chooses its version."""
    steps = " ".join(steps_of(f"OLDEST={tmp_path}", f"{tmp_path}/.requirements"))
    left_out = re.search(r"\$\{names\}([\w|-]+)\)==", steps)
    assert left_out is not None
    floors = {}
    for needed in map(Requirement, PROJECT["dependencies"]):
        floors[canonicalize_name(needed.name)] = next(
            each.version for each in needed.specifier if each.operator == ">="
        )
    refused = []
    for name, version in pinned(python).items():
        found = installed(name, version)
        if found is None or name in {*floors, *left_out[1].split("|")}:
            continue
        for needed in map(Requirement, found.requires or []):
            floor = floors.get(canonicalize_name(needed.name))
            if floor is not None and holds(needed, python) and floor not in needed.specifier:
                refused.append(f"{name}=={version} needs {needed}")
    assert not refused


@needs_make
def test_newest_requires_every_allowed_range_and_reads_only_the_pin_of_torch(tmp_path: Path) -> None:
    newest = tmp_path / "newest"
    steps = steps_of(f"NEWEST={newest}", f"{newest}/.requirements")
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    allowed = {needed for each in lists for needed in each if not needed.startswith("hf_cachegen[")}
    installs = [line for line in steps if "pip install" in line]
    assert set(re.findall(r'"([^"]+)"', installs[-1])) == allowed
    assert "--upgrade-strategy eager" in installs[-1]
    assert f"--constraint {newest}/torch.txt" in installs[-1], "the torch that was found is not replaced"
    assert re.findall(r"[\w-]+==[\d.]+", " ".join(installs)) == [f"torch=={pinned('3.11')['torch']}"]
    assert not any("requirements-dev" in line for line in steps)


@needs_make
def test_newest_resolves_again_in_every_run(tmp_path: Path) -> None:
    newest = tmp_path / "newest"
    newest.mkdir()
    for stamp in (".created", ".requirements", ".package"):
        (newest / stamp).touch()
    assert any("--upgrade-strategy eager" in line for line in steps_of(f"NEWEST={newest}", "test-newest"))


@needs_make
def test_the_oldest_transformers_is_tested_on_generation_with_the_pinned_torch(tmp_path: Path) -> None:
    own, main = tmp_path / "own", tmp_path / "main"
    steps = steps_of(f"OLDEST_TRANSFORMERS={own}", f"VENV={main}", "test-oldest-transformers")
    floor = next(needed for needed in PROJECT["dependencies"] if needed.startswith("transformers>="))
    installs = [line for line in steps if f"{own}/bin/python -m pip install" in line]
    assert [line.split()[-1] for line in installs] == [re.sub(r">=([\d.]+).*", r"==\1", floor)]
    matrix = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_generation*.py")}
    assert {*matrix, "tests/test_cache.py", "tests/test_layers.py"} <= set(steps[-1].split())


def commands(steps: Iterable[str]) -> set[str]:
    """Return the targets of make that the commands name."""
    return {word for line in steps if line.startswith("make ") for word in line.split()[1:] if "=" not in word}


def test_continuous_integration_runs_all_tests_and_the_documentation() -> None:
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert commands(run) == {"docs", "test", "test-slow", "test-oldest-transformers"}


@needs_make
def test_the_workflows_run_existing_targets_on_the_supported_pythons() -> None:
    yaml = pytest.importorskip("yaml")
    workflows = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / ".github/workflows").iterdir()}
    steps = [step for flow in workflows.values() for job in flow["jobs"].values() for step in job["steps"]]
    for name in ("test", "newest"):
        assert f"name: {name}" in (ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8")
    linux, weekly = workflows["test"]["jobs"]["linux"], workflows["newest"]["jobs"]["dependencies"]
    assert linux["strategy"]["matrix"]["python"] == PYTHONS
    used = [step["uses"] for step in steps if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", each) for each in used), "an action is pinned by its major version"
    targets = {entry["target"] for entry in weekly["strategy"]["matrix"]["include"]}
    assert targets >= {"test-newest"}
    named = commands(step["run"].strip() for step in steps if "run" in step) - {"${{", "}}", "matrix.target"}
    assert {"test", "test-slow", "test-oldest-transformers", "docs"} <= named
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    assert named | targets <= set(phony[1].split())


@pytest.mark.parametrize("python", PYTHONS)
def test_a_package_for_the_documentation_is_pinned_once_to_one_version(python: str) -> None:
    found = [pin for pin in pins_of("requirements-docs.txt") if holds(pin, python)]
    names = [canonicalize_name(pin.name) for pin in found]
    assert sorted(names) == sorted(set(names))
    assert {"mkdocs", "mkdocs-material", "mkdocstrings", "mkdocstrings-python"} <= set(names)
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in found)


def test_the_test_files_that_the_makefile_names_exist() -> None:
    named = re.findall(r"\btests/\w+\.py", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert "tests/test_cache.py" in named
    assert [name for name in named if not (ROOT / name).exists()] == []
