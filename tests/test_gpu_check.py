"""benchmarks/gpu_check.sh fits the time and the files of a lent machine, and names what exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
TEXT = SCRIPT.read_text()
BUILDS = ("build_cpu", "build_cuda")
"""Steps of a machine whose libraries do not load."""
SECONDS, FILES = 420, 8


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_script_parses() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_the_limits_of_all_steps_are_within_seven_minutes() -> None:
    steps = {name: int(limit) for name, limit in re.findall(r'step "?\$?(\w+)"? (\d+) ', TEXT)}
    tools = len(re.findall(r"for tool in ([\w ]+);", TEXT)[0].split())
    total = sum(limit * (tools if name == "tool" else 1) for name, limit in steps.items() if name not in BUILDS)
    assert {"probe", "tests", "bench_cuda", "klt", "product", "host", "tool"} <= set(steps)
    assert total <= SECONDS


def test_few_files_come_back() -> None:
    named = set(re.findall(r"(?:\$OUT/|\s)(\w+)\.(?:txt|json)\b", TEXT.split("set -uo")[1]))
    assert len(named) <= FILES, named


def test_its_modules_and_tests_exist() -> None:
    for module in re.findall(r"-m (benchmarks\.\w+)", TEXT):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists()
    tests = (ROOT / "tests" / "test_cuda.py").read_text()
    [expression] = re.findall(r'-k "([^"]+)"', TEXT)
    for name in expression.split(" or "):
        assert re.search(rf"def test_\w*{name}", tests), name
