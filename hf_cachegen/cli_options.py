"""Options that several commands share, and the encoder's: one for every field of CacheGenConfig."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from hf_cachegen.cli_models import DTYPES, find_profile
from hf_cachegen.config import CacheGenConfig, CoderName, TransformName

if TYPE_CHECKING:
    from hf_cachegen.profiles.files import Profile

Function = TypeVar("Function", bound=Callable[..., Any])
_DEFAULT = CacheGenConfig()
COLDEST = 1e-6
"""Temperature: any logit divided by it is a number; at 0 --greedy is what is meant."""
LARGEST_SEED = (1 << 64) - 1
"""What torch.manual_seed takes."""


def _all(*decorators: Callable[[Function], Function]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def _encoder(flag: str, help_text: str, **attributes: Any) -> Callable[[Function], Function]:
    field = flag.split("/")[0].lstrip("-").replace("-", "_")
    return click.option(flag, default=getattr(_DEFAULT, field), show_default=True, help=help_text, **attributes)


artifact_argument = click.argument("artifact")
place_argument = click.argument("place")

output_options = _all(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object, errors too, and nothing else."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)

model_options = _all(
    click.option("--revision", help="Branch, tag or commit of a model on the Hub."),
    click.option("--device", help="Where the model runs, cpu, cuda:0, ...  [default: cuda if there, else cpu]"),
)

def _dtype_option(default: str, help_text: str) -> Callable[[Function], Function]:
    return click.option("--dtype", type=click.Choice(DTYPES), default=default, show_default=True, help=help_text)


dtype_option = _dtype_option("auto", "Dtype of the model and of its cache.")
# In bfloat16 rounding alone diverges about as much as the default target: the steps learnt would be far too fine.
learning_dtype_option = _dtype_option("float32", "Dtype to learn in; the profile serves every dtype.")

encoder_options = _all(
    _encoder(
        "--transform", "What is done before quantising; auto: klt where there is a profile, else what codes smaller.",
        type=click.Choice(get_args(TransformName)),
    ),
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
)  # fmt: skip

learning_options = _all(
    click.option("--target-kl", type=float, nargs=3, default=(0.1, 0.01, 0.001), show_default=True,
                 help="Largest divergence of levels 1, 2 and 3, in nats per token of a continuation."),
    click.option("--floor", type=float, default=0.5, show_default=True,
                 help="Least sensitivity, in units of the layer's mean: keeps errors small that no sample minds."),
    click.option("--group-layers", type=click.IntRange(min=1), help="Layers with a joint basis.  [default: by width]"),
    click.option("--undo-rotation/--no-undo-rotation", default=True, show_default=True,
                 help="Turn keys back to position 0 before anything else, where the model's rotation is known."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of the draws."),
)  # fmt: skip


def _profile_option(help_text: str) -> Callable[[Function], Function]:
    return click.option("--profile", default="auto", show_default=True, metavar="auto|none|PLACE", help=help_text)


encoding_profile_option = _profile_option(
    "The model's profile: auto takes the one in the model's folder or in its repository of profiles, if any; PLACE is "
    "a file, a folder, a repository or a URL."
)
decoding_profile_option = _profile_option(
    "The profile, for an artifact that needs one: auto looks beside the artifact, in the model's folder and in "
    "repositories of profiles; none, beside the artifact alone."
)
pushing_profile_option = _profile_option(
    "The profile that goes along, for an artifact that needs one: auto takes the one in FOLDER, unless the artifact "
    "says where on the Hub it is; none, none."
)


key_option = click.option("--key", help="Opens a sealed artifact: the file of 32 bytes that it was sealed with.")
trust_options = _all(
    click.option("--public-key", help="Accept only what is signed with the private half of this key (PEM file)."),
    key_option,
)


def access_options(repo_type: str) -> Callable[[Function], Function]:
    """Where in a repository (of that kind by default), or below a URL."""
    return _all(
        click.option("--subfolder", help="Folder within the repository or below the URL."),
        click.option("--repo-type", type=click.Choice(["dataset", "model", "space"]), default=repo_type,
                     show_default=True, help="Kind of the repository on the Hub."),
        click.option("--revision", help="Branch, tag or commit of the repository.  [default: main]"),
    )  # fmt: skip


class _Number(click.FloatRange):
    """A number within a range: "nan" is none, though it compares as if it were."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


sampling_options = _all(
    click.option("--sample/--greedy", default=False, show_default=True, help="Draw tokens, or take the likeliest."),
    click.option("--temperature", type=_Number(min=COLDEST),
                 help="With --sample: above 1 is more random, below 1 less; 0 is --greedy."),
    click.option("--top-k", type=click.IntRange(min=0),
                 help="With --sample: draw from the k likeliest tokens; 0: from all."),
    click.option("--top-p", type=_Number(0, 1),
                 help="With --sample: draw from the likeliest tokens of this total share."),
    click.option("--seed", type=click.IntRange(0, LARGEST_SEED), help="With --sample: makes the draw repeatable."),
    click.option("--num-beams", type=click.IntRange(min=1), default=1, show_default=True, help="Beams of the search."),
)  # fmt: skip


def encoder_settings(
    options: dict[str, Any], given: Callable[[str], bool], profile: str, model: str
) -> tuple[CacheGenConfig, Profile | None]:
    """The configuration that the options ask for, and the profile, where it takes one.

    given: says whether the user named an option; profile: the value of --profile. Raises ConfigError, ProfileError, and
    UsageError for a configuration and a profile that do not go together.
    """
    wanted = not options["lossless"] and options["transform"] in ("auto", "klt")
    if not wanted and profile not in ("auto", "none"):
        raise click.UsageError("--profile PLACE is for --transform klt", click.get_current_context())
    found = find_profile(profile, model) if wanted else None
    implied: dict[str, Any] = {}
    if options["lossless"]:
        implied = {"transform": "identity", "levels": 1}
    elif found is not None:
        implied = {"transform": "klt", "levels": found.levels}
    config = CacheGenConfig(**{**options, **{name: value for name, value in implied.items() if not given(name)}})
    if config.transform == "klt" and found is None:
        raise click.UsageError(
            "--transform klt needs a profile of the model: learn one with 'hf-cachegen profile', or give --profile",
            click.get_current_context(),
        )
    if found is not None and config.levels != found.levels:
        raise click.UsageError(
            f"--levels {config.levels}: the profile has {found.levels} levels", click.get_current_context()
        )
    return config, found


def read_text(file: Any) -> str:
    """All of a text file that an option or argument named. Raises UsageError where it is not UTF-8."""
    try:
        text: str = file.read()
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"{file.name} is not UTF-8 text: {error.reason} at byte {error.start}", click.get_current_context()
        ) from error
    return text


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
