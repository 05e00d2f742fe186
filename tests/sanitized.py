"""The native code's fuzzers, compiled with AddressSanitizer and UBSan and run in processes of their own."""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.lockstep import COMPILER, ROOT, STRICT

SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiled(arguments: list[str]) -> None:
    done = subprocess.run([str(COMPILER), *arguments], check=False, text=True, capture_output=True)
    if done.returncode and "cannot find" in done.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert done.returncode == 0, done.stderr


@functools.cache
def sanitized_objects(sources: tuple[str, ...]) -> list[str]:
    """One of the two libraries under AddressSanitizer and UBSan, compiled once a process."""
    folder = tempfile.mkdtemp(prefix="sanitized-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    objects = [f"{folder}/{Path(source).stem}.o" for source in sources]
    for source, target in zip(sources, objects, strict=True):
        compiled([*STRICT, *SANITIZERS, "-c", source, "-o", target])
    return objects


def sanitized(driver: str, sources: list[str], tmp_path: Path) -> Path:
    """A fuzzer with one of the two libraries."""
    program, source = tmp_path / f"{driver}-{len(sources)}", str(ROOT / "tests" / "native" / f"{driver}.cpp")
    objects = sanitized_objects(tuple(sources))
    compiled([*STRICT, *SANITIZERS, source, "-x", "none", *objects, "-o", str(program)])
    return program


def fuzz(program: Path, count: int, seed: int) -> re.Match[str]:
    """(number of cases, of back-ends, digest) of a run."""
    # Its own process: it must not inherit a preloaded allocator.
    variables = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [str(program), str(count), str(seed)]
    done = subprocess.run(command, check=False, text=True, capture_output=True, env=variables)
    assert done.returncode == 0, done.stderr
    found = re.match(r"(\d+) .*, (\d+) back-ends,.* digest ([0-9a-f]{16})", done.stdout)
    assert found is not None
    assert int(found[1]) >= count
    return found
