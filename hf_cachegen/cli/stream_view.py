"""The live view of a stream, and the table of its chunks at the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hf_cachegen.cli.output import size_text

if TYPE_CHECKING:
    from hf_cachegen.streaming import ChunkReport, Event, StreamReport

STYLES = {"": "dim", "text": "magenta", "1": "yellow", "2": "cyan", "3": "green"}
"""Style of a chunk that is missing (""), recomputed ("text"), or loaded at a level."""
REFRESHES_PER_SECOND = 12
MAX_FAULTS, MAX_FAULT_CHARACTERS = 3, 200


class StreamView:
    """The state of a stream, rendered each time the terminal is refreshed. `take` is the stream's on_event."""

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
        """Start the clock."""
        self._began = time.monotonic()

    def take(self, event: Event) -> None:
        """Update the state by an event of the stream."""
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
                self._faults.append(f"{event.location}: {event.error}")
            elif isinstance(event, kinds.ContextReady):
                self._ready = event.seconds
            elif isinstance(event, kinds.FirstToken):
                self._ttft = event.seconds

    def __rich__(self) -> Group:
        """Render the clock, the chunks, the throughput, the faults and the answer so far."""
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
        strip = Text("chunks   ")
        for index, how in enumerate(self._chunks):
            shown = how[:1].upper() or ("-" if index in self._fetched else ".")
            strip.append(shown, STYLES.get(how, "bold"))
        strip.append("   (1-3: level, T: recomputed from text, -: fetched, .: missing)", "dim")
        yield strip
        rate = "" if self._rate is None else f", {8 * self._rate / 1e6:,.1f} Mbit/s"
        yield Text(f"network  {size_text(self._wire)}{rate}")
        moments = {"context ready": self._ready, "first token": self._ttft}
        yield Text("  ".join(f"{name} after {at:.3f} s" for name, at in moments.items() if at is not None))
        for fault in self._faults[-MAX_FAULTS:]:
            yield Text(fault[:MAX_FAULT_CHARACTERS], "red")
        if self.text:
            yield Text(self.text)


@contextmanager
def live(view: StreamView, as_json: bool) -> Iterator[None]:
    """Keep the view up to date on stderr, on a terminal."""
    console = Console(stderr=True)
    if as_json or not console.is_terminal:
        yield
        return
    with Live(view, console=console, refresh_per_second=REFRESHES_PER_SECOND):
        yield


def streamer(view: StreamView, tokenizer: Any, echo: bool) -> Any:
    """Return a streamer for generate that adds the answer to the view, and, with `echo`, prints it on stdout."""
    from transformers import TextStreamer

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            view.text += text
            if echo:
                super().on_finalized_text(text, stream_end)

    return Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)


def chunk_table(report: StreamReport, bases_first: bool) -> Table:
    """Tabulate the choice and the times of each chunk; the reasons of the choices are below.

    Args:
        bases_first: whether the stream returned with the bases, and finer levels arrived while the model generated.
    """
    reasons = [f"{_numbers(list(group))}: {why}" for why, group in groupby(report.chunks, lambda chunk: chunk.why)]
    if bases_first:
        finer = sum((chunk.level or 0) > (chunk.first_level or 0) for chunk in report.chunks)
        reasons.append(
            "the level above is the target; the bases came first, and "
            f"{finer} of {len(report.chunks)} chunks were refined while the model generated"
        )
    table = Table(title=_verdict(report), title_justify="left", caption="\n".join(reasons), caption_justify="left")
    for name in ("chunk", "tokens", "choice", "bytes", "transfer", "decode", "recompute", "prefill"):
        table.add_column(name, justify="left" if name == "choice" else "right", no_wrap=True)
    for chunk in report.chunks:
        times = (chunk.transfer_seconds, chunk.decode_seconds, chunk.recompute_seconds, chunk.prefill_seconds)
        shown = ["" if seconds is None else f"{1000 * seconds:.0f} ms" for seconds in times]
        refined = "" if chunk.level == chunk.first_level else f", first {chunk.first_level}"
        table.add_row(str(chunk.index), str(chunk.tokens), f"{chunk.choice}{refined}", f"{chunk.nbytes:,}", *shown)
    return table


def _numbers(chunks: list[ChunkReport]) -> str:
    first, last = chunks[0].index, chunks[-1].index
    return f"chunk {first}" if first == last else f"chunks {first} to {last}"


def _verdict(report: StreamReport) -> str:
    if report.ttft is None:
        return "no first token"
    met = "" if report.met is None else f", the SLO of {report.slo:g} s was {'met' if report.met else 'missed'}"
    return f"first token after {report.ttft:.3f} s{met}; {size_text(report.wire_bytes)} over the network"
