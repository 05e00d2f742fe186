"""Refine a context while a model generates from it.

A thread goes on fetching and decoding, and writes each chunk's finer keys and values over the coarser ones, with `lock`
held. A reader takes a copy first (`snapshot`). A generation's own cache is updated between two steps, by a logits
processor, which every way of decoding calls there: `SwapIn` copies the changed chunks into the positions of the
context. What the model has computed since then stays.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.cache_utils import Cache

from hf_cachegen.errors import StreamCancelledError
from hf_cachegen.models.compat import tokens_seen
from hf_cachegen.models.indexed import index_of, sides_of
from hf_cachegen.models.kinds import kv_layers
from hf_cachegen.models.layers import KVTensors
from hf_cachegen.models.prefix import Reuse
from hf_cachegen.profiles.files import Profile
from hf_cachegen.streaming.events import FirstToken, StreamFinished
from hf_cachegen.streaming.report import StreamReport

if TYPE_CHECKING:
    from hf_cachegen.streaming.loader import Loader

LOG = logging.getLogger("hf_cachegen.streaming")
END_SECONDS = 5.0
"""How long the end of a stream waits for its threads, beyond a source's own time limit."""
SETTLE_SECONDS = 1.0
"""How long it waits in any case for the thread that decodes, which ends with its current chunk."""


