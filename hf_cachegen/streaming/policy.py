"""Choose the level of each chunk, and which chunks are recomputed from their tokens: pure functions.

1. Levels are nested: a coarse chunk is refined later by the parts that it lacks, so nothing is lost by fetching the
   coarse part first. `Plan.sure` is the level that is fetched first of every chunk, `Plan.level` the level aimed at.
2. Recomputing a chunk needs all keys and values before it. So text grows from the front of the context while transfers
   come from its back, until they meet: `Plan.text` counts the chunks at the front. If the link dies, the missing part
   is at the front and can be recomputed.
3. Text is exact and the finest level is not. But where the finest level fits the time, nothing is recomputed.

`Paper` is Algorithm 1 of the CacheGen paper (section 5.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol

from hf_cachegen.errors import ConfigError

TEXT: Literal["text"] = "text"


@dataclass(frozen=True)
class Missing:
    """The costs of a chunk that is not in place.

    Args:
        wire_bytes: [level - 1]: bytes that must still be fetched for that level. 0: all are here; inf: it cannot be
            had.
        decode_seconds: Time of decoding it.
        recompute_seconds: Time of recomputing it after the chunks before it; inf where that cannot be done.
    """

    wire_bytes: tuple[float, ...]
    decode_seconds: float
    recompute_seconds: float


@dataclass(frozen=True)
class Outlook:
    """What a policy knows.

    Args:
        seconds_left: Until the context must be in place; inf without an SLO.
        bytes_per_second: The throughput of this stream. None: not measured yet; 0: no source is left.
        missing: The missing chunks, in the order of the context.
        first_seconds: Time of running the model's first layers, which a predicted artifact still needs before its first
            chunk is decoded. Transfers go on meanwhile, and recomputing needs none of it.
    """

    seconds_left: float
    bytes_per_second: float | None
    missing: tuple[Missing, ...]
    first_seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a policy decides.

    Args:
        level: The level aimed at, for all chunks that are not text.
        sure: The level that is fetched first of every chunk, at most `level`.
        text: The number of missing chunks, from the front, that are recomputed.
        seconds: Expected time until all chunks are in place.
        why: The reason.
        provisional: Made before the first sample. Where nothing is refined later, it holds for the first chunk alone.
    """

    level: int
    sure: int
    text: int
    seconds: float
    why: str
    provisional: bool = False


class Policy(Protocol):
    """Plans a stream. It is called again and again, with the latest measurements."""

    @property
    def smoothing(self) -> float:
        """Weight of the old throughput in each new estimate. 0: the last sample alone; towards 1: a longer average."""
        ...

    @property
    def refines(self) -> bool:
        """Whether chunks in place are refined while time is left."""
        ...

    def plan(self, outlook: Outlook) -> Plan:
        """Return what to do about the missing chunks, one or more."""
        ...


class Costs:
    """The seconds until all missing chunks are in place, for a level and a number of text chunks.

    Transfers overlap the work of the calling thread (the first layers of a prediction, decoding, recomputing). The last
    chunk is decoded after it has arrived. Where all chunks are recomputed, nothing is predicted.
    """

    def __init__(self, outlook: Outlook) -> None:
        missing, rate = outlook.missing, outlook.bytes_per_second
        self.count, self.levels, self.first = len(missing), len(missing[0].wire_bytes), outlook.first_seconds
        self._rate = math.inf if rate is None else rate
        self._recompute = [0.0, *accumulate(chunk.recompute_seconds for chunk in missing)]
        self._decode = _sums_from([chunk.decode_seconds for chunk in missing])
        self._last = [chunk.decode_seconds for chunk in missing] + [0.0]
        self._bytes = [_sums_from([chunk.wire_bytes[level] for chunk in missing]) for level in range(self.levels)]

    def transfer(self, level: int, text: int = 0) -> float:
        """Return the seconds of transferring the chunks that are not text."""
        nbytes = self._bytes[level - 1][text]
        return nbytes / self._rate if nbytes and self._rate else math.inf if nbytes else 0.0

    def recompute(self, text: int | None = None) -> float:
        """Return the seconds of recomputing the first `text` missing chunks (default: all)."""
        return self._recompute[self.count if text is None else text]

    def seconds(self, level: int, text: int) -> float:
        """Return the seconds until all missing chunks are in place."""
        work = self._recompute[text] + self._decode[text] + (self.first if text < self.count else 0.0)
        return max(self.transfer(level, text) + self._last[text], work)

    def fewest_text(self, level: int, limit: float) -> int | None:
        """Return the least number of text chunks with which `level` is in place within `limit`; None: there is none."""
        for text in range(self.count + 1):
            cost = self.seconds(level, text)
            if cost <= limit and cost < math.inf:
                return text
            if self._recompute[text] > limit:
                return None
        return None

    def fastest(self) -> tuple[int, int, float]:
        """Return (level, text, seconds) of the fastest way at any quality; inf where there is no way."""
        cost, text = min((self.seconds(1, text), text) for text in range(self.count + 1))
        return 1, text, cost


