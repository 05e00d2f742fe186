"""What the command line knows of models: loading one with its tokenizer, quietly; the profile that goes with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hf_cachegen.stores import Access, open_store

if TYPE_CHECKING:
    from hf_cachegen.profile import Profile

DTYPES = ("auto", "bfloat16", "float16", "float32")


def load_model(name: str, *, revision: str | None, dtype: str, device: str | None) -> tuple[Any, Any]:
    """The causal language model `name` (a folder or a Hub id) and its tokenizer.

    dtype: "auto" is that of the checkpoint. device: None is CUDA where there is one, else the CPU.
    Raises click.BadParameter where there is no such model, dtype or device.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place = _device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype="auto" if dtype == "auto" else getattr(torch, dtype)
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise click.BadParameter(
            f"cannot load {name!r}: {reason[0] if reason else type(error).__name__}", param_hint="'--model'"
        ) from error
    return model.to(place).eval(), tokenizer


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
    from hf_cachegen.finding import find

    return find(None if choice == "none" else choice, model)


def required_profile(artifact: str, choice: str, model: str, access: Access | None = None) -> Profile | None:
    """The profile that decoding `artifact` takes, None where it takes none; see `find_profile`. Raises ProfileError
    where it is missing or another one.
    """
    from hf_cachegen.artifact import Artifact

    return Artifact(open_store(artifact, access), None, None if choice == "none" else choice, model).profile()


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
