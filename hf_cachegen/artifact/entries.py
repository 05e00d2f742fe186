"""The table of the named tensors of an artifact, which are stored beside its keys and values (docs/format.md).

    "states":[{"coding":"planes","dtype":"float32","name":"state-0","shape":[1,2,8],"tokens":511},...]

Row i describes segment i of `states.safetensors`. The container knows nothing about the meaning of a tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_cachegen.artifact import checks
from hf_cachegen.artifact.checks import MANIFEST_FILE
from hf_cachegen.errors import LimitError, ManifestError

STATES_FILE = "states.safetensors"
STATES = "states"
"""Name of the table in the manifest, and of the feature that it requires."""
DTYPE_BYTES = {
    "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "int32": 4, "int64": 8, "uint8": 1,
}  # fmt: skip
"""The dtypes of a named tensor, with bytes per value."""
CODINGS = ("raw", "planes")
MAX_DIMS = 8
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclass(frozen=True)
class TensorEntry:
    """One named tensor.

    Attributes:
        name: name of its segment.
        shape: dims, each at least 1; () for a single value.
        dtype: one of DTYPE_BYTES.
        tokens: number of tokens of the context after which the model held it; 0 if that does not apply.
        coding: one of CODINGS.
        base: the name of an earlier tensor of the same shape and dtype that it is coded against, which itself has no
            base; None if it is coded alone.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    tokens: int
    coding: str
    base: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        row: dict[str, Any] = {
            "coding": self.coding, "dtype": self.dtype, "name": self.name, "shape": list(self.shape),
            "tokens": self.tokens,
        }  # fmt: skip
        return row if self.base is None else {**row, "base": self.base}


def read_entries(
    table: list[Any], segments: list[tuple[str, int]], max_tokens: int, max_bytes: int
) -> tuple[TensorEntry, ...]:
    """Read the table from untrusted JSON.

    Args:
        table: the rows.
        segments: (name, length in bytes) of the segments of `states.safetensors`, in order.
        max_tokens: limit for `tokens`.
        max_bytes: limit for the decoded bytes of all tensors together.

    Raises:
        ManifestError: the table contradicts itself or the segments.
        LimitError: a value is above its limit.
    """
    entries: dict[str, TensorEntry] = {}
    total = 0
    if len(table) != len(segments):
        raise ManifestError(f"{MANIFEST_FILE}: {len(table)} rows in {STATES}, {len(segments)} tensors in {STATES_FILE}")
    for index, (row, (name, length)) in enumerate(zip(table, segments, strict=True)):
        where = f"{STATES}[{index}]"
        entry = _entry(row, where, max_tokens)
        total += entry.nbytes
        if total > max_bytes:
            raise LimitError(f"{MANIFEST_FILE}: more than {max_bytes} decoded bytes in {STATES}, the limit")
        if entry.name != name:
            raise ManifestError(f"{MANIFEST_FILE}: expected the name {name!r} at {where}, got {entry.name!r}")
        if length > entry.nbytes or (entry.coding == "raw" and length != entry.nbytes):
            raise ManifestError(
                f"{MANIFEST_FILE}: {where} has {entry.nbytes} bytes, which do not fit its segment of {length} bytes"
            )
        _check_base(entry, entries, where)
        entries[name] = entry
    return tuple(entries.values())


def _entry(row: Any, where: str, max_tokens: int) -> TensorEntry:
    members: Mapping[str, Any] = row if isinstance(row, dict) else {}
    shape = members.get("shape")
    if type(shape) is not list or len(shape) > MAX_DIMS:
        found = checks.short(shape)
        raise ManifestError(f"{MANIFEST_FILE}: expected at most {MAX_DIMS} dims at {where}.shape, got {found}")
    if any(checks.count(dim, f"{where}.shape") == 0 for dim in shape):
        raise ManifestError(f"{MANIFEST_FILE}: expected dims of at least 1 at {where}.shape, got {checks.short(shape)}")
    for name, known in (("dtype", tuple(DTYPE_BYTES)), ("coding", CODINGS)):
        if members.get(name) not in known:
            found = checks.short(members.get(name))
            raise ManifestError(f"{MANIFEST_FILE}: expected one of {known} at {where}.{name}, got {found}")
    tokens = checks.count(members.get("tokens"), f"{where}.tokens")
    if tokens > max_tokens:
        raise LimitError(f"{MANIFEST_FILE}: {where} is after {tokens} tokens, the limit is {max_tokens}")
    base = members.get("base")
    return TensorEntry(
        name=checks.text(members.get("name"), NAME, f"{where}.name"),
        shape=tuple(shape),
        dtype=members["dtype"],
        tokens=tokens,
        coding=members["coding"],
        base=None if base is None else checks.text(base, NAME, f"{where}.base"),
    )


def _check_base(entry: TensorEntry, earlier: Mapping[str, TensorEntry], where: str) -> None:
    if entry.base is None:
        return
    base = earlier.get(entry.base)
    if base is None or base.base is not None or entry.coding == "raw":
        raise ManifestError(f"{MANIFEST_FILE}: {where}.base must name an earlier tensor that is coded alone")
    if (base.shape, base.dtype) != (entry.shape, entry.dtype):
        raise ManifestError(f"{MANIFEST_FILE}: {where} and its base {base.name!r} differ in shape or dtype")
