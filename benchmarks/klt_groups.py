"""The price of a joint basis on the geometry of an 8B model: the product and the profile, by layers per group.

    python -m benchmarks.klt_groups

32 layers, 8 KV heads of 128. A group of g layers has g x 1024 channels; its product is [tokens, components] x
[components, channels]. Times are of one group's product for K (the rest is proportional), beside decoding as many
symbols by the entropy coder, best of several rounds taking turns; bits per element by group size are in
docs/rate_distortion.md.
"""

from __future__ import annotations

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.bench_codec import COLUMNS, TOKENS, Symbols, best

LAYERS, CHANNELS = 32, 1024


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--kept", default=1.0, show_default=True, help="share of components that are not always zero")
def main(rounds: int, kept: float) -> None:
    """The price of a joint basis."""
    torch.manual_seed(0)
    _, _, decode = Symbols(0.5, 1).coder()
    view = Table(
        "layers a group", "profile, MB", "GFLOP per 512 tokens", "fp32 product / coder", "bf16 product / coder"
    )
    for layers in (1, 2, 4, 8):
        width = layers * CHANNELS
        components = round(kept * width)
        y, u = torch.randn(TOKENS, components), torch.randn(components, width)
        y16, u16 = y.bfloat16(), u.bfloat16()
        seconds = best(
            {
                "coder": decode,
                "fp32": lambda y=y, u=u: y @ u,  # type: ignore[misc]
                "bf16": lambda y=y16, u=u16: y @ u,  # type: ignore[misc]
            },
            rounds,
        )
        groups = 2 * LAYERS // layers
        megabytes = groups * components * width * 2 / 1e6
        flops = groups * 2 * TOKENS * components * width / 1e9
        coder = seconds["coder"] * width / COLUMNS  # the same number of elements
        ratios = [seconds[name] / coder for name in ("fp32", "bf16")]
        view.add_row(str(layers), f"{megabytes:.0f}", f"{flops:.0f}", *(f"{ratio:.1f}" for ratio in ratios))
    Console(width=110).print(view)


if __name__ == "__main__":
    main()
