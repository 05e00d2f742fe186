"""The threads that fetch what a schedule asks for, from the source that the failover names.

All share one lock, `changed`, with the thread that decodes. Schedule and failover are called with it held.

- One thread fetches what decoding takes (the side information, a profile) while the others fetch chunks. So the
  decoding thread never waits for it where it could recompute a chunk meanwhile.
- A run of parts is cut into ranges that all threads fetch together. So chunks arrive one after the other over any
  number of connections, and the first is decoded while the second arrives.

No thread waits without a limit. A thread that is not needed any more ends with the next piece that arrives for it, at
the latest when its request's time is over.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from hf_cachegen.artifact import Range, Segment
from hf_cachegen.codec.transforms import Transform
from hf_cachegen.errors import ArtifactError, StoreTimeoutError
from hf_cachegen.profiles.files import Profile
from hf_cachegen.streaming.bandwidth import Bandwidth
from hf_cachegen.streaming.failover import Action, Failover
from hf_cachegen.streaming.meter import GivenUp, give_up_when
from hf_cachegen.streaming.schedule import Part, Schedule
from hf_cachegen.streaming.sources import Source
from hf_cachegen.streaming.window import request_bytes
from hf_cachegen.streaming.work import WAKE_SECONDS

EXIT_SECONDS = 1.0
"""How long the interpreter's exit waits for decoders that are being made."""

_PREPARING: set[threading.Thread] = set()


@atexit.register
def _let_them_be_made() -> None:
    """A thread that is inside torch when the interpreter exits would abort the process."""
    end = time.monotonic() + EXIT_SECONDS
    while any(thread.is_alive() for thread in list(_PREPARING)) and time.monotonic() < end:
        time.sleep(0.01)


class Receiver(Protocol):
    """Takes what the threads fetch. All methods are called with `changed` held."""

    decodes: bool
    """Whether anything will be decoded. Else the side information and the profile are not fetched."""

    def segment_of(self, part: Part) -> Segment:
        """Return the segment of the artifact that holds a part."""
        ...

    def prepared(self, codec: Transform, profile: Profile | None) -> None:
        """Take what decodes the chunks."""
        ...

    def arrived(self, part: Part, data: bytes, wire: bool, seconds: float) -> None:
        """Take a part. wire: it is not from this disk; seconds: since its first request."""
        ...

    def failed(self, location: str, error: Exception, part: Part | None) -> None:
        """A source failed. part: the part that it gave wrong, if it was one."""
        ...


class _Closed:
    """Receives nothing. It replaces the receiver of a closed stream, whose memory is needed elsewhere."""

    decodes = False

    def segment_of(self, part: Part) -> Segment:
        raise GivenUp

    def prepared(self, codec: Transform, profile: Profile | None) -> None: ...

    def arrived(self, part: Part, data: bytes, wire: bool, seconds: float) -> None: ...

    def failed(self, location: str, error: Exception, part: Part | None) -> None: ...


@dataclass
class _Run:
    """Parts that lie side by side. The thread that fetches the last of `ranges` hands them out in their order.

    far: the segments that come over the network. missing: the number of ranges that have not arrived; 1 where there
    are none, and the run is read at once. lost: whether one of the ranges cannot be had. began: on time.monotonic().
    """

    parts: list[Part]
    segments: list[Segment]
    far: list[Segment]
    ranges: list[Range]
    missing: int
    lost: bool = False
    began: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _Piece:
    """A run, and the one of its ranges to fetch; None: read the run at once."""

    run: _Run
    wanted: Range | None

    @property
    def nbytes(self) -> int:
        return sum(s.length for s in self.run.far) if self.wanted is None else self.wanted.length


class _Preparation:
    """The task of fetching what decoding takes."""

    nbytes = 0


