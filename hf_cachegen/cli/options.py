"""Options that several commands share; among them one option for each field of CacheGenConfig."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from hf_cachegen.artifact.store import local_path, output_path
from hf_cachegen.cli.models import DTYPES, find_profile
from hf_cachegen.config import AUTO_LAYERS, CacheGenConfig, CoderName, TransformName
from hf_cachegen.errors import ConfigError

if TYPE_CHECKING:
    from hf_cachegen.profiles.files import Profile

Function = TypeVar("Function", bound=Callable[..., Any])
_DEFAULT = CacheGenConfig()
LOWEST_TEMPERATURE = 1e-6
"""Logits divided by it stay finite."""
LARGEST_SEED = (1 << 64) - 1
"""Limit of torch.manual_seed."""


def _all(*decorators: Callable[[Function], Function]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def _encoder(flag: str, help_text: str, **attributes: Any) -> Callable[[Function], Function]:
    field = flag.split("/")[0].lstrip("-").replace("-", "_")
    return click.option(flag, default=getattr(_DEFAULT, field), show_default=True, help=help_text, **attributes)


class _LayersOrNone(click.ParamType):
    """A number of layers, auto, or none."""

    name = "layers|auto|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value is None or value == "none":
            return None
        if value == AUTO_LAYERS:
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"expected a whole number, auto or none, got {value!r}.", param, ctx)


class _LocalPath(click.ParamType):
    """A path of this machine, with "~" expanded. Raises ConfigError for text that cannot be one."""

    name = "path"

    def __init__(self, parse: Callable[[str], Path] = local_path) -> None:
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return self._parse(value)


class _OutputFolder(_LocalPath):
    """A folder to write, or one that does not exist yet."""

    name = "directory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = super().convert(value, param, ctx)
        if path.is_file():
            self.fail(f"expected a folder, {value!r} is a file.", param, ctx)
        return path


LOCAL_PATH, OUTPUT_PATH, OUTPUT_FOLDER = _LocalPath(), _LocalPath(output_path), _OutputFolder(output_path)


def require_writable(folder: Path) -> None:
    """Raise ConfigError, before anything slow, where a folder cannot be made or written."""
    found = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not found.is_dir():
        raise ConfigError(f"expected a folder to write to, {found} is a file")
    if not os.access(found, os.W_OK | os.X_OK):
        raise ConfigError(f"{found} cannot be written: it is read-only, or you have no permission; choose another")


artifact_argument = click.argument("artifact")
location_argument = click.argument("location")
source_model_option = click.option("--model", required=True, help="Folder or Hub id of a causal language model.")


def overwrite_option(help_text: str) -> Callable[[Function], Function]:
    """Return the option --overwrite."""
    return click.option("--overwrite", is_flag=True, help=help_text)


output_options = _all(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, also for an error."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)

model_options = _all(
    click.option("--revision", help="Branch, tag or commit of a model on the Hub."),
    click.option("--device", help="Device of the model: cpu, cuda:0, ...  [default: cuda if available, else cpu]"),
)

answer_options = _all(
    click.option("--model", required=True, help="Folder or Hub id of the model that the artifact was made with."),
    click.option("--prompt", help="Question. Its text follows the text of the context; in a chat it is a message of "
                 "the user. - reads stdin."),
    click.option("--context", "context_file", type=click.File("r", encoding="utf-8"),
                 help="Text file of the context, for an artifact that does not store its text."),
    click.option("--chat", type=click.File("r", encoding="utf-8"),
                 help="JSON file of the whole chat, the turns of the context included; --prompt may add a question."),
    click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True,
                 help="Maximum length of the answer, in tokens."),
)  # fmt: skip


text_option = click.option(
    "--text/--no-text", "keep_text", default=True, show_default=True,
    help="Store the text in the artifact, so that a question is tokenized together with it.",
)  # fmt: skip


state_options = _all(
    click.option("--state-every", type=click.IntRange(min=1),
                 help="Tokens between two checkpoints of a model's recurrent states.  [default: the end and a few "
                 "positions before it]"),
    click.option("--state-budget", type=click.IntRange(min=1), default=512 << 20, show_default=True,
                 help="Largest size of all checkpoints in bytes; above it some are left out."),
)  # fmt: skip


def _dtype_option(default: str, help_text: str) -> Callable[[Function], Function]:
    return click.option("--dtype", type=click.Choice(DTYPES), default=default, show_default=True, help=help_text)


dtype_option = _dtype_option("auto", "Dtype of the model and of its cache; auto is the dtype of the checkpoint.")
# In bfloat16 the rounding alone causes about the default target divergence: the learnt steps would be far too fine.
learning_dtype_option = _dtype_option("float32", "Dtype of the model while learning; the profile serves every dtype.")

encoder_options = _all(
    _encoder(
        "--transform", "Transform before quantisation; auto: klt with a profile, else the one with fewer bytes.",
        type=click.Choice(get_args(TransformName)),
    ),
    _encoder("--lossless", "Bit-exact encoding with one level; implies --transform identity.", is_flag=True),
    _encoder("--levels", "Number of quality levels in the artifact, 1 to 3.", type=int),
    _encoder("--steps", "Quantiser steps of delta and identity for the first, middle and last third of the layers.",
             type=float, nargs=3),
    _encoder("--chunk-tokens", "Tokens per chunk, the unit of fetching and decoding.", type=int),
    _encoder("--group-tokens", "Tokens per group of the delta transform.", type=int),
    _encoder("--protect-first", "Number of tokens at the start that every level keeps at the finest step.", type=int),
    _encoder("--protect-last", "Number of tokens at the end that every level keeps at the finest step.", type=int),
    _encoder("--coder", "Entropy coder.", type=click.Choice(get_args(CoderName))),
    _encoder("--prob-bits", "Precision of the coder's probabilities, 10 to 12 bits.", type=int),
    _encoder(
        "--predict-layers", "Layers that a loader computes from the tokens, to store only the difference to a "
        "prediction. 0: the embedding, if the profile has a predictor for it. none: no prediction. auto: the earliest "
        "first token over a link of --bandwidth-gbps.",
        type=_LayersOrNone(),
    ),
    _encoder("--bandwidth-gbps", "Throughput of the loaders' link in Gbit/s, for --predict-layers auto.", type=float),
    _encoder(
        "--prefill-tokens-per-second", "Speed of the model on the loaders' machine, for --predict-layers auto.  "
        "[default: measured here]", type=float,
    ),
    _encoder("--measure/--no-measure", "Record the relative error of each layer in the artifact."),
    _encoder("--step-offset", "Quarter octaves added to the step of the profile; 4 doubles it.", type=int),
    _encoder(
        "--target-kl", "Divergence of the finest level, in nats per token, for which the step of each context is "
        "chosen by probing the model.  [default: the given step]", type=float,
    ),
    _encoder("--probe-passes", "Maximum number of forward passes for --target-kl.", type=int),
)  # fmt: skip

learning_options = _all(
    click.option("--target-kl", type=float, nargs=3, default=(0.1, 0.01, 0.001), show_default=True,
                 help="Upper bounds on the KL divergence of levels 1, 2 and 3, in nats per token of a continuation."),
    click.option("--floor", type=float, default=0.5, show_default=True,
                 help="Lower bound on the sensitivity, as a fraction of the layer's mean."),
    click.option("--group-layers", type=click.IntRange(min=1),
                 help="Number of adjacent layers with a joint basis.  [default: chosen by their width]"),
    click.option("--across-layers", type=click.Choice(["auto", "joint", "chained"]), default="auto", show_default=True,
                 help="joint: each group of layers is coded by itself. chained: it is predicted from the groups before "
                 "it, which saves bits, and a group of wide layers is one layer. auto: chained, unless --group-layers "
                 "is given."),
    click.option("--undo-rotation/--no-undo-rotation", default=True, show_default=True,
                 help="Undo the rotary embedding of the keys before the transform, if its type is supported."),
    click.option("--predict-layers", type=click.IntRange(min=0), multiple=True,
                 help="Number of first layers to learn a predictor from; 0 is the embedding alone; repeatable."),
    click.option("--predict-rank", type=click.IntRange(min=1), default=256, show_default=True,
                 help="Largest rank of a predictor."),
    click.option("--seed", type=int, default=0, show_default=True, help="Random seed."),
)  # fmt: skip


def _profile_option(help_text: str) -> Callable[[Function], Function]:
    return click.option("--profile", default="auto", show_default=True, metavar="auto|none|LOCATION", help=help_text)


encoding_profile_option = _profile_option(
    "Profile of the model. auto: the one in the model's folder or in its profile repository, if any. LOCATION: a file, "
    "folder, repository or URL."
)
decoding_profile_option = _profile_option(
    "Profile, if the artifact needs one. auto: search next to the artifact, in the model's folder and in profile "
    "repositories. none: search next to the artifact only. LOCATION: a file, folder, repository or URL."
)
converting_profile_option = _profile_option(
    "Profile to encode with, with --model, or to decode with, if the artifact needs one. auto: search next to the "
    "artifact, in the model's folder and in profile repositories. none: none to encode with; to decode, search next to "
    "the artifact only. LOCATION: a file, folder, repository or URL."
)
pushing_profile_option = _profile_option(
    "Profile to push with the artifact, if it needs one. auto: the one in FOLDER, unless the artifact names its "
    "location on the Hub. none: no profile. LOCATION: a file, folder, repository or URL."
)


key_option = click.option("--key", help="Key file (32 bytes) of a sealed artifact.")
trust_options = _all(
    click.option("--public-key", help="PEM file of the public key that must have signed the artifact."),
    key_option,
)


def access_options(repo_type: str) -> Callable[[Function], Function]:
    """Return the options that select a part of a repository (of that type by default) or of a URL."""
    return _all(
        click.option("--subfolder", help="Folder within the repository or below the URL."),
        click.option("--repo-type", type=click.Choice(["dataset", "model", "space"]), default=repo_type,
                     show_default=True, help="Type of the repository on the Hub."),
        click.option("--revision", help="Branch, tag or commit of the repository.  [default: main]"),
    )  # fmt: skip


def pushing_options(message: str, public_help: str) -> Callable[[Function], Function]:
    """Return the options of a commit on the Hub."""
    return _all(
        click.option("--public", is_flag=True, help=public_help),
        click.option("--message", default=message, show_default=True, help="Message of the commit."),
        click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing."),
    )


class _Number(click.FloatRange):
    """A finite number within a range (click's own range accepts "nan")."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


sampling_options = _all(
    click.option("--sample/--greedy", default=False, show_default=True,
                 help="Sampling, or greedy decoding."),
    click.option("--temperature", type=_Number(min=LOWEST_TEMPERATURE),
                 help="Sampling temperature, with --sample; instead of 0, use --greedy."),
    click.option("--top-k", type=click.IntRange(min=0),
                 help="Number of most likely tokens to sample from, with --sample; 0 is all."),
    click.option("--top-p", type=_Number(0, 1),
                 help="Total probability of the most likely tokens to sample from, with --sample."),
    click.option("--seed", type=click.IntRange(0, LARGEST_SEED), help="Random seed, with --sample."),
    click.option("--num-beams", type=click.IntRange(min=1), default=1, show_default=True, help="Number of beams."),
)  # fmt: skip


def encoder_settings(
    options: dict[str, Any], given: Callable[[str], bool], profile: str, model: str
) -> tuple[CacheGenConfig, Profile | None]:
    """Build the encoder's configuration, and find its profile.

    Args:
        options: the values of `encoder_options`.
        given: whether the user gave an option, by its name.
        profile: the value of --profile.
        model: the folder or Hub id of the model.

    Returns:
        (configuration, profile); the profile is None where none is used.

    Raises:
        ConfigError: an option is out of its range.
        ProfileError: there is no profile at the location that --profile names, or it is damaged.
        click.UsageError: the configuration and the profile conflict.
    """
    wanted = not options["lossless"] and options["transform"] in ("auto", "klt")
    if not wanted and profile not in ("auto", "none"):
        raise click.UsageError(
            "--profile LOCATION requires --transform klt, without --lossless", click.get_current_context()
        )
    found = find_profile(profile, model) if wanted else None
    implied: dict[str, Any] = {}
    if options["lossless"]:
        implied = {"transform": "identity", "levels": 1}
    elif found is not None:
        implied = {"transform": "klt", "levels": found.levels}
    config = CacheGenConfig(**{**options, **{name: value for name, value in implied.items() if not given(name)}})
    if config.transform == "klt" and found is None:
        raise click.UsageError(
            "--transform klt requires a profile of the model: learn one with 'hf-cachegen profile', or use --profile",
            click.get_current_context(),
        )
    if found is not None and config.levels != found.levels:
        raise click.UsageError(
            f"--levels {config.levels} conflicts with the profile, which has {found.levels} levels; leave out --levels",
            click.get_current_context(),
        )
    return config, found


def read_text(file: Any) -> str:
    """Read all of a text file. Raises UsageError unless it is UTF-8."""
    try:
        text: str = file.read()
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"{file.name} is not UTF-8 text: {error.reason} at byte {error.start}", click.get_current_context()
        ) from error
    return text


def sampling_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of generate for the sampling options. Raises UsageError for one that requires --sample."""
    sampling = {name: options[name] for name in ("temperature", "top_k", "top_p")}
    if options["sample"]:
        chosen = {name: value for name, value in sampling.items() if value is not None}
        return {"do_sample": True, "num_beams": options["num_beams"], **chosen}
    misplaced = [name for name, value in {**sampling, "seed": options["seed"]}.items() if value is not None]
    if misplaced:
        raise click.UsageError(f"--{misplaced[0].replace('_', '-')} requires --sample", click.get_current_context())
    # Without these, sampling values in the model's own generation settings would cause a warning.
    return {"do_sample": False, "num_beams": options["num_beams"], **dict.fromkeys(sampling)}
