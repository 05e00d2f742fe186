"""Builds the native coder: plain shared libraries without Python or torch in them, where there are their compilers.

_cpu.so needs a C++ compiler; without one, or when it fails, the package still installs and works on the reference
coder. _cuda.so needs nvcc, but no GPU. CXX, CXXFLAGS, NVCC, TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") and
CACHEGEN_BUILD_CUDA are honoured; the last is auto (the default: where there is nvcc, and a failure is a notice), 0
(never) or 1 (or fail). All else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread", "-ffp-contract=off"]


NVCC_FLAGS = ["-std=c++17", "-O3", "-shared", "--cudart=static", "--extended-lambda", "--threads=0"]
NVCC_FLAGS += ["--fmad=false", "-Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
"""Without --fmad=false a device would round otherwise than the CPU, and write other bytes."""
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")
"""Those that nvcc has of these; the last of them as PTX too, for GPUs to come."""


def _cpp() -> list[str]:
    for command in (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return [*words, *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        if words and command == os.environ.get("CXX"):
            raise CompileError(f"CXX={command} is not there")
    raise CompileError("no C++ compiler found")


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which("nvcc", path=os.path.join(home, "bin"))


def _architectures(nvcc: str) -> str:
    """The default list, for this release of nvcc."""
    done = subprocess.run([nvcc, "--list-gpu-arch"], check=False, text=True, capture_output=True)
    known = [name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in done.stdout.split()]
    return ";".join(known) + "+PTX" if known else "8.0+PTX"


def _cuda() -> list[str]:
    command = _nvcc()
    if command is None:
        raise CompileError("CACHEGEN_BUILD_CUDA=1, but there is no nvcc")
    flags = []
    for name in re.split("[; ]+", (os.environ.get("TORCH_CUDA_ARCH_LIST") or _architectures(command)).strip()):
        version = name.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch("[0-9]{2,3}[af]?", version):
            raise CompileError(f"TORCH_CUDA_ARCH_LIST names {name!r}; expected such as 9.0 or 10.0+PTX")
        code = f"[sm_{version},compute_{version}]" if name.endswith("+PTX") else f"sm_{version}"
        flags.append(f"-gencode=arch=compute_{version},code={code}")
    return [command, *NVCC_FLAGS, *flags]


def _wants_cuda() -> bool:
    wanted = os.environ.get("CACHEGEN_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"CACHEGEN_BUILD_CUDA must be auto, 0 or 1, got {wanted!r}")
    return wanted == "1" or (wanted == "auto" and _nvcc() is not None)


class BuildLibraries(build_ext):
    """Compiles every Extension in one call of the compiler, into a file without a Python version in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        inputs = [ROOT / name for name in (*ext.sources, *ext.depends)]
        if not self.force and target.exists() and all(p.stat().st_mtime < target.stat().st_mtime for p in inputs):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        try:
            compiler = _cuda() if ext.name.endswith("_cuda") else _cpp()
            command = [*compiler, *(str(ROOT / name) for name in ext.sources), "-o", str(part)]
            print(shlex.join(command))
            subprocess.run(command, check=True)
        except (CompileError, OSError, subprocess.CalledProcessError) as error:
            stands_in = "the CPU's coder" if ext.name.endswith("_cuda") else "the slow reference coder"
            print(f"hf_cachegen: {ext.name} is not built; {stands_in} stands in. {error}", file=sys.stderr)
            raise CompileError(str(error)) from error  # setuptools goes on: the extension is optional
        part.replace(target)  # a library in use is never written to


def _listed(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "cuda_ext").glob(pattern))


def _library(name: str, sources: str, *headers: str, optional: bool = True) -> Extension:
    depends = ["setup.py", *(path for pattern in (*headers, "core/*.h", "include/*.h") for path in _listed(pattern))]
    return Extension(f"hf_cachegen.{name}", sources=_listed(sources), depends=depends, optional=optional)


LIBRARIES = [_library("_cpu", "cpu/*.cpp", "cpu/*.h")]
if _wants_cuda():
    forced = os.environ.get("CACHEGEN_BUILD_CUDA") == "1"
    LIBRARIES.append(_library("_cuda", "cuda/*.cu", "cuda/*.h", optional=not forced))

setup(ext_modules=LIBRARIES, cmdclass={"build_ext": BuildLibraries})
