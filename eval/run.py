"""Measure one model on one data set under any number of codecs, into a folder (`python -m eval run`).

Under `accelerate launch` the examples are divided among the processes of all nodes, which must share the folder, and
the first process merges. The same command continues an interrupted run: finished examples are not measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from tqdm import tqdm

from eval import codecs, datasets, metrics, surroundings
from eval.baselines import CALIBRATED
from eval.baselines.joint import Joint
from eval.chat import with_template
from eval.datasets.request import Request
from eval.examples import Dataset, Example, with_question
from eval.measure import Encoded, encode, measure
from eval.models import find_profile, load_model, load_tokenizer, position_limit, token_ids
from eval.run_folder import RunFolder
from hf_cachegen.errors import ConfigError

PATIENCE = timedelta(days=7)
"""The longest wait of the first process for the others: a slow process is not an error."""
WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Options:
    """The options of `run`; docs/evaluation.md explains each."""

    model: str
    dataset: str
    codecs: tuple[str, ...]
    levels: tuple[int, ...] | None = None
    limit: int | None = None
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    revision: str | None = None
    profile: str = "auto"
    chunk_tokens: int = 512
    batch: int = 8
    max_tokens: int | None = None
    too_long: str | None = None
    include_question: bool = False
    chat_template: bool | None = None
    basis: str | None = None


def run(options: Options, out: Path) -> dict[str, Any]:
    """Measure, and return the metrics.

    Args:
        options: what to measure.
        out: folder of the run; an unfinished run continues.

    Returns:
        The metrics in the first process, an empty dictionary in the others.

    Raises:
        ConfigError: an option, the data or the folder do not fit.
    """
    state = PartialState(cpu=options.device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)
    set_seed(options.seed)
    folder = RunFolder(out)
    tokenizer = load_tokenizer(options.model, options.revision)
    dataset = datasets.load(options.dataset, Request(tokenizer, options.limit, options.seed))
    if options.include_question:
        inside = tuple(with_question(dataset.examples))
        dataset = replace(dataset, name=f"{dataset.name}, question cached", examples=inside)
    options = with_defaults(options, dataset, tokenizer)
    if options.chat_template:
        dataset = replace(dataset, examples=tuple(with_template(tokenizer, dataset.examples)))
    profile = find_profile(options.profile, options.model)
    joint = None if options.basis is None else Joint.load(Path(options.basis))
    chosen, missing = codecs.choose(options.codecs, profile, joint)
    most = options.max_tokens or position_limit(options.model, options.revision)
    kept, left_out = fit(tokenizer, dataset, most, options)
    asked = {
        **asdict(options),
        "codecs": list(chosen),
        "unavailable": missing,
        "dataset": {"name": dataset.name, "scores": list(dataset.scores), "new_tokens": dataset.new_tokens,
                    "first_line": dataset.first_line, "source": dataset.source, "examples": len(kept),
                    "too_long": left_out, "digest": _digest(dataset.examples)},
        "max_tokens": most,
        "profile": None if profile is None or not {*codecs.PROFILED} & {*chosen} else
                   {"digest": profile.digest, "bytes": len(profile.to_bytes())},
        "basis": None if options.basis is None or not {*CALIBRATED} & {*chosen} else
                 {"sha256": hashlib.sha256(Path(options.basis).read_bytes()).hexdigest()},
    }  # fmt: skip
    # The device is not part of the request: a run may continue on another one.
    asked = {key: value for key, value in asked.items() if key != "device"}
    if state.is_main_process:
        folder.begin(asked, {**surroundings.session(state.num_processes), "device": options.device})
    state.wait_for_everyone()
    _measure_all(options, dataset, kept, chosen, profile, joint, tokenizer, folder, state)
    state.wait_for_everyone()
    if not state.is_main_process:
        return {}
    records = folder.merge([example.id for example, _ in kept])
    found = metrics.summarise(records, dataset.scores)
    folder.finish(found)
    return found


def with_defaults(options: Options, dataset: Dataset, tokenizer: Any) -> Options:
    """Return the options with the data set's own chat template and truncation rule where none are given.

    A chat template is left out where the tokenizer has none, unless it was asked for.
    """
    chat = options.chat_template
    if chat is None:
        chat = dataset.chat_template and bool(getattr(tokenizer, "chat_template", None))
    return replace(options, chat_template=chat, too_long=options.too_long or dataset.too_long)


def fit(
    tokenizer: Any, dataset: Dataset, most: int, options: Options
) -> tuple[list[tuple[Example, Encoded]], list[str]]:
    """Apply the rule for examples that are too long.

    Args:
        tokenizer: a Transformers tokenizer.
        dataset: the examples.
        most: limit of prompt and answer together, in tokens.
        options: its `too_long` is "skip", "middle" (contexts lose tokens in the middle, as in LongBench) or "error".

    Returns:
        (examples with their tokens, ids of those left out).

    Raises:
        ConfigError: an example is too long and the rule is "error", or no example is left.
    """
    kept: list[tuple[Example, Encoded]] = []
    left_out: list[str] = []
    for example in dataset.examples:
        found = encode(tokenizer, example, start=not options.chat_template)
        after = [len(token_ids(tokenizer, q.completion or "", start=False)) for q in example.questions]
        excess = found.longest + max(dataset.new_tokens, *after) - most
        if excess <= 0:
            kept.append((example, found))
        elif options.too_long == "middle" and len(found.context) - excess >= 2:
            length = len(found.context) - excess
            ids = found.context[: length - length // 2] + found.context[len(found.context) - length // 2 :]
            kept.append((example, replace(found, context=ids)))
        elif options.too_long == "error":
            raise ConfigError(
                f"example {example.id!r}: expected prompt and answer of at most {most} tokens, the prompt needs "
                f"{found.longest}: use --too-long skip or middle, or raise --max-tokens"
            )
        else:
            left_out.append(example.id)
    if not kept:
        raise ConfigError(
            f"{dataset.name}: none of the {len(left_out)} examples fits into {most} tokens: --too-long middle cuts them"
        )
    return kept, left_out


def _measure_all(
    options: Options, dataset: Dataset, kept: Sequence[tuple[Example, Encoded]], chosen: Sequence[str], profile: Any,
    joint: Joint | None, tokenizer: Any, folder: RunFolder, state: PartialState,
) -> None:  # fmt: skip
    done = folder.done()
    mine = kept[state.process_index :: state.num_processes]
    todo = [(example, encoded) for example, encoded in mine if example.id not in done]
    if not todo:
        return
    device = options.device or str(state.device)
    model = load_model(options.model, revision=options.revision, dtype=options.dtype, device=device)
    kit = codecs.Kit(model, tokenizer, profile, options.chunk_tokens, options.levels, joint)
    # The first use of a model and of each codec is slow and would distort the first example's seconds.
    first = todo[0][1]
    short = Encoded(first.context[:WARM_UP_TOKENS], first.questions)
    measure(kit, replace(dataset, new_tokens=min(2, dataset.new_tokens)), todo[0][0], short, chosen, options.batch)
    quiet, finished = not state.is_local_main_process, len(mine) - len(todo)
    bar = tqdm(todo, dataset.name, len(mine), initial=finished, unit="context", disable=quiet)
    with folder.writer(state.process_index) as writer:
        for example, encoded in bar:
            writer.add(measure(kit, dataset, example, encoded, chosen, options.batch))


def _digest(examples: Sequence[Example]) -> str:
    """Return the SHA-256 of all examples, so that another version of the data is another run."""
    return hashlib.sha256(json.dumps([asdict(example) for example in examples]).encode()).hexdigest()
