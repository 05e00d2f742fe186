"""Streams <-> files: the surface that meets untrusted bytes. Imports neither torch nor numpy."""

from __future__ import annotations

from hf_cachegen.container.manifest import (
    BASE_FILE,
    FORMAT_VERSION,
    INPUT_IDS,
    MANIFEST_FILE,
    PROFILE_FILE,
    SIGNATURE_FILE,
    TOKENS_FILE,
    Limits,
    Manifest,
    Segment,
    chunk_name,
    nbytes_at,
    refine_file,
)
from hf_cachegen.container.reader import Reader
from hf_cachegen.container.store import Range, Store, chain, innermost, without_signature
from hf_cachegen.container.writer import ArtifactWriter, artifact_sizes, pack_input_ids, write_artifact

__all__ = [
    "BASE_FILE",
    "FORMAT_VERSION",
    "INPUT_IDS",
    "MANIFEST_FILE",
    "PROFILE_FILE",
    "SIGNATURE_FILE",
    "TOKENS_FILE",
    "ArtifactWriter",
    "Limits",
    "Manifest",
    "Range",
    "Reader",
    "Segment",
    "Store",
    "artifact_sizes",
    "chain",
    "chunk_name",
    "innermost",
    "nbytes_at",
    "pack_input_ids",
    "refine_file",
    "without_signature",
    "write_artifact",
]
