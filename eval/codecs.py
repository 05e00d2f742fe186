"""The codecs that are compared: ways to store the KV cache of a context, each with its levels.

The package's own codecs are measured as a user runs them (`save_pretrained`, `from_pretrained`): their bytes are those
of all files of an artifact, and their seconds include reading from disk. The baselines are computed in memory, which is
in their favour: token ids, a manifest and reading from disk are not charged to them, and uniform levels are unpacked
from whole bytes. Baselines whose bits are an entropy or that have no fast decoder have no decode time; it is missing,
not zero.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from eval import transformers_quantised, uniform
from eval.baselines import CALIBRATED
from eval.baselines import NAMES as BASELINES
from eval.baselines.joint import Joint
from hf_cachegen import CacheGenCache, CacheGenConfig, Profile
from hf_cachegen.errors import ConfigError

EXACT, TEXT = "exact", "text"
PREDICTED = {"predict0": 0, "predict1": 1, "predict2": 2, "predict5": 5}
"""Codec to its `predict_layers`: klt with a prediction from the model's first layers (docs/predictor.md)."""
OWN = ("lossless", "delta", "identity", "klt", *PREDICTED)
PROFILED = ("klt", *PREDICTED)
"""The codecs that need a profile of the model."""
UNIFORM = {"uniform-8": 8, "uniform-4": 4, "uniform-3": 3}
NAMES = (EXACT, TEXT, *UNIFORM, *transformers_quantised.BACKENDS, *BASELINES, *CALIBRATED, *OWN)
"""Every codec, in the order of the tables."""
TITLES = {
    EXACT: "exact cache",
    TEXT: "text (prefill)",
    "uniform-8": "uniform 8-bit",
    "uniform-4": "uniform 4-bit",
    "uniform-3": "uniform 3-bit",
    "quanto-4": "QuantizedCache quanto 4-bit",
    "quanto-2": "QuantizedCache quanto 2-bit",
    "hqq-8": "QuantizedCache hqq 8-bit",
    "hqq-4": "QuantizedCache hqq 4-bit",
    "hqq-2": "QuantizedCache hqq 2-bit",
    "fp8": "QuantizedCache fp8",
    "released": "CacheGen as released",
    **{name: entry.title for name, entry in (BASELINES | CALIBRATED).items()},
    "lossless": "lossless",
    "delta": "delta (our reading of section 5.2)",
    "identity": "identity",
    "klt": "klt",
    **{name: f"klt, prediction m = {layer}" for name, layer in PREDICTED.items()},
}
"""Codec to its title in tables; "released" stands in older runs, which charged a table every 256 tokens to it."""


@dataclass(frozen=True)
class Kept:
    """One context, stored by one codec at one level.

    Attributes:
        codec: a name in NAMES.
        level: 1 (coarsest) to the number of levels, None where the codec has only one.
        cache: the decoded cache.
        nbytes: bytes of everything that must be fetched.
        encode: seconds, None where not measured.
        decode: seconds, None where not measured.
        prefill: seconds to compute the context's cache, for a codec that stores the text.
        layers: the artifact's report for each layer at this level: "k_bits", "v_bits" (bits per element), "k_error" and
            "v_error" (relative).
    """

    codec: str
    level: int | None
    cache: CacheGenCache
    nbytes: float
    encode: float | None = None
    decode: float | None = None
    prefill: float = 0.0
    layers: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class Kit:
    """What codecs need besides a cache.

    Attributes:
        model: the causal language model.
        tokenizer: its tokenizer.
        profile: the model's profile for klt, None where there is none.
        chunk_tokens: tokens per chunk of an artifact.
        levels: levels to measure of codecs that have several, None for all.
        joint: the model's joint basis for calibrated baselines, None where there is none.
    """

    model: Any
    tokenizer: Any
    profile: Profile | None
    chunk_tokens: int
    levels: tuple[int, ...] | None = None
    joint: Joint | None = None


