"""`make demo` and `hf-cachegen demo`: a real model answers questions about long contexts from compressed caches.

One process reads the contexts, answers from the exact cache and saves artifacts; a fresh process loads them, at every
level, and answers the same questions. The table puts both side by side.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CONTEXTS, LINES, QUESTIONS = 6, 128, 8
"""Records of 128 lines (about 1,080 tokens), 8 questions about each."""


def load() -> tuple[Any, Any]:
    """(model, tokenizer), the reference model in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eval.reference import MODEL_PATH

    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.bfloat16)
    return model, AutoTokenizer.from_pretrained(MODEL_PATH)


def prompts_of(tokenizer: Any, index: int) -> tuple[Any, list[list[int]]]:
    """(document, token ids of the context followed by each question)."""
    from eval.reference import held_out_lines

    document = held_out_lines(index, LINES, QUESTIONS)
    return document, [tokenizer(document.text + question.prompt).input_ids for question in document.questions]


def share_right(document: Any, outputs: list[str]) -> float:
    from eval import scorers

    right = [scorers.line_retrieval(o, q.answer) for o, q in zip(outputs, document.questions, strict=True)]
    return sum(right) / len(right)


def encode(folder: Path) -> dict[str, Any]:
    """First process: prefill, answer from the exact cache, save. Sizes in bytes and times in seconds, summed over
    contexts.
    """
    from eval.accuracy import answers
    from hf_cachegen import CacheGenCache

    model, tokenizer = load()
    result: dict[str, Any] = {"tokens": 0, "exact_bytes": 0, "prefill_seconds": 0.0, "right": 0.0, "outputs": []}
    for index in range(CONTEXTS):
        document, prompts = prompts_of(tokenizer, index)
        ids = tokenizer(document.text).input_ids
        if index == 0:
            CacheGenCache.from_context(
                model, ids
            )  # the first pass through a model is slower than the rest: not counted
        cache = CacheGenCache.from_context(model, ids)
        outputs = answers(model, tokenizer, cache, prompts)
        start = time.perf_counter()
        cache.save_pretrained(folder / str(index))
        result["encode_seconds"] += time.perf_counter() - start
        result["tokens"] += len(ids)
        result["exact_bytes"] += cache.report.exact_bytes
        result["prefill_seconds"] += cache.report.prefill_seconds
        result["right"] += share_right(document, outputs) / CONTEXTS
        result["outputs"] += outputs
    return result


def answer(folder: Path) -> list[dict[str, Any]]:
    """Second process: load every artifact at every level and answer from it."""
    from eval.accuracy import answers
    from hf_cachegen import CacheGenCache

    model, tokenizer = load()
    CacheGenCache.from_pretrained(folder / "0", model=model)  # as above
    rows = []
    for level in (1, 2, 3):
        row: dict[str, Any] = {"level": level, "bytes": 0, "load_seconds": 0.0, "right": 0.0, "outputs": []}
        for index in range(CONTEXTS):
            document, prompts = prompts_of(tokenizer, index)
            cache = CacheGenCache.from_pretrained(folder / str(index), model=model, level=level)
            outputs = answers(model, tokenizer, cache, prompts)
            row["bytes"] += cache.report.loaded_bytes
            row["load_seconds"] += cache.report.load_seconds
            row["right"] += share_right(document, outputs) / CONTEXTS
            row["outputs"] += outputs
        rows.append(row)
    return rows


def in_fresh_process(step: str, folder: Path) -> Any:
    """Runs `python -m eval.demo STEP FOLDER` from the checkout and returns the JSON that it prints last."""
    command = [sys.executable, "-m", "eval.demo", step, str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_demo(console: Console, json_output: bool) -> int:
    """Both steps and the table. Returns an exit code: 0 when every level-3 answer is the exact cache's."""
    with tempfile.TemporaryDirectory() as name:
        exact = in_fresh_process("encode", Path(name))
        rows = in_fresh_process("answer", Path(name))
    for row in rows:
        row["same"] = sum(a == b for a, b in zip(row.pop("outputs"), exact["outputs"], strict=True)) / len(
            exact["outputs"]
        )
    del exact["outputs"]
    if json_output:
        console.print_json(json.dumps({"exact": exact, "levels": rows}))
    else:
        show(console, exact, rows)
    return 0 if rows[-1]["same"] == 1.0 else 1


def show(console: Console, exact: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    per = f"{CONTEXTS} contexts of {exact['tokens'] // CONTEXTS} tokens, {CONTEXTS * QUESTIONS} questions"
    view = Table("cache", "bytes per context", "ratio", "ready in", "exact match", "same answers", title=per)

    def seconds(total: float) -> str:
        return f"{1000 * total / CONTEXTS:.0f} ms"

    size = exact["exact_bytes"]
    view.add_row(
        "exact, by prefill",
        f"{size // CONTEXTS:,}",
        "1.0",
        seconds(exact["prefill_seconds"]),
        f"{exact['right']:.1%}",
        "",
    )
    for row in rows:
        view.add_row(
            f"level {row['level']}, loaded from disk", f"{row['bytes'] // CONTEXTS:,}", f"{size / row['bytes']:.1f}",
            seconds(row["load_seconds"]), f"{row['right']:.1%}", f"{row['same']:.1%}",
        )  # fmt: skip
    console.print(view)


def main() -> None:
    step, folder = sys.argv[1:]
    print(json.dumps({"encode": encode, "answer": answer}[step](Path(folder))))


if __name__ == "__main__":
    main()
