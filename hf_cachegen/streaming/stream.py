"""Stream a context: find a source that answers, start fetching, validate, and load.

    open_manifest -> Download.start -> validate -> Loader.run -> Refinement

Fetching starts as soon as the manifest is read. The artifact is validated while its chunks arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hf_cachegen.artifact import MEDIA_FEATURE
from hf_cachegen.artifact.artifact import Artifact
from hf_cachegen.codec.context import checked_level
from hf_cachegen.errors import ArtifactError, PromptMismatchError, StoreError, UnsupportedModelError
from hf_cachegen.models.layers import KVTensors
from hf_cachegen.models.opening import OpenContext, open_manifest, validate
from hf_cachegen.models.prefix import match, tokens_of
from hf_cachegen.models.requirements import positions_change
from hf_cachegen.profiles.finding import finder
from hf_cachegen.stores import open_store
from hf_cachegen.streaming.download import Download
from hf_cachegen.streaming.events import ContextReady, StreamFinished
from hf_cachegen.streaming.layers import LayerWriter
from hf_cachegen.streaming.link import Link
from hf_cachegen.streaming.loader import Loader
from hf_cachegen.streaming.locations import Location, locations_of
from hf_cachegen.streaming.meter import TransferMeter
from hf_cachegen.streaming.options import PathLike, StreamOptions
from hf_cachegen.streaming.policy import TEXT
from hf_cachegen.streaming.refine import Refinement
from hf_cachegen.streaming.session import Session
from hf_cachegen.streaming.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

END_SECONDS = 2.0
"""How long a stream that failed or was interrupted waits for its threads."""


def stream_context(
    path: PathLike, model: PreTrainedModel, options: StreamOptions
) -> tuple[OpenContext, KVTensors, Refinement]:
    """Stream the context of an artifact into the layers of a model.

    Args:
        path: The first location of the artifact.
        model: The model that will use the context.
        options: See `StreamOptions`.

    Returns:
        The validated artifact, the keys and values, and what may still refine them.

    Raises:
        ArtifactError, StoreError, MismatchError, StreamCancelledError: As `CacheGenCache.stream` says.
    """
    session = Session.start(model, options)
    with ExitStack() as ending:
        download, context = _open(session, model, locations_of(path, options), ending)
        _check_choice(download, options)
        writer = LayerWriter(context.artifact.geometry, context.devices or [])
        loader = Loader(download, writer, context.input_ids, _question_tokens(context, options))
        kv = loader.run(model)
        ending.pop_all()  # a context that is in place does not wait for its threads
    refinement = Refinement(loader, kv)
    session.events.add(ContextReady, refinement.report)
    if options.refine == "while_generating" and loader.more:
        refinement.start()
    else:
        refinement.close()
        session.events.add(StreamFinished, refinement.report)
    session.events.deliver()
    return context, kv, refinement


def _open(
    session: Session, model: PreTrainedModel, locations: Sequence[Location], ending: ExitStack
) -> tuple[Download, OpenContext]:
    """Start fetching from the first location whose artifact can be opened and validated.

    `ending` closes the download. Raises the first location's error where there is no such location.
    """
    options, first_error = session.options, None
    for number, location in enumerate(locations):
        download = None
        try:
            artifact, sources = _open_sources(session, model, [*locations[number:], *locations[:number]])
            # The tokens of a chunk do not say which pictures they stand for. And keys and values before a chunk are not
            # enough to compute it if the model also has states.
            more = artifact.manifest.states or MEDIA_FEATURE in artifact.manifest.required
            can_recompute = not more and not positions_change(model.config, 1, artifact.geometry.tokens)
            download = Download(session, artifact, sources, can_recompute=can_recompute)
            ending.callback(download.close, END_SECONDS)
            download.start()
            likely = () if options.prompt is None else tokens_of(*options.prompt)
            return download, validate(artifact, model, options.tokenizer, likely, options.verify)
        except (ArtifactError, StoreError) as error:
            ending.pop_all()
            if download is not None:
                download.close()
            first_error = first_error or error
            session.source_failed(str(location), error)
            session.events.deliver()
    raise first_error or StoreError("there is no location to stream from")


def _open_sources(
    session: Session, model: PreTrainedModel, locations: Sequence[Location]
) -> tuple[Artifact, list[Source]]:
    """Open the manifest at the first location. The others are opened when they are needed."""
    options = session.options
    links = [options.link or Link.to(location.host) for location in locations]
    meters = [TransferMeter([session.bandwidth, link.bandwidth]) for link in links]
    store = open_store(locations[0].path, locations[0].access, options.limits, meters[0])
    artifact = open_manifest(store, options.limits)
    find_profile = finder(options.profile, model)
    return artifact, [
        Source(location, link, meter, artifact, find_profile, opened=number == 0)
        for number, (location, link, meter) in enumerate(zip(locations, links, meters, strict=True))
    ]


def _check_choice(download: Download, options: StreamOptions) -> None:
    """Raise LevelError or UnsupportedModelError for a level that the artifact or the model cannot give."""
    if options.choice == TEXT and not download.schedule.can_recompute:
        raise UnsupportedModelError(
            "no chunk can be recomputed: this model has recurrent states, its rotation depends on the whole length, or "
            "the context has media"
        )
    if options.choice is not None and options.choice != TEXT:
        checked_level(options.choice, download.artifact.levels)


def _question_tokens(context: OpenContext, options: StreamOptions) -> int:
    """The number of tokens that follow the context. Raises PromptMismatchError where the prompt shares none with it."""
    if options.prompt is None:
        return options.prompt_tokens
    ids, mask = options.prompt
    shared = match(context.input_ids[0], ids, mask).length
    if shared <= 0:
        raise PromptMismatchError("the prompt does not begin with the context")
    return int(ids.shape[1]) - shared
