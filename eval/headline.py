"""The runs of the headline tables, each suite with one command.

    python -m eval.headline reference
    python -m eval.headline real --model runs/smollm2-135m --profile runs/smollm2-profile --text second_half.txt ...
    python -m eval.headline retrieval --model runs/smollm2-135m --profile runs/smollm2-profile --text second_half.txt
    python -m eval.headline table docs/results/headline/runs/any-numbers

A suite learns what it needs once (into `--work`), measures every case into a folder of runs, compresses the predictions
and writes a report. Everything is resumable: the same command continues after a kill. `table` prints the rows of a
finished run that documents show, from the committed metrics alone.

The headline is a task that the reference model can do and that is not saturated: long records in which numbers may
begin alike. Beside it stand tasks that the model cannot do well, and texts on real weights that the profile
has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import click

from eval import codecs, datasets
from eval.baselines import CALIBRATED, joint
from eval.command import run_command
from eval.datasets.request import Request
from eval.models import load_model, load_tokenizer, token_ids
from eval.reference import MODEL_PATH
from eval.reference import profile as reference_profile
from eval.report import write
from eval.report.tables import Table, difference, kl, percent
from eval.run import Options, run
from eval.run_folder import ASKED, RunFolder

RESULTS = Path("docs/results")
CONTEXTS = 12
TOKENS = 1024
"""Tokens of a context of real weights."""
BASIS_CONTEXTS, BASIS_SEED = 6, 1_000_000
"""Contexts of each task of the reference model that the joint basis is learnt from, and their seed."""
SAMPLES, PREDICTORS = 40, (0, 1)
"""Samples of each task that the reference model's profile is learnt from, and the layers of its predictors."""
PUBLISHED = (
    "uniform-8", "uniform-4", "artifact", "lmcache", "kivi-4", "kivi-2", "turboquant-4", "turboquant-3", "kvtc",
)  # fmt: skip
OWN = ("delta", "klt")
QUOTED = (
    ("exact", None), ("uniform-4", None), ("artifact", 3), ("artifact", 2), ("lmcache", 2), ("kivi-2", None),
    ("turboquant-3", None), ("kvtc", 3), ("kvtc", 2), ("delta", 3), ("klt", 2), ("klt", 1), ("predict0", 1),
    ("predict1", 1), ("predict2", 1),
)  # fmt: skip
"""(codec, level) of the rows that documents show, where a run has them."""


@dataclass(frozen=True)
class Case:
    """One run of a suite: the name of its folder, its data set and its codecs."""

    name: str
    dataset: str
    codecs: tuple[str, ...]


def reference_cases() -> tuple[Case, ...]:
    """Return the runs of the reference model."""
    everything = (*PUBLISHED, *OWN, *(f"predict{layer}" for layer in PREDICTORS))
    few = ("uniform-4", "artifact", "kvtc", "klt", "predict0", "predict1")
    return (
        Case("any-numbers", "reference-lines:any_numbers=1,lines=180,questions=4", everything),
        Case("topics", "reference-topics", few),
        Case("stories", "reference-stories", few),
    )


def real_cases(text: str, conversations: str, code: str, tokens: int = TOKENS) -> tuple[Case, ...]:
    """Return the runs of real weights, on a text of the kind of the profile's and on others.

    Args:
        text: a text file; the profile was learnt from other text of the same kind.
        conversations: JSONL file with conversations in the field "prompt"; empty to leave them out.
        code: pattern of source files; empty to leave them out.
        tokens: tokens of a context; every technique is measured at the default length only.
    """
    few = ("uniform-4", "artifact", "kvtc", "klt", "predict0")
    everything = (*PUBLISHED[1:], *OWN, "predict0", "predict2") if tokens == TOKENS else few
    window, name = f"prefix={tokens},suffix=128", "" if tokens == TOKENS else f"-{tokens}"
    cases = [Case(f"text{name}", f"wikitext:path={text},{window}", everything)]
    if conversations:
        spec = f"documents:path={conversations},field=prompt,title=LongChat conversations,{window}"
        cases.append(Case(f"conversations{name}", spec, few))
    if code:
        cases.append(Case(f"code{name}", f"documents:path={code},title=Python code,{window}", few))
    return tuple(cases)


def retrieval_cases(text: str, tokens: Sequence[int], pairs: Sequence[int]) -> tuple[Case, ...]:
    """Return the runs of retrieval on real weights, at several lengths.

    Args:
        text: a text file that the needle is hidden in; the profile was learnt from other text.
        tokens: tokens of the contexts around a needle.
        pairs: pairs of keys and values in a context.
    """
    few = ("uniform-4", "kivi-2", "artifact", "kvtc", "klt", "predict0", "predict2")
    needles = (Case(f"needle-{count}", f"needle:path={text},tokens={count}", few) for count in tokens)
    values = (Case(f"key-values-{count}", f"key-values:pairs={count}", few) for count in pairs)
    return (*needles, *values)


def measure(cases: Sequence[Case], out: Path, title: str, common: dict[str, Any]) -> None:
    """Measure every case that is not finished, and write the report of all that are.

    Args:
        cases: the runs.
        out: folder of the report; the runs go into its folder `runs`.
        title: title of the report.
        common: the options that all runs share.
    """
    for case in cases:
        folder = RunFolder(out / "runs" / case.name)
        run(Options(dataset=case.dataset, codecs=case.codecs, **common), folder.path)
        folder.compress()
    report(out, title)


def report(out: Path, title: str) -> None:
    """Write the report of all finished runs of a suite."""
    finished = [path for path in sorted((out / "runs").iterdir()) if RunFolder(path).finished()]
    write(finished, out, title, None)
    (out / "index.html").unlink()  # the page repeats report.md, and is large


