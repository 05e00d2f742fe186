"""The command `stream`: answer a question while the context is streamed against a deadline."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import click
from rich.console import Console

from hf_cachegen.artifact import MANIFEST_FILE
from hf_cachegen.cli.models import load_for
from hf_cachegen.cli.options import (
    answer_options,
    artifact_argument,
    decoding_profile_option,
    model_options,
    output_options,
    sampling_arguments,
    sampling_options,
    trust_options,
)
from hf_cachegen.cli.output import print_json
from hf_cachegen.cli.prompts import Asked, note_loss, token_counts
from hf_cachegen.cli.stream_view import StreamView, chunk_table, live, streamer
from hf_cachegen.errors import ArtifactNotFoundError, StoreError
from hf_cachegen.stores import Access, open_store

if TYPE_CHECKING:
    from hf_cachegen.streaming import StreamReport


def _reachable(locations: Sequence[str], access: Access) -> str:
    """Return the first location that has a manifest. Raise the first one's error where none has."""
    first, *others = locations
    try:
        open_store(first, access).size(MANIFEST_FILE)
    except (ArtifactNotFoundError, StoreError):
        with suppress(ArtifactNotFoundError, StoreError):
            if others:
                return _reachable(others, access)
        raise
    return first


def _level(context: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "text":
        return value
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"expected a level from 1, or 'text', got {value!r}", context, parameter)
    return int(value)


@click.command("stream", short_help="Answer a question while the context is streamed.")
@artifact_argument
@answer_options
@click.option("--slo", type=click.FloatRange(min=0, min_open=True), help="Time limit of the first token, in seconds.")
@click.option("--policy", type=click.Choice(("adaptive", "paper")), default="adaptive", show_default=True,
              help="Policy that chooses a level, or text, for each chunk.")
@click.option("--level", callback=_level, metavar="N|text",
              help="Level of all chunks, or text to recompute them; replaces the policy.")
@click.option("--refine", type=click.Choice(("off", "before", "while_generating")), default="while_generating",
              show_default=True, help="Time at which finer levels are loaded: before or during generation, or never.")
@click.option("--fallback", multiple=True, metavar="LOCATION", help="Another location of the artifact; repeatable.")
@click.option("--stall-seconds", type=click.FloatRange(min=0, min_open=True),
              help="Time without data after which a source has failed, in seconds.  "
              "[default: a quarter of the SLO, at least 0.5; 10 without an SLO]")
@click.option("--connections", type=click.IntRange(min=1), default=8, show_default=True,
              help="Maximum number of parallel requests.")
@sampling_options
@decoding_profile_option
@trust_options
@model_options
@output_options
def stream(
    artifact: str, model: str, prompt: str | None, context_file: Any, chat: Any, slo: float | None, policy: str,
    level: Any, refine: str, fallback: tuple[str, ...], stall_seconds: float | None, connections: int,
    max_new_tokens: int, profile: str, public_key: str | None, key: str | None, revision: str | None,
    device: str | None, as_json: bool, debug: bool, **options: Any,
) -> None:  # fmt: skip
    """Answer a question about the context of ARTIFACT while the context is streamed, and show its progress.

    The clock starts when the model is loaded. The answer goes to stdout, the progress to stderr.
    """
    arguments, asked = sampling_arguments(options), Asked.of(prompt, context_file, chat)
    access = Access(public_key=public_key, key=key)
    source = _reachable((artifact, *fallback), access)
    loaded, tokenizer, required = load_for(
        source, access, model, profile, revision=revision, device=device, as_json=as_json
    )
    import torch

    from hf_cachegen.cache import CacheGenCache
    from hf_cachegen.generation import generate
    from hf_cachegen.models.text import one_prompt
    from hf_cachegen.streaming import policy_of

    inputs = one_prompt(tokenizer, asked.ids(source, access, tokenizer, as_json), loaded.device)
    view = StreamView(slo)
    on_terminal = not as_json and Console(stderr=True).is_terminal
    if options["num_beams"] == 1 and not as_json:
        arguments["streamer"] = streamer(view, tokenizer, echo=not on_terminal)
    if options["seed"] is not None:
        torch.manual_seed(options["seed"])
    with live(view, as_json):
        view.begin()
        cache = CacheGenCache.stream(
            artifact, loaded, slo=slo, level=level, policy=policy, refine=refine,
            prompt=(inputs["input_ids"], inputs["attention_mask"]), fallback=fallback, profile=required,
            tokenizer=tokenizer, on_event=view.take, stall_seconds=stall_seconds, connections=connections,
            public_key=public_key, key=key,
        )  # fmt: skip
        try:
            output = generate(loaded, **inputs, cache=cache, max_new_tokens=max_new_tokens, **arguments)
        finally:
            if cache.refinement is not None:
                cache.refinement.cancel()
    answer, report = output[0, inputs["input_ids"].shape[1] :], cast("StreamReport", cache.report)
    text, counts = tokenizer.decode(answer, skip_special_tokens=True), token_counts(cache, inputs, answer)
    if as_json:
        print_json({"text": text, **counts, "report": report.to_dict()})
        return
    if "streamer" not in arguments or on_terminal:
        click.echo(text)
    note_loss(counts)
    bases_first = slo is None and refine == "while_generating" and policy_of(policy, level).refines
    Console(stderr=True).print(chunk_table(report, bases_first))
