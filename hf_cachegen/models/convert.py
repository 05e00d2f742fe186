"""Read and write the KV caches of other programs: a tuple or a DynamicCache that torch.save wrote.

They are read with weights_only=True, which loads tensors, containers and the two cache classes, and runs no code. The
attributes of the objects in an untrusted file may still be anything, so they are checked before use.
"""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_cachegen.artifact.store import local_path, output_path
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.errors import (
    ArtifactExistsError,
    ArtifactNotFoundError,
    ConfigError,
    CorruptError,
    TensorError,
    UnsupportedLayerError,
)

CacheFormat = Literal["legacy", "dynamic"]


class Decodable(Protocol):
    """The part of an artifact that `save_cache` needs."""

    @property
    def geometry(self) -> Geometry:
        """Return the geometry of the cache."""

    def decode(self, level: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Return the (keys, values) of all layers, each [rows, heads, tokens, dim]."""


def load_cache(path: str | os.PathLike[str]) -> tuple[list[Tensor], list[Tensor]]:
    """Load ((key, value), ...) or a DynamicCache from a file that torch.save wrote.

    Args:
        path: the file.

    Returns:
        (keys, values) of the layers, each [rows, heads, tokens, dim] as in the file, on the CPU.

    Raises:
        ConfigError: `path` is no path.
        ArtifactNotFoundError: the file does not exist.
        CorruptError: the file is damaged, or torch cannot read it without running code.
        TensorError, UnsupportedLayerError: the file does not hold such a cache.
    """
    _require_unpacked(local_path(path))
    try:
        with torch.serialization.safe_globals([DynamicCache, DynamicLayer]):
            found = torch.load(local_path(path), map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ArtifactNotFoundError(f"expected a file that torch.save wrote; there is no file {path}") from error
    except ConfigError:
        raise
    except Exception as error:  # a damaged or hostile file can make torch raise any error
        raise CorruptError(
            f"{path}: expected a file of tensors or a DynamicCache; it holds something else, or is damaged: "
            f"{_reason(error)}"
        ) from error
    pairs = _layers_of(found) if isinstance(found, DynamicCache) else found
    if not isinstance(pairs, list | tuple) or not pairs:
        raise TensorError(f"{path}: expected a DynamicCache or ((key, value), ...), got {type(found).__name__}")
    keys, values = [], []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) < 2 or not all(isinstance(x, Tensor) for x in pair[:2]):
            raise TensorError(f"{path}: expected a pair of tensors (key, value) for layer {index}")
        if len(pair) > 2:
            raise UnsupportedLayerError(f"{path}: expected (key, value) for layer {index}, got {len(pair)} entries")
        keys.append(pair[0])
        values.append(pair[1])
    return keys, values


def save_cache(
    artifact: Decodable, path: str | os.PathLike[str], form: CacheFormat, *, level: int | None = None,
    overwrite: bool = False,
) -> None:  # fmt: skip
    """Decode an artifact into a file for torch.load.

    Args:
        artifact: the artifact.
        path: the file to write.
        form: "legacy" for a tuple ((key, value), ...), "dynamic" for a DynamicCache.
        level: the level to decode, 1 the coarsest; None for the finest.
        overwrite: replace the file if it exists.

    Raises:
        ConfigError: `form` is unknown, or `path` is no path.
        ArtifactExistsError: `path` exists, and `overwrite` is false.
        UnsupportedLayerError: a DynamicCache cannot hold the layers without the model's configuration.
        ArtifactError, ProfileError, NativeError: the artifact cannot be decoded.
        OSError: the disk is full, or access is denied.
    """
    if form not in get_args(CacheFormat):
        raise ConfigError(f"form must be one of {get_args(CacheFormat)}, got {form!r}")
    path = output_path(path)
    partial = output_path(f"{path}.partial")
    if os.path.lexists(path) and not overwrite:
        raise ArtifactExistsError(f"{path} already exists; choose another file, or pass overwrite=True to replace it")
    windows = sorted({layer.kind for layer in artifact.geometry.layers} - {"full", "mla"})
    if form == "dynamic" and windows:
        raise UnsupportedLayerError(f"a DynamicCache of {windows} layers needs the model's configuration; use 'legacy'")
    pairs = tuple(zip(*artifact.decode(level), strict=True))
    value: Any = pairs
    if form == "dynamic":
        value = DynamicCache()
        for index, (key, tensor) in enumerate(pairs):
            value.update(key, tensor, index)
    try:
        with open(partial, "wb") as file:
            torch.save(value, file)
        os.replace(partial, path)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch replaces the system's error by one of its own
            raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from error
        raise
    finally:
        if os.path.lexists(partial):
            os.unlink(partial)


def _require_unpacked(path: Path) -> None:
    """Raise CorruptError where an archive unpacks to more bytes than it has: torch compresses nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return  # another format, or damaged: torch's reader reports it
    if unpacked > (size := path.stat().st_size):
        raise CorruptError(f"{path}: expected a file that torch.save wrote; it unpacks from {size} to {unpacked} bytes")


def _reason(error: Exception) -> str:
    """Return torch's reason, without its advice to load the file in a way that may run code in it."""
    text = str(error).strip()
    foreign = re.search(r"Unsupported (?:global: GLOBAL|class) (\S{1,200})", text)
    if foreign:
        return f"it names {foreign[1]}, which is not loaded"
    if not text or "weights_only" in text or "Weights only" in text:
        return type(error).__name__
    return text.splitlines()[0]


def _layers_of(cache: DynamicCache) -> list[tuple[Any, Any]]:
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        raise TensorError("expected a DynamicCache with a list of layers")
    unknown = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if unknown:
        raise UnsupportedLayerError(f"expected layers of type DynamicLayer, got {unknown}")
    return [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
