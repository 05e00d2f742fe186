"""The threads that fetch what a schedule wants, and what becomes of a place that fails.

All share one lock, `changed`, with the thread that decodes: under it the schedule is asked and told. A place that fails
is left for the next one. After ROUNDS rounds of failures without a segment in between, those parts are given up that no
place gave, and all finer ones; coarser ones are asked for once more, since a place may lack one file only. What one
place has wrong another may have right: a part is given up when each has given it wrong.

Two twists. What decoding takes (the side information, a profile) is fetched by one of the threads, beside the chunks,
so that nobody waits for it who could recompute meanwhile. And a run of parts is cut into ranges that all threads fetch
together: with as many connections as a link may need, chunks still arrive one after the other, and the first is decoded
while the second comes, where as many whole chunks at a time would all arrive at the end.

No thread waits without a limit. Those that nobody needs any more end with the next piece that arrives for them, at the
latest when their request's time is over.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from hf_cachegen.artifact import Segment
from hf_cachegen.errors import ArtifactError, StoreTimeoutError
from hf_cachegen.streaming.bandwidth import Bandwidth
from hf_cachegen.streaming.schedule import Part, Schedule
from hf_cachegen.streaming.sources import GivenUp, Range, Source

ROUNDS = 2
WINDOW_SECONDS, ROUND_TRIPS, MOST_WINDOW_SECONDS = 0.02, 3, 0.5
"""What is under way at a time, over all connections, should take so long, and so many round trips more: the link shall
never wait, and where it did, as before anything was measured, what is asked for must grow from one round trip to the
next. But not more than the last, since no plan can change what is under way.
"""
FIRST_REQUEST_BYTES = 1 << 19
"""Before anything was measured."""
LEAST_REQUESTS, SECONDS_PER_REQUEST = 2, 2.5e-3
"""Under way in any case, since one ends and the next is there; and one for so much of a round trip, in which a
connection grows slowly: a short path is filled by few, and each request costs work.
"""
LEAST_REQUEST_BYTES, SHARED_BYTES, MOST_REQUEST_BYTES = 1 << 18, 1 << 20, 8 << 20
"""Requests are larger than SHARED_BYTES only where all connections have such."""
WAKE_SECONDS = 0.1
"""How often a thread looks whether time alone has changed what there is to do."""

EXIT_SECONDS = 1.0
"""How long the interpreter's end waits for decoders that are being made."""

_LOCAL = threading.local()
_PREPARING: set[threading.Thread] = set()


@atexit.register
def _let_them_be_made() -> None:
    """A thread that is inside torch when the interpreter ends would end the process with an abort."""
    end = time.monotonic() + EXIT_SECONDS
    while any(thread.is_alive() for thread in list(_PREPARING)) and time.monotonic() < end:
        time.sleep(0.01)


def abandoned() -> bool:
    """Whether nobody waits any more for what the calling thread fetches."""
    given_up = getattr(_LOCAL, "given_up", None)
    return given_up is not None and given_up()


def request_bytes(
    rate: float | None, round_trip: float | None, under_way: Sequence[int], connections: int
) -> float | None:
    """Bytes that the next request should have, by the throughput, the round trip and the bytes of the requests that are
    under way; None where those are enough.
    """
    seconds, few = MOST_WINDOW_SECONDS, connections
    if round_trip is not None:
        seconds = min(seconds, WINDOW_SECONDS + ROUND_TRIPS * round_trip)
        few = min(few, max(LEAST_REQUESTS, int(round_trip / SECONDS_PER_REQUEST)))
    window = few * FIRST_REQUEST_BYTES if rate is None else rate * seconds
    if len(under_way) >= LEAST_REQUESTS and sum(under_way) >= window:
        return None
    nbytes = max(min(window / few, SHARED_BYTES), window / connections)
    return min(MOST_REQUEST_BYTES, max(LEAST_REQUEST_BYTES, nbytes))


@dataclass
class _Run:
    """Parts that lie side by side, handed out in their order by whoever brings the last of `ranges`.

    far: those that come over the network. missing: how many ranges are not here, or 1 where there are none: then it is
    read at once. lost: whether one of them cannot be had. begun: seconds of the monotonic clock.
    """

    parts: list[Part]
    segments: list[Segment]
    far: list[Segment]
    ranges: list[Range]
    missing: int
    lost: bool = False
    begun: float = field(default_factory=time.monotonic)


_Piece = tuple[_Run, Range | None]
"""A run, and which of its ranges is to be fetched."""
Prepare = Callable[[Source], Callable[[], None]]
"""Fetches from a source what decoding takes, and gives what puts it to use."""


