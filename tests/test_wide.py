"""Wide symbols are decoded directly into coefficients: the same numbers as stage by stage."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_cachegen.codec import native
from hf_cachegen.codec.chunk import Channels, LossyCodec, Span
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.launching import launch
from hf_cachegen.codec.side import Side
from hf_cachegen.codec.tables import VALUE_SYMBOLS
from hf_cachegen.codec.wide import Wide, correct
from hf_cachegen.config import CacheGenConfig

TOKENS, CHANNELS, STEP = 40, 300, 100
CONFIG = CacheGenConfig(levels=3, protect_first=2, protect_last=3)
SPAN = Span(0, TOKENS, TOKENS)
WIDE = {(0, 7): 4e3, (1, 0): -9e3, (12, 299): 5e4, (13, 5): -3e3, (39, 128): 7e3}
"""Values that no byte holds, by (token, channel): of first, ordinary and last tokens, of coded and uncoded channels."""


def codec(mean: int = 0) -> LossyCodec:
    """Return a codec; the last channels are not coded."""
    entries = torch.full((CHANNELS,), 40, dtype=torch.uint8)
    entries[-20:] = 0
    digits = torch.full((2, CHANNELS), 2, dtype=torch.uint8)
    digits[:, -20:] = 0
    codes = torch.full((CHANNELS,), STEP, dtype=torch.uint8)
    means = torch.full((CHANNELS,), mean, dtype=torch.int16)
    side = Side(codes, means, torch.zeros_like(entries), entries, digits)
    nothing = torch.zeros(CHANNELS, dtype=torch.int64)
    return LossyCodec(Channels(nothing, nothing), CONFIG, side)


def drawn(coder: LossyCodec) -> Tensor:
    """Return rows with wide symbols."""
    rows = torch.randn(TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0)) * coder.steps * 30
    for where, symbol in WIDE.items():
        rows[where] = symbol * coder.steps[0]
    return rows


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("isa", [isa for isa in native.Isa if isa], ids=lambda isa: isa.name.lower())
def test_the_numbers_are_those_of_the_stages(isa: native.Isa, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.available() or isa not in native.available_isas():
        pytest.skip(f"this machine has no compiled coder for {isa.name.lower()}")
    monkeypatch.setenv("CACHEGEN_CPU", isa.name.lower())
    coder = codec()
    rows = drawn(coder)
    parts = coder.encode(rows, SPAN)[:level]
    expected = coder.approximations(rows, SPAN)[level - 1]
    found = torch.full((TOKENS + 2, CHANNELS), torch.nan)
    with monkeypatch.context() as patch:
        patch.setattr(coder, "_rows", lambda *_: pytest.fail("decoded stage by stage"))
        launch(coder, [(parts, SPAN, 1)], Target.matrix(found))()
    assert torch.equal(found[1:-1], expected)
    assert found[[0, -1]].isnan().all()
    for token, channel in WIDE:
        step = coder.steps[0] * (1 if token < 2 or token > 36 else 3 ** (3 - level))
        assert abs(float(found[1 + token, channel]) - float(rows[token, channel])) <= 0.51 * float(step)


@pytest.mark.parametrize(("dtype", "mean"), [(torch.bfloat16, 0), (torch.float32, 3)])
def test_values_that_do_not_tell_their_symbol_are_decoded_by_stages(dtype: torch.dtype, mean: int) -> None:
    coder = codec(mean)
    rows = drawn(coder)
    found = torch.empty(TOKENS, CHANNELS, dtype=dtype)
    launch(coder, [(coder.encode(rows, SPAN)[:2], SPAN, 0)], Target.matrix(found))()
    assert torch.equal(found, coder.approximations(rows, SPAN)[1].to(dtype))


def test_a_symbol_within_a_byte_stays_as_it_is() -> None:
    steps = torch.tensor([0.1, 0.3])
    rows = torch.tensor([[5.0, -7.0], [2.0, 127.0]]) * steps
    before = rows.clone()
    correct(rows, Wide(torch.tensor([1, 2]), torch.tensor([VALUE_SYMBOLS - 1, 4], dtype=torch.int32)), steps, 2)
    assert torch.equal(rows, before)