def table(path: Path) -> Table:
    """Return the rows of a finished run that documents show.

    Args:
        path: folder of the run.
    """
    folder = RunFolder(path)
    metrics, scores = folder.metrics(), folder.config()[ASKED]["dataset"]["scores"]
    known = {(v["codec"], v["level"]): v for v in metrics["variants"]}
    score = scores[0] if scores else None
    heads = ("technique", "bits per element", *(("exact match", "same answers") if score else ("perplexity, %",)),
             "KL, nats per token")  # fmt: skip
    rows = []
    for key in QUOTED:
        if key in known:
            v = known[key]
            quality = (
                (percent(v["scores"][score]), percent(v["same_answer"], interval=False))
                if score
                else (difference(v["perplexity"], 100, 2),)
            )
            rows.append((codecs.title(*key), f"{v['bits_per_element']:.2f}", *quality, kl(v["kl"])))
    return Table(folder.config()[ASKED]["dataset"]["name"], heads, tuple(rows))


@click.group()
def main() -> None:
    """Measure the suites of the headline tables."""


@main.command()
@click.option("--limit", default=CONTEXTS, show_default=True, help="Contexts of each run.")
@click.option("--samples", default=SAMPLES, show_default=True, help="Samples of each task for the profile.")
@click.option("--only", help="Name of one case.  [default: all]")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/headline"), show_default=True,
              help="Folder of the profile and the basis.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "headline", show_default=True,
              help="Folder of runs and report.")  # fmt: skip
def reference(limit: int, samples: int, only: str | None, work: Path, out: Path) -> None:
    """Measure the reference model."""
    profile, basis = work / "cachegen_profile.safetensors", work / "basis.safetensors"
    if not profile.exists():
        reference_profile.learn(samples, PREDICTORS, work)
    if not basis.exists():
        tokenizer = load_tokenizer(str(MODEL_PATH))
        contexts = [
            token_ids(tokenizer, example.context, start=True)
            for name in ("reference-lines", "reference-topics", "reference-stories")
            for example in datasets.load(name, Request(tokenizer, BASIS_CONTEXTS, BASIS_SEED)).examples
        ]
        joint.learn(load_model(str(MODEL_PATH)), contexts).save(basis)
    common = {"model": "eval/reference/model", "dtype": "bfloat16", "limit": limit, "profile": str(profile),
              "basis": str(basis)}  # fmt: skip
    cases = [case for case in reference_cases() if only in (None, case.name)]
    measure(cases, out, "The reference model, 5 M parameters", common)


def real_options(name: str) -> Callable[[Any], Any]:
    """Return a decorator that adds the options of all suites of real weights. name: of the folder of results."""
    options = (
        click.option("--model", required=True, help="Folder or Hub id of the model."),
        click.option("--profile", required=True, help="Its profile, learnt from other text than --text."),
        click.option("--basis", help="Its joint basis (python -m eval.baselines.joint).  [default: kvtc is left out]"),
        click.option("--limit", default=CONTEXTS, show_default=True, help="Contexts of each run."),
        click.option("--only", help="Name of one case.  [default: all]"),
        click.option("--out", type=click.Path(path_type=Path), default=RESULTS / name, show_default=True,
                     help="Folder of runs and report."),
    )  # fmt: skip
    return lambda command: reduce(lambda made, option: option(made), reversed(options), command)


@main.command()
@real_options("headline-smollm2")
@click.option("--text", required=True, help="Text file of the kind that the profile was learnt from.")
@click.option("--conversations", default="", help='JSONL file with conversations in the field "prompt".')
@click.option("--code", default="", help="Pattern of source files.")
@click.option("--tokens", default=TOKENS, show_default=True, help="Tokens of a context.")
def real(
    model: str, profile: str, basis: str | None, text: str, conversations: str, code: str, tokens: int, limit: int,
    only: str | None, out: Path,
) -> None:  # fmt: skip
    """Measure real weights on text like the profile's, conversations and code."""
    cases = [case for case in real_cases(text, conversations, code, tokens) if only in (None, case.name)]
    measure_real(cases, model, profile, basis, limit, out)


@main.command()
@real_options("retrieval-smollm2")
@click.option("--text", required=True, help="Text file that the needles are hidden in.")
@click.option("--tokens", default=(500, 2000), show_default=True, multiple=True, help="Tokens around a needle.")
@click.option("--pairs", type=int, multiple=True, help="Pairs of keys and values; repeatable.")
def retrieval(
    model: str, profile: str, basis: str | None, text: str, tokens: tuple[int, ...], pairs: tuple[int, ...],
    limit: int, only: str | None, out: Path,
) -> None:  # fmt: skip
    """Measure retrieval on real weights: a needle in a text, and values by their keys."""
    cases = [case for case in retrieval_cases(text, tokens, pairs) if only in (None, case.name)]
    measure_real(cases, model, profile, basis, limit, out)


def measure_real(cases: Sequence[Case], model: str, profile: str, basis: str | None, limit: int, out: Path) -> None:
    """Measure cases on real weights. Without a basis the codecs that need one are left out."""
    common = {"model": model, "limit": limit, "profile": profile, "basis": basis}
    able = [
        replace(case, codecs=tuple(name for name in case.codecs if basis or name not in CALIBRATED)) for case in cases
    ]
    measure(able, out, f"{Path(model).name}, a real model", common)


@main.command(name="table")
@click.argument("path", type=click.Path(path_type=Path, exists=True, file_okay=False))
def print_table(path: Path) -> None:
    """Print the rows of a finished run that documents show."""
    click.echo(table(path).markdown())


if __name__ == "__main__":
    run_command(main, "eval.headline")
