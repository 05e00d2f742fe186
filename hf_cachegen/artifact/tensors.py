"""Named tensors of a context that are not keys and values: states of recurrent layers, outputs of an encoder.

They are coded exactly, one segment each. Their names and positions mean something only to the code that stores them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_cachegen.artifact.entries import STATES_FILE, TensorEntry
from hf_cachegen.artifact.reader import Reader
from hf_cachegen.codec import tensor_bytes
from hf_cachegen.errors import TensorError


@dataclass(frozen=True)
class NamedTensor:
    """A tensor to store with a context.

    Attributes:
        name: unique among the tensors of the context: small letters, digits, "-" and "_", at most 64.
        tensor: of any shape, with a dtype of `codec.tensor_bytes.DTYPES`, on any device.
        tokens: number of tokens of the context after which the model held it; 0 if that does not apply.
        base: name of an earlier tensor of the same shape and dtype, without a base of its own, against which this one
            is coded where that takes fewer bytes; None to code it alone.
    """

    name: str
    tensor: Tensor
    tokens: int = 0
    base: str | None = None


@dataclass(frozen=True)
class EncodedTensor:
    """An encoded named tensor: its row in the manifest, and the bytes of its segment."""

    entry: TensorEntry
    data: bytes


def encode_tensors(tensors: Iterable[NamedTensor]) -> tuple[EncodedTensor, ...]:
    """Encode named tensors exactly.

    Raises:
        TensorError: a tensor is empty or of an unknown dtype, two have one name, or a base does not fit.
    """
    encoded: list[EncodedTensor] = []
    given: dict[str, NamedTensor] = {}
    for named in tensors:
        if named.name in given:
            raise TensorError(f"expected different names for the tensors of a context, got {named.name!r} twice")
        coding, data = tensor_bytes.encode(named.tensor)
        base = _base(named, given)
        if base is not None:
            other_coding, other = tensor_bytes.encode(named.tensor, base.tensor)
            if other_coding != "raw" and len(other) < len(data):
                coding, data = other_coding, other
            else:
                base = None
        given[named.name] = named
        dtype = str(named.tensor.dtype).removeprefix("torch.")
        shape = tuple(named.tensor.shape)
        entry = TensorEntry(named.name, shape, dtype, named.tokens, coding, None if base is None else base.name)
        encoded.append(EncodedTensor(entry, data))
    return tuple(encoded)


def _base(named: NamedTensor, given: dict[str, NamedTensor]) -> NamedTensor | None:
    if named.base is None:
        return None
    base = given.get(named.base)
    if base is None or base.base is not None:
        raise TensorError(f"the base of {named.name!r} must be an earlier tensor without a base, got {named.base!r}")
    if base.tensor.shape != named.tensor.shape or base.tensor.dtype != named.tensor.dtype:
        raise TensorError(f"{named.name!r} and its base {named.base!r} differ in shape or dtype")
    return base


def read_encoded(reader: Reader) -> tuple[EncodedTensor, ...]:
    """Read and verify the bytes of all named tensors, without decoding them. Raises the errors of `Reader.read`."""
    entries = reader.manifest.states
    segments = [reader.manifest.segment(STATES_FILE, entry.name) for entry in entries]
    reader.prefetch(segments)
    return tuple(
        EncodedTensor(entry, reader.read(segment)) for entry, segment in zip(entries, segments, strict=True)
    )


def decode_tensors(encoded: Iterable[EncodedTensor]) -> tuple[NamedTensor, ...]:
    """Decode named tensors, on the CPU, in their order.

    Raises:
        TruncatedError, CorruptError: the bytes are damaged.
    """
    decoded: dict[str, NamedTensor] = {}
    for item in encoded:
        entry = item.entry
        base = None if entry.base is None else decoded[entry.base].tensor
        dtype: torch.dtype = getattr(torch, entry.dtype)
        tensor = tensor_bytes.decode(item.data, entry.coding, entry.shape, dtype, base)
        decoded[entry.name] = NamedTensor(entry.name, tensor, entry.tokens, entry.base)
    return tuple(decoded.values())
