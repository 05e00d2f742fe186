"""Compare klt's code length with the entropy of its symbols, on the reference model.

    python -m benchmarks.klt_coding

For contexts that the profile has not seen, it prints the bits per element up to each level, of the chunks with their
side information and of all files. Beside them is the code length of the same symbols under other distributions, one for
each coefficient (and digit's context): learnt from as many samples as the profile ("held-out entropy"), and the
context's own ("own entropy", a bound, because these distributions are not stored). No tokens are protected.
"""

from __future__ import annotations

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.reference import CALIBRATION_SEED, HELD_OUT_SEED, MODEL_PATH, TASKS, sample
from hf_cachegen import CacheGenConfig, Profile, encode_kv
from hf_cachegen.codec.fit import Counts
from hf_cachegen.codec.rows import gather, spans_of
from hf_cachegen.codec.tables import DIGIT_SYMBOLS, VALUE_SYMBOLS
from hf_cachegen.codec.transforms.klt import Klt
from hf_cachegen.profiles.learning import prefill

CONFIG = CacheGenConfig(transform="klt", protect_first=0, protect_last=0, measure=False)
PRIOR = 0.02
"""Added to each count of a distribution learnt from samples."""


def bits(counts: Tensor, learnt: Tensor, symbols: int) -> float:
    """Return the code length of counts [components, contexts x symbols] under distributions of other counts."""
    found, weights = counts.reshape(-1, symbols).double(), learnt.reshape(-1, symbols).double()
    share = weights / weights.sum(1, keepdim=True).clamp_min(1e-12)
    return float(-(found * share.clamp_min(1e-12).log2()).sum())


@click.command()
@click.option("--contexts", default=4, show_default=True, help="Test contexts of each task.")
@click.option("--samples", default=32, show_default=True, help="Samples of each task for the held-out distributions.")
@click.option("--tokens", default=1024, show_default=True, help="Approximate length of a context in tokens.")
def main(contexts: int, samples: int, tokens: int) -> None:
    """Compare klt's code length with the entropy."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    profile = Profile.load(MODEL_PATH)

    def counted(keys: list[Tensor], values: list[Tensor], codec: Klt, counts: Counts) -> None:
        for span in spans_of(keys[0].shape[2], CONFIG.chunk_tokens):
            counts.add(codec.inner.symbols(codec.checked(gather(keys, values, span), span))[0])

    learnt = Counts(len(profile.base_entries), profile.levels)
    for task in TASKS:
        for n in range(samples):
            keys, values, _ = prefill(model, sample(tokenizer, task, CALIBRATION_SEED + n, tokens)[0])
            counted(keys, values, Klt(encode_kv(keys, values, CONFIG, profile).geometry, CONFIG, profile), learnt)
    widths = [VALUE_SYMBOLS] + [DIGIT_SYMBOLS] * (profile.levels - 1)
    view = Table("task", "level", "chunks and side", "all files", "held-out entropy", "own entropy", "to held-out")
    for task in TASKS:
        totals = torch.zeros(4, profile.levels, dtype=torch.float64)
        for n in range(contexts):
            keys, values, _ = prefill(model, sample(tokenizer, task, HELD_OUT_SEED + n, tokens)[0])
            encoded = encode_kv(keys, values, CONFIG, profile)
            counts, elements = Counts(len(profile.base_entries), profile.levels), encoded.geometry.elements * contexts
            counted(keys, values, Klt(encoded.geometry, CONFIG, profile), counts)
            sizes = torch.tensor([8.0 * sum(map(len, part)) for part in encoded.parts], dtype=torch.float64)
            sizes[0] += 8 * len(encoded.side)
            everything = [8.0 * encoded.nbytes_at(level) for level in range(1, encoded.levels + 1)]
            pairs = [*zip(counts.parts, learnt.parts, widths, strict=True)]
            ideal = [bits(mine, theirs.double() + PRIOR, width) for mine, theirs, width in pairs]
            own = [bits(mine, mine, width) for mine, _, width in pairs]
            totals[0] += sizes.cumsum(0) / elements
            totals[1] += torch.tensor(everything, dtype=torch.float64) / elements
            totals[2] += torch.tensor(ideal, dtype=torch.float64).cumsum(0) / elements
            totals[3] += torch.tensor(own, dtype=torch.float64).cumsum(0) / elements
        for level, (coded, files, ideal_bits, own_bits) in enumerate(totals.T.tolist(), 1):
            numbers = [f"{value:.3f}" for value in (coded, files, ideal_bits, own_bits)]
            view.add_row(task, str(level), *numbers, f"{coded / ideal_bits - 1:+.1%}")
    Console(width=110).print(view)


if __name__ == "__main__":
    main()
