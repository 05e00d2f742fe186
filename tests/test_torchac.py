"""The paper's coder as an oracle: torchac returns the same symbols as rans."""

from __future__ import annotations

import sys

import pytest
import torch

from hf_cachegen.codec import rans
from hf_cachegen.codec.rans import Tables
from hf_cachegen.errors import CorruptError, MissingExtraError, TensorError, TruncatedError
from tests.coder_support import Section, draw_section, laplace_tables


@pytest.fixture(scope="session")
def torchac() -> None:
    """Skip the tests where torchac, which compiles itself at its first import, fails to compile."""
    try:
        import torchac  # noqa: F401
    except Exception as error:
        pytest.skip(f"torchac cannot be imported: {error}")


def sample(contexts: int = 1) -> Section:
    return draw_section(8, 50, 300, laplace_tables([0.7, 2.0, 5.0], 11), contexts)


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchac", None)
    section = sample()
    with pytest.raises(MissingExtraError, match=r"hf_cachegen\[torchac\]"):
        section.encode(coder="torchac")
    with pytest.raises(MissingExtraError, match=r"hf_cachegen\[torchac\]"):
        section.decode([b"0000", b"0000"], coder="torchac")


@pytest.mark.usefixtures("torchac")
@pytest.mark.parametrize("contexts", [1, 3])
def test_both_coders_return_the_same_symbols_in_as_many_bytes(contexts: int) -> None:
    section = sample(contexts)
    by_torchac, by_rans = section.encode(coder="torchac"), section.encode(coder="rans")
    assert torch.equal(section.decode(by_torchac, coder="torchac"), section.decode(by_rans, coder="rans"))
    # Each lane of rans costs some 24 bits, torchac a checksum and a share of its floor; short tiles show both.
    assert sum(map(len, by_torchac)) <= sum(map(len, by_rans))
    assert sum(map(len, by_torchac)) == pytest.approx(section.entropy_bytes(), rel=0.01)


@pytest.mark.usefixtures("torchac")
@pytest.mark.parametrize("rows", [[[1024]], [[1024, 0, 0]], [[0, 0, 1024]], [[0, 1023, 0, 1, 0]], [[4] * 256]], ids=str)
def test_tables_with_gaps(rows: list[list[int]]) -> None:
    section = draw_section(1, 7, 33, Tables(torch.tensor(rows), 10), 1)
    assert torch.equal(section.decode(section.encode(coder="torchac"), coder="torchac"), section.symbols)


@pytest.mark.usefixtures("torchac")
def test_damage_is_found() -> None:
    section = sample()
    first, second = section.encode(coder="torchac")
    for wrong in (first[:-1], first[:-100], first[:10] + b"\xff\0" + first[12:], first + b"\0"):
        with pytest.raises(CorruptError):
            section.decode([wrong, second], coder="torchac")
    for cut in (b"", b"123"):
        with pytest.raises(TruncatedError):
            section.decode([cut, second], coder="torchac")


@pytest.mark.usefixtures("torchac")
def test_ids_contexts_and_symbols_are_checked() -> None:
    section = sample(3)
    streams = section.encode(coder="torchac")
    assert section.contexts is not None
    section.symbols[0, 0] = 40
    with pytest.raises(TensorError, match="no frequency"):
        section.encode(coder="torchac")
    section.contexts[7, 280] = 3
    with pytest.raises(CorruptError, match="context"):
        section.decode(streams, coder="torchac")
    section.table_ids[5, 1] = 3
    with pytest.raises(CorruptError, match="table id"):
        section.decode(streams, coder="torchac")


@pytest.mark.usefixtures("torchac")
def test_empty_sections() -> None:
    empty = draw_section(0, 0, 40, laplace_tables([1.0], 11), 1)
    assert empty.encode(coder="torchac") == []
    assert rans.decode(b"", [], 0, empty.tables, empty.table_ids, coder="torchac").shape == (0, 40)