def choose(
    names: Sequence[str], profile: Profile | None, joint: Joint | None = None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the codecs to measure.

    Args:
        names: names in NAMES, or "all".
        profile: the model's profile, without which klt cannot be used; prediction needs its predictors.
        joint: the model's joint basis, without which calibrated baselines cannot be used.

    Returns:
        (codecs in the order of the tables, always with the exact cache; codec to the reason why "all" leaves it out).

    Raises:
        ConfigError: a name is unknown, or names a codec that cannot be used here.
    """
    asked = {name for name in names if name != "all"} | {EXACT}
    if unknown := sorted(asked - set(NAMES)):
        raise ConfigError(f"unknown codecs {unknown}: expected one of {', '.join(NAMES)}, or 'all'")
    missing = {
        name: reason for name in transformers_quantised.BACKENDS if (reason := transformers_quantised.missing(name))
    }
    if joint is None:
        missing |= dict.fromkeys(CALIBRATED, "no basis: learn one with python -m eval.baselines.joint, give --basis")
    if profile is None:
        reason = "the model has no profile: learn one with 'hf-cachegen profile', or give --profile"
        missing |= dict.fromkeys(PROFILED, reason)
    else:
        known = [predictor.layer for predictor in profile.predictors]
        missing |= {
            name: f"the profile has predictors for the layers {known}: learn one with --predict-layers {layer}"
            for name, layer in PREDICTED.items()
            if layer not in known
        }
    for name in NAMES:
        if name in asked and name in missing:
            raise ConfigError(f"codec {name}: {missing[name]}")
    if "all" not in names:
        return tuple(name for name in NAMES if name in asked), {}
    return tuple(name for name in NAMES if name not in missing), missing


def title(codec: str, level: int | None) -> str:
    """Return the title of one level of a codec in tables."""
    return TITLES[codec] if level is None else f"{TITLES[codec]}, level {level}"


def keep(codec: str, kit: Kit, exact: CacheGenCache, text: str) -> Iterator[Kept]:
    """Store a context by one codec, and yield every level, the finest first.

    Args:
        codec: a name in NAMES that can be used here.
        kit: what it needs.
        exact: the exact cache of the context.
        text: the text of the context.
    """
    if codec == EXACT:
        yield Kept(EXACT, None, exact, exact.report.exact_bytes, decode=0.0)
    elif codec == TEXT:
        again = CacheGenCache.from_context(kit.model, exact.input_ids, profile=None, tokenizer=kit.tokenizer)
        seconds = again.report.prefill_seconds or 0.0
        yield Kept(TEXT, None, again, len(text.encode()), encode=0.0, decode=0.0, prefill=seconds)
    elif codec in OWN:
        yield from _own(codec, kit, exact)
    elif codec in BASELINES or codec in CALIBRATED:
        yield from _published(codec, kit, exact)
    else:
        yield _quantised(codec, kit, exact)


def _own(codec: str, kit: Kit, exact: CacheGenCache) -> Iterator[Kept]:
    config = CacheGenConfig(chunk_tokens=kit.chunk_tokens)
    if codec == "lossless":
        config = replace(config, transform="identity", lossless=True)
    elif codec in PROFILED and kit.profile is not None:
        layer = PREDICTED.get(codec)
        config = replace(config, transform="klt", levels=kit.profile.levels, predict_layers=layer)
        if layer is not None:  # what is predicted from is computed together with the cache
            exact = CacheGenCache.from_context(kit.model, exact.input_ids, config, kit.profile, tokenizer=kit.tokenizer)
    else:
        config = replace(config, transform=codec)
    with tempfile.TemporaryDirectory(prefix="hf_cachegen-eval-") as name:
        path = Path(name) / "artifact"
        start = time.perf_counter()
        exact.save_pretrained(path, config)
        encode = time.perf_counter() - start
        levels = [None] if config.lossless else list(range(config.levels, 0, -1))
        for level in levels:
            if level is not None and kit.levels is not None and level not in kit.levels:
                continue
            start = time.perf_counter()
            cache = CacheGenCache.from_pretrained(path, kit.model, level, profile=kit.profile or "auto")
            wait(kit.model)
            decode = time.perf_counter() - start
            layers = _layers(cache.report.encoding, cache.report.level or 1)
            yield Kept(codec, level, cache, cache.report.loaded_bytes or 0, encode, decode, layers=layers)


def _layers(report: dict[str, Any], level: int) -> tuple[dict[str, float], ...]:
    rows = report.get("layers", [])
    return tuple({key: values[level - 1] for key, values in row.items() if len(values) >= level} for row in rows)


def _published(codec: str, kit: Kit, exact: CacheGenCache) -> Iterator[Kept]:
    kv = exact.kv
    keys, values = ([x.cpu().float() for x in side] for side in (kv.keys, kv.values))
    if codec in BASELINES:
        found = BASELINES[codec].run(keys, values)
    elif kit.joint is None:
        raise ConfigError(f"codec {codec} needs a basis: learn one with python -m eval.baselines.joint, give --basis")
    else:
        found = CALIBRATED[codec].run(keys, values, kit.joint)
    for stored in found:
        if stored.level is not None and kit.levels is not None and stored.level not in kit.levels:
            continue
        yield Kept(codec, stored.level, _cache(kit, exact, stored.keys, stored.values), stored.bits / 8)


def _quantised(codec: str, kit: Kit, exact: CacheGenCache) -> Kept:
    kv = exact.kv
    if codec in UNIFORM:
        bits = UNIFORM[codec]
        packed = [[uniform.pack(x, bits) for x in side] for side in (kv.keys, kv.values)]
        wait(kit.model)
        start = time.perf_counter()
        keys, values = ([uniform.unpack(*parts, kv.keys[0].dtype) for parts in side] for side in packed)
        wait(kit.model)
        decode = time.perf_counter() - start
        nbytes = sum(x.numel() * uniform.bits_per_element(bits, x.shape[-1]) / 8 for x in (*kv.keys, *kv.values))
    else:
        held = transformers_quantised.quantise(codec, kit.model.config, kv.keys, kv.values)
        nbytes = transformers_quantised.nbytes(held)
        wait(kit.model)
        start = time.perf_counter()
        keys, values = transformers_quantised.dequantise(held, kv.geometry.tokens)
        wait(kit.model)
        decode = time.perf_counter() - start
    return Kept(codec, None, _cache(kit, exact, keys, values), nbytes, decode=decode)


def _cache(kit: Kit, exact: CacheGenCache, keys: Sequence[Tensor], values: Sequence[Tensor]) -> CacheGenCache:
    """Return decoded tensors as a cache, in the dtype and on the devices of the exact one."""
    pairs = [(k.to(a), v.to(b)) for k, v, a, b in zip(keys, values, exact.kv.keys, exact.kv.values, strict=True)]
    return CacheGenCache.from_cache(DynamicCache(pairs), exact.input_ids, kit.model, profile=None, verify="weights")


def wait(model: Any) -> None:
    """Wait until the model's device is idle, so that a clock measures its work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
