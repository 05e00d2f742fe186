"""Compare the decoding cost of klt and delta, and measure the price of a joint basis, on the geometry of an 8B model.

    python -m benchmarks.klt_groups

The cache has 8 KV heads of 128, the layers of one group, and a chunk of 512 tokens without protected ones. Both codecs
decode symbols of the same spread (klt's falls from component to component as in a real cache; `--silent` is their share
that is zero at every level). Tables are chosen for the context. Times are those of whole chunks, from bytes
to rows in the cache's dtype: processor time of one core, the best of several alternating rounds, relative to delta. The
last fields are the product alone, in bfloat16 and in float32, and the relative difference of both. Bits per element by
group size are in docs/rate_distortion.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest import mock

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_cachegen import CacheGenConfig, Profile
from hf_cachegen.codec import basis, fit
from hf_cachegen.codec.chunk import Channels, LossyCodec, Span
from hf_cachegen.codec.geometry import Geometry, LayerGeometry
from hf_cachegen.codec.group import Group
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.launching import launch
from hf_cachegen.codec.profile import Rotary
from hf_cachegen.codec.transforms.klt import Klt

LAYERS, HEADS, DIM = 32, 8, 128
TOKENS = 512
SPAN = Span(TOKENS, TOKENS, 3 * TOKENS)
"""A chunk in the middle of a context."""
STEP_CODE = 160
"""A step of one."""


def best(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the least processor time of each in seconds; they take turns."""
    found = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for name, run in work.items():
            start = time.process_time()
            run()
            found[name] = min(found[name], time.process_time() - start)
    return found


def klt(layers: int, level: int, silent: float) -> tuple[Klt, list[bytes], Tensor]:
    """Return a codec of `layers` layers in one group, the parts of a chunk up to a level, and its coefficients."""
    geometry = LayerGeometry("full", HEADS, DIM, HEADS, DIM)
    width = layers * HEADS * DIM
    angles = 1e-4 ** (torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2))
    eye = torch.eye(DIM).expand(layers * HEADS, DIM, DIM)
    groups = tuple(Group(kind, 0, layers, eye, torch.randn(width, width) / width**0.5) for kind in (0, 1))
    entries = torch.full((3, 2 * width), 60, dtype=torch.uint8)
    profile = Profile(
        (geometry,) * layers, Rotary("half", angles), torch.randn(2 * width), groups, STEP_CODE, entries[0],
        entries[1:], {},
    )  # fmt: skip
    config = CacheGenConfig(transform="klt", measure=False)
    whole = Geometry((geometry,) * layers, tokens=SPAN.total, batch=1, dtype="bfloat16")
    spread = torch.logspace(2, -2, width).repeat(2)
    spread[torch.arange(2 * width) % width >= (1 - silent) * width] = 0
    y = torch.randn(TOKENS, 2 * width) * spread
    counts, codec = fit.Counts(2 * width, 3), Klt(whole, config, profile)
    counts.add(codec.inner.symbols(y)[0])
    codec = Klt(whole, config, profile, counts.choose(codec.inner.values, codec.inner.digits)[0])
    return codec, codec.inner.encode(y, SPAN)[:level], y


def delta(layers: int, level: int) -> tuple[LossyCodec, list[bytes]]:
    """Return the same for delta, with values whose neighbours are similar."""
    vectors = torch.repeat_interleave(torch.arange(2 * layers), HEADS * DIM)
    channels, config = Channels(vectors, vectors // 2 * 3 // layers), CacheGenConfig(transform="delta", measure=False)
    rows = torch.randn(TOKENS, len(channels)).cumsum(0)
    codec, _ = fit.fit(lambda: iter([(rows, SPAN)]), channels, config, config.group_tokens)
    return codec, codec.encode(rows, SPAN)[:level]


def decoded(codec: LossyCodec, parts: list[bytes], dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode rows [tokens, channels]: klt's coefficients before the matrix product, or delta's values."""
    rows = torch.empty(SPAN.tokens, len(codec.channels), dtype=dtype)
    launch(codec, [(parts, SPAN, 0)], Target.matrix(rows))()
    return rows


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--level", default=2, show_default=True)
@click.option("--silent", default=0.3, show_default=True, help="Share of components that are zero at every level.")
def main(rounds: int, level: int, silent: float) -> None:
    """Compare decoding of klt and delta, by layers in a group."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = Table(
        "layers a group", "profile, MB", "klt / delta", "of it coder", "klt, float32 / delta", "product, ms",
        "in float32, ms", "difference", title=f"8B geometry, level {level}, bfloat16 products: "
        f"{'yes' if basis.multiplies_bfloat16() else 'no'}",
    )  # fmt: skip
    for layers in (1, 2, 4, 8):
        (codec, parts, _), (other, others) = klt(layers, level, silent), delta(layers, level)
        y = decoded(codec.inner, parts)

        def wide(codec: Klt = codec, parts: list[bytes] = parts) -> Tensor:
            with mock.patch.object(basis, "multiplies_bfloat16", return_value=False):
                return codec.decode(parts, SPAN, torch.bfloat16)

        seconds = best(
            {
                "klt": lambda codec=codec, parts=parts: codec.decode(parts, SPAN, torch.bfloat16),  # type: ignore[misc]
                "coder": lambda codec=codec, parts=parts: decoded(codec.inner, parts),  # type: ignore[misc]
                "wide": wide,
                "delta": lambda codec=other, parts=others: decoded(codec, parts, torch.bfloat16),  # type: ignore[misc]
                "product": lambda codec=codec, y=y: codec.basis.rows(y, SPAN, torch.bfloat16),  # type: ignore[misc]
                "float32": lambda codec=codec, y=y: codec.basis.rows(y, SPAN, torch.float32),  # type: ignore[misc]
            },
            rounds,
        )
        exact = codec.basis.rows(y, SPAN, torch.float32)
        error = (codec.basis.rows(y, SPAN, torch.bfloat16).float() - exact).norm() / exact.norm()
        megabytes = sum(group.synthesis.numel() for group in codec.profile.groups) * 2 * LAYERS / layers / 1e6
        ratios = (f"{seconds[name] / seconds['delta']:.1f}" for name in ("klt", "coder", "wide"))
        found.add_row(
            str(layers), f"{megabytes:,.0f}", *ratios,
            f"{1e3 * seconds['product']:.1f}", f"{1e3 * seconds['float32']:.1f}", f"{float(error):.2%}",
        )  # fmt: skip
    Console(width=130).print(found)


if __name__ == "__main__":
    main()
