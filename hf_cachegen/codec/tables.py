"""Convert histograms to integer frequencies and a codebook, and choose a table for every channel.

A table is a row of integer frequencies that sums to 2^prob_bits. A codebook is a set of tables named by one byte.
Both are made and compared in integers only, so that every machine makes the same tables and the same choices.

There are two kinds of codebook:

- *value* tables code whole symbols: index = value + ZERO_INDEX, 256 indices; table 0 is "always zero";
- *digit* tables code a refinement's digit {-1, 0, 1}, index = digit + 1; one id names three tables, for a coarser
  symbol that is zero, positive or negative (table = 3 * id + context); id 0 is "always zero".

A channel whose id is 0 is not coded. Symbols outside a table's support are rare by choice. They are coded as the
nearest symbol inside and corrected by an exception (`section.py`), at EXCEPTION_BITS each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from heapq import heapify, heappop, heapreplace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_cachegen.codec.rans import Tables

VALUE_SYMBOLS = 256
ZERO_INDEX = 128
DIGIT_SYMBOLS = 3
DIGIT_ZERO = 1
DIGIT_CONTEXTS = 3
SHIPPED_CODEBOOK = "cachegen-1"
"""Name of the codebook that is part of the package. Another set of tables needs another name."""
EXCEPTION_BITS = 64
COST_SCALE = 256
"""Costs are integers in units of 1/256 bit."""
LARGEST_COST = (1 << 15) - 1
"""Above every cost: 12 bits and an exception."""
COMPILED_ENTRIES = 32
"""The compiled code compares so many entries at a time."""
_SUPPORT_SHARE = 1 << 17
"""A symbol rarer than one in this many becomes an exception: a frequency of 1 would cost the others more."""


def normalise(weights: Sequence[int], prob_bits: int) -> list[int]:
    """Convert integer weights to frequencies that sum to 2^prob_bits, at least 1 for each symbol of the support.

    The support is contiguous, so that an exception can be clamped into it. The algorithm is greedy on weight /
    frequency, which minimises the code length. At 12 bits no frequency exceeds 4095 (the decoder's entry has 12 bits
    for it).
    """
    given = np.asarray(weights, np.int64)
    total, budget = int(given.sum()), 1 << prob_bits
    kept = np.flatnonzero((given * _SUPPORT_SHARE >= total) & (total > 0)).tolist()
    if not kept:
        raise ValueError("a histogram needs at least one count")
    low, high = kept[0], kept[-1]
    if prob_bits == 12 and low == high:  # one symbol alone would need 4096
        low, high = (low, high + 1) if high + 1 < len(given) else (low - 1, high)
    most = min(budget - (high - low), 4095)
    freq, support = [0] * len(given), range(low, high + 1)
    freq[low : high + 1] = (given[low : high + 1] * budget // total).clip(1, most).tolist()
    excess, weights = sum(freq) - budget, given.tolist()
    # A step changes the key of one symbol only, and away from the front: a heap finds the next best in log time.
    if excess > 0:
        heap = [(weights[i] / (freq[i] - 1), i) for i in support if freq[i] > 1]
        heapify(heap)
        for _ in range(excess):
            _, best = heap[0]
            freq[best] -= 1
            if freq[best] > 1:
                heapreplace(heap, (weights[best] / (freq[best] - 1), best))
            else:
                heappop(heap)
    elif excess < 0:
        heap = [(-(weights[i] / freq[i]), i) for i in support if freq[i] < most]
        heapify(heap)
        for _ in range(-excess):
            _, best = heap[0]
            freq[best] += 1
            if freq[best] < most:
                heapreplace(heap, (-(weights[best] / freq[best]), best))
            else:
                heappop(heap)
    return freq


@lru_cache(maxsize=4)
def _symbol_costs(prob_bits: int) -> Tensor:
    """Return the cost of a symbol by its frequency, float64 [1 + 2^prob_bits]; 0 for frequency 0."""
    bits = [0.0, *(prob_bits - math.log2(f) for f in range(1, 1 + (1 << prob_bits)))]
    return (torch.tensor(bits, dtype=torch.float64) * COST_SCALE).round()


class Codebook:
    """Tables, with the costs that the encoder needs to choose among them.

    Args:
        frequencies: int32 [tables, symbols].
        prob_bits: Every row sums to 2^prob_bits.
        contexts: 1 for value tables, 3 for digit tables (then tables = 3 x entries).
    """

    def __init__(self, frequencies: Tensor, prob_bits: int, contexts: int):
        self.tables = Tables(frequencies.to(torch.int32), prob_bits)
        self.contexts = contexts
        self.zero = ZERO_INDEX if contexts == 1 else DIGIT_ZERO
        self.entries = frequencies.shape[0] // contexts
        used = (frequencies > 0).int()
        self.low = used.argmax(1).to(torch.uint8)
        self.high = (frequencies.shape[1] - 1 - used.flip(1).argmax(1)).to(torch.uint8)
        # Entry 0 is not coded. At 12 bits its table has a second symbol, which would be lost without an exception.
        first = slice(contexts)
        if prob_bits == 12 and bool(((self.low[first] == self.zero) & (self.high[first] == self.zero + 1)).all()):
            self.high[first] = self.zero

    @cached_property
    def zeros(self) -> Tensor:
        """The share of zeros that each table expects: float32 [tables]."""
        frequencies = self.tables.frequencies.float()
        return frequencies[:, self.zero] / frequencies.sum(1)

    @cached_property
    def cost(self) -> Tensor:
        """The cost of each symbol, float64 [entries, contexts * symbols], in integer multiples of 1/COST_SCALE bit.

        Integers are exact in any order of summation. A symbol outside the support costs its neighbour inside plus an
        exception.
        """
        frequencies, prob_bits = self.tables.frequencies, self.tables.prob_bits
        cost = _symbol_costs(prob_bits)[frequencies.long()]
        index = torch.arange(frequencies.shape[1])[None]
        inside = torch.minimum(torch.maximum(index, self.low[:, None]), self.high[:, None])
        cost = cost.gather(1, inside) + (index != inside) * float(EXCEPTION_BITS * COST_SCALE)
        return cost.reshape(self.entries, -1)

    @cached_property
    def compiled_cost(self) -> Tensor:
        """`cost` as the compiled code takes it: int32 [contexts * symbols, entries], filled up to a multiple of
        COMPILED_ENTRIES with entries that cost more than all others.
        """
        filled = torch.full((self.cost.shape[1], -(-self.entries // COMPILED_ENTRIES) * COMPILED_ENTRIES), LARGEST_COST)
        filled[:, : self.entries] = self.cost.mT
        return filled.to(torch.int32)

    @cached_property
    def narrowest(self) -> int:
        """The entry, other than "always zero", that codes a channel of zeros most cheaply: about a thousandth of a bit
        per symbol.
        """
        return 1 + int(self.cost[1:, self.zero].argmin())

    def choose(self, histograms: Tensor, *, coded: bool = False) -> tuple[Tensor, Tensor]:
        """Choose the cheapest entry of every channel.

        Args:
            histograms: Integers [channels, contexts * symbols].
            coded: Leave out the entry "always zero".

        Returns:
            The entries, uint8 [channels], and their cost in bits, float64 [channels].
        """
        near, first = _seen(histograms), int(coded)
        cost, entries = (histograms[:, near].double() @ self.cost[first:, near].mT).min(1)
        return (entries + first).to(torch.uint8), cost / COST_SCALE

    def bits(self, histograms: Tensor, entries: Tensor) -> Tensor:
        """Return the cost in bits, float64 [channels], of these histograms under entries uint8 [channels]."""
        near = _seen(histograms)
        return (histograms[:, near] * self.cost[:, near][entries.long()]).sum(1) / COST_SCALE

    def table_ids(self, entries: Tensor) -> Tensor:
        """Convert entries uint8 [channels] to the coder's table ids uint8 [channels, contexts]."""
        return entries[:, None] * self.contexts + torch.arange(self.contexts, dtype=torch.uint8)


