"""Record the surroundings of a measurement: versions, processor, threads, device, revision of the checkout."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import hf_cachegen

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy", "optimum-quanto", "hqq")
CPUINFO = Path("/proc/cpuinfo")


def session(processes: int) -> dict[str, Any]:
    """Return the surroundings as plain values, without names of persons or machines."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ["python", "-m", module(), *sys.argv[1:]],
        "processes": processes,
        "revision": revision(),
        "versions": {
            "python": platform.python_version(),
            "hf_cachegen": hf_cachegen.__version__,
            **{name: version for name in PACKAGES if (version := _version(name))},
        },
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def module() -> str:
    """Return what follows `python -m` in the command of this process; "eval" where none does."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec is not None else "eval"
    return name if name.split(".")[0] == "eval" else "eval"


def revision() -> str | None:
    """Return the commit of the checkout, with "+" where files differ from it, None outside a checkout."""
    commit = _git("rev-parse", "HEAD")
    return None if commit is None else commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    """Return the name of the processor, as far as the system reports it."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
