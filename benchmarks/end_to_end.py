"""Time the whole way of a context: prefill, save, load, first token, beside what a user would do instead.

    python -m benchmarks.end_to_end --model runs/smollm2-135m --text wikitext2_valid.txt --profile PROFILE --out PATH
    python -m benchmarks.end_to_end --model random-1b --tokens 1024 --tokens 4096 --out PATH

"random-1b" is a Llama of 1.1 B parameters with random weights: its times are those of a real model, its bits are not.
Ways to keep a context: this package's transforms, torch.save and safetensors of the exact tensors, Transformers'
QuantizedCache where its back-end is installed (pickled, since it has no format), and, on request and at the shortest
length alone, the paper's arithmetic coder (torchac) on the symbols of delta. Save is from tensors to files, load from
files to tensors in the layout of the model. Files are read from a warm page cache. The first token is that of a prompt
of QUESTION more tokens, from the loaded tensors. Medians of --repeats, all in one process; the model's identity is
known before the clock starts, as in a server. A second table shows how the times grow with the length.
"""

from __future__ import annotations

import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import matplotlib
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

from eval import surroundings, transformers_quantised
from eval.models import load_model
from hf_cachegen import CacheGenCache, CacheGenConfig, Profile
from hf_cachegen.errors import ConfigError

matplotlib.use("Agg")
from matplotlib import pyplot

QUESTION = 16
RANDOM = "random-1b"
QUANTISED = "quanto-4"
PREFILL = "prefill"
ONE: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False}
"""Options for the first token alone."""


@dataclass(frozen=True)
class Measured:
    """One way at one length.

    Attributes:
        way: its name.
        tokens: length of the context.
        bits: stored bits per element.
        save: seconds from tensors to files.
        load: seconds from files to tensors.
        first: seconds from tensors to the first token.
    """

    way: str
    tokens: int
    bits: float
    save: float
    load: float
    first: float


@dataclass(frozen=True)
class Way:
    """A way to keep a context.

    Attributes:
        name: its name.
        save: writes an exact cache into a folder.
        load: returns what a folder holds, as an object for `model.generate(cache=...)`.
    """

    name: str
    save: Callable[[CacheGenCache, Path], None]
    load: Callable[[Path], Any]


def ours(name: str, model: Any, profile: Profile | None, level: int, config: CacheGenConfig) -> Way:
    """Return a way of this package."""

    def save(exact: CacheGenCache, folder: Path) -> None:
        exact.save_pretrained(folder / "artifact", config)

    def load(folder: Path) -> CacheGenCache:
        return CacheGenCache.from_pretrained(folder / "artifact", model, level, profile=profile or "auto")

    return Way(name, save, load)


def ways(model: Any, profile: Profile | None, torchac: bool) -> Iterator[Way]:
    """Yield all ways that can be used here."""
    if profile is not None:
        config = CacheGenConfig(transform="klt", levels=profile.levels)
        for level in (1, profile.levels):
            yield ours(f"klt, level {level}", model, profile, level, config)
    for level in (1, 3):
        yield ours(f"delta, level {level}", model, None, level, CacheGenConfig(transform="delta"))
    yield ours("lossless", model, None, 1, CacheGenConfig(lossless=True))
    yield Way("torch.save", _torch_save, _torch_load)
    yield Way("safetensors", _safetensors_save, _safetensors_load)
    if transformers_quantised.missing(QUANTISED) is None:
        yield Way(
            f"QuantizedCache, {QUANTISED}", lambda exact, folder: _quantised_save(model, exact, folder), _quantised_load
        )
    if torchac:
        yield ours("delta with torchac, level 3", model, None, 3, CacheGenConfig(transform="delta", coder="torchac"))


def _pairs(exact: CacheGenCache) -> list[tuple[Tensor, Tensor]]:
    return list(zip(exact.kv.keys, exact.kv.values, strict=True))


