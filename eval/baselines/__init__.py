"""Baselines: published ways to store a KV cache, computed in memory under their own names.

Every baseline is a function of the keys and values of a context that yields what each of its levels decodes to, and the
bytes that must be stored, side information included. Headers, token ids and a manifest are not charged to them. Each
file cites its source; none copies code. A new baseline is one file and one line in NAMES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from eval.baselines import kivi, kvtc, released, turboquant
from eval.baselines.joint import Joint
from eval.baselines.stored import Stored

Baseline = Callable[[Sequence[Tensor], Sequence[Tensor]], Iterator[Stored]]
"""(keys, values), per layer [1, heads, tokens, head_dim] of any float dtype, to what each level decodes to."""


@dataclass(frozen=True)
class Entry:
    """One baseline: how tables call it, and the function."""

    title: str
    run: Baseline


_residual = partial(turboquant.turboquant, residual=True)

NAMES: dict[str, Entry] = {
    "artifact": Entry("CacheGen artifact", partial(released.cachegen, table_tokens=None)),
    "lmcache": Entry("LMCache, 256", partial(released.cachegen, table_tokens=released.LMCACHE_TOKENS)),
    "default-8": Entry("CacheGen's default quantization, 8 bit", partial(released.default_quantization, bits=8)),
    "default-4": Entry("CacheGen's default quantization, 4 bit", partial(released.default_quantization, bits=4)),
    "default-3": Entry("CacheGen's default quantization, 3 bit", partial(released.default_quantization, bits=3)),
    "kivi-4": Entry("KIVI 4 bit", partial(kivi.kivi, bits=4)),
    "kivi-2": Entry("KIVI 2 bit", partial(kivi.kivi, bits=2)),
    "turboquant-4": Entry("TurboQuant 4 bit", partial(turboquant.turboquant, bits=4)),
    "turboquant-3": Entry("TurboQuant 3 bit", partial(turboquant.turboquant, bits=3)),
    "turboquant-2": Entry("TurboQuant 2 bit", partial(turboquant.turboquant, bits=2)),
    "turboquant-residual-4": Entry("TurboQuant with residual 4 bit", partial(_residual, bits=4)),
    "turboquant-residual-3": Entry("TurboQuant with residual 3 bit", partial(_residual, bits=3)),
}  # fmt: skip
"""Baselines that need no calibration, in the order of the tables."""


@dataclass(frozen=True)
class Calibrated:
    """A baseline that needs a model's joint basis: its title, and a function of (keys, values, basis)."""

    title: str
    run: Callable[[Sequence[Tensor], Sequence[Tensor], Joint], Iterator[Stored]]


CALIBRATED: dict[str, Calibrated] = {
    "kvtc": Calibrated("KVTC", kvtc.kvtc),
    "pca": Calibrated("joint PCA, no sensitivities", kvtc.pca),
}
"""Baselines that need `--basis`, in the order of the tables."""
