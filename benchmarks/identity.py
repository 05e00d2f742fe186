"""Time what it costs to know that a cache belongs to a model: a row for each check, in milliseconds.

    python -m benchmarks.identity --model eval/reference/model --model runs/smollm2-135m

One thread; the shortest processor time of some repeats, so other processes count little. The speed of checksums is
given beside that of reading the same memory (a sum over it) and of copying it, as a ratio, because memory limits all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import torch

from eval.models import load_model
from hf_cachegen.models.checksum import checksums
from hf_cachegen.models.fingerprint import Fingerprint
from hf_cachegen.models.identity import forget, identify
from hf_cachegen.models.probe import check, record, run
from hf_cachegen.models.weights import weights, weights_checksum

TOKENS = list(range(5, 21))
BYTES = 1 << 29
"""Of the tensor that shows the speed of memory: larger than the caches of most processors."""


def milliseconds(call: Callable[[], Any], repeats: int, before: Callable[[], Any] = lambda: None) -> float:
    """The shortest processor time of `call`; `before` is not timed."""
    times = []
    for _ in range(repeats):
        before()
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return 1e3 * min(times)


def memory() -> str:
    """Speeds of reading, copying and checking one tensor."""
    tensor = torch.randint(-(1 << 62), 1 << 62, (BYTES // 8,))
    other = torch.empty_like(tensor)
    names = {"read": tensor.sum, "copied": partial(other.copy_, tensor), "checked": partial(checksums, [tensor])}
    speed = {name: BYTES / 1e6 / milliseconds(call, 5) for name, call in names.items()}
    shown = ", ".join(f"{name} at {value:.1f} GB/s" for name, value in speed.items())
    return f"One tensor of {BYTES >> 20} MiB: {shown}: {speed['checked'] / speed['read']:.2f} of reading it."


def rows(path: str) -> dict[str, float]:
    """What each check costs for one model."""
    model: Any = load_model(path).eval()
    identify(model)
    mine = Fingerprint.of(model, TOKENS)
    tensor = next(weight.stored.tensors[0] for weight in weights(model))
    recorded = record(*run(model, TOKENS))

    @torch.no_grad()
    def write() -> None:
        tensor.view(-1)[:1].mul_(1.0)

    def identified() -> None:
        identify(model)

    first = milliseconds(partial(weights_checksum, model), 5, partial(forget, model))
    tensors = {id(inner): inner.detach() for weight in weights(model) for inner in weight.stored.tensors}
    whole = [inner.reshape(-1)[: inner.numel() // 8 * 8].view(torch.int64) for inner in tensors.values()]
    identified()
    return {
        "size of the weights in MB": sum(inner.nbytes for inner in tensors.values()) / 1e6,
        "reading them (a sum)": milliseconds(lambda: [inner.sum() for inner in whole], 5),
        "checksum of all weights, once": first,
        "after one weight was written": milliseconds(identified, 10, write),
        "an unchanged model again": milliseconds(identified, 100),
        "the whole `check` of an unchanged model": milliseconds(partial(mine.check, model), 100),
        "probe, once per artifact and model object": milliseconds(
            partial(check, model, TOKENS, recorded, mine.dtype), 5
        ),
    }


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, required=True, help="Folder of a model; may be repeated.")
def main(models: tuple[str, ...]) -> None:
    """Print the speed of memory and a table of the checks."""
    torch.set_num_threads(1)
    print(memory(), end="\n\n")
    found = {path: rows(path) for path in models}
    print("| |", *(f"{path} |" for path in found))
    print("|---|", *("--- |" for _ in found))
    for name in next(iter(found.values())):
        print(f"| {name} |", *(f"{values[name]:.4g} |" for values in found.values()))


if __name__ == "__main__":
    main()
