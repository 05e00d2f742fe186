"""Shared by the tests of generate(): decoding modes, prompts of one context, and comparisons with the stock call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache as remember
from typing import Any
from unittest import mock

import pytest
import torch

from hf_cachegen.cache import CacheGenCache
from hf_cachegen.generation import generate
from hf_cachegen.models import probe
from hf_cachegen.models.causality import hides_pads
from tests import tiny_models
from tests.tiny_models import shared, tokens

CONTEXT = tokens(40)
NEW_TOKENS = 12
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3, "do_sample": False},
    "beam sampling": {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
    "num_return_sequences": {"num_return_sequences": 3, "do_sample": True},
    "static cache": {"cache_implementation": "static", "do_sample": False},
    "static cache with beams": {"cache_implementation": "static", "num_beams": 2, "do_sample": False},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "do_sample": False},
    "guidance": {"guidance_scale": 1.5, "do_sample": False},
    "lengths": {"min_new_tokens": 6, "do_sample": False},
    "chunked prefill": {"prefill_chunk_size": 16, "do_sample": False},
    "chunked prefill, small": {"prefill_chunk_size": 2, "do_sample": False},
}
ASSISTED = {
    "assisted": {"do_sample": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
    "prompt lookup with longer n-grams": {
        "prompt_lookup_num_tokens": 5,
        "max_matching_ngram_size": 3,
        "do_sample": False,
    },
    "assisted sampling": {"do_sample": True},
}


def prompt(question: int, seed: int = 3) -> torch.Tensor:
    """Return the context and a question of `question` tokens; a negative number drops tokens of the context."""
    return torch.cat([CONTEXT, tokens(max(question, 1), seed)], dim=1)[:, : 40 + question]


def batch(*questions: int) -> dict[str, torch.Tensor]:
    """Return left-padded prompts of one document with questions of different length."""
    rows = [prompt(question, seed)[0] for seed, question in enumerate(questions)]
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    ids = torch.stack([torch.nn.functional.pad(row, (pad, 0)) for row, pad in zip(rows, pads, strict=True)])
    mask = torch.stack([torch.arange(longest) >= pad for pad in pads]).long()
    return {"input_ids": ids, "attention_mask": mask}


def seeded(function: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return function(*args, max_new_tokens=NEW_TOKENS, **kwargs)


def same(model: Any, cache: Any, ids: torch.Tensor, **options: Any) -> bool:
    expected = seeded(model.generate, ids, **options)
    return torch.equal(seeded(generate, model, ids, cache=cache, **options), expected)


@contextmanager
def fed(model: Any) -> Iterator[list[int]]:
    """Record the number of tokens of every forward pass, but for that of a probe: the hook makes one necessary."""
    hides_pads(model)  # tried once for each model, by the first test with padded rows
    lengths: list[int] = []
    probing = []
    run = probe.run

    def record(_: Any, args: Any, kwargs: Any) -> None:
        if not probing:
            lengths.append((args[0] if args else kwargs["input_ids"]).shape[1])

    def run_unrecorded(*args: Any) -> Any:
        probing.append(True)
        try:
            return run(*args)
        finally:
            probing.pop()

    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    with mock.patch.object(probe, "run", run_unrecorded):
        yield lengths
    hook.remove()


@remember
def cached(name: str) -> CacheGenCache:
    """Return the cache of CONTEXT, which all tests share and none changes."""
    return CacheGenCache.from_context(shared(name), CONTEXT)


each_model = pytest.mark.parametrize("name", tiny_models.SUPPORTED)
llama = pytest.mark.parametrize("name", ["llama"])
