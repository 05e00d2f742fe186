"""Convert streams to files and back. This package reads untrusted bytes.

The modules imported here use neither torch nor numpy. `artifact` and `encoded` connect them to the codec. They are
imported when one of their names is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_cachegen.artifact.entries import STATES_FILE, TensorEntry
from hf_cachegen.artifact.manifest import (
    BASE_FILE,
    FORMAT_VERSION,
    INPUT_IDS,
    MANIFEST_FILE,
    MEDIA_FEATURE,
    PROFILE_FILE,
    SIGNATURE_FILE,
    TEXT_FILE,
    TOKENS_FILE,
    Limits,
    Manifest,
    Segment,
    chunk_name,
    nbytes_at,
    refine_file,
)
from hf_cachegen.artifact.pin import Pin
from hf_cachegen.artifact.reader import Reader
from hf_cachegen.artifact.store import Range, Store, chain, innermost, without_signature
from hf_cachegen.artifact.text import ContextText, read_text
from hf_cachegen.artifact.writer import ArtifactWriter, artifact_sizes, pack_input_ids, write_artifact

if TYPE_CHECKING:
    from hf_cachegen.artifact.artifact import Artifact, write

__all__ = [
    "BASE_FILE",
    "FORMAT_VERSION",
    "INPUT_IDS",
    "MANIFEST_FILE",
    "MEDIA_FEATURE",
    "PROFILE_FILE",
    "SIGNATURE_FILE",
    "STATES_FILE",
    "TEXT_FILE",
    "TOKENS_FILE",
    "Artifact",
    "ArtifactWriter",
    "ContextText",
    "Limits",
    "Manifest",
    "Pin",
    "Range",
    "Reader",
    "Segment",
    "Store",
    "TensorEntry",
    "artifact_sizes",
    "chain",
    "chunk_name",
    "innermost",
    "nbytes_at",
    "pack_input_ids",
    "read_text",
    "refine_file",
    "without_signature",
    "write",
    "write_artifact",
]


def __getattr__(name: str) -> Any:
    if name not in ("Artifact", "write"):
        raise AttributeError(f"module 'hf_cachegen.artifact' has no attribute {name!r}")
    return getattr(import_module("hf_cachegen.artifact.artifact"), name)