@dataclass(frozen=True)
class Adaptive:
    """Plan the finest level that fits the time left, with as little recomputing as that takes.

    The level that is fetched first would still fit if the link became `caution` times slower. Finer levels come as
    refinements.

    Args:
        caution: At least 1.
        smoothing: See `Policy`.
        text: Whether chunks may be recomputed to meet the SLO. Where no source is left they are in any case.
        refines: See `Policy`.

    Raises:
        ConfigError: An argument is out of its range.
    """

    caution: float = 3.0
    smoothing: float = 0.0
    text: bool = True
    refines: bool = True

    def __post_init__(self) -> None:
        if not self.caution >= 1:
            raise ConfigError(f"caution must be at least 1, got {self.caution}")
        _check_smoothing(self.smoothing)

    def plan(self, outlook: Outlook) -> Plan:
        """Plan as the class says."""
        costs, left = Costs(outlook), outlook.seconds_left
        if outlook.bytes_per_second is None:
            return self._unmeasured(costs, left)
        if left == math.inf:
            return _whole(costs)
        for level in range(costs.levels, 0, -1):
            text = costs.fewest_text(level, left)
            if text is not None and (self.text or text == 0):
                sure = self._sure(costs, left, level, text)
                return Plan(level, sure, text, costs.seconds(level, text), _why(costs, level, text, left))
        # Recomputing that ends too late would only delay the decoding of what arrives, and the link may recover.
        in_time = not 0 < left < outlook.missing[0].recompute_seconds or costs.transfer(1) == math.inf
        return _fastest(costs, left, self.text and in_time)

    def _sure(self, costs: Costs, left: float, level: int, text: int) -> int:
        if not self.refines:
            return level
        fits = (low for low in range(level, 1, -1) if self.caution * costs.transfer(low, text) <= left)
        return next(fits, 1)

    def _unmeasured(self, costs: Costs, left: float) -> Plan:
        """The plan before the first sample: the base first.

        If recomputing everything just fits, it begins at once, since later it would not fit. It also begins where it is
        too late for anything else.
        """
        if left == math.inf:
            return _whole(costs)
        middle = (costs.levels + 1) // 2
        whole = costs.recompute()
        if self.text and 0 < whole <= left < costs.first:
            return Plan(middle, 1, costs.count, whole, "no throughput yet; the first layers alone take too long", True)
        if self.text and whole < math.inf and (left <= 0 or whole <= left <= whole * HEDGE):
            why = "it is too late to wait" if left <= 0 else "recomputing all just fits, so it begins"
            return Plan(middle, 1, 1, whole, f"no throughput yet; {why}", True)
        if self.refines:
            return Plan(middle, 1, 0, math.nan, "no throughput yet: the base first, then finer levels", True)
        return Plan(middle, middle, 0, math.nan, UNMEASURED, True)


UNMEASURED = "no throughput yet: the middle level"
HEDGE = 1.25
"""Recomputing begins before the first sample when the time left is at most this multiple of what it takes."""


