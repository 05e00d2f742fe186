"""The stream that docs/format.md works out by hand: every coder writes it and reads it."""

from __future__ import annotations

import re

import pytest
import torch

from hf_cachegen.codec import native, rans
from tests.lockstep import ROOT

PAGE = (ROOT / "docs" / "format.md").read_text()
BACKENDS = (*(isa.name.lower() for isa in native.available_isas()), "reference")


def example() -> tuple[torch.Tensor, bytes]:
    """Symbols uint8 [tokens, channels], and their stream, as the page has them."""
    tokens = re.findall(r"^    token \d+: ([\d ]+)$", PAGE, re.MULTILINE)
    (stream,) = re.findall(r"^    stream: ([0-9a-f ]+)$", PAGE, re.MULTILINE)
    return torch.tensor([list(map(int, row.split())) for row in tokens], dtype=torch.uint8), bytes.fromhex(stream)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_example_of_the_format(backend: rans.Backend) -> None:
    symbols, stream = example()
    tables = rans.Tables(torch.tensor([[1023, 1]]), 10)
    ids = torch.zeros(2, 1, dtype=torch.uint8)
    assert rans.encode(symbols, tables, ids, backend=backend) == [stream]
    assert torch.equal(rans.decode(stream, [len(stream)], 2, tables, ids, backend=backend), symbols)


def test_the_steps_of_the_example() -> None:
    """Every row of the page's table, and where the states end."""
    rows = re.findall(r"^\| (\d) \| (\d) \| (\d+) \| (\d+) \| (\d) \| (.*?) = (\d+) \| (.*?) ?\|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    state = {lane: int(x) for token, lane, x, *_ in rows if token == "0"}
    for _, lane, x, slot, index, step, after, word in rows:
        assert state[lane] == int(x)
        assert int(slot) == int(x) % 1024
        assert int(index) == (int(slot) >= 1023)
        assert eval(step.replace("x", "*")) == int(after)
        state[lane] = int(word.split("= ")[1]) if word else int(after)
    assert set(state.values()) == {1 << 15}
