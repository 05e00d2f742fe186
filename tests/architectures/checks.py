"""What a family must fulfil: each check compares generation from a cache with the stock generation.

A lossless artifact must give the same tokens, and the same logits bit for bit wherever two runs of the stock forward
pass over the same split give them. Of the finest lossy level the logits must be finite and close.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_cachegen import CacheGenCache, CacheGenConfig, detach, generate
from hf_cachegen.errors import CacheGenError, UnsupportedModelError
from hf_cachegen.models.compat import CACHE_ARGUMENT, cache_of, run, takes
from tests.architectures.models import Entry, make
from tests.architectures.shrink import FIRST_SPECIAL

CONTEXT_TOKENS, NEW_TOKENS = 40, 4
CLOSE = 0.8
"""Largest distance of the finest lossy level's logits from the exact ones, relative to their norm. Logits without any
relation are apart by 1.4; a mixture of few random experts, of which one error selects another, by 0.6."""
ROUNDING = 1e-4
LOSSLESS = CacheGenConfig(lossless=True)
REUSED = {"exact hit": CONTEXT_TOKENS - 1, "shorter prompt": 30, "departing prompt": 23}
"""Positions of a prompt that are taken from the cache; in the other prompts the whole context."""


@dataclass
class Outcome:
    """The result of one entry.

    Attributes:
        status: "passes", "refused" (a typed error of the package), "fails" (ours), "not built" or "stock fails".
        reason: why it does not pass; empty where it does.
        failed: for each check that failed, what happened.
        notes: what the stock model itself cannot do, by check.
        layers: the classes of the cache's layers.
        seconds: time taken.
    """

    status: str = "passes"
    reason: str = ""
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    seconds: float = 0.0


def words(count: int, seed: int) -> Tensor:
    """Return random ordinary tokens, int64 [1, count]."""
    return torch.randint(3, FIRST_SPECIAL, (1, count), generator=torch.Generator().manual_seed(seed))


CONTEXT = words(CONTEXT_TOKENS, 0)
QUESTION = words(6, 1)


def prompts() -> dict[str, dict[str, Any]]:
    """Return the arguments of generate for each check."""
    question = torch.cat([CONTEXT, QUESTION], 1)
    departing = torch.cat([CONTEXT[:, :23], words(9, 2)], 1)
    short = torch.cat([torch.zeros_like(QUESTION[:, :4]), CONTEXT, QUESTION[:, 4:]], 1)
    mask = torch.ones(2, question.shape[1], dtype=torch.long)
    mask[1, :4] = 0
    return {
        "question": {"input_ids": question},
        "exact hit": {"input_ids": CONTEXT},
        "shorter prompt": {"input_ids": CONTEXT[:, :31]},
        "departing prompt": {"input_ids": departing},
        "left padding": {"input_ids": torch.cat([question, short]), "attention_mask": mask},
        "beams": {"input_ids": question, "num_beams": 2},
    }


def examine(entry: Entry) -> Outcome:
    """Build the tiny model of an entry and run all checks."""
    start, outcome = time.perf_counter(), Outcome()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            model = make(entry)
        except Exception as error:
            outcome.status, outcome.reason = "not built", brief(error)
        else:
            _examine(model, outcome)
            del model
    gc.collect()
    outcome.seconds = round(time.perf_counter() - start, 2)
    return outcome


def _examine(model: Any, outcome: Outcome) -> None:
    stock: dict[str, Tensor] = {}
    for name, arguments in prompts().items():
        try:
            stock[name] = _generate(model.generate, arguments)
        except Exception as error:  # noqa: PERF203
            outcome.notes[name] = f"stock: {brief(error)}"
    if "question" not in stock:
        outcome.status, outcome.reason = "stock fails", outcome.notes["question"]
        return
    try:
        exact = CacheGenCache.from_context(model, CONTEXT)
        outcome.layers = sorted({type(layer).__name__ for layer in DynamicCache(config=model.config).layers})
        with tempfile.TemporaryDirectory() as folder:
            exact.save_pretrained(folder, LOSSLESS)
            cache = CacheGenCache.from_pretrained(folder, model)
        with tempfile.TemporaryDirectory() as folder:
            exact.save_pretrained(folder, CacheGenConfig())
            lossy = CacheGenCache.from_pretrained(folder, model)
    except UnsupportedModelError as error:
        outcome.status, outcome.reason = "refused", brief(error)
        return
    except CacheGenError as error:
        outcome.status, outcome.reason = "refused", f"{type(error).__name__}: {brief(error)}"
        return
    except Exception as error:
        outcome.status, outcome.reason = "fails", f"making the cache: {brief(error)}"
        return
    for name, expected in stock.items():
        arguments = prompts()[name]
        try:
            found = _generate(functools.partial(generate, model, cache=cache), arguments)
        except Exception as error:
            outcome.failed[name] = brief(error)
            continue
        if torch.equal(found, expected):
            continue
        outcome.failed[name] = "other tokens than the stock generation"
        with contextlib.suppress(Exception):  # the stock model may not read a prompt in two parts
            if torch.equal(found, _in_two_parts(model, arguments, REUSED.get(name, CONTEXT_TOKENS))):
                del outcome.failed[name]
                outcome.notes[name] = "the stock model itself answers otherwise when it reads the prompt in two parts"
    _compare_logits(model, cache, lossy, outcome)
    detach(model)
    if outcome.failed:
        outcome.status = "fails"
        outcome.reason = "; ".join(f"{name}: {what}" for name, what in outcome.failed.items())


def _in_two_parts(model: Any, arguments: dict[str, Any], start: int) -> Tensor:
    """Return what the stock model generates when a stock cache holds the first `start` positions of the prompt."""
    ids, mask = arguments["input_ids"], arguments.get("attention_mask")
    inputs = {} if mask is None else {"attention_mask": mask[:, :start]}
    if mask is not None and takes(model, "position_ids"):
        inputs["position_ids"] = (mask[:, :start].cumsum(-1) - 1).clamp_min(0)
    cache = cache_of(run(model, ids[:, :start], DynamicCache(config=model.config), **inputs))
    cache.batch_repeat_interleave(arguments.get("num_beams", 1))
    return _generate(model.generate, {**arguments, CACHE_ARGUMENT: cache})


def _generate(call: Callable[..., Any], arguments: dict[str, Any]) -> Tensor:
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    result = call(**{**settings, **arguments})
    return result if isinstance(result, Tensor) else result.sequences


def _compare_logits(model: Any, cache: CacheGenCache, lossy: CacheGenCache, outcome: Outcome) -> None:
    """Compare the logits of the question after a loaded cache with those after a stock cache of the same context.

    A model with states reads its context in other passes, and some cannot read several tokens after states. There the
    logits of the first generated token are compared with those of the stock generation, up to rounding.
    """
    states = bool(cache.checkpoints.all)
    after = _first_logits if states else _question_logits
    try:
        first, second = (after(model, None) for _ in range(2))
    except Exception as error:
        outcome.notes["logits"] = f"stock: {brief(error)}"
        return
    try:
        exact, close = (after(model, each) for each in (cache, lossy))
    except Exception as error:
        outcome.failed["logits"] = brief(error)
        return
    apart = _distance(exact, first)
    if not torch.equal(first, second):
        outcome.notes["logits"] = "two runs of the stock model differ"
    elif apart > (ROUNDING if states else 0.0):
        outcome.failed["logits"] = f"differ from the stock ones by {apart:.2g}"
    apart = _distance(close, first)
    if not apart <= CLOSE:
        outcome.failed["finest lossy level"] = f"logits differ by {apart:.2g}"


def _question_logits(model: Any, cache: CacheGenCache | None) -> Tensor:
    if cache is None:
        filled = cache_of(run(model, CONTEXT, DynamicCache(config=model.config)))
    else:
        filled = cache.to_dynamic(model)
    return run(model, QUESTION, filled).logits.float()


def _first_logits(model: Any, cache: CacheGenCache | None) -> Tensor:
    settings = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = generate(model, prompts()["question"]["input_ids"], cache=cache, **settings)
    return found.logits[0].float()


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def brief(error: BaseException) -> str:
    """Return an error's message in one line, with its class where it is not one of the package."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, CacheGenError) else f"{type(error).__name__}: {text}"