def _seen(histograms: Tensor) -> slice:
    """Return the range of the symbols that occur. Of 256 symbols most do not, and cost nothing."""
    seen = histograms.any(0).nonzero().flatten().tolist() or [0]
    return slice(seen[0], seen[-1] + 1)


def learn(histograms: Tensor, entries: int, prob_bits: int, rounds: int = 4) -> Tensor:
    """Learn up to `entries` value tables that code these histograms cheaply.

    The channels are clustered. At first each cluster is an equal share of them, in the order of their mean symbol.
    Then, in each of `rounds` rounds, every table is made from its channels, and each channel goes to its cheapest
    table.

    Args:
        histograms: Integers [channels, symbols].
        entries: Number of tables.
        prob_bits: Every table sums to 2^prob_bits.
        rounds: Number of iterations.

    Returns:
        int32 [tables, symbols].
    """
    counts, near = histograms.double(), _seen(histograms)  # sums of integers are exact
    symbols = torch.arange(counts.shape[1], dtype=torch.float64)
    order = ((counts @ symbols) / counts.sum(1).clamp_min(1)).argsort(stable=True)
    owner = torch.empty_like(order)
    owner[order] = torch.arange(len(order)) * entries // max(1, len(order))
    frequencies = torch.empty(0)
    for _ in range(rounds):
        sums = ((owner == torch.arange(entries)[:, None]).double() @ counts).long()
        sums = sums[sums.sum(1) > 0]
        rows = np.array([normalise(row, prob_bits) for row in sums.tolist()], np.int32)
        frequencies = torch.from_numpy(rows)
        owner = (counts[:, near] @ Codebook(frequencies, prob_bits, 1).cost[:, near].mT).min(1).indices
    return frequencies


@lru_cache(maxsize=8)
def shipped_codebooks(prob_bits: int) -> tuple[Codebook, Codebook]:
    """Load (value tables, digit tables) of the package at this precision. `codebook.py` made the file."""
    shipped = load_file(Path(__file__).with_name("codebook.safetensors"))
    values, digits = shipped[f"values-{prob_bits}"], shipped[f"digits-{prob_bits}"]
    return Codebook(values, prob_bits, 1), Codebook(digits, prob_bits, DIGIT_CONTEXTS)