_RUNNING: weakref.WeakSet[Refinement] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread that is inside torch when the interpreter exits would abort the process."""
    for refinement in list(_RUNNING):
        refinement.close(END_SECONDS)


class Refinement:
    """The part of a stream that goes on after its context is in place. The context is usable at any time.

    `wait` until it is done, or `cancel` it. Threads may share it.
    """

    def __init__(self, loader: Loader, kv: KVTensors) -> None:
        self._loader, self._kv = loader, kv
        self._thread: threading.Thread | None = None
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._ending, self._first = threading.Lock(), threading.Lock()
        self._reported = False

    @property
    def done(self) -> bool:
        """Whether nothing more will arrive."""
        return self._done.is_set()

    @property
    def report(self) -> StreamReport:
        """The state of the stream."""
        return self._loader.report(finished=self.done)

    @property
    def profile(self) -> Profile | None:
        """The profile that decoding took; None where it took none."""
        return self._loader.download.profile

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing more will arrive.

        Args:
            timeout: Bound on the wait, in seconds; None: no bound.

        Returns:
            False where the wait took longer than `timeout`.

        Raises:
            StreamCancelledError, CacheGenError: What ended the refinement early.
        """
        done = self._done.wait(timeout)
        if self._error is not None:
            raise self._error
        return done

    def cancel(self) -> None:
        """End it, and leave nothing running."""
        self.close(2 * self._loader.session.options.stall + END_SECONDS)  # a request is tried twice

    def close(self, wait: float = 0.0) -> None:
        """End it, and wait up to `wait` seconds for its threads.

        StreamFinished has been delivered when this returns, unless `on_event` itself called it.
        """
        self._loader.close(wait)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(max(wait, SETTLE_SECONDS))
        self._end()

    def _end(self) -> None:
        with self._ending:
            last = self._thread is not None and not self._reported  # without a thread, the caller reports it
            self._reported = True
        self._done.set()
        if last:
            self._loader.session.events.add(StreamFinished, self.report)
        self._loader.session.events.deliver()

    def start(self) -> None:
        """Go on in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="hf_cachegen-refine", daemon=True)
        _RUNNING.add(self)
        self._thread.start()

    def _run(self) -> None:
        try:
            with torch.no_grad():
                self._loader.refine()
        except StreamCancelledError as error:
            self._error = error
        except BaseException as error:
            LOG.exception("refining failed; the context stays usable at its present levels")
            self._error = error
        finally:
            self._loader.close()
            self._end()

    def snapshot(self) -> tuple[KVTensors, int]:
        """Return keys and values that do not change any more, and the number of changes that they include."""
        with self._loader.decoding.lock, self._loader.writer.reading():
            return (self._kv if self.done else self._kv.clone()), len(self._loader.decoding.changes)

    def first_token(self, rows: int, read: int, seconds: float) -> None:
        """Record that a generation has its first token. The first such time is the stream's TTFT.

        Args:
            rows: Number of rows of the batch.
            read: Number of tokens of each row that the model read for it.
            seconds: How long that took.
        """
        session = self._loader.session
        with self._first:
            if session.tally.ttft is not None:
                return
            session.tally.ttft = ttft = session.elapsed()
        slo = session.options.slo
        session.events.add(FirstToken, None if slo is None else ttft <= slo)
        session.events.deliver()
        if rows == 1:  # a batch takes another time for each token
            self._loader.learn_question(read, seconds)

    def bring(self, cache: Cache, reuse: Reuse, seen: int) -> int:
        """Copy the chunks that have changed into a generation's cache.

        Args:
            cache: Made by `build_dynamic` or `build_static` from a snapshot for `reuse`, each row repeated any number
                of times. It must own its tensors, as it does after a forward pass.
            reuse: Which positions of the cache came from the context.
            seen: The number of changes that the cache includes.

        Returns:
            The number of changes that it includes now.
        """
        with self._loader.decoding.lock, self._loader.writer.reading():
            changes = self._loader.decoding.changes
            for chunk in sorted(set(changes[seen:])):
                span = self._loader.download.spans[chunk]
                sides = zip(self._kv.geometry.layers, self._kv.keys, self._kv.values, strict=True)
                for layer, (geometry, keys, joined) in zip(kv_layers(cache), sides, strict=True):
                    held = _first_position(layer)
                    values, indices = sides_of(geometry, joined)
                    _copy(layer.keys, keys, span.first, span.tokens, held, reuse)
                    _copy(layer.values, values, span.first, span.tokens, held, reuse)
                    if indices is not None and (target := index_of(layer)) is not None:
                        _copy(target, indices, span.first, span.tokens, 0, reuse)
            return len(changes)


class SwapIn(LogitsProcessor):
    """Records a generation's first token, and copies refinements into its cache between two steps."""

    def __init__(self, refinement: Refinement, cache: Cache, reuse: Reuse, seen: int) -> None:
        self._refinement, self._cache, self._reuse, self._seen = refinement, cache, reuse, seen
        self._waiting: float | None = time.monotonic()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores unchanged."""
        if self._waiting is not None:
            if int(self._cache.get_seq_length()) <= self._reuse.length:
                self._waiting = time.monotonic()  # of a draft: the model has not begun to read
                return scores
            self._refinement.first_token(
                len(scores), int(input_ids.shape[1]) - self._reuse.length, time.monotonic() - self._waiting
            )
            self._waiting = None
        self._seen = self._refinement.bring(self._cache, self._reuse, self._seen)
        return scores


def _first_position(layer: Any) -> int:
    """The position of the first token that a layer holds: a sliding layer has dropped those that left its window."""
    if not layer.is_sliding:
        return 0
    return max(0, tokens_seen(layer) - layer.keys.shape[2])


def _copy(live: Tensor, known: Tensor, first: int, tokens: int, held: int, reuse: Reuse) -> None:
    """Copy tokens [first, first + tokens) of known [1, heads, context, dim] to their positions in live [rows x repeats,
    heads, positions, dim], which begins at position `held`. Only positions that came from the context are written.
    """
    repeats = live.shape[0] // len(reuse.pads)
    for row, pads in enumerate(reuse.pads):
        start, stop = max(first + pads, held), min(first + tokens + pads, reuse.length, held + live.shape[2])
        if start < stop:
            rows = slice(row * repeats, (row + 1) * repeats)
            live[rows, :, start - held : stop - held] = known[:, :, start - pads : stop - pads].to(live.device)