class Fetcher:
    """The threads of one stream. `crash` is the error that ended one of them, if it should not have ended.

    Args:
        schedule: Says what to fetch next.
        sources: In the order in which they are asked.
        receiver: Takes what arrives.
        bandwidth: The measured throughput of the stream.
        connections: Number of threads.
        stall: Seconds of silence after which a request has failed.
    """

    def __init__(
        self,
        schedule: Schedule,
        sources: Sequence[Source],
        receiver: Receiver,
        bandwidth: Bandwidth,
        connections: int,
        stall: float,
    ) -> None:
        self.changed = threading.Condition()
        self.closed = False
        self.crash: BaseException | None = None
        self._schedule, self._sources, self._receiver = schedule, tuple(sources), receiver
        self._bandwidth, self._connections, self._stall = bandwidth, connections, stall
        self._failover = Failover([source.location for source in sources], stall)
        self._threads: list[threading.Thread] = []
        self._started = 0
        """The number of threads of this epoch."""
        self._unprepared, self._preparing = receiver.decodes, False
        self._waiting: deque[_Piece] = deque()
        self._under_way: dict[int, int] = {}
        """The bytes that each thread of this epoch with a task fetches; 0 for what decoding takes."""

    def start(self) -> None:
        """Start fetching."""
        with self.changed:
            self._start()

    def close(self, wait: float = 0.0) -> None:
        """End all threads, and wait for them up to `wait` seconds."""
        with self.changed:
            self.closed = True
            # A thread may hang in a request for long; it must not keep what the receiver holds.
            self._receiver, self._unprepared = _Closed(), False
            self.changed.notify_all()
        end = time.monotonic() + wait
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def watch(self) -> None:
        """Leave a source that has been silent for too long, although its requests should have ended by themselves.

        To be called again and again, with `changed` held.
        """
        if self.closed:
            return
        silence = self._bandwidth.silence()
        action = self._failover.silent(silence)
        self._apply(action, StoreTimeoutError(f"{action.failed}: no byte arrived for {silence:.1f} s"))

    def given_up(self, epoch: int) -> bool:
        """Return whether requests of that epoch, the time of one source, are not waited for any more."""
        return self.closed or self._failover.over or epoch != self._failover.epoch

    def _start(self) -> None:
        """Start the first thread of an epoch. To be called with `changed` held."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._started = 0
        self._add(self._failover.epoch, self._sources[self._failover.current])

    def _add(self, epoch: int, source: Source) -> None:
        """Start one more thread of an epoch, unless one has no task. To be called with `changed` held.

        A thread that has got a task calls this. So few threads start where few are needed: each takes time from the
        threads that load, first to start and then whenever something changes.
        """
        if self._started > len(self._under_way) or self._started == self._connections:
            return
        self._started += 1
        # A daemon: a process that exits must not wait for a request's time limit.
        thread = threading.Thread(target=self._run, args=(epoch, source), name="hf_cachegen-fetch", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, epoch: int, source: Source) -> None:
        give_up_when(lambda: self.given_up(epoch))
        try:
            try:
                source.open()
            except GivenUp:
                return
            except (ArtifactError, OSError) as error:
                self._cannot_open(epoch, error)
                return
            while not self.given_up(epoch):
                self._work(epoch, source)
        except BaseException as error:
            with self.changed:
                self.crash, self.closed = error, True
                self.changed.notify_all()

    def _work(self, epoch: int, source: Source) -> None:
        """Do the next task, once there is one."""
        task, began = self._next(epoch, source), time.monotonic()
        if task is None:
            return
        if isinstance(task, _Preparation):
            self._make_ready(epoch, source)
            return
        try:
            self._fetch(epoch, source, task)
        except GivenUp:
            self._give_back(epoch, source, task.run)
        except (ArtifactError, OSError) as error:
            with self.changed:  # in one step, or it would seem meanwhile that nothing more will arrive
                self._cannot_fetch(epoch, error, self._give_back(epoch, source, task.run), began)

    def _next(self, epoch: int, source: Source) -> _Piece | _Preparation | None:
        """Wait for the next task; None once given up."""
        me = threading.get_ident()
        with self.changed:
            self._under_way.pop(me, None)
            while not self.given_up(epoch):
                task = self._preparation() or self._wanted(source)
                if task is not None:
                    self._under_way[me] = task.nbytes
                    self._add(epoch, source)
                    return task
                self.changed.wait(WAKE_SECONDS)
        return None

    def _preparation(self) -> _Preparation | None:
        """The task of fetching what decoding takes, if no thread has it."""
        if not self._unprepared or self._preparing:
            return None
        self._preparing = True
        return _Preparation()

    def _wanted(self, source: Source) -> _Piece | None:
        """The next piece to fetch; None where enough is under way."""
        rate, under_way = self._bandwidth.rate(), [nbytes for nbytes in self._under_way.values() if nbytes]
        nbytes = request_bytes(rate, self._bandwidth.round_trip, under_way, self._connections)
        if nbytes is None:
            return None
        if not self._waiting:
            parts = self._schedule.next_run(time.monotonic(), rate, nbytes)
            if not parts:
                return None
            segments = [self._receiver.segment_of(part) for part in parts]
            far = [segment for segment in segments if not source.is_local(segment)]
            ranges = source.ranges(far, nbytes)
            run = _Run(parts, segments, far, ranges, max(1, len(ranges)))
            self._waiting.extend([_Piece(run, wanted) for wanted in ranges] or [_Piece(run, None)])
            self.changed.notify_all()  # there is more to fetch, and perhaps a decision to report
        return self._waiting.popleft()

    def _make_ready(self, epoch: int, source: Source) -> None:
        _PREPARING.add(threading.current_thread())
        try:
            codec, profile = source.decoder()
        except GivenUp:
            return
        except (ArtifactError, OSError) as error:
            self._cannot_prepare(epoch, error)
            return
        finally:
            _PREPARING.discard(threading.current_thread())
        with self.changed:
            if not self.given_up(epoch):
                self._receiver.prepared(codec, profile)
                self._unprepared = False
                self._schedule.prepared()
                self.changed.notify_all()

    def _fetch(self, epoch: int, source: Source, piece: _Piece) -> None:
        run, wanted = piece.run, piece.wanted
        wire = wanted is not None or bool(run.far)
        with source.turn(lambda: self.given_up(epoch), self._stall) if wire else nullcontext(True) as granted:
            if not granted:
                raise GivenUp
            if wanted is not None:
                source.hold(wanted)
            with self.changed:
                run.missing -= 1
                if run.missing and (run.lost or self.given_up(epoch)):
                    raise GivenUp
                if run.missing:
                    return
            self._hand_out(source, run)

    def _hand_out(self, source: Source, run: _Run) -> None:
        for part, segment, data in zip(run.parts, run.segments, source.read(run.segments), strict=True):
            with self.changed:
                if self.closed:
                    raise GivenUp
                if part[1] in self._schedule.chunks[part[0]].arrived:
                    continue  # it was asked for again when the source was left
                self._failover.arrived()
                self._schedule.arrived(*part)
                self._receiver.arrived(part, data, segment in run.far, time.monotonic() - run.began)
                self.changed.notify_all()
        source.release(run.ranges)

    def _give_back(self, epoch: int, source: Source, run: _Run) -> Part | None:
        """Give back the parts of a run that did not arrive; return the first of them."""
        source.release(run.ranges)
        with self.changed:
            if epoch != self._failover.epoch or run.lost:
                return None
            run.lost = True
            self._waiting = deque(waiting for waiting in self._waiting if waiting.run is not run)
            lost = [(chunk, part) for chunk, part in run.parts if part in self._schedule.chunks[chunk].asked]
            self._schedule.returned(lost)
            self.changed.notify_all()
            return lost[0] if lost else None

    def _cannot_open(self, epoch: int, error: Exception) -> None:
        with self.changed:
            if not self.given_up(epoch):
                self._apply(self._failover.cannot_open(wrong=isinstance(error, ArtifactError)), error)

    def _cannot_prepare(self, epoch: int, error: Exception) -> None:
        with self.changed:
            if not self.given_up(epoch):
                self._preparing = False
                self._apply(self._failover.cannot_prepare(wrong=isinstance(error, ArtifactError)), error)

    def _cannot_fetch(self, epoch: int, error: Exception, part: Part | None, began: float) -> None:
        """part: the first that has not arrived; None: other threads have fetched all of the run."""
        if self.given_up(epoch) or part is None or part[1] >= self._schedule.chunks[part[0]].best:
            return
        wrong = isinstance(error, ArtifactError)
        action = self._failover.cannot_fetch(part, wrong=wrong, began=began, now=time.monotonic())
        self._apply(action, error, part if wrong else None)

    def _apply(self, action: Action, error: Exception, part: Part | None = None) -> None:
        """Do what the failover says about a failure."""
        if action.failed is None:
            return
        self._receiver.failed(action.failed, error, part)
        if action.lost is not None:
            self._schedule.unobtainable(*action.lost)
        if action.undecodable:
            self._unprepared = False
            self._schedule.undecodable()
        if action.leave:
            self._leave(action.cut_off)
        self.changed.notify_all()

    def _leave(self, cut_off: int | None) -> None:
        """Void what is under way, and ask the failover's source for it, if there is one."""
        self._preparing = False
        self._waiting.clear()
        self._under_way.clear()
        for chunk in self._schedule.chunks:
            chunk.asked.clear()
        if cut_off is not None:
            self._schedule.cut_off(cut_off)
        if not self._failover.over:
            self._bandwidth.forget()
            self._start()
