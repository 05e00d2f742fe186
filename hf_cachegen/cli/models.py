"""Load a model with its tokenizer and its profile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from hf_cachegen.artifact import Manifest, Reader
from hf_cachegen.cli.output import step
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.errors import ProfileError
from hf_cachegen.stores import Access, open_store
from hf_cachegen.stores.naming import is_hub_id

if TYPE_CHECKING:
    from hf_cachegen.profiles.files import Profile

DTYPES = ("auto", "bfloat16", "float16", "float32")


def load_model(name: str, *, revision: str | None, dtype: str, device: str | None) -> tuple[Any, Any]:
    """Load the causal language model `name` (a folder or a Hub id) and its tokenizer.

    Args:
        dtype: one of DTYPES; "auto" is the dtype of the checkpoint.
        device: a name of torch; None for CUDA where available, else the CPU.

    Returns:
        (model, tokenizer), the model in evaluation mode.

    Raises:
        click.BadParameter: the model cannot be loaded, or the device does not exist.
    """
    target = _device(device)
    tokenizer = _load_tokenizer(name, revision)
    return _load_weights(name, revision, dtype, target), tokenizer


def _load_tokenizer(name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    with _loading(name, revision) as found:
        return AutoTokenizer.from_pretrained(found, revision=revision)


def _load_weights(name: str, revision: str | None, dtype: str, device: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with _loading(name, revision) as found:
        model = AutoModelForCausalLM.from_pretrained(
            found, revision=revision, dtype="auto" if dtype == "auto" else getattr(torch, dtype)
        )
    return model.to(device).eval()


@contextmanager
def _loading(name: str, revision: str | None) -> Iterator[str]:
    """Yield the model's folder or id, with "~" expanded, and silence the output of Transformers.

    Raises:
        click.BadParameter: the model cannot be loaded; the message names the folder that was tried too. A path is
            never looked up on the Hub, and has no revision.
    """
    from transformers.utils import logging

    folder = os.path.expanduser(name)
    missing = "" if os.path.isdir(folder) else f"no folder {os.path.abspath(folder)}"
    if missing and not is_hub_id(name):
        raise click.BadParameter(f"cannot load {name!r}: {missing}", param_hint="'--model'")
    if revision is not None and not missing:
        raise click.BadParameter(
            f"a revision is for a model on the Hub; {name!r} is a local folder", param_hint="'--revision'"
        )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield folder
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()
        first = f"{missing}, and on the Hub: " if missing else ""
        raise click.BadParameter(
            f"cannot load {name!r}: {first}{reason[0] if reason else type(error).__name__}", param_hint="'--model'"
        ) from error


def load_for(
    artifact: str, access: Access, name: str, profile: str, *, revision: str | None, device: str | None, as_json: bool
) -> tuple[Any, Any, Profile | None]:
    """Load what an artifact needs: its model in the artifact's dtype, and its profile.

    All that can fail early is checked before the weights are loaded, the model's name first.

    Args:
        profile: the value of --profile.

    Returns:
        (model, tokenizer, profile); the profile is None where the artifact needs none.

    Raises:
        click.BadParameter: the model cannot be loaded, or the device does not exist.
        ArtifactError, StoreError: the artifact cannot be read.
        WrongModelError: the artifact is of a model with another configuration.
        ProfileError: the profile is missing, or is a different one.
    """
    manifest = Reader(open_store(artifact, access)).manifest
    dtype, target = Geometry.from_dict(manifest.geometry).dtype, _device(device)
    tokenizer = _load_tokenizer(name, revision)
    try:
        required = required_profile(artifact, profile, name, access)
    except ProfileError:
        _require_configured(manifest, name, revision)  # another model has another profile
        raise
    with step("loading the model", as_json):
        return _load_weights(name, revision, dtype, target), tokenizer, required


def _require_configured(manifest: Manifest, name: str, revision: str | None) -> None:
    from transformers import AutoConfig

    from hf_cachegen.models.fingerprint import Fingerprint

    if manifest.fingerprint is not None:
        with _loading(name, revision) as found:
            config = AutoConfig.from_pretrained(found, revision=revision)
        Fingerprint.from_dict(manifest.fingerprint).check_saved_config(config)


def token_ids(tokenizer: Any, text: str, *, start: bool) -> list[int]:
    """Tokenize `text` (see `hf_cachegen.models.text.plain_ids`); `start` adds the tokens before a text (BOS)."""
    from hf_cachegen.models.text import plain_ids

    return plain_ids(tokenizer, text, start=start)


def find_profile(choice: str, model: str) -> Profile | None:
    """Find the profile of `model` that --profile selects by "auto", "none" or a location. Raises ProfileError."""
    from hf_cachegen.profiles.finding import find

    return find(None if choice == "none" else choice, model)


def required_profile(artifact: str, choice: str, model: str, access: Access | None = None) -> Profile | None:
    """Find the profile that decoding `artifact` needs, or None where it needs none; `choice` as in `find_profile`.

    Raises:
        ProfileError: the profile is missing, or is a different one.
    """
    from hf_cachegen.artifact.artifact import Artifact
    from hf_cachegen.profiles.finding import profile_of

    return profile_of(Artifact(open_store(artifact, access)), None if choice == "none" else choice, model)


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise click.BadParameter(
            f"expected a device of this machine, such as cpu, got {name!r}", param_hint="'--device'"
        ) from error
    return device
