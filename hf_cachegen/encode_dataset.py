"""The command `hf-cachegen encode-dataset` as a module, for `accelerate launch -m hf_cachegen.encode_dataset`."""

from __future__ import annotations

import sys

from hf_cachegen import cli
from hf_cachegen.cli.encode_dataset import encode_dataset as main

__all__ = ["main"]

if __name__ == "__main__":
    cli.main(["encode-dataset", *sys.argv[1:]])
