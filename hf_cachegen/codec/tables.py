"""Histograms to integer frequencies to a codebook, and the choice of a table for every column.

A table is a row of integer frequencies that sums to 2^prob_bits. A codebook is a set of tables named by one byte.
Both are made and compared in integers only, so that every machine makes the same tables and the same choices.

Two kinds of codebook:

- *value* tables code whole symbols: index = value + ZERO_INDEX, 256 indices; table 0 is "always zero";
- *digit* tables code a refinement's digit {-1, 0, 1}, index = digit + 1; one id names three tables, for a coarser
  symbol that is zero, positive or negative (table = 3 * id + context); id 0 is "always zero".

A column whose id is 0 is not coded at all. Symbols outside a table's support are rare by choice; they are coded as
the nearest symbol inside and corrected by an exception (`section.py`), at EXCEPTION_BITS each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

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
"""Name of the codebook that comes with the package; another set of tables would have another name."""
EXCEPTION_BITS = 64
COST_SCALE = 256
"""Costs are kept in 1/256 bit, as integers."""
_SUPPORT_SHARE = 1 << 17
"""A symbol rarer than one in this many is left to the exceptions: a frequency of 1 would cost the others more."""


def normalise(weights: Sequence[int], prob_bits: int) -> list[int]:
    """Integer weights to frequencies that sum to 2^prob_bits, each symbol of the support at least 1.

    The support is contiguous, so that an exception can be clamped into it. Greedy on weight / frequency, which
    minimises the code length. At 12 bits no frequency exceeds 4095 (the decoder's entry has 12 bits for it).
    """
    total, budget = sum(weights), 1 << prob_bits
    kept = [i for i, w in enumerate(weights) if w * _SUPPORT_SHARE >= total > 0]
    if not kept:
        raise ValueError("a histogram needs at least one count")
    low, high = kept[0], kept[-1]
    if prob_bits == 12 and low == high:  # one symbol alone would need 4096
        low, high = (low, high + 1) if high + 1 < len(weights) else (low - 1, high)
    most = min(budget - (high - low), 4095)
    freq = [0] * len(weights)
    for i in range(low, high + 1):
        freq[i] = min(most, max(1, weights[i] * budget // total))
    support = range(low, high + 1)
    while (excess := sum(freq) - budget) != 0:
        if excess > 0:
            best = min((i for i in support if freq[i] > 1), key=lambda i: (weights[i] / (freq[i] - 1), i))
        else:
            best = max((i for i in support if freq[i] < most), key=lambda i: (weights[i] / freq[i], -i))
        freq[best] += -1 if excess > 0 else 1
    return freq


class Codebook:
    """Tables with what the encoder needs to choose among them.

    frequencies int32 [tables, symbols]; `contexts` is 1 for value tables, 3 for digit tables (then tables = 3 x
    entries).
    """

    def __init__(self, frequencies: Tensor, prob_bits: int, contexts: int):
        self.tables = Tables(frequencies.to(torch.int32), prob_bits)
        self.contexts = contexts
        self.zero = ZERO_INDEX if contexts == 1 else DIGIT_ZERO
        self.entries = frequencies.shape[0] // contexts
        used = (frequencies > 0).int()
        self.low = used.argmax(1).to(torch.uint8)
        self.high = (frequencies.shape[1] - 1 - used.flip(1).argmax(1)).to(torch.uint8)

    @cached_property
    def cost(self) -> Tensor:
        """What each symbol costs, float64 [entries, contexts * symbols], in whole COST_SCALEths of a bit: exact in
        any order of summation. A symbol outside the support costs its neighbour inside and an exception.
        """
        frequencies, prob_bits = self.tables.frequencies, self.tables.prob_bits
        bits = [[prob_bits - math.log2(f) if f else 0.0 for f in row] for row in frequencies.tolist()]
        cost = (torch.tensor(bits, dtype=torch.float64) * COST_SCALE).round()
        index = torch.arange(frequencies.shape[1])[None]
        inside = torch.minimum(torch.maximum(index, self.low[:, None]), self.high[:, None])
        cost = cost.gather(1, inside) + (index != inside) * float(EXCEPTION_BITS * COST_SCALE)
        return cost.reshape(self.entries, -1)

    @cached_property
    def narrowest(self) -> int:
        """The entry, other than "always zero", under which a column of zeros costs least: some thousandth of a bit."""
        return 1 + int(self.cost[1:, self.zero].argmin())

    def choose(self, histograms: Tensor, *, coded: bool = False) -> tuple[Tensor, Tensor]:
        """The cheapest entry of every column, uint8 [columns], and what it costs in bits, float64 [columns].

        histograms: integers [columns, contexts * symbols]. coded: without the entry "always zero".
        """
        near, first = _seen(histograms), int(coded)
        cost, entries = (histograms[:, near].double() @ self.cost[first:, near].mT).min(1)
        return (entries + first).to(torch.uint8), cost / COST_SCALE

    def bits(self, histograms: Tensor, entries: Tensor) -> Tensor:
        """What these columns cost under these entries uint8 [columns]: bits, float64 [columns]."""
        near = _seen(histograms)
        return (histograms[:, near] * self.cost[:, near][entries.long()]).sum(1) / COST_SCALE

    def table_ids(self, entries: Tensor) -> Tensor:
        """Entries uint8 [columns] to the coder's table ids uint8 [columns, contexts]."""
        return (entries.to(torch.int64)[:, None] * self.contexts + torch.arange(self.contexts)).to(torch.uint8)


def _seen(histograms: Tensor) -> slice:
    """Of 256 symbols most occur nowhere, and cost nothing: the range of those that do."""
    seen = histograms.any(0).nonzero().flatten().tolist() or [0]
    return slice(seen[0], seen[-1] + 1)


def learn(histograms: Tensor, entries: int, prob_bits: int, rounds: int = 4) -> Tensor:
    """Up to `entries` value tables, int32 [tables, symbols], that code these histograms [columns, symbols] cheaply.

    Clusters columns: begins with equal shares in the order of their mean symbol, then gives each column to its
    cheapest table and makes every table anew from its columns, `rounds` times.
    """
    symbols = torch.arange(histograms.shape[1], dtype=torch.float64)
    order = ((histograms.double() @ symbols) / histograms.sum(1).clamp_min(1)).argsort(stable=True)
    owner = torch.empty_like(order)
    owner[order] = torch.arange(len(order)) * entries // max(1, len(order))
    frequencies = torch.empty(0)
    for _ in range(rounds):
        sums = torch.zeros(entries, histograms.shape[1], dtype=torch.int64).index_add_(0, owner, histograms.long())
        sums = sums[sums.sum(1) > 0]
        frequencies = torch.tensor([normalise(row, prob_bits) for row in sums.tolist()], dtype=torch.int32)
        owner = Codebook(frequencies, prob_bits, 1).choose(histograms)[0].long()
    return frequencies


@lru_cache(maxsize=8)
def shipped_codebooks(prob_bits: int) -> tuple[Codebook, Codebook]:
    """(value tables, digit tables) of the package at this precision; `codebook.py` made the file."""
    shipped = load_file(Path(__file__).with_name("codebook.safetensors"))
    values, digits = shipped[f"values-{prob_bits}"], shipped[f"digits-{prob_bits}"]
    return Codebook(values, prob_bits, 1), Codebook(digits, prob_bits, DIGIT_CONTEXTS)
