"""Command line: `python -m eval run` measures codecs on a data set, `python -m eval report` makes a page of runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from eval.codecs import NAMES
from eval.command import run_command
from eval.datasets import LOADERS
from eval.models import DTYPES

INTERRUPTED = 130
TOO_LONG = ("skip", "middle", "error")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Quality, size and time of compressed KV caches (docs/evaluation.md)."""


@main.command()
@click.option("--model", required=True, help="Folder or Hub id of a causal language model.")
@click.option("--dataset", required=True, metavar="NAME[:OPTION=VALUE,...]", help=f"Data set: {', '.join(LOADERS)}.")
@click.option(
    "--codec",
    "codecs",
    multiple=True,
    default=("all",),
    show_default=True,
    help=f"Codec, repeatable: {', '.join(NAMES)}, or all that can be used here. exact is always measured.",
)
@click.option("--levels", help="Levels of codecs that have several, such as 1,3.  [default: all]")
@click.option("--limit", type=click.IntRange(min=1), help="Most contexts.")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of generated data.")
@click.option("--device", help="Device, such as cpu or cuda:0.  [default: a GPU for each process, else cpu]")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Dtype of the model.")
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option("--profile", default="auto", show_default=True, metavar="auto|none|LOCATION", help="Profile for klt.")
@click.option("--basis", metavar="FILE", help="Joint basis for kvtc and pca (python -m eval.baselines.joint).")
@click.option("--chunk-tokens", type=int, default=512, show_default=True, help="Tokens per chunk of an artifact.")
@click.option(
    "--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Questions that are answered at once."
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=2),
    help="Limit of prompt and answer together, in tokens.  [default: the model's]",
)
@click.option(
    "--too-long",
    type=click.Choice(TOO_LONG),
    help="Rule for longer examples; middle cuts their context in the middle.  [default: the data set's]",
)
@click.option(
    "--include-question", is_flag=True, help="Cache of the question with the context, as in the paper's artifact."
)
@click.option(
    "--chat-template/--no-chat-template",
    default=None,
    help="Tokenizer's chat template around context and question.  [default: the data set's]",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the run; an unfinished run continues."
)
def run(out: Path, levels: str | None, **given: Any) -> None:
    """Measure codecs on a data set and compare each with the exact cache on the same examples."""
    from eval.report.tables import text_table
    from eval.run import Options
    from eval.run import run as measure

    try:
        wanted = None if levels is None else tuple(sorted({int(level) for level in levels.split(",")}))
    except ValueError as error:
        raise click.BadParameter(
            f"expected whole numbers with commas, got {levels!r}", param_hint="'--levels'"
        ) from error
    try:
        found = measure(Options(levels=wanted, **given), out)
    except KeyboardInterrupt:
        click.echo(f"\nstopped; the same command continues the run in {out}", err=True)
        sys.exit(INTERRUPTED)
    if found:
        click.echo(text_table(out))


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for index.html, report.md and plots."
)
@click.option(
    "--title", default="KV caches, compressed: quality, size, time", show_default=True, help="Title of the page."
)
@click.option(
    "--adaptation",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Results of python -m eval.adaptation, to include in the page.",
)
def report(runs: tuple[Path, ...], out: Path, title: str, adaptation: Path | None) -> None:
    """Make one page (HTML), tables (Markdown) and plots (SVG) of finished RUNS."""
    from eval.report import write

    for path in write(runs, out, title, adaptation):
        click.echo(path)


if __name__ == "__main__":
    run_command(main, "eval")
