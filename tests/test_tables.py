"""Tables: from histograms to frequencies, the shipped codebooks, and the choice among their tables."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_cachegen.codec import tables


@given(st.lists(st.integers(0, 1 << 20), min_size=2, max_size=256).filter(any), st.sampled_from([10, 11, 12]))
def test_normalised_frequencies_have_the_right_sum(weights: list[int], prob_bits: int) -> None:
    freq = tables.normalise(weights, prob_bits)
    assert sum(freq) == 1 << prob_bits
    assert max(freq) <= 4095
    used = [i for i, f in enumerate(freq) if f]
    assert used == list(range(used[0], used[-1] + 1))
    common = [i for i, w in enumerate(weights) if w * 1024 >= sum(weights)]
    assert set(common) <= set(used)


@given(st.lists(st.integers(0, 40), min_size=2, max_size=256).filter(any), st.sampled_from([10, 11, 12]))
def test_normalising_takes_the_greedy_steps(weights: list[int], prob_bits: int) -> None:
    """One step at a time: the frequencies are part of the format, whatever finds them faster."""
    found = tables.normalise(weights, prob_bits)
    used, budget = [i for i, f in enumerate(found) if f], 1 << prob_bits
    most = min(budget - len(used) + 1, 4095)
    freq = [min(most, max(1, w * budget // sum(weights))) if i in used else 0 for i, w in enumerate(weights)]
    while (excess := sum(freq) - budget) != 0:
        fewer = [(weights[i] / (freq[i] - 1), i) for i in used if freq[i] > 1]
        more = [(-weights[i] / freq[i], i) for i in used if freq[i] < most]
        freq[min(fewer if excess > 0 else more)[1]] += -1 if excess > 0 else 1
    assert found == freq


def test_normalise_refuses_an_empty_histogram() -> None:
    with pytest.raises(ValueError, match="at least one count"):
        tables.normalise([0, 0, 0], 11)


@pytest.mark.parametrize("prob_bits", [10, 11, 12])
def test_shipped_codebooks_fit_one_byte(prob_bits: int) -> None:
    values, digits = tables.shipped_codebooks(prob_bits)
    assert values.entries <= 256
    assert 3 * digits.entries <= 256
    assert values.tables.frequencies[0].nonzero().flatten().tolist()[0] in (127, 128)
    mirrored = digits.tables.frequencies.reshape(-1, 3, 3)
    assert int((mirrored[:, 1] - mirrored[:, 2].flip(1)).abs().max()) <= 2  # ties are rounded from the left


def test_the_cheapest_table_is_chosen() -> None:
    values, _ = tables.shipped_codebooks(11)
    never = torch.zeros(1, 256, dtype=torch.int64)
    never[0, 128] = 1000
    wide = torch.ones(1, 256, dtype=torch.int64)
    entries, bits = values.choose(torch.cat([never, wide]))
    assert entries.tolist() == [0, 1]
    assert bits.tolist() == [0.0, 8 * 256.0]
