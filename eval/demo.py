"""`make demo` and `hf-cachegen demo`: a real model answers questions about long contexts from compressed caches.

One process reads the contexts, answers from the exact cache and saves artifacts, once with the model's profile (klt)
and once as CacheGen was published (delta). A fresh process loads them, at every level, and answers the same questions.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CONTEXTS, LINES, QUESTIONS = 4, 128, 8
"""Records of 128 lines (about 1,080 tokens), 8 questions about each."""
NEW_TOKENS = 24
"""Enough for a whole line of the record."""
TRANSFORMS = ("klt", "delta")
LEVELS = (3, 2, 1)


def load() -> tuple[Any, Any]:
    """(model, tokenizer), the reference model in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from eval.reference import MODEL_PATH

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.bfloat16)
    return model, AutoTokenizer.from_pretrained(MODEL_PATH)


def prompts_of(tokenizer: Any, index: int) -> tuple[Any, list[list[int]]]:
    """(document, token ids of the context followed by each question)."""
    from eval.reference import held_out_lines

    document = held_out_lines(index, LINES, QUESTIONS)
    return document, [tokenizer(document.text + question.prompt).input_ids for question in document.questions]


def right_answers(document: Any, outputs: list[str]) -> int:
    """How many of the outputs name the number asked for."""
    from eval import scorers

    return sum(scorers.line_retrieval(o, q.answer) for o, q in zip(outputs, document.questions, strict=True))


def encode(folder: Path) -> dict[str, Any]:
    """First process: prefill, answer from the exact cache, save. Bytes and seconds are sums over the contexts."""
    from eval.answers import answers, first_line
    from hf_cachegen import CacheGenCache, CacheGenConfig

    model, tokenizer = load()
    # The first pass through a model is slower than the rest and is not counted.
    CacheGenCache.from_context(model, prompts_of(tokenizer, 0)[1][0])
    result: dict[str, Any] = {"tokens": 0, "exact_bytes": 0, "seconds": 0.0, "right": 0, "outputs": []}
    for index in range(CONTEXTS):
        document, prompts = prompts_of(tokenizer, index)
        cache = CacheGenCache.from_context(model, tokenizer(document.text).input_ids, tokenizer=tokenizer)
        outputs = [first_line(text) for text in answers(model, tokenizer, cache, prompts, NEW_TOKENS)]
        for transform in TRANSFORMS:
            cache.save_pretrained(folder / transform / str(index), CacheGenConfig(transform=transform))
        result["tokens"] += cache.report.context_tokens
        result["exact_bytes"] += cache.report.exact_bytes
        result["seconds"] += cache.report.prefill_seconds
        result["right"] += right_answers(document, outputs)
        result["outputs"] += outputs
    return result


def answer(folder: Path) -> list[dict[str, Any]]:
    """Second process: load every artifact at every level and answer from it."""
    from eval.answers import answers, first_line
    from hf_cachegen import CacheGenCache

    model, tokenizer = load()
    rows = []
    for transform in TRANSFORMS:
        CacheGenCache.from_pretrained(folder / transform / "0", model=model)  # the first load is slower, as above
        for level in LEVELS:
            row: dict[str, Any] = {"transform": transform, "level": level, "bytes": 0, "seconds": 0.0, "right": 0}
            outputs = []
            for index in range(CONTEXTS):
                document, prompts = prompts_of(tokenizer, index)
                place = folder / transform / str(index)
                cache = CacheGenCache.from_pretrained(place, model=model, level=level, tokenizer=tokenizer)
                found = [first_line(text) for text in answers(model, tokenizer, cache, prompts, NEW_TOKENS)]
                row["bytes"] += cache.report.loaded_bytes
                row["seconds"] += cache.report.load_seconds
                row["right"] += right_answers(document, found)
                outputs += found
            rows.append({**row, "outputs": outputs})
    return rows


def in_fresh_process(step: str, folder: Path) -> Any:
    """Runs `python -m eval.demo STEP FOLDER` from the checkout and returns the JSON that it prints last."""
    command = [sys.executable, "-m", "eval.demo", step, str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_demo(console: Console, json_output: bool) -> int:
    """Both steps and the table. Exit code 0 when every answer at klt's finest level is the exact cache's."""
    with tempfile.TemporaryDirectory() as name, console.status("one process encodes ..."):
        exact = in_fresh_process("encode", Path(name))
        with console.status("... another one answers"):
            rows = in_fresh_process("answer", Path(name))
    for row in rows:
        row["same"] = sum(a == b for a, b in zip(row.pop("outputs"), exact["outputs"], strict=True))
    del exact["outputs"]
    if json_output:
        console.print_json(
            json.dumps({"contexts": CONTEXTS, "questions": CONTEXTS * QUESTIONS, "exact": exact, "levels": rows})
        )
    else:
        console.print(view(exact, rows))
    return 0 if rows[0]["same"] == CONTEXTS * QUESTIONS else 1


def view(exact: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    """Means over the contexts."""
    asked = CONTEXTS * QUESTIONS
    title = f"{CONTEXTS} contexts of {exact['tokens'] // CONTEXTS} tokens, {asked} questions"
    table = Table("cache", "bytes", "ratio", "ready in", "exact match", "same answers", title=title)

    def add(name: str, size: int, seconds: float, right: int, same: int) -> None:
        cells = f"{size // CONTEXTS:,}", f"{exact['exact_bytes'] / size:.1f}", f"{1000 * seconds / CONTEXTS:.0f} ms"
        table.add_row(name, *cells, f"{right / asked:.1%}", f"{same / asked:.1%}")

    add("exact, by prefill", exact["exact_bytes"], exact["seconds"], exact["right"], asked)
    for row in rows:
        add(f"{row['transform']}, level {row['level']}", row["bytes"], row["seconds"], row["right"], row["same"])
    return table


def main() -> None:
    step, folder = sys.argv[1:]
    print(json.dumps({"encode": encode, "answer": answer}[step](Path(folder))))


if __name__ == "__main__":
    main()
