"""docs/evaluation.md names every option, codec, score and data set of the code, and no other."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from eval.__main__ import run
from eval.codecs import NAMES
from eval.datasets import LOADERS
from eval.scorers import SCORERS
from hf_cachegen.cli.contexts import encode
from hf_cachegen.cli.encode_dataset import encode_dataset

TEXT = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()


def test_the_options_of_run_are_documented() -> None:
    options = {flag for parameter in run.params for flag in (*parameter.opts, *parameter.secondary_opts)} - {"--out"}
    rows = re.findall(r"^\| (`--[^|]*) \|([^|]*)\|", TEXT, re.M)
    assert {flag for cell, _ in rows for flag in re.findall(r"`(--[\w-]+)`", cell)} == options
    for parameter in run.params:
        default = parameter.default
        if isinstance(default, str | int) and not isinstance(default, bool) and default not in ("auto", 0):
            (row,) = [shown for cell, shown in rows if f"`{parameter.opts[0]}`" in cell]
            assert str(default) in row


def test_data_sets_and_their_options_are_documented() -> None:
    table = TEXT.split("## Data sets")[1].split("##")[0]
    rows = dict(re.findall(r"^\| ((?:`[\w-]+`(?:, )?)+) \|.*\| ([^|]*(?:\\\|[^|]*)*) \|$", table, re.M))
    named = {name: options for names, options in rows.items() for name in re.findall(r"`([\w-]+)`", names)}
    assert set(named) == set(LOADERS)
    for name, loader in LOADERS.items():
        options = set(list(inspect.signature(loader).parameters)[1:])
        if "the same" not in named[name]:
            assert options <= set(re.findall(r"(\w+)=", named[name])), name


def test_codecs_and_scores_are_documented() -> None:
    table = TEXT.split("| codec | what |")[1].split("##")[0]
    assert set(re.findall(r"`([\w-]+)`", "".join(re.findall(r"^\| ([^|]*) \|", table, re.M)))) == set(NAMES)
    for name in SCORERS:
        assert f"`{name}`" in TEXT


def test_the_options_of_encode_dataset_are_documented() -> None:
    part = TEXT.split("`encode_dataset` writes")[1].split("\n## ")[0]
    shared = {flag for parameter in encode.params for flag in parameter.opts}
    known = shared | {"--dataset", "--help"}
    for parameter in encode_dataset.params:
        for flag in parameter.opts:
            assert flag in known or f"`{flag}`" in part, flag