@dataclass(frozen=True)
class Paper:
    """Plan by Algorithm 1 of the paper.

    Text where recomputing all that remains fits the time left; else the finest level whose remaining bytes fit it, at
    the throughput of the last chunk; before the first sample the middle level.
    """

    smoothing: float = 0.0
    refines: bool = False

    def __post_init__(self) -> None:
        _check_smoothing(self.smoothing)

    def plan(self, outlook: Outlook) -> Plan:
        """Plan as the class says."""
        costs, left = Costs(outlook), outlook.seconds_left
        whole = costs.recompute()
        if whole <= left and whole < math.inf and left < math.inf:
            why = f"recomputing all that remains takes {whole:.2f} s of the {left:.2f} s left"
            return Plan(1, 1, costs.count, whole, why)
        if outlook.bytes_per_second is None:
            middle = (costs.levels + 1) // 2
            return Plan(middle, middle, 0, math.nan, UNMEASURED, True)
        for level in range(costs.levels, 0, -1):
            seconds = max(costs.transfer(level), costs.first)
            if seconds <= left and seconds < math.inf:
                why = f"the finest whose {seconds:.2f} s of transfer fit the {left:.2f} s left"
                return Plan(level, level, 0, costs.seconds(level, 0), why)
        return _fastest(costs, left, True, mixed=False)


@dataclass(frozen=True)
class Fixed:
    """Plan one level or "text" for all chunks, whatever the time left; None: the finest level."""

    choice: int | Literal["text"] | None = None
    smoothing: float = 0.0
    refines: bool = False

    def plan(self, outlook: Outlook) -> Plan:
        """Plan as the class says."""
        costs = Costs(outlook)
        if self.choice == TEXT:
            return Plan(1, 1, costs.count, costs.recompute(), "as asked for")
        level = costs.levels if self.choice is None else min(int(self.choice), costs.levels)
        return Plan(level, level, 0, costs.seconds(level, 0), "as asked for")


def policy_of(policy: Policy | str, level: int | Literal["text"] | None) -> Policy:
    """Return the policy that the options `policy` and `level` name. Raises ConfigError."""
    if level is not None:
        if not (level == TEXT or (isinstance(level, int) and not isinstance(level, bool) and level >= 1)):
            raise ConfigError(f"level must be a whole number from 1, or 'text', got {level!r}")
        return Fixed(level)
    if isinstance(policy, str):
        named: dict[str, Policy] = {"adaptive": Adaptive(), "paper": Paper()}
        if policy not in named:
            raise ConfigError(f"policy must be one of {sorted(named)} or a Policy, got {policy!r}")
        return named[policy]
    if isinstance(policy, type) or not callable(getattr(policy, "plan", None)):
        raise ConfigError(f"policy must be a name or a Policy, with a method plan(outlook), got {policy!r}")
    return policy


def refinement_order(chunks: int) -> list[int]:
    """Return the order in which chunks are refined.

    The last chunk comes first, since it stands before the question; then the first chunk, which attention depends on
    most; then the others from the back to the front. All chunks get one level finer before any gets two: the first
    refinement removes the most error for its bytes.
    """
    order = [chunks - 1, 0, *range(chunks - 2, 0, -1)]
    return list(dict.fromkeys(order))


def _whole(costs: Costs) -> Plan:
    finest = costs.levels
    return Plan(finest, finest, 0, costs.seconds(finest, 0), "no SLO: the finest level")


def _fastest(costs: Costs, left: float, text_allowed: bool, *, mixed: bool = True) -> Plan:
    level, text, seconds = costs.fastest()
    if not mixed:
        seconds, text = min((costs.seconds(1, text), text) for text in (0, costs.count))
    if not text_allowed:
        text, seconds = 0, costs.seconds(1, 0)
    way = "the fastest way" if text_allowed else "level 1"
    why = f"nothing fits the {max(0.0, left):.2f} s left: {way}, {seconds:.2f} s"
    return Plan(level, level, text, seconds, why)


def _why(costs: Costs, level: int, text: int, left: float) -> str:
    seconds = costs.seconds(level, text)
    what = "recomputing all" if text == costs.count else f"the finest that fits, with {text} chunks recomputed"
    return f"{what if text else 'the finest that fits'}: {seconds:.2f} s of the {left:.2f} s left"


def _sums_from(values: Sequence[float]) -> list[float]:
    """[i]: the sum of values[i:]."""
    return [*accumulate(reversed(values), initial=0.0)][::-1]


def _check_smoothing(smoothing: float) -> None:
    if not 0 <= smoothing < 1:
        raise ConfigError(f"smoothing must be from 0 to below 1, got {smoothing}")
