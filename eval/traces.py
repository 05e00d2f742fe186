"""Bandwidth traces: the rate of a link as a function of time or of the chunk that is sent.

A rate holds from its time until the next one. A trace with a period repeats; one without continues with its last rate,
and `finish` is infinite where that is zero. The paper's traces (CacheGen, SIGCOMM 2024, section 7.4) have no times:
each chunk of a context draws its own bandwidth from 0.1 to 10 Gbps, however long it takes. `ChunkRates` are those, and
`in_time` turns them into a trace that a real link can replay.

Everything is pure and seeded: the same arguments give the same trace. Rates are in bits per second, sizes in bytes,
times in seconds. A value out of range, or a file that is not a trace, raises ConfigError.
"""

from __future__ import annotations

import csv
import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

from hf_cachegen.errors import ConfigError

GBPS = 1e9
PAPER_RANGE = (0.1 * GBPS, 10 * GBPS)
MAHIMAHI_PACKET_BYTES = 1500
"""Bytes that each line of a mahimahi trace carries."""


class Link(Protocol):
    """A link that carries the chunks of a context, one after the other."""

    def finish(self, start: float, nbytes: float, chunk: int = 0) -> float:
        """Return the time at which `nbytes` of chunk `chunk` have arrived if sending begins at `start`."""
        ...


@dataclass(frozen=True)
class Trace:
    """Rates over time: rates[i] bits/s hold from starts[i] seconds, ascending from 0; `period` seconds, or None."""

    starts: tuple[float, ...]
    rates: tuple[float, ...]
    period: float | None = None

    def __post_init__(self) -> None:
        if not self.starts or len(self.starts) != len(self.rates):
            raise ConfigError(
                f"expected one rate for each time, got {len(self.starts)} times and {len(self.rates)} rates"
            )
        if self.starts[0] != 0 or not all(a < b for a, b in pairwise(self.starts)):
            raise ConfigError("expected times that ascend from 0")
        if not all(math.isfinite(value) for value in (*self.starts, *self.rates)):
            raise ConfigError("expected finite times and rates")
        if min(self.rates) < 0:
            raise ConfigError(f"expected rates of at least 0, got {min(self.rates)}")
        if self.period is not None and not self.starts[-1] < self.period < math.inf:
            raise ConfigError(f"expected a period after the last time {self.starts[-1]}, got {self.period}")
        if self.period is not None and not any(self.rates):
            raise ConfigError("expected a rate above 0 in a trace that repeats")

    @cached_property
    def _sent(self) -> tuple[float, ...]:
        """Bits sent from 0 to each time, and to the period where there is one."""
        ends = self.starts[1:] if self.period is None else (*self.starts[1:], self.period)
        total, found = 0.0, [0.0]
        for start, end, rate in zip(self.starts, ends, self.rates, strict=False):
            total += (end - start) * rate
            found.append(total)
        return tuple(found)

    def _split(self, seconds: float) -> tuple[int, float]:
        """Return the number of whole periods before a time, and the rest in seconds."""
        if self.period is None:
            return 0, seconds
        whole = math.floor(seconds / self.period)
        return whole, min(max(seconds - whole * self.period, 0.0), self.period)

    def rate(self, seconds: float) -> float:
        """Return the rate in bits per second at a time of at least 0."""
        return self.rates[bisect_right(self.starts, self._split(seconds)[1]) - 1]

    def bits(self, seconds: float) -> float:
        """Return the bits sent from 0 to a time."""
        whole, rest = self._split(seconds)
        step = bisect_right(self.starts, rest) - 1
        before = whole * self._sent[-1] if whole else 0.0
        return before + self._sent[step] + (rest - self.starts[step]) * self.rates[step]

    def finish(self, start: float, nbytes: float, chunk: int = 0) -> float:
        """Return the time at which `nbytes` have arrived if sending begins at `start`, infinite where they never do."""
        if nbytes <= 0:
            return start
        target = self.bits(start) + 8.0 * nbytes
        whole = 0
        if self.period is not None:
            # Keep the rest above zero: a target reached at the end of a period is not reached after a later pause.
            whole = math.ceil(target / self._sent[-1]) - 1
            target = min(target - whole * self._sent[-1], self._sent[-1])
        step = min(bisect_right(self._sent, target), len(self.rates)) - 1
        while step and self._sent[step] >= target:
            step -= 1
        left = target - self._sent[step]
        if left > 0 and not self.rates[step]:
            return math.inf
        rest = self.starts[step] + (left / self.rates[step] if left > 0 else 0.0)
        return max(start, whole * (self.period or 0.0) + rest)

    def steps(self, until: float) -> Iterator[tuple[float, float]]:
        """Yield (time, rate) of every change before `until`, repetitions included, the first at 0."""
        whole = 0
        while True:
            for start, rate in zip(self.starts, self.rates, strict=True):
                at = start + whole * (self.period or 0.0)
                if at >= until:
                    return
                yield at, rate
            if self.period is None:
                return
            whole += 1

    def scaled(self, factor: float) -> Trace:
        """Return the trace with every rate multiplied by `factor`."""
        return Trace(self.starts, tuple(factor * rate for rate in self.rates), self.period)