def _torch_save(exact: CacheGenCache, folder: Path) -> None:
    torch.save(_pairs(exact), folder / "kv.pt")


def _torch_load(folder: Path) -> DynamicCache:
    return DynamicCache(torch.load(folder / "kv.pt", weights_only=True))


def _safetensors_save(exact: CacheGenCache, folder: Path) -> None:
    named = {
        f"{i}.{part}": x.contiguous()
        for i, pair in enumerate(_pairs(exact))
        for part, x in zip("kv", pair, strict=True)
    }
    save_file(named, folder / "kv.safetensors")


def _safetensors_load(folder: Path) -> DynamicCache:
    found = load_file(folder / "kv.safetensors")
    # A copy: the file is mapped, and would be read while the model runs.
    return DynamicCache([(found[f"{i}.k"].clone(), found[f"{i}.v"].clone()) for i in range(len(found) // 2)])


def _quantised_save(model: Any, exact: CacheGenCache, folder: Path) -> None:
    held = transformers_quantised.quantise(QUANTISED, model.config, exact.kv.keys, exact.kv.values)
    buffer = io.BytesIO()
    torch.save((held, exact.kv.geometry.tokens), buffer)
    (folder / "kv.pt").write_bytes(buffer.getvalue())


def _quantised_load(folder: Path) -> DynamicCache:
    held, tokens = torch.load(folder / "kv.pt", weights_only=False)  # this process wrote it
    keys, values = transformers_quantised.dequantise(held, tokens)
    return DynamicCache(list(zip(keys, values, strict=True)))


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the time of some work and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(model: Any, ids: Tensor, profile: Profile | None, torchac: bool, repeats: int) -> Iterator[Measured]:
    """Yield the prefill, then every way.

    Args:
        model: the model.
        ids: int64 [1, tokens + QUESTION], the context and a question.
        profile: for klt.
        torchac: also measure the paper's coder, which is too slow for long contexts.
        repeats: measurements of each way.
    """
    context, tokens = ids[:, :-QUESTION], ids.shape[1] - QUESTION
    exact = CacheGenCache.from_context(model, context, profile=profile)
    prefill, _ = seconds(partial(model.generate, ids, **ONE))
    yield Measured(PREFILL, tokens, 8 * 32 / exact.kv.geometry.elements, 0.0, 0.0, prefill)
    for way in tqdm(list(ways(model, profile, torchac)), f"{tokens} tokens"):
        found: list[tuple[float, float, float]] = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                save, _ = seconds(partial(way.save, exact, folder))
                nbytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                load, cache = seconds(partial(way.load, folder))
                if isinstance(cache, CacheGenCache):
                    nbytes = cache.report.loaded_bytes or nbytes
                first, _ = seconds(partial(model.generate, ids, cache=cache, **ONE))
                found.append((save, load, first))
        medians = (statistics.median(column) for column in zip(*found, strict=True))
        yield Measured(way.name, tokens, 8 * nbytes / exact.kv.geometry.elements, *medians)


def table(rows: list[Measured]) -> str:
    """Format the rows as Markdown; the last two fields are ratios to the prefill of the same length."""
    lines = [
        "| tokens | way | bits per element | save, s | load, s | first token, s "
        "| load + first / prefill | save / prefill |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    prefill = {row.tokens: row.first for row in rows if row.way == PREFILL}
    for row in rows:
        base = prefill[row.tokens]
        cells = [row.tokens, row.way, f"{row.bits:.2f}", f"{row.save:.3f}", f"{row.load:.3f}", f"{row.first:.3f}",
                 f"{(row.load + row.first) / base:.3f}", f"{row.save / base:.3f}"]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def growth(rows: list[Measured]) -> str:
    """Format the exponents of the times over the length, from the shortest to the longest context, as Markdown.

    An exponent of 1 is a time in proportion to the length; a fixed cost lowers it.
    """
    lines = ["| way | save | load | first token |", "|---|---:|---:|---:|"]
    for name in dict.fromkeys(row.way for row in rows):
        line = sorted((row for row in rows if row.way == name), key=lambda row: row.tokens)
        short, long = line[0], line[-1]
        if short.tokens == long.tokens:
            continue  # one length alone
        pairs = [(short.save, long.save), (short.load, long.load), (short.first, long.first)]
        base = math.log(long.tokens / short.tokens)
        cells = [f"{math.log(b / a) / base:.2f}" if a > 0 and b > 0 else "" for a, b in pairs]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Measured], out: Path) -> None:
    """Draw the time to the first token, and the time to save, over the length."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for name in dict.fromkeys(row.way for row in rows):
        line = [row for row in rows if row.way == name]
        lengths = [row.tokens for row in line]
        axes[0].plot(lengths, [row.load + row.first for row in line], marker="o", markersize=3, label=name)
        if name != PREFILL:
            axes[1].plot(lengths, [row.save for row in line], marker="o", markersize=3, label=name)
    for axis, title in zip(axes, ("load and first token, seconds", "save, seconds"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel=title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out.with_suffix(".svg"))
    pyplot.close(figure)


def random_model() -> Any:
    """Return a Llama of 1.1 B parameters with random weights, in bfloat16."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=32000, max_position_embeddings=16384,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    rotary = model.model.rotary_emb
    rotary.inv_freq, _ = rotary.compute_default_rope_parameters(config)
    rotary.original_inv_freq = rotary.inv_freq
    return model.eval()


@click.command()
@click.option("--model", "name", required=True, help=f"Folder or Hub id of the model, or {RANDOM}.")
@click.option("--text", type=click.Path(path_type=Path), help="Text of the contexts; random tokens without it.")
@click.option("--tokens", "lengths", type=int, multiple=True, default=(1024, 4096, 8000), show_default=True,
              help="Length of the context; repeatable.")  # fmt: skip
@click.option("--profile", help="Location of the model's profile, for klt.")
@click.option("--dtype", default="auto", show_default=True, help="Dtype of the model, such as bfloat16.")
@click.option("--torchac", is_flag=True, help="Also measure the paper's arithmetic coder.")
@click.option("--repeats", default=3, show_default=True, help="Measurements of each way.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Path of the results, without suffix.")
def main(
    name: str, text: Path | None, lengths: tuple[int, ...], profile: str | None, dtype: str, torchac: bool,
    repeats: int, out: Path,
) -> None:  # fmt: skip
    """Time the whole way of a context."""
    model = random_model() if name == RANDOM else load_model(name, dtype=dtype, device="cpu")
    found = None if profile is None else Profile.from_pretrained(profile)
    most = max(lengths) + QUESTION
    if text is None:
        ids = torch.randint(0, model.config.vocab_size, (1, most), generator=torch.Generator().manual_seed(0))
    else:
        ids = AutoTokenizer.from_pretrained(name)(text.read_text(), return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < most:
        raise ConfigError(f"expected a text of at least {most} tokens, got {ids.shape[1]}")
    rows: list[Measured] = []
    for tokens in sorted(lengths):
        rows += measure(model, ids[:, : tokens + QUESTION], found, torchac and tokens == min(lengths), repeats)
    tables = table(rows)
    if len(set(lengths)) > 1:
        tables += f"\n## Growth with the length\n\nTimes grow with the length to the power of:\n\n{growth(rows)}"
    print(tables)
    out.parent.mkdir(parents=True, exist_ok=True)
    session = surroundings.session(1)
    held = str(model.dtype).removeprefix("torch.")
    about = f"{name} in {held}, {session['processor']}, {session['threads']} threads, medians of {repeats}."
    out.with_suffix(".md").write_text(f"# End to end\n\n{about}\n\n{tables}")
    out.with_suffix(".json").write_text(json.dumps({"session": session, "rows": [asdict(r) for r in rows]}, indent=1))
    if len(lengths) > 1:
        plot(rows, out)


if __name__ == "__main__":
    main()
