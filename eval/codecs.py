"""What is compared: ways to keep the KV cache of a context, each with its levels.

Twists: the package's own codecs are measured through the product's door (`save_pretrained`, `from_pretrained`), so
their bytes are an artifact's files, all counted, and their seconds those that a user waits. The baselines are computed
in memory, in their favour: what they would have to store beside their values (token ids, a manifest) is not charged to
them, nor reading them from a disk; uniform levels are unpacked from whole bytes, and CacheGen's released coder, whose
bits are an entropy, has no seconds at all.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from eval import transformers_quantised, uniform
from eval.released import released
from hf_cachegen import CacheGenCache, CacheGenConfig, Profile
from hf_cachegen.errors import ConfigError

EXACT, TEXT = "exact", "text"
OWN = ("lossless", "delta", "identity", "klt")
UNIFORM = {"uniform-8": 8, "uniform-4": 4, "uniform-3": 3}
NAMES = (EXACT, TEXT, *UNIFORM, *transformers_quantised.BACKENDS, "released", *OWN)
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
    "lossless": "lossless",
    "delta": "delta",
    "identity": "identity",
    "klt": "klt",
}


@dataclass(frozen=True)
class Kept:
    """One context as one codec kept it at one level (None: it has but one).

    cache: what is decoded; nbytes: everything that must be fetched; encode, decode: seconds, None where not measured;
    prefill: seconds to compute the context's cache, for a codec that keeps the text; layers: the artifact's report,
    "k_bits", "v_bits" (bits per element) and "k_error", "v_error" (relative) of each layer at this level.
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
    """What codecs need besides a cache. levels: of the package's codecs, None for all."""

    model: Any
    tokenizer: Any
    profile: Profile | None
    chunk_tokens: int
    levels: tuple[int, ...] | None = None


Codec = Callable[[Kit, CacheGenCache, str], Iterator[Kept]]
"""(kit, exact cache, text of the context) to what each level decodes to."""


def choose(names: Sequence[str], profile: Profile | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """(codecs in the order of the tables, why others of "all" cannot be used here); exact is always among them.

    Raises ConfigError for a name that is none, and for one that was asked for and cannot be used.
    """
    asked = {name for name in names if name != "all"} | {EXACT}
    if unknown := sorted(asked - set(NAMES)):
        raise ConfigError(f"no codecs {unknown}; there are {', '.join(NAMES)}, and 'all'")
    missing = {
        name: reason for name in transformers_quantised.BACKENDS if (reason := transformers_quantised.missing(name))
    }
    if profile is None:
        missing["klt"] = "the model has no profile: learn one with 'hf-cachegen profile', or give --profile"
    for name in NAMES:
        if name in asked and name in missing:
            raise ConfigError(f"codec {name}: {missing[name]}")
    if "all" not in names:
        return tuple(name for name in NAMES if name in asked), {}
    return tuple(name for name in NAMES if name not in missing), missing


def title(codec: str, level: int | None) -> str:
    """How tables call one level of a codec."""
    return TITLES[codec] if level is None else f"{TITLES[codec]}, level {level}"


def keep(codec: str, kit: Kit, exact: CacheGenCache, text: str) -> Iterator[Kept]:
    """Every level of `codec`, the finest first."""
    if codec == EXACT:
        yield Kept(EXACT, None, exact, exact.report.exact_bytes, decode=0.0)
    elif codec == TEXT:
        again = CacheGenCache.from_context(kit.model, exact.input_ids, profile=None, tokenizer=kit.tokenizer)
        seconds = again.report.prefill_seconds or 0.0
        yield Kept(TEXT, None, again, len(text.encode()), encode=0.0, decode=0.0, prefill=seconds)
    elif codec in OWN:
        yield from _own(codec, kit, exact)
    else:
        yield _baseline(codec, kit, exact)


def _own(codec: str, kit: Kit, exact: CacheGenCache) -> Iterator[Kept]:
    config = CacheGenConfig(chunk_tokens=kit.chunk_tokens)
    if codec == "lossless":
        config = replace(config, transform="identity", lossless=True)
    elif codec == "klt" and kit.profile is not None:
        config = replace(config, transform="klt", levels=kit.profile.levels)
    else:
        config = replace(config, transform=codec)
    with tempfile.TemporaryDirectory(prefix="hf_cachegen-eval-") as name:
        place = Path(name) / "artifact"
        start = time.perf_counter()
        exact.save_pretrained(place, config)
        encode = time.perf_counter() - start
        levels = [None] if config.lossless else list(range(config.levels, 0, -1))
        for level in levels:
            if level is not None and kit.levels is not None and level not in kit.levels:
                continue
            start = time.perf_counter()
            cache = CacheGenCache.from_pretrained(place, kit.model, level, profile=kit.profile or "auto")
            wait(kit.model)
            decode = time.perf_counter() - start
            layers = _layers(cache.report.encoding, cache.report.level or 1)
            yield Kept(codec, level, cache, cache.report.loaded_bytes or 0, encode, decode, layers=layers)


def _layers(report: dict[str, Any], level: int) -> tuple[dict[str, float], ...]:
    rows = report.get("layers", [])
    return tuple({key: values[level - 1] for key, values in row.items() if len(values) >= level} for row in rows)


def _baseline(codec: str, kit: Kit, exact: CacheGenCache) -> Kept:
    kv = exact.kv
    decode = None
    if codec in UNIFORM:
        bits = UNIFORM[codec]
        packed = [[uniform.pack(x, bits) for x in side] for side in (kv.keys, kv.values)]
        wait(kit.model)
        start = time.perf_counter()
        keys, values = ([uniform.unpack(*parts, kv.keys[0].dtype) for parts in side] for side in packed)
        wait(kit.model)
        decode = time.perf_counter() - start
        nbytes = sum(x.numel() * uniform.bits_per_element(bits, x.shape[-1]) / 8 for x in (*kv.keys, *kv.values))
    elif codec == "released":
        spent, (keys, values) = released(([x.cpu().float() for x in kv.keys], [x.cpu().float() for x in kv.values]))
        nbytes = spent * kv.geometry.elements / 8
    else:
        held = transformers_quantised.quantise(codec, kit.model.config, kv.keys, kv.values)
        nbytes = transformers_quantised.nbytes(held)
        wait(kit.model)
        start = time.perf_counter()
        keys, values = transformers_quantised.dequantise(held, kv.geometry.tokens)
        wait(kit.model)
        decode = time.perf_counter() - start
    pairs = [(k.to(a), v.to(b)) for k, v, a, b in zip(keys, values, kv.keys, kv.values, strict=True)]
    cache = CacheGenCache.from_cache(DynamicCache(pairs), exact.input_ids, kit.model, profile=None)
    return Kept(codec, None, cache, nbytes, decode=decode)


def wait(model: Any) -> None:
    """Until the model's device has done what it was given, so that a clock means something."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
