"""Builds the native coder, a plain shared library without Python or torch in it, where there is a C++ compiler.

Without one, or when it fails, the package still installs and works on the reference coder. CXX and CXXFLAGS are
honoured. All else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import os
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


def _compiler() -> list[str]:
    for command in (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
        if words and command == os.environ.get("CXX"):
            raise CompileError(f"CXX={command} is not there")
    raise CompileError("no C++ compiler found")


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
            flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
            command = [*_compiler(), *flags, *(str(ROOT / name) for name in ext.sources), "-o", str(part)]
            print(shlex.join(command))
            subprocess.run(command, check=True)
        except (CompileError, OSError, subprocess.CalledProcessError) as error:
            print(f"hf_cachegen: {ext.name} is not built; the slow reference coder stands in. {error}", file=sys.stderr)
            raise CompileError(str(error)) from error  # setuptools goes on: the extension is optional
        part.replace(target)  # a library in use is never written to


def _listed(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "cuda_ext").glob(pattern))


setup(
    ext_modules=[
        Extension(
            "hf_cachegen._cpu",
            sources=_listed("cpu/*.cpp"),
            depends=["setup.py", *_listed("cpu/*.h"), *_listed("core/*.h"), *_listed("include/*.h")],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibraries},
)
