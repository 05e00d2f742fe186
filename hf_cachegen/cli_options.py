"""Options that several commands share, and the encoder's: one for every field of CacheGenConfig."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from hf_cachegen.cli_models import DTYPES
from hf_cachegen.config import CacheGenConfig, CoderName, TransformName

Function = TypeVar("Function", bound=Callable[..., Any])
_DEFAULT = CacheGenConfig()


def _all(*decorators: Callable[[Function], Function]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def _encoder(flag: str, help_text: str, **attributes: Any) -> Callable[[Function], Function]:
    field = flag.split("/")[0].lstrip("-").replace("-", "_")
    return click.option(flag, default=getattr(_DEFAULT, field), show_default=True, help=help_text, **attributes)


artifact_argument = click.argument("artifact", type=click.Path(path_type=Path))

output_options = _all(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object, errors too, and nothing else."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)

model_options = _all(
    click.option("--revision", help="Branch, tag or commit of a model on the Hub."),
    click.option("--device", help="Where the model runs, cpu, cuda:0, ...  [default: cuda if there, else cpu]"),
)

dtype_option = click.option(
    "--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Dtype of the model and of its cache."
)

encoder_options = _all(
    _encoder("--transform", "What is done before quantising.", type=click.Choice(get_args(TransformName))),
    _encoder("--lossless", "Bit-exact, in one level; implies --transform identity.", is_flag=True),
    _encoder("--levels", "How many levels the artifact serves, 1 to 3.", type=int),
    _encoder("--steps", "Quantiser steps for the first, middle and last third of the layers.", type=float, nargs=3),
    _encoder("--chunk-tokens", "Tokens per chunk, the unit of loading.", type=int),
    _encoder("--group-tokens", "Tokens per group of the delta transform.", type=int),
    _encoder("--protect-first", "Tokens at the start that every level keeps at the finest step.", type=int),
    _encoder("--protect-last", "Tokens at the end that every level keeps at the finest step.", type=int),
    _encoder("--coder", "Entropy coder.", type=click.Choice(get_args(CoderName))),
    _encoder("--prob-bits", "Precision of the coder's probabilities, 10 to 12 bits.", type=int),
    _encoder("--measure/--no-measure", "Write the relative error of each layer into the report."),
)

sampling_options = _all(
    click.option("--sample/--greedy", default=False, show_default=True, help="Draw tokens, or take the likeliest."),
    click.option("--temperature", type=float, help="With --sample: above 1 is more random, below 1 less."),
    click.option("--top-k", type=int, help="With --sample: draw from the k likeliest tokens."),
    click.option("--top-p", type=float, help="With --sample: draw from the likeliest tokens of this total share."),
    click.option("--seed", type=int, help="With --sample: makes the draw repeatable."),
    click.option("--num-beams", type=click.IntRange(min=1), default=1, show_default=True, help="Beams of the search."),
)


def encoder_config(options: dict[str, Any], given: Callable[[str], bool]) -> CacheGenConfig:
    """The configuration that the options ask for; `given` says whether the user named an option. Raises ConfigError."""
    if options["lossless"]:
        implied = {"transform": "identity", "levels": 1}
        options = {**options, **{name: value for name, value in implied.items() if not given(name)}}
    return CacheGenConfig(**options)


def sampling_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of generate for the sampling options; raises UsageError for those that need --sample."""
    drawing = {name: options[name] for name in ("temperature", "top_k", "top_p")}
    if options["sample"]:
        chosen = {name: value for name, value in drawing.items() if value is not None}
        return {"do_sample": True, "num_beams": options["num_beams"], **chosen}
    misplaced = [name for name, value in {**drawing, "seed": options["seed"]}.items() if value is not None]
    if misplaced:
        raise click.UsageError(f"--{misplaced[0].replace('_', '-')} needs --sample", click.get_current_context())
    # A model's own generation settings may hold values that only sampling knows, and would warn.
    return {"do_sample": False, "num_beams": options["num_beams"], **dict.fromkeys(drawing)}
