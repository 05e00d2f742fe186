"""From a place to a context that is in place: finds a source that answers, and runs the stream."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hf_cachegen.artifact import Artifact
from hf_cachegen.container import Limits
from hf_cachegen.errors import ArtifactError, PromptMismatchError, StoreError
from hf_cachegen.finding import ProfileLike
from hf_cachegen.layout import KVTensors
from hf_cachegen.opening import OpenContext, open_context
from hf_cachegen.prefix import match, tokens_of
from hf_cachegen.stores import Access, Patience, open_store
from hf_cachegen.streaming.events import ContextReady, SourceFailed, StreamFinished
from hf_cachegen.streaming.fetching import abandoned
from hf_cachegen.streaming.link import Link
from hf_cachegen.streaming.loader import Loader
from hf_cachegen.streaming.options import Fallback, Place, StreamOptions
from hf_cachegen.streaming.refine import Refinement
from hf_cachegen.streaming.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

END_SECONDS = 2.0
"""How long a stream that failed or was interrupted waits for its threads."""
ATTEMPTS = 2
BACKOFF_SECONDS = 0.05
"""A stream goes on elsewhere rather than wait."""
FIRST_HOST_ALONE = ("revision", "subfolder", "headers", "storage_options", "repo_type")
"""Options of the first place that a fallback does not get: credentials are for those whom they were given for."""


def stream_context(
    path: Place,
    model: PreTrainedModel,
    options: StreamOptions,
    profile: ProfileLike,
    tokenizer: PreTrainedTokenizerBase | None,
    limits: Limits | None,
    access: Mapping[str, Any],
) -> tuple[OpenContext, KVTensors, Refinement]:
    """The arguments are those of `CacheGenCache.stream`, and so are the errors."""
    loader = Loader(model, options, time.monotonic())
    places = _places(path, options, access)
    with ExitStack() as resources, ExitStack() as ending:
        ending.callback(loader.close, END_SECONDS)
        likely = () if options.prompt is None else tokens_of(*options.prompt)
        check = partial(
            open_context, model=model, limits=limits, profile=profile, tokenizer=tokenizer, likely=likely,
            verify=options.verify,
        )  # fmt: skip
        found = _open(loader, resources, places, limits, check)
        loader.opened(found, _question(found, options))
        kv = loader.run(model)
        ending.pop_all()  # a context that is in place waits for no thread
        refinement = Refinement(loader, kv, resources.pop_all())
    loader.tell(ContextReady, refinement.report)
    if options.refine == "while_generating" and loader.more:
        refinement.start()
    else:
        refinement.close()
        loader.tell(StreamFinished, refinement.report)
    loader.deliver()
    return found, kv, refinement


def _places(path: Place, options: StreamOptions, access: Mapping[str, Any]) -> list[tuple[Place, Access]]:
    patience = Patience(ATTEMPTS, options.stall, backoff=BACKOFF_SECONDS, max_wait=options.stall)
    first = {"patience": patience, **access}
    others = {name: value for name, value in first.items() if name not in FIRST_HOST_ALONE}
    return [(path, Access(**first)), *(_fallback(fallback, others) for fallback in options.fallback)]


def _fallback(fallback: Fallback, others: Mapping[str, Any]) -> tuple[Place, Access]:
    place, own = fallback if isinstance(fallback, tuple) else (fallback, {})
    return place, Access(**{**others, **own})


def _open(
    loader: Loader, resources: ExitStack, places: Sequence[tuple[Place, Access]], limits: Limits | None, check: Any
) -> OpenContext:
    """The context from the first place that has it. Raises the first place's error where none has."""
    failed: Exception | None = None
    for number, (place, access) in enumerate(places):
        try:
            store = open_store(place, access, limits)
            in_turn = [*places[number:], *places[:number]]
            found: OpenContext = check(store, on_manifest=partial(_begin, loader, resources, in_turn, limits))
            return found
        except (ArtifactError, StoreError) as error:  # noqa: PERF203
            failed = failed or error
            loader.tally.failed(str(place), error, None)
            loader.tell(SourceFailed, str(place), f"{type(error).__name__}: {error}")
            loader.deliver()
    raise failed or StoreError("no place to stream from")


def _begin(
    loader: Loader,
    resources: ExitStack,
    places: Sequence[tuple[Place, Access]],
    limits: Limits | None,
    artifact: Artifact,
) -> None:
    loader.close()  # an earlier place, which failed in between

    def elsewhere(place: Place, access: Access) -> Artifact:
        return artifact.elsewhere(open_store(place, access, limits))

    sources = []
    for number, (place, access) in enumerate(places):
        link = loader.options.link or Link.to(_host(place))
        get, same = (partial(elsewhere, place, access), artifact) if number else (lambda: artifact, None)
        sources.append(Source(str(place), get, link, loader.bandwidth, abandoned, same))
        resources.callback(sources[-1].close)
    loader.begin(artifact, sources)


def _host(place: Place) -> str:
    """What the streams to one place share a link to."""
    parts = urlsplit(os.fspath(place))
    return f"{parts.scheme}://{parts.netloc}" if parts.scheme and parts.netloc else "elsewhere"


def _question(found: OpenContext, options: StreamOptions) -> int:
    """Tokens that follow the context. Raises PromptMismatchError where the prompt has nothing of the context."""
    if options.prompt is None:
        return options.prompt_tokens
    ids, mask = options.prompt
    columns = match(found.input_ids[0], ids, mask).columns
    if columns <= 0:
        raise PromptMismatchError("the prompt does not begin with the context")
    return int(ids.shape[1]) - columns
