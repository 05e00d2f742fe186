"""Retrieval accuracy and fidelity against size, on the reference model: exact cache, uniform quantisation, each
transform and level.

    python -m eval.accuracy --contexts 16 --lines 128 --questions 8

Every codec answers the same questions from the same contexts. Columns: bits per element with everything counted, exact
match of the retrieved number, share of answers that equal the exact cache's word for word, and KL divergence (nats per
token, exact against lossy) of the next-token distribution over the questions and their right answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import hf_cachegen
from eval import scorers, uniform
from eval.reference import MODEL_PATH, held_out_lines
from eval.reference.corpus import Document
from hf_cachegen import CacheGenCache, CacheGenConfig, Profile
from hf_cachegen.finding import find

ANSWER_TOKENS = 24
"""Enough for a whole line of the record."""
KV = tuple[Sequence[Tensor], Sequence[Tensor]]
Codec = Callable[[KV], list[tuple[str, KV, float]]]
"""Exact keys and values to (name, decoded keys and values, bits per element) of every level."""


@dataclass
class Row:
    """One line of the result; all but `codec` are means over the contexts."""

    codec: str
    bits_per_element: float = 0.0
    exact_match: float = 0.0
    same_answer: float = 0.0
    kl: float = 0.0


def exact(kv: KV) -> list[tuple[str, KV, float]]:
    return [("exact", kv, 8.0 * kv[0][0].dtype.itemsize)]


def uniform_codec(bits: int) -> Codec:
    def codec(kv: KV) -> list[tuple[str, KV, float]]:
        decoded = tuple([uniform.quantise(x, bits) for x in side] for side in kv)
        return [(f"uniform {bits}-bit", (decoded[0], decoded[1]), uniform.bits_per_element(bits, kv[0][0].shape[-1]))]

    return codec


def cachegen_codec(config: CacheGenConfig, profile: Profile | None = None) -> Codec:
    def codec(kv: KV) -> list[tuple[str, KV, float]]:
        encoded = hf_cachegen.encode_kv(*kv, config, profile)
        name = f"lossless {config.transform}" if config.lossless else config.transform
        return [
            (
                f"{name}, level {level}",
                hf_cachegen.decode_kv(encoded, level),
                8 * encoded.nbytes_at(level) / encoded.geometry.elements,
            )
            for level in range(encoded.levels, 0, -1)
        ]

    return codec


def default_codecs(chunk_tokens: int, profile: Profile | None) -> list[Codec]:
    """Everything the package has, and uniform quantisation; klt where there is a profile."""
    config = CacheGenConfig(chunk_tokens=chunk_tokens)
    return [
        exact,
        uniform_codec(8),
        uniform_codec(4),
        uniform_codec(3),
        cachegen_codec(replace(config, transform="identity", lossless=True)),
        cachegen_codec(replace(config, transform="delta")),
        cachegen_codec(replace(config, transform="identity")),
        *([cachegen_codec(replace(config, transform="klt"), profile)] if profile else []),
    ]


def evaluate(model: Any, tokenizer: Any, codecs: Sequence[Codec], documents: Sequence[Document]) -> list[Row]:
    """Rows in the order of the codecs."""
    rows: dict[str, Row] = {}
    contexts = len(documents)
    for document in tqdm(documents, "contexts"):
        context_ids = tokenizer(document.text, return_tensors="pt").input_ids
        prompts = [tokenizer(document.text + q.prompt).input_ids for q in document.questions]
        cache = CacheGenCache.from_context(model, context_ids)
        kv = (cache.kv.keys, cache.kv.values)
        reference: tuple[list[str], list[Tensor]] | None = None
        for codec in codecs:
            for name, decoded, bits in codec(kv):
                lossy = CacheGenCache.from_cache(DynamicCache(list(zip(*decoded, strict=True))), context_ids, model)
                outputs = answers(model, tokenizer, lossy, prompts)
                logs = [continuation(model, tokenizer, decoded, q.prompt + q.completion) for q in document.questions]
                reference = reference or (outputs, logs)
                row = rows.setdefault(name, Row(name))
                row.bits_per_element += bits / contexts
                right = [scorers.line_retrieval(o, q.answer) for o, q in zip(outputs, document.questions, strict=True)]
                row.exact_match += sum(right) / len(right) / contexts
                row.same_answer += (
                    sum(a == b for a, b in zip(outputs, reference[0], strict=True)) / len(right) / contexts
                )
                row.kl += sum(map(kl, reference[1], logs)) / len(logs) / contexts
    return list(rows.values())


def answers(model: Any, tokenizer: Any, cache: CacheGenCache, prompts: list[list[int]]) -> list[str]:
    """Greedy answers, all questions of a context in one batch, each up to the end of its line."""
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    out = hf_cachegen.generate(model, **batch, cache=cache, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.split("\n")[0] for text in texts]


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, kv: KV, text: str) -> Tensor:
    """Log-probabilities float32 [tokens, vocabulary] of what follows the context."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    past = DynamicCache(list(zip(*kv, strict=True)))
    logits: Tensor = model(ids, past_key_values=past).logits[0]
    return logits.float().log_softmax(-1)


def kl(exact: Tensor, lossy: Tensor) -> float:
    return (exact.exp() * (exact - lossy)).sum(-1).mean().item()


def table(rows: Sequence[Row], exact_bits: float) -> Table:
    view = Table("codec", "bits per element", "of exact", "exact match", "same answer", "KL, nats per token")
    for row in rows:
        share = f"{row.bits_per_element / exact_bits:.1%}"
        view.add_row(
            row.codec,
            f"{row.bits_per_element:.2f}",
            share,
            f"{row.exact_match:.3f}",
            f"{row.same_answer:.3f}",
            f"{row.kl:.5f}",
        )
    return view


@click.command()
@click.option("--model", default=str(MODEL_PATH), show_default="the reference model")
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(["bfloat16", "float16", "float32"]))
@click.option("--contexts", default=16, show_default=True)
@click.option("--lines", default=128, show_default=True, help="lines of each record, 8 tokens each")
@click.option("--questions", default=8, show_default=True, help="questions about each record")
@click.option("--any-numbers", is_flag=True, help="numbers of a record may share their first token")
@click.option("--chunk-tokens", default=512, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="write the rows as JSON")
def main(
    model: str,
    dtype: str,
    contexts: int,
    lines: int,
    questions: int,
    any_numbers: bool,
    chunk_tokens: int,
    out: Path | None,
) -> None:
    """Accuracy and fidelity against size."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = [held_out_lines(index, lines, questions, distinct=not any_numbers) for index in range(contexts)]
    rows = evaluate(loaded, tokenizer, default_codecs(chunk_tokens, find("auto", model)), documents)
    Console(width=110).print(table(rows, rows[0].bits_per_element))
    if out:
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
