"""hf-cachegen stream: a context comes in against the clock, for people to look at."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hf_cachegen.cli_models import begin, no_padding, token_counts, token_ids, with_question
from hf_cachegen.cli_options import (
    artifact_argument,
    decoding_profile_option,
    model_options,
    output_options,
    sampling_arguments,
    sampling_options,
    trust_options,
)
from hf_cachegen.cli_output import print_json
from hf_cachegen.cli_views import size_text
from hf_cachegen.stores import Access

if TYPE_CHECKING:
    from hf_cachegen.streaming import ChunkReport, Event, StreamReport

STYLES = {"": "dim", "text": "magenta", "1": "yellow", "2": "cyan", "3": "green"}
"""Of a chunk that is missing, recomputed, or there at a level."""


class StreamView:
    """What is known of a stream, drawn anew as often as it is asked for. `take` is the stream's on_event."""

    def __init__(self, slo: float | None) -> None:
        self.slo, self.text = slo, ""
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._chunks: list[str] = []
        self._fetched: set[int] = set()
        self._rate: float | None = None
        self._wire = 0
        self._ready: float | None = None
        self._ttft: float | None = None
        self._faults: list[str] = []

    def begin(self) -> None:
        """The clock starts."""
        self._began = time.monotonic()

    def take(self, event: Event) -> None:
        """Follows the stream's events."""
        from hf_cachegen import streaming as kinds

        with self._lock:
            if isinstance(event, kinds.StreamStarted):
                self._chunks = [""] * event.chunks
            elif isinstance(event, kinds.ChunkFetched):
                self._fetched.add(event.chunk_index)
                self._rate = event.bytes_per_second or self._rate
                self._wire += event.nbytes if event.wire else 0
            elif isinstance(event, kinds.ChunkReady):
                self._chunks[event.chunk_index] = "text" if event.level is None else str(event.level)
            elif isinstance(event, kinds.SourceFailed):
                self._faults.append(f"{event.place}: {event.error}")
            elif isinstance(event, kinds.ContextReady):
                self._ready = event.seconds
            elif isinstance(event, kinds.FirstToken):
                self._ttft = event.seconds

    def __rich__(self) -> Group:
        """The clock, the chunks, the throughput, what went wrong, the answer so far."""
        with self._lock:
            return Group(*self._lines())

    def _lines(self) -> Iterator[Any]:
        elapsed = time.monotonic() - self._began if self._ttft is None else self._ttft
        clock = Text(f"{elapsed:6.2f} s")
        if self.slo is not None:
            clock.append(f" of {self.slo:g} s ", "red" if elapsed > self.slo else "")
            grid = Table.grid(padding=(0, 1))
            grid.add_row(clock, ProgressBar(total=self.slo, completed=min(elapsed, self.slo), width=40))
            yield grid
        else:
            yield clock
        strip = Text("chunks  ")
        for index, how in enumerate(self._chunks):
            shown = how[:1].upper() or ("-" if index in self._fetched else ".")
            strip.append(shown, STYLES.get(how, "bold"))
        strip.append("   (1-3: level, T: recomputed, -: arrived, .: missing)", "dim")
        yield strip
        rate = "" if self._rate is None else f", {8 * self._rate / 1e6:,.1f} Mbit/s"
        yield Text(f"wire    {size_text(self._wire)}{rate}")
        moments = {"context in place": self._ready, "first token": self._ttft}
        yield Text("  ".join(f"{name} after {at:.3f} s" for name, at in moments.items() if at is not None))
        for fault in self._faults[-3:]:
            yield Text(fault[:200], "red")
        if self.text:
            yield Text(self.text)


@contextmanager
def _shown(view: StreamView, as_json: bool) -> Iterator[None]:
    """The view, kept up to date on stderr, for people at a terminal."""
    console = Console(stderr=True)
    if as_json or not console.is_terminal:
        yield
        return
    with Live(view, console=console, refresh_per_second=12):
        yield


def _table(report: StreamReport, bases_first: bool) -> Table:
    """What each chunk came as, and what it took; what was aimed at and why, below.

    bases_first: whether the call for the context returned with the bases, and finer levels came while the model
    generated.
    """
    reasons = [f"{_numbers(list(group))}: {why}" for why, group in groupby(report.chunks, lambda chunk: chunk.why)]
    if bases_first:
        finer = sum((chunk.level or 0) > (chunk.first_level or 0) for chunk in report.chunks)
        later = f"{finer} of {len(report.chunks)} chunks became finer while the model generated"
        reasons.append(f"this is aimed at: the bases came first, {later}")
    table = Table(title=_verdict(report), title_justify="left", caption="\n".join(reasons), caption_justify="left")
    for column in ("chunk", "tokens", "choice", "bytes", "transfer", "decode", "recompute", "prefill"):
        table.add_column(column, justify="left" if column == "choice" else "right", no_wrap=True)
    for chunk in report.chunks:
        times = (chunk.transfer_seconds, chunk.decode_seconds, chunk.recompute_seconds, chunk.prefill_seconds)
        shown = ["" if seconds is None else f"{1000 * seconds:.0f} ms" for seconds in times]
        refined = "" if chunk.level == chunk.first_level else f", first {chunk.first_level}"
        table.add_row(str(chunk.index), str(chunk.tokens), f"{chunk.choice}{refined}", f"{chunk.nbytes:,}", *shown)
    return table