@dataclass(frozen=True)
class ChunkRates:
    """The paper's trace: rates[i] bits/s for the whole of chunk i; it repeats after the last."""

    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise ConfigError("expected one or more finite rates above 0")

    def finish(self, start: float, nbytes: float, chunk: int = 0) -> float:
        """Return the time at which `nbytes` of chunk `chunk` have arrived if sending begins at `start`."""
        return start + 8.0 * nbytes / self.rates[chunk % len(self.rates)]

    def in_time(self, seconds: float) -> Trace:
        """Return a trace of these rates, each for `seconds`, repeated, for a link that does not know chunks."""
        if not 0 < seconds < math.inf:
            raise ConfigError(f"expected more than 0 seconds for each rate, got {seconds}")
        starts = tuple(index * seconds for index in range(len(self.rates)))
        return Trace(starts, self.rates, len(self.rates) * seconds)


def paper(
    seed: int,
    chunks: int,
    low: float = PAPER_RANGE[0],
    high: float = PAPER_RANGE[1],
    spread: Literal["uniform", "log"] = "uniform",
) -> ChunkRates:
    """Return bandwidths as in the paper's section 7.4, one draw for each chunk.

    Args:
        seed: random seed.
        chunks: number of chunks.
        low: lowest rate, bits per second.
        high: highest rate, bits per second.
        spread: "uniform" as in the paper, or "log": uniform in the logarithm, so that slow links are as frequent.

    Raises:
        ConfigError: a value is out of range.
    """
    if chunks < 1 or not 0 < low <= high < math.inf:
        raise ConfigError(f"expected chunks >= 1 and 0 < low <= high, got {chunks}, {low}, {high}")
    rng = random.Random(seed)
    if spread == "log":
        return ChunkRates(tuple(math.exp(rng.uniform(math.log(low), math.log(high))) for _ in range(chunks)))
    if spread != "uniform":
        raise ConfigError(f"expected spread to be 'uniform' or 'log', got {spread!r}")
    return ChunkRates(tuple(rng.uniform(low, high) for _ in range(chunks)))


def steady(rate: float) -> Trace:
    """Return a trace of one rate."""
    return Trace((0.0,), (float(rate),))


def step(before: float, after: float, at: float) -> Trace:
    """Return a trace of one rate, and another from time `at` on."""
    return Trace((0.0, float(at)), (float(before), float(after)))


def saw(low: float, high: float, period: float, teeth: int = 16) -> Trace:
    """Return a trace that rises from `low` to `high` in `teeth` equal steps, falls at once, and repeats."""
    if teeth < 2 or not 0 < period < math.inf:
        raise ConfigError(f"expected teeth >= 2 and a period above 0, got {teeth}, {period}")
    rates = tuple(low + (high - low) * index / (teeth - 1) for index in range(teeth))
    return Trace(tuple(period * index / teeth for index in range(teeth)), rates, period)


