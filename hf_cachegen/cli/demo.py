"""The command `demo`: the reference model answers questions about long contexts from artifacts.

One process prefills the contexts, answers from the exact caches and saves artifacts, once with the model's profile
(klt) and once as in the paper (delta). A fresh process loads them at each level and answers the same questions. Both
are in demo_steps.py. The model and the contexts are files of the checkout.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import hf_cachegen
from hf_cachegen.cli.options import output_options
from hf_cachegen.errors import MissingExtraError

MODEL = Path("eval", "reference", "model")
CONTEXTS = Path("eval", "reference", "demo.jsonl")
"""Four records of 128 lines (about 1,080 tokens each), with 8 questions about each."""
CALL = """\
cache = CacheGenCache.from_pretrained(folder, model=model)
output = model.generate(**inputs, cache=cache)  # context and question
"""


@click.command("demo", short_help="Compare answers from artifacts with those from the exact cache.")
@output_options
def demo(as_json: bool, debug: bool) -> None:
    """Answer questions about long contexts from artifacts, and compare them with the answers from the exact caches.

    The demo needs a checkout of the repository, which holds its model and contexts. Exit code 1 means that an answer
    at the finest level of klt differs from the exact one.
    """
    root = find_checkout()
    console = Console()
    with tempfile.TemporaryDirectory() as name, console.status("one process encodes the contexts"):
        exact = _in_fresh_process("encode", root, Path(name))
        with console.status("a fresh process answers from the artifacts"):
            rows = _in_fresh_process("answer", root, Path(name))
    outputs = exact.pop("outputs")
    for row in rows:
        row["same"] = sum(a == b for a, b in zip(row.pop("outputs"), outputs, strict=True))
    count, asked = exact.pop("contexts"), len(outputs)
    if as_json:
        console.print_json(json.dumps({"contexts": count, "questions": asked, "exact": exact, "levels": rows}))
    else:
        console.print("A fresh process loads each artifact and calls the model as usual:\n", highlight=False)
        console.print(CALL, style="cyan", markup=False)
        console.print(_table(exact, rows, count, asked))
    click.get_current_context().exit(0 if rows[0]["same"] == asked else 1)


def find_checkout() -> Path:
    """Return the folder of the checkout: the one that the package is in, or the current one.

    Raises:
        MissingExtraError: neither holds the model and the contexts.
    """
    tried = [Path(hf_cachegen.__file__).resolve().parent.parent, Path.cwd()]
    for root in tried:
        if (root / MODEL / "config.json").is_file() and (root / CONTEXTS).is_file():
            return root
    raise MissingExtraError(
        f"expected {MODEL} and {CONTEXTS}, which are not part of the installed package; found neither in "
        f"{' nor in '.join(map(str, dict.fromkeys(tried)))}: clone the repository and run 'hf-cachegen demo' there"
    )


def _in_fresh_process(step: str, root: Path, folder: Path) -> Any:
    """Run one step of demo_steps.py in a process of its own, and return the JSON value that it prints last."""
    command = [sys.executable, "-m", "hf_cachegen.cli.demo_steps", step, str(root), str(folder)]
    package_folder = Path(hf_cachegen.__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=package_folder, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _table(exact: dict[str, Any], rows: list[dict[str, Any]], contexts: int, asked: int) -> Table:
    """Tabulate the means over the contexts."""
    title = f"{contexts} contexts of {exact['tokens'] // contexts} tokens, {asked} questions"
    table = Table("cache", "bytes", "ratio", "ready in", "exact match", "same answers", title=title)

    def add(name: str, size: int, seconds: float, right: int, same: int) -> None:
        cells = f"{size // contexts:,}", f"{exact['exact_bytes'] / size:.1f}", f"{1000 * seconds / contexts:.0f} ms"
        table.add_row(name, *cells, f"{right / asked:.1%}", f"{same / asked:.1%}")

    add("exact (prefill)", exact["exact_bytes"], exact["seconds"], exact["right"], asked)
    for row in rows:
        add(f"{row['transform']}, level {row['level']}", row["bytes"], row["seconds"], row["right"], row["same"])
    return table