def _numbers(chunks: list[ChunkReport]) -> str:
    return str(chunks[0].index) if len(chunks) == 1 else f"{chunks[0].index}-{chunks[-1].index}"


def _verdict(report: StreamReport) -> str:
    if report.ttft is None:
        return "no first token"
    met = "" if report.met is None else f", the SLO of {report.slo:g} s was {'met' if report.met else 'missed'}"
    return f"first token after {report.ttft:.3f} s{met}; {size_text(report.wire_bytes)} over the network"


def _level(context: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "text":
        return value
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"expected a level from 1, or 'text', got {value!r}", context, parameter)
    return int(value)


def _streamer(view: StreamView, tokenizer: Any, echo: bool) -> Any:
    """Gives the answer to the view as it grows; echo: and to stdout."""
    from transformers import TextStreamer

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            view.text += text
            if echo:
                super().on_finalized_text(text, stream_end)

    return Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)


@click.command(short_help="Answer a question while the context streams in, against the clock.")
@artifact_argument
@click.option("--model", required=True, help="The model that the artifact was made with.")
@click.option("--prompt", required=True, help="The question, appended to the cached context; - reads stdin.")
@click.option("--slo", type=click.FloatRange(min=0, min_open=True), help="Seconds until the first token.")
@click.option("--policy", type=click.Choice(("adaptive", "paper")), default="adaptive", show_default=True,
              help="How levels and text are chosen.")
@click.option("--level", callback=_level, metavar="N|text", help="The same for all chunks instead of a policy.")
@click.option("--refine", type=click.Choice(("off", "before", "while_generating")), default="while_generating",
              show_default=True, help="When finer levels may follow what was fetched first.")
@click.option("--fallback", multiple=True, metavar="PLACE", help="Another place with the same artifact; repeatable.")
@click.option("--stall-seconds", type=click.FloatRange(min=0, min_open=True),
              help="Silence after which a place has failed.  [default: a quarter of the SLO, from 0.5; else 10]")
@click.option("--connections", type=click.IntRange(min=1), default=8, show_default=True, help="Requests at a time.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="At most.")
@sampling_options
@decoding_profile_option
@trust_options
@model_options
@output_options
def stream(
    artifact: str, model: str, prompt: str, slo: float | None, policy: str, level: Any, refine: str,
    fallback: tuple[str, ...], stall_seconds: float | None, connections: int, max_new_tokens: int, profile: str,
    public_key: str | None, key: str | None, revision: str | None, device: str | None, as_json: bool, debug: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Answer a question about the context of ARTIFACT while it streams in, and show how.

    The clock starts when the model is loaded. The answer goes to stdout, the view to stderr.
    """
    arguments = sampling_arguments(options)
    loaded, tokenizer, required, question = begin(
        artifact, Access(public_key=public_key, key=key), model, profile, prompt, revision=revision, device=device,
        as_json=as_json,
    )  # fmt: skip
    import torch

    from hf_cachegen.cache import CacheGenCache
    from hf_cachegen.generation import generate
    from hf_cachegen.streaming import policy_of

    asked = token_ids(tokenizer, question, start=False)
    view = StreamView(slo)
    live = not as_json and Console(stderr=True).is_terminal
    if options["num_beams"] == 1 and not as_json:
        arguments["streamer"] = _streamer(view, tokenizer, echo=not live)
    if options["seed"] is not None:
        torch.manual_seed(options["seed"])
    with _shown(view, as_json):
        view.begin()
        cache = CacheGenCache.stream(
            artifact, loaded, slo=slo, level=level, policy=policy, refine=refine,  # type: ignore[arg-type]
            prompt_tokens=len(asked), fallback=fallback, profile=required, tokenizer=tokenizer, on_event=view.take,
            stall_seconds=stall_seconds, connections=connections, public_key=public_key, key=key,
        )  # fmt: skip
        prompt_ids = with_question(cache.input_ids, asked, loaded.device)
        try:
            arguments |= no_padding(tokenizer, prompt_ids)
            output = generate(loaded, prompt_ids, cache=cache, max_new_tokens=max_new_tokens, **arguments)
        finally:
            if cache.refinement is not None:
                cache.refinement.cancel()
    answer, report = output[0, prompt_ids.shape[1] :], cast("StreamReport", cache.report)
    text = tokenizer.decode(answer, skip_special_tokens=True)
    if as_json:
        print_json({"text": text, **token_counts(cache, prompt_ids, answer), "report": report.to_dict()})
        return
    if "streamer" not in arguments or live:
        click.echo(text)
    bases_first = slo is None and refine == "while_generating" and policy_of(policy, level).refines
    Console(stderr=True).print(_table(report, bases_first))