def on_off(
    seed: int, on: float, off: float, mean_on: float = 1.0, mean_off: float = 0.3, seconds: float = 60.0
) -> Trace:
    """Return a trace like a mobile link: rates `on` and `off` in turn, each for an exponential random time.

    Args:
        seed: random seed.
        on: bits per second; the trace begins with it.
        off: bits per second.
        mean_on: mean duration of `on`, seconds.
        mean_off: mean duration of `off`, seconds.
        seconds: period after which the trace repeats.

    Raises:
        ConfigError: a value is out of range.
    """
    if not (0 < mean_on < math.inf and 0 < mean_off < math.inf and 0 < seconds < math.inf and on > 0):
        raise ConfigError("expected mean_on, mean_off, seconds and the rate `on` above 0")
    rng = random.Random(seed)
    starts: list[float] = []
    rates: list[float] = []
    at = 0.0
    while at < seconds:
        state = len(rates) % 2
        starts.append(at)
        rates.append(float(off if state else on))
        at += max(1e-3, rng.expovariate(1 / (mean_off if state else mean_on)))
    return Trace(tuple(starts), tuple(rates), seconds)


def load(path: str | Path, window: float = 0.1) -> Trace:
    """Read a trace from a file; it repeats.

    A `.csv` file has lines of seconds,bits_per_second, with an optional heading; the last rate holds as long as the one
    before it. Any other file is a mahimahi packet trace: a time in milliseconds for each packet of 1,500 bytes.

    Args:
        path: the file.
        window: seconds in which packets are counted.

    Raises:
        ConfigError: the file is not a trace.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a trace: {error}") from error
    try:
        return _csv(text) if path.suffix == ".csv" else _mahimahi(text, window)
    except ConfigError as error:
        raise ConfigError(f"{path} is not a trace: {error}") from error


def _csv(text: str) -> Trace:
    rows = [row for row in csv.reader(text.splitlines()) if row]
    found = []
    for number, row in enumerate(rows):
        try:
            seconds, rate = map(float, row)
        except ValueError:
            if number:
                raise ConfigError(f"expected seconds,bits_per_second, got {','.join(row)!r:.80}") from None
            continue
        found.append((seconds, rate))
    if not found:
        raise ConfigError("expected lines of seconds,bits_per_second, found none")
    starts = tuple(seconds - found[0][0] for seconds, _ in found)
    period = starts[-1] + (starts[-1] - starts[-2]) if len(starts) > 1 else None
    return Trace(starts, tuple(rate for _, rate in found), period)


def _mahimahi(text: str, window: float) -> Trace:
    if not 0 < window < math.inf:
        raise ConfigError(f"expected a window above 0 seconds, got {window}")
    try:
        times = [int(line) for line in text.split()]
    except ValueError as error:
        raise ConfigError(f"expected one time in milliseconds for each line: {error}") from None
    if not times or times[0] < 0 or times[-1] < 1 or times != sorted(times):
        raise ConfigError("expected times in milliseconds that ascend from 0, the last above 0")
    return _windows([time / 1000 for time in times], times[-1] / 1000, window)


def _windows(packets: Sequence[float], period: float, window: float) -> Trace:
    """Count a packet at time t in the window that ends at or after t, so that none is early by more than a window."""
    count = max(1, math.ceil(period / window - 1e-9))
    totals = [0] * count
    for time in packets:
        totals[min(max(math.ceil(time / window - 1e-9) - 1, 0), count - 1)] += 1
    starts = tuple(index * window for index in range(count))
    lengths = [min((index + 1) * window, period) - index * window for index in range(count)]
    bits = 8 * MAHIMAHI_PACKET_BYTES
    return Trace(starts, tuple(bits * n / length for n, length in zip(totals, lengths, strict=True)), period)
