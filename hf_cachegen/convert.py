"""Other programs' KV caches <-> artifacts: what torch.save wrote of a legacy tuple, or of a DynamicCache.

Read with weights_only=True: tensors, containers and the two cache classes, never code. What comes out of a stranger's
file is checked before use, since even so its attributes may be anything.
"""

from __future__ import annotations

import os
import re
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_cachegen.artifact.artifact import Artifact
from hf_cachegen.errors import (
    ArtifactExistsError,
    ArtifactNotFoundError,
    ConfigError,
    CorruptError,
    TensorError,
    UnsupportedLayerError,
)

CacheFormat = Literal["legacy", "dynamic"]


def load_cache(path: str | os.PathLike[str]) -> tuple[list[Tensor], list[Tensor]]:
    """(keys, values) of the layers, from a file that torch.save wrote of ((key, value), ...) or of a DynamicCache.

    Raises ArtifactNotFoundError; CorruptError for what torch cannot read without running code; TensorError and
    UnsupportedLayerError for what is no such cache.
    """
    try:
        with torch.serialization.safe_globals([DynamicCache, DynamicLayer]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ArtifactNotFoundError(f"there is no file {path}") from error
    except Exception as error:  # torch raises whatever a damaged or hostile file makes it trip over
        raise CorruptError(
            f"{path} holds something else than tensors and stock caches, or is damaged: {_reason(error)}"
        ) from error
    pairs = _layers_of(found) if isinstance(found, DynamicCache) else found
    if not isinstance(pairs, list | tuple) or not pairs:
        raise TensorError(f"{path}: expected a DynamicCache or ((key, value), ...), got {type(found).__name__}")
    keys, values = [], []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) < 2 or not all(isinstance(x, Tensor) for x in pair[:2]):
            raise TensorError(f"{path}: layer {index} is no pair of tensors (key, value)")
        if len(pair) > 2:
            raise UnsupportedLayerError(f"{path}: layer {index} has {len(pair)} entries; key and value alone are known")
        keys.append(pair[0])
        values.append(pair[1])
    return keys, values


def save_cache(
    artifact: Artifact, path: str | os.PathLike[str], form: CacheFormat, *, level: int | None = None,
    overwrite: bool = False,
) -> None:  # fmt: skip
    """Decodes an artifact into a file for torch.load: "legacy" ((key, value), ...), or "dynamic", a DynamicCache.

    Raises ConfigError, ArtifactExistsError, and what decoding raises.
    """
    if form not in get_args(CacheFormat):
        raise ConfigError(f"form must be one of {get_args(CacheFormat)}, got {form!r}")
    if os.path.lexists(path) and not overwrite:
        raise ArtifactExistsError(f"{path} is there already; choose another file, or pass overwrite=True to replace it")
    windows = sorted({layer.kind for layer in artifact.geometry.layers} - {"full", "mla"})
    if form == "dynamic" and windows:
        raise UnsupportedLayerError(f"a stock cache of {windows} layers needs the model's configuration: use 'legacy'")
    pairs = tuple(zip(*artifact.decode(level), strict=True))
    value: Any = pairs
    if form == "dynamic":
        value = DynamicCache()
        for index, (key, tensor) in enumerate(pairs):
            value.update(key, tensor, index)
    partial = f"{os.fspath(path)}.partial"
    try:
        torch.save(value, partial)
        os.replace(partial, path)
    finally:
        if os.path.lexists(partial):
            os.unlink(partial)


def _reason(error: Exception) -> str:
    """What torch found wrong, without its advice to load the file in a way that may run what it holds."""
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
        raise TensorError("this DynamicCache has no layers")
    unknown = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if unknown:
        raise UnsupportedLayerError(f"layers of type {unknown}; DynamicLayer alone is known")
    return [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