class Fetcher:
    """sources: the first is used until it fails; one without the artifact goes. segment_of: what a part is called in
    the artifact. prepare: None where nothing will be decoded. What it gives, on_arrival(part, data, wire, seconds since
    the request) and on_failure(place, error, part or None) are called with `changed` held. error: the last failure of a
    source; crash: what ended a thread that should not have ended.
    """

    def __init__(
        self,
        schedule: Schedule,
        sources: Sequence[Source],
        segment_of: Callable[[Part], Segment],
        bandwidth: Bandwidth,
        connections: int,
        stall: float,
        prepare: Prepare | None,
        on_arrival: Callable[[Part, bytes, bool, float], None],
        on_failure: Callable[[str, Exception, Part | None], None],
    ) -> None:
        self.changed = threading.Condition()
        self.schedule, self.sources, self.bandwidth = schedule, list(sources), bandwidth
        self.closed = False
        self.error: Exception | None = None
        self.crash: BaseException | None = None
        self._segment_of, self._connections, self._stall = segment_of, connections, stall
        self._prepare, self._preparing, self._unprepared = prepare, False, 0
        self._on_arrival, self._on_failure = on_arrival, on_failure
        self._threads: list[threading.Thread] = []
        self._current, self._epoch, self._failed, self._cut = 0, 0, 0.0, False
        self._failures: list[tuple[str, int]] = []  # each one's place, and the part that it was about
        self._wrong: Counter[Part] = Counter()
        self._waiting: deque[_Piece] = deque()
        self._under_way: dict[int, int] = {}

    def start(self) -> None:
        """Begins to fetch."""
        with self.changed:
            self._start()

    def close(self, wait: float = 0.0) -> None:
        """Ends all threads; waits for them up to so many seconds."""
        with self.changed:
            self.closed = True
            # Who is told holds this, and the context's tensors, which shall go as soon as nobody wants them any more.
            self._on_arrival = self._on_failure = _nobody
            self._prepare = None
            self.changed.notify_all()
        end = time.monotonic() + wait
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def watch(self) -> None:
        """Gives up a place that has been silent for too long although its requests should have ended by themselves.

        To be called now and then, with `changed` held.
        """
        if not self.closed and not self._cut and self.bandwidth.silence() > 2 * self._stall + 1:
            place = self.sources[self._current].place
            self._note(StoreTimeoutError(f"{place}: silent for {self.bandwidth.silence():.1f} s"), None)
            self._failures.append((place, 0))
            self._leave()

    def given_up(self, epoch: int) -> bool:
        """Whether requests of that epoch (the time of one source) are not waited for any more."""
        return self.closed or self._cut or epoch != self._epoch

    def _start(self) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for _ in range(self._connections):
            # A daemon: a process that ends shall not wait for a request's time limit.
            thread = threading.Thread(target=self._run, args=(self._epoch,), name="hf_cachegen-fetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self, epoch: int) -> None:
        with self.changed:
            source = self.sources[self._current]
        _LOCAL.given_up = lambda: self.given_up(epoch)
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
        """Does what is to be done next, once there is something."""
        task, began = self._next(epoch, source), time.monotonic()
        if task is None:
            return
        if not isinstance(task, tuple):
            self._make_ready(epoch, source, task)
            return
        run, piece = task
        try:
            self._fetch(epoch, source, run, piece)
        except GivenUp:
            self._give_back(epoch, source, run)
        except (ArtifactError, OSError) as error:
            with self.changed:  # at once, or it would seem that nothing is to come any more
                self._cannot_fetch(epoch, error, self._give_back(epoch, source, run), began)

    def _next(self, epoch: int, source: Source) -> _Piece | Prepare | None:
        """What to do next, waited for; None once given up."""
        me = threading.get_ident()
        with self.changed:
            self._under_way.pop(me, None)
            while not self.given_up(epoch):
                if self._prepare is not None and not self._preparing:
                    self._preparing = True
                    return self._prepare
                if (task := self._wanted(source)) is not None:
                    run, piece = task
                    self._under_way[me] = sum(s.length for s in run.far) if piece is None else piece.length
                    return task
                self.changed.wait(WAKE_SECONDS)
        return None

    def _wanted(self, source: Source) -> _Piece | None:
        """What is to be fetched now; None where enough is under way."""
        rate, under_way = self.bandwidth.rate(), [nbytes for nbytes in self._under_way.values() if nbytes]
        nbytes = request_bytes(rate, self.bandwidth.round_trip, under_way, self._connections)
        if nbytes is None:
            return None
        if not self._waiting:
            parts = self.schedule.next_run(time.monotonic(), rate, nbytes)
            if not parts:
                return None
            segments = [self._segment_of(part) for part in parts]
            far = [segment for segment in segments if not source.here(segment)]
            pieces: list[Range] = source.ranges(far, nbytes)
            run = _Run(parts, segments, far, pieces, max(1, len(pieces)))
            tasks: list[_Piece] = [(run, piece) for piece in pieces]
            self._waiting.extend(tasks or [(run, None)])
            self.changed.notify_all()  # more to fetch; and a decision may be told
        return self._waiting.popleft()

    def _make_ready(self, epoch: int, source: Source, prepare: Prepare) -> None:
        _PREPARING.add(threading.current_thread())
        try:
            install = prepare(source)
        except GivenUp:
            return
        except (ArtifactError, OSError) as error:
            self._cannot_prepare(epoch, error)
            return
        finally:
            _PREPARING.discard(threading.current_thread())
        with self.changed:
            if not self.given_up(epoch):  # else it may be another artifact's
                install()
                self._prepare = None
                self.schedule.prepared()
                self.changed.notify_all()

    def _fetch(self, epoch: int, source: Source, run: _Run, piece: Range | None) -> None:
        wire = piece is not None or bool(run.far)
        with source.turn(lambda: self.given_up(epoch), self._stall) if wire else nullcontext(True) as granted:
            if not granted:
                raise GivenUp
            if piece is not None:
                source.hold(piece)
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
                if self.closed:  # whoever asked may have begun anew, with another artifact
                    raise GivenUp
                if part[1] in self.schedule.chunks[part[0]].arrived:
                    continue  # asked for once more when the place was left
                self._failures.clear()
                self.schedule.arrived(*part)
                self._on_arrival(part, data, segment in run.far, time.monotonic() - run.begun)
                self.changed.notify_all()
        source.release(run.ranges)

    def _give_back(self, epoch: int, source: Source, run: _Run) -> Part | None:
        """Those parts of a run that did not arrive; the first of them is returned."""
        source.release(run.ranges)
        with self.changed:
            if epoch != self._epoch or run.lost:
                return None
            run.lost = True
            self._waiting = deque(waiting for waiting in self._waiting if waiting[0] is not run)
            lost = [(chunk, part) for chunk, part in run.parts if part in self.schedule.chunks[chunk].asked]
            self.schedule.returned(lost)
            self.changed.notify_all()
            return lost[0] if lost else None

    def _cannot_open(self, epoch: int, error: Exception) -> None:
        with self.changed:
            if self.given_up(epoch):
                return
            self._note(error, None)
            if isinstance(error, ArtifactError) and len(self.sources) > 1:
                del self.sources[self._current]  # it would be in vain again; the others are asked once more
                self._current -= 1
                self._failures.clear()
            else:
                self._failures.append((self.sources[self._current].place, 0))
            self._leave()

    def _cannot_prepare(self, epoch: int, error: Exception) -> None:
        """Counted apart: a profile may come from elsewhere."""
        with self.changed:
            if self.given_up(epoch):
                return
            self._note(error, None)
            self._preparing = False
            self._unprepared += ROUNDS if isinstance(error, ArtifactError) else 1
            if self._unprepared >= ROUNDS * len(self.sources):
                self._prepare = None
                self.schedule.undecodable()
                self.changed.notify_all()
            elif len(self.sources) > 1:
                self._leave()

    def _cannot_fetch(self, epoch: int, error: Exception, part: Part | None, began: float) -> None:
        """part: the first that is lacking; where none is, others have brought them."""
        with self.changed:
            wrong, alone = isinstance(error, ArtifactError), len(self.sources) == 1
            if self.given_up(epoch) or part is None or (not wrong and began <= self._failed):
                return  # of several that fail together one counts
            if part[1] >= self.schedule.chunks[part[0]].best:
                return  # given up already
            self._note(error, part if wrong else None)
            if wrong:
                self._wrong[part] += 1
                if self._wrong[part] >= len(self.sources):
                    self.schedule.unobtainable(*part)
                    self.changed.notify_all()
                    return
            else:
                self._failed = time.monotonic()
                self._failures.append((self.sources[self._current].place, part[1]))
                if alone and len(self._failures) < ROUNDS:
                    return  # there is no other place, and what else is under way may come
            self._leave()

    def _note(self, error: Exception, part: Part | None) -> None:
        self.error = error
        self._on_failure(self.sources[self._current].place, error, part)

    def _leave(self) -> None:
        """The current source is left for the next one, if failures have not become too many."""
        self._epoch += 1
        self._preparing = False
        self._waiting.clear()
        self._under_way.clear()
        for chunk in self.schedule.chunks:
            chunk.asked.clear()
        if len(self._failures) >= ROUNDS * len(self.sources):
            self._cut_off()
        if not self._cut:
            self._current = (self._current + 1) % len(self.sources)
            self.bandwidth.forget()
            self._start()
        self.changed.notify_all()

    def _cut_off(self) -> None:
        """What the place that failed least could not give is given up."""
        coarsest: dict[str, int] = {}
        for place, part in self._failures:
            coarsest[place] = min(part, coarsest.get(place, part))
        self._failures.clear()
        part = max(coarsest.values())
        self.schedule.cut_off(part)
        self._cut = part == 0


def _nobody(*_: object) -> None:
    """Is told what happens after a stream was closed."""
