"""The codec is pure: importing all of it in a fresh interpreter loads no module that reads files or a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = ("fsspec", "ssl", "transformers", "huggingface_hub", "hf_cachegen.stores", "hf_cachegen.artifact",
           "hf_cachegen.profiles")  # fmt: skip
PROBE = f"""
import pkgutil, sys
from importlib import import_module

import torch  # torch.hub opens URLs: ssl may be there before the codec is

before = set(sys.modules)
import hf_cachegen.codec

if len(sys.argv) > 1:
    for module in pkgutil.walk_packages(hf_cachegen.codec.__path__, "hf_cachegen.codec."):
        import_module(module.name)
    assert "hf_cachegen.codec.context" in sys.modules
sys.exit(" ".join(name for name in {FOREIGN} if name in set(sys.modules) - before) or 0)
"""


@pytest.mark.parametrize("arguments", [[], ["everything"]], ids=["the package", "every module"])
def test_importing_the_codec_loads_no_store_and_no_network(arguments: list[str]) -> None:
    command = [sys.executable, "-c", PROBE, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
