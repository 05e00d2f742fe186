"""Load a causal language model, its tokenizer and its profile, and run it on a cache.

This file and the public names of `hf_cachegen` are all that the evaluation needs to know about models.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_cachegen import Profile
from hf_cachegen.errors import ArtifactNotFoundError, ConfigError, ProfileError, StoreError

DTYPES = ("auto", "bfloat16", "float16", "float32")
PROFILE_FILE = "cachegen_profile.safetensors"
PROFILE_SUFFIX = "-cachegen-profile"
"""Suffix of the Hub repository that holds a model's profile (docs/stores.md)."""
UNBOUNDED = 1 << 30
"""Tokens: the limit of a model that states none."""
CACHE_ARGUMENT = "cache" if Version("5.24.dev0") <= Version(transformers.__version__) else "past_key_values"
"""Name of the cache among the arguments of a model's forward pass."""


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Load the tokenizer of a model; one without a pad token pads with its end-of-text token.

    Args:
        name: folder or Hub id of the model.
        revision: branch, tag or commit on the Hub.

    Returns:
        A Transformers tokenizer.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(name), revision=revision)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"cannot load the tokenizer of {name!r}: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, *, revision: str | None = None, dtype: str = "auto", device: str | None = None) -> Any:
    """Load a causal language model in evaluation mode.

    Args:
        name: folder or Hub id of the model.
        revision: branch, tag or commit on the Hub.
        dtype: one of DTYPES; "auto" is the dtype of the checkpoint.
        device: such as "cpu" or "cuda:0"; None for a GPU where there is one, else the CPU.

    Returns:
        A Transformers model.

    Raises:
        ConfigError: the model cannot be loaded, or the device does not exist.
    """
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(os.path.expanduser(name), revision=revision, dtype=wanted)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"cannot load the model {name!r}: {_first_line(error)}") from error
    try:
        return model.to(where).eval()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"cannot put the model on device {where!r}: {_first_line(error)}") from error


def position_limit(name: str, revision: str | None = None) -> int:
    """Return the number of tokens that a model was made for, UNBOUNDED where its configuration states none.

    Args:
        name: folder or Hub id of the model.
        revision: branch, tag or commit on the Hub.
    """
    config = AutoConfig.from_pretrained(os.path.expanduser(name), revision=revision).get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or UNBOUNDED)


def find_profile(choice: str, model: str) -> Profile | None:
    """Return the profile that `--profile` selects, None where there is none.

    Args:
        choice: "none", a location (file, folder, URL, Hub repository), or "auto": the profile in the model's folder, or
            in the Hub repository `<model>-cachegen-profile`.
        model: folder or Hub id of the model.

    Raises:
        ProfileError: the profile is missing at the given location, or damaged.
        StoreError: the given location cannot be read.
    """
    if choice == "none":
        return None
    if choice != "auto":
        return Profile.from_pretrained(choice)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return Profile.load(folder) if (folder / PROFILE_FILE).is_file() else None
    try:
        return Profile.from_pretrained(f"{model}{PROFILE_SUFFIX}")
    except StoreError:
        return None
    except ProfileError as error:
        if isinstance(error.__cause__, ArtifactNotFoundError):
            return None
        raise


def token_ids(tokenizer: Any, text: str, *, start: bool) -> list[int]:
    """Tokenize a part of a prompt.

    Args:
        tokenizer: a Transformers tokenizer.
        text: the part.
        start: the part begins the prompt: add the tokens that the tokenizer puts before a text (BOS). A token that it
            would put after the text (EOS) is always left out, since more text follows.

    Returns:
        The token ids.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=start)["input_ids"]
    if start and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token or ""):
        ids = ids[:-1]
    return ids


@torch.no_grad()
def continuation_logits(model: Any, keys: Sequence[Tensor], values: Sequence[Tensor], ids: Tensor) -> Tensor:
    """Run a model over the tokens that follow a cached context.

    Args:
        model: the model that the cache belongs to.
        keys: per layer [1, heads, context tokens, head_dim], in the model's dtype.
        values: per layer, likewise.
        ids: int64 [1, tokens], the tokens after the context.

    Returns:
        float32 [tokens, vocabulary], the logits of the token after each of `ids`.
    """
    past = DynamicCache()
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        past.update(k, v, layer)
    outputs = model(input_ids=ids.to(model.device), use_cache=True, return_dict=True, **{CACHE_ARGUMENT: past})
    logits: Tensor = outputs.logits[0]
    return logits.float()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
