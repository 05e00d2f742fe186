"""The two steps of `hf-cachegen demo`, each in a process of its own: encode the contexts, and answer from artifacts.

`python -m hf_cachegen.cli.demo_steps encode|answer CHECKOUT FOLDER` prints its result as JSON.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from hf_cachegen.cli.demo import CONTEXTS, MODEL

MAX_NEW_TOKENS = 24
"""Enough for one line of a record."""
TRANSFORMS = ("klt", "delta")
LEVELS = (3, 2, 1)


@dataclass(frozen=True)
class Document:
    """A context, and questions about it with their answers."""

    context: str
    questions: list[dict[str, str]]

    def count_right(self, outputs: list[str]) -> int:
        """Count the outputs whose last number is the answer, the score of LongChat's line retrieval."""
        last = [(re.findall(r"\d+", output) or [None])[-1] for output in outputs]
        return sum(number == question["answer"] for number, question in zip(last, self.questions, strict=True))


def load(root: Path) -> tuple[Any, Any, list[Document]]:
    """Return (model in bfloat16, tokenizer, documents)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(root / MODEL, dtype=torch.bfloat16)
    lines = (root / CONTEXTS).read_text(encoding="utf-8").splitlines()
    return model, AutoTokenizer.from_pretrained(root / MODEL), [Document(**json.loads(line)) for line in lines]


def answers(model: Any, tokenizer: Any, cache: Any, document: Document) -> list[str]:
    """Answer all questions about a context in one batch, with the stock call; return the first line of each answer."""
    prompts = [document.context + question["prompt"] for question in document.questions]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    output = model.generate(**inputs, cache=cache, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.lstrip("\n").split("\n")[0] for text in texts]


def encode(root: Path, folder: Path) -> dict[str, Any]:
    """Prefill the contexts, answer from the exact caches, and save artifacts.

    Returns:
        Sums over the contexts of bytes, seconds and right answers; and all outputs.
    """
    from hf_cachegen.cache import CacheGenCache
    from hf_cachegen.config import CacheGenConfig

    model, tokenizer, documents = load(root)
    # The first pass through a model is slower than the others, and is not counted.
    CacheGenCache.from_context(model, tokenizer(documents[0].context).input_ids)
    result: dict[str, Any] = {"contexts": len(documents), "tokens": 0, "exact_bytes": 0, "seconds": 0.0, "right": 0}
    outputs = []
    for index, document in enumerate(documents):
        cache = CacheGenCache.from_context(model, tokenizer(document.context).input_ids, tokenizer=tokenizer)
        found = answers(model, tokenizer, cache, document)
        for transform in TRANSFORMS:
            cache.save_pretrained(folder / transform / str(index), CacheGenConfig(transform=transform))
        result["tokens"] += cache.report.context_tokens
        result["exact_bytes"] += cache.report.exact_bytes
        result["seconds"] += cache.report.prefill_seconds
        result["right"] += document.count_right(found)
        outputs += found
    return {**result, "outputs": outputs}


def answer(root: Path, folder: Path) -> list[dict[str, Any]]:
    """Load every artifact at every level, and answer from it; return a row for each transform and level."""
    from hf_cachegen.cache import CacheGenCache

    model, tokenizer, documents = load(root)
    rows = []
    for transform in TRANSFORMS:
        CacheGenCache.from_pretrained(folder / transform / "0", model=model)  # the first load is slower, as above
        for level in LEVELS:
            row: dict[str, Any] = {"transform": transform, "level": level, "bytes": 0, "seconds": 0.0, "right": 0}
            outputs = []
            for index, document in enumerate(documents):
                artifact = folder / transform / str(index)
                cache = CacheGenCache.from_pretrained(artifact, model=model, level=level, tokenizer=tokenizer)
                found = answers(model, tokenizer, cache, document)
                row["bytes"] += cache.report.loaded_bytes
                row["seconds"] += cache.report.load_seconds
                row["right"] += document.count_right(found)
                outputs += found
            rows.append({**row, "outputs": outputs})
    return rows


if __name__ == "__main__":
    name, root, folder = sys.argv[1:]
    click.echo(json.dumps({"encode": encode, "answer": answer}[name](Path(root), Path(folder))))
