"""The NEON back-end, cross-compiled for 64-bit Arm and run by qemu: the same results as this machine's back-ends."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.lockstep import COMPILER, CPU_SOURCES, ROOT, STRICT

CROSS_COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
DRIVERS = ["fuzz_decode", "fuzz_passes", "fuzz_into"]
CASES = "200"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CROSS_COMPILER and EMULATOR and COMPILER),
        reason="NEON is NOT TESTED: install g++-aarch64-linux-gnu and qemu-user",
    ),
]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Return the library's objects by compiler."""
    found: dict[str, list[str]] = {}
    for compiler in (str(CROSS_COMPILER), str(COMPILER)):
        folder = tmp_path_factory.mktemp("objects")
        found[compiler] = [f"{folder}/{Path(source).stem}.o" for source in CPU_SOURCES]
        for source, target in zip(CPU_SOURCES, found[compiler], strict=True):
            subprocess.run([compiler, *STRICT, "-O1", "-c", source, "-o", target], check=True)
    return found


@pytest.mark.parametrize("driver", DRIVERS)
def test_neon_gives_the_same_digest(driver: str, objects: dict[str, list[str]], tmp_path: Path) -> None:
    digests = []
    for compiler, emulator in ((str(CROSS_COMPILER), [str(EMULATOR)]), (str(COMPILER), [])):
        program, source = tmp_path / f"{driver}-{len(emulator)}", str(ROOT / "tests" / "native" / f"{driver}.cpp")
        arguments = [*STRICT, "-O1", "-static", source, "-x", "none", *objects[compiler], "-o", str(program)]
        subprocess.run([compiler, *arguments], check=True)
        done = subprocess.run([*emulator, str(program), CASES, "2"], check=True, text=True, capture_output=True)
        found = re.match(r".*?(\d+) back-ends,.* digest ([0-9a-f]{16})", done.stdout)
        assert found is not None
        if emulator:
            assert int(found[1]) == 2, "the scalar back-end and NEON"
        digests.append(found[2])
    assert digests[0] == digests[1]
