"""Value tables that are learnt from the data they code, and their bytes:

    u8 tables - 1; u16 frequencies [tables, 256]; u8 entry [channels]

Table 0 is "always zero". Its channels are not coded.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hf_cachegen.codec.rans import MAX_FREQUENCY
from hf_cachegen.codec.section import Cursor
from hf_cachegen.codec.tables import VALUE_SYMBOLS, ZERO_INDEX, Codebook, learn, normalise
from hf_cachegen.errors import CorruptError

MAX_TABLES = 256
"""Their number is stored in one byte."""


LEAST_SHARE = 1 << 16
"""A symbol that does not occur in a sample counts as one in so many."""


def _never(prob_bits: int) -> Tensor:
    """Return the frequencies of table 0, "always zero", which is not coded: int32 [1, 256]."""
    never = torch.zeros(1, VALUE_SYMBOLS, dtype=torch.int32)
    never[0, ZERO_INDEX] = 1
    return learn(never, 1, prob_bits)


def learn_book(groups: Iterable[Tensor], entries: int, prob_bits: int) -> Codebook:
    """Learn up to `entries` tables for each group of channels.

    Args:
        groups: histograms, integers [channels, 256], of channels that may share tables.
        entries: Largest number of tables for one group.
        prob_bits: Every table sums to 2^prob_bits.
    """
    tables = [_never(prob_bits), *(learn(group, entries, prob_bits) for group in groups)]
    return Codebook(torch.cat(tables), prob_bits, 1)


def sampled_book(groups: Iterable[Tensor], entries: Iterable[int], prob_bits: int) -> Codebook:
    """Learn tables from some channels, for all.

    A channel may be unlike all that were learnt from. So each group has one more table, which supports every symbol.

    Args:
        groups: histograms, integers [channels, 256], of the sampled channels that may share tables.
        entries: Largest number of tables for each group, without that one.
        prob_bits: Every table sums to 2^prob_bits.
    """
    tables = [_never(prob_bits)]
    for group, most in zip(groups, entries, strict=True):
        tables.append(learn(group, most, prob_bits))
        total = group.sum(0, dtype=torch.int64)
        every = total.clamp_min(1 + int(total.sum()) // LEAST_SHARE)
        tables.append(torch.tensor([normalise(every.tolist(), prob_bits)], dtype=torch.int32))
    return Codebook(torch.cat(tables), prob_bits, 1)


def to_bytes(book: Codebook, entries: Tensor) -> bytes:
    """Return the bytes of the tables and of the table entries uint8 [channels]."""
    frequencies = book.tables.frequencies.to(torch.int16)  # at most 4096
    return bytes([len(frequencies) - 1]) + frequencies.numpy().tobytes() + entries.numpy().tobytes()


def read(cursor: Cursor, channels: int, prob_bits: int) -> tuple[Codebook, Tensor]:
    """Read the tables and the entries of `channels` channels. Inverse of `to_bytes`.

    Raises:
        TruncatedError, CorruptError: The bytes are damaged.
    """
    tables = cursor.take(1)[0] + 1
    frequencies = cursor.tensor(tables * VALUE_SYMBOLS, torch.int16).reshape(tables, VALUE_SYMBOLS)
    entries = cursor.tensor(channels, torch.uint8)
    outside = bool(((frequencies < 0) | (frequencies > MAX_FREQUENCY)).any())
    if outside or bool((frequencies.sum(1) != 1 << prob_bits).any()):
        raise CorruptError("the frequencies of a learnt table have a wrong sum or range; fetch the artifact again")
    if bool((entries >= tables).any()):
        raise CorruptError("the id of a learnt table is out of range; fetch the artifact again")
    return Codebook(frequencies, prob_bits, 1), entries
