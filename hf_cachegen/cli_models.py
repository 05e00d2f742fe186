"""What the command line knows of models: loading one with its tokenizer, quietly; the profile that goes with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from hf_cachegen.artifact import Reader
from hf_cachegen.cli_output import step
from hf_cachegen.cli_views import describe
from hf_cachegen.stores import Access, open_store
from hf_cachegen.stores.naming import is_hub_id

if TYPE_CHECKING:
    from hf_cachegen.profiles.files import Profile

DTYPES = ("auto", "bfloat16", "float16", "float32")


def load_model(name: str, *, revision: str | None, dtype: str, device: str | None) -> tuple[Any, Any]:
    """The causal language model `name` (a folder or a Hub id) and its tokenizer.

    dtype: "auto" is that of the checkpoint. device: None is CUDA where there is one, else the CPU.
    Raises click.BadParameter where there is no such model, dtype or device.
    """
    place = _device(device)
    tokenizer = _load_tokenizer(name, revision)
    return _load_weights(name, revision, dtype, place), tokenizer


def _load_tokenizer(name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    with _loading(name) as found:
        return AutoTokenizer.from_pretrained(found, revision=revision)


def _load_weights(name: str, revision: str | None, dtype: str, place: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with _loading(name) as found:
        model = AutoModelForCausalLM.from_pretrained(
            found, revision=revision, dtype="auto" if dtype == "auto" else getattr(torch, dtype)
        )
    return model.to(place).eval()


@contextmanager
def _loading(name: str) -> Iterator[str]:
    """Yield the model's folder or id, with "~" expanded, and keep Transformers quiet. What it raises for a model that
    it cannot load becomes click.BadParameter, which names the folder too; for a path the Hub is not asked.
    """
    from transformers.utils import logging

    folder = os.path.expanduser(name)
    missing = "" if os.path.isdir(folder) else f"there is no folder {os.path.abspath(folder)}"
    if missing and not is_hub_id(name):
        raise click.BadParameter(f"cannot load {name!r}: {missing}", param_hint="'--model'")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield folder
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()
        first = f"{missing}, and as a model on the Hub: " if missing else ""
        raise click.BadParameter(
            f"cannot load {name!r}: {first}{reason[0] if reason else type(error).__name__}", param_hint="'--model'"
        ) from error


def load_for(
    artifact: str, access: Access, name: str, profile: str, *, revision: str | None, device: str | None, as_json: bool
) -> tuple[Any, Any, Profile | None]:
    """(model, tokenizer, profile) for an artifact: the model `name` in the artifact's dtype, and the profile that
    `profile` (the value of --profile) means, None where the artifact takes none.

    What can be said at once is said before the weights are loaded, and of the model first. Raises click.BadParameter,
    ArtifactError, StoreError, ProfileError.
    """
    dtype = describe(Reader(open_store(artifact, access)))["dtype"]
    place = _device(device)
    tokenizer = _load_tokenizer(name, revision)
    required = required_profile(artifact, profile, name, access)
    with step("loading the model", as_json):
        return _load_weights(name, revision, dtype, place), tokenizer, required


def begin(
    artifact: str, access: Access, name: str, profile: str, prompt: str, *, revision: str | None, device: str | None,
    as_json: bool,
) -> tuple[Any, Any, Profile | None, str]:  # fmt: skip
    """What answering a question about an artifact takes: that of `load_for`, and the question ("-": all of stdin)."""
    question = sys.stdin.read() if prompt == "-" else prompt
    return (*load_for(artifact, access, name, profile, revision=revision, device=device, as_json=as_json), question)


def token_ids(tokenizer: Any, text: str, *, start: bool) -> list[int]:
    """The ids of `text`; `start` adds what the tokenizer puts before a text (BOS), which a question must not have.

    What it would put behind the text (EOS) is left out, since more text follows.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=start)["input_ids"]
    if start and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token or ""):
        ids = ids[:-1]
    return ids


def with_question(context_ids: Any, question: list[int], device: Any) -> Any:
    """The prompt [1, tokens] that asks a question about a context [1, tokens]."""
    import torch

    return torch.cat([context_ids, torch.tensor([question], dtype=torch.long)], dim=1).to(device)


def no_padding(tokenizer: Any, prompt_ids: Any) -> dict[str, Any]:
    """Arguments of generate for one prompt without pads."""
    import torch

    # Without a mask the stock generate would take a pad token within the text for padding.
    arguments = {"attention_mask": torch.ones_like(prompt_ids)}
    return arguments if tokenizer.pad_token_id is not None else {**arguments, "pad_token_id": tokenizer.eos_token_id}


def token_counts(cache: Any, prompt_ids: Any, answer: Any) -> dict[str, int]:
    """What `--json` says of the lengths of a context, a question and an answer."""
    context = cache.input_ids.shape[1]
    return {"context_tokens": context, "question_tokens": prompt_ids.shape[1] - context, "new_tokens": len(answer)}


def find_profile(choice: str, model: str) -> Profile | None:
    """The profile that --profile means for `model`: "auto", "none" or a path. Raises ProfileError."""
    from hf_cachegen.profiles.finding import find

    return find(None if choice == "none" else choice, model)


def required_profile(artifact: str, choice: str, model: str, access: Access | None = None) -> Profile | None:
    """The profile that decoding `artifact` takes, None where it takes none; see `find_profile`. Raises ProfileError
    where it is missing or another one.
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
        raise click.BadParameter(f"there is no device {name!r} here", param_hint="'--device'") from error
    return device
