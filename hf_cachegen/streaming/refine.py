"""Refinements that go on arriving after a context is in place, and how a generation that has begun gets them.

A thread fetches and decodes on, and writes each chunk's better keys and values over the coarser ones, with `lock` held.
Who reads them meanwhile takes a copy first (`snapshot`). A generation's own cache is brought up to date between two
steps, by a logits processor, which is called there in every way of decoding: `SwapIn` copies what has changed into the
columns of the context; what the model has computed since stays.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.cache_utils import Cache

from hf_cachegen.errors import StreamCancelledError
from hf_cachegen.models.compat import tokens_seen
from hf_cachegen.models.layers import KVTensors
from hf_cachegen.models.prefix import Reuse
from hf_cachegen.profiles.files import Profile
from hf_cachegen.streaming.events import FirstToken, StreamFinished
from hf_cachegen.streaming.report import StreamReport

if TYPE_CHECKING:
    from hf_cachegen.streaming.loader import Loader

LOG = logging.getLogger("hf_cachegen.streaming")
END_SECONDS = 5.0
"""How long ending a stream waits for its threads beyond a source's own time limit."""
SETTLE_SECONDS = 1.0
"""How long it waits, in any case, for the thread that decodes: that ends with the chunk that it is at."""


_RUNNING: weakref.WeakSet[Refinement] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread that is inside torch when the interpreter ends would end the process with an abort."""
    for refinement in list(_RUNNING):
        refinement.close(END_SECONDS)


class Refinement:
    """What still improves a streamed context. `wait` until it is done, `cancel` to end it; the context is usable at any
    time. Threads may share it.
    """

    def __init__(self, loader: Loader, kv: KVTensors, resources: ExitStack) -> None:
        self._loader, self._kv, self._resources = loader, kv, resources
        self._thread: threading.Thread | None = None
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._ending, self._first = threading.Lock(), threading.Lock()
        self._told = False

    @property
    def done(self) -> bool:
        """Whether nothing more will arrive."""
        return self._done.is_set()

    @property
    def report(self) -> StreamReport:
        """How the stream stands."""
        return self._loader.report(finished=self.done)

    @property
    def profile(self) -> Profile | None:
        """The profile that decoding took."""
        return self._loader.profile

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until nothing more will arrive; False where that took longer than `timeout` seconds.

        Raises what ended the refinement, if it was not its end.
        """
        done = self._done.wait(timeout)
        if self._error is not None:
            raise self._error
        return done

    def cancel(self) -> None:
        """Ends it; nothing is left running."""
        self.close(2 * self._loader.options.stall + END_SECONDS)  # a request is tried twice

    def close(self, wait: float = 0.0) -> None:
        """Ends it, and waits up to so many seconds for its threads. StreamFinished has been told when this returns
        (unless it was called by `on_event` itself).
        """
        self._loader.close(wait)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(max(wait, SETTLE_SECONDS))
        self._end()

    def _end(self) -> None:
        with self._ending:
            self._resources.close()
            last = self._thread is not None and not self._told  # without a thread, who made it tells
            self._told = True
        self._done.set()
        if last:
            self._loader.tell(StreamFinished, self.report)
        self._loader.deliver()

    def start(self) -> None:
        """Goes on in a thread of its own."""
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
            LOG.exception("the context stays as it is")
            self._error = error
        finally:
            self._loader.close()
            self._end()

    def snapshot(self) -> tuple[KVTensors, int]:
        """Keys and values that nobody changes any more, and how many changes they have."""
        with self._loader.lock, self._loader.placer.reading():
            return (self._kv if self.done else self._kv.clone()), len(self._loader.changes)

    def first_token(self, rows: int, read: int, seconds: float) -> None:
        """A generation has its first token, for which it read so many tokens of so many rows in so many seconds. The
        first time is the stream's TTFT.
        """
        loader = self._loader
        with self._first:
            if loader.tally.ttft is not None:
                return
            loader.tally.ttft = ttft = time.monotonic() - loader.began
        slo = loader.options.slo
        loader.tell(FirstToken, None if slo is None else ttft <= slo)
        loader.deliver()
        if rows == 1:  # a batch takes another time for each token
            loader.learn_question(read, seconds)

    def bring(self, cache: Cache, reuse: Reuse, seen: int) -> int:
        """Copies what has changed since `seen` changes into a generation's cache; returns the changes that it has now.

        cache: made by `build_dynamic` or `build_static` from a snapshot for `reuse`, each row repeated any number of
        times, and no view of it any more (it has been through a forward pass).
        """
        with self._loader.lock, self._loader.placer.reading():
            changes = self._loader.changes
            for chunk in sorted(set(changes[seen:])):
                span = self._loader.spans[chunk]
                for layer, keys, values in zip(cache.layers, self._kv.keys, self._kv.values, strict=True):
                    held = _first_column(layer)
                    _copy(layer.keys, keys, span.first, span.tokens, held, reuse)
                    _copy(layer.values, values, span.first, span.tokens, held, reuse)
            return len(changes)


class SwapIn(LogitsProcessor):
    """Between two steps of one generation: tells of its first token, and brings refinements into its cache."""

    def __init__(self, refinement: Refinement, cache: Cache, reuse: Reuse, seen: int) -> None:
        self._refinement, self._cache, self._reuse, self._seen = refinement, cache, reuse, seen
        self._waiting: float | None = time.monotonic()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores as they are."""
        if self._waiting is not None:
            if int(self._cache.get_seq_length()) <= self._reuse.columns:
                self._waiting = time.monotonic()  # of a draft: the model has not read anything yet, nor begun to
                return scores
            self._refinement.first_token(
                len(scores), int(input_ids.shape[1]) - self._reuse.columns, time.monotonic() - self._waiting
            )
            self._waiting = None
        self._seen = self._refinement.bring(self._cache, self._reuse, self._seen)
        return scores


def _first_column(layer: Any) -> int:
    """The column that a layer's first token stands for: a sliding layer has dropped what left its window."""
    if not layer.is_sliding:
        return 0
    return max(0, tokens_seen(layer) - layer.keys.shape[2])


def _copy(live: Tensor, known: Tensor, first: int, tokens: int, held: int, reuse: Reuse) -> None:
    """Tokens [first, first + tokens) of known [1, heads, context, dim] to their columns in live [rows x repeats, heads,
    columns, dim], whose first column is `held`; only columns that came from the context.
    """
    repeats = live.shape[0] // len(reuse.pads)
    for row, pads in enumerate(reuse.pads):
        start, stop = max(first + pads, held), min(first + tokens + pads, reuse.columns, held + live.shape[2])
        if start < stop:
            rows = slice(row * repeats, (row + 1) * repeats)
            live[rows, :, start - held : stop - held] = known[:, :, start - pads : stop - pads].to(live.device)
