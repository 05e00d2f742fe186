"""Named tensors beside the keys and values of a context: exact in every dtype, and checked before they are decoded."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_cachegen import CacheGenConfig, decode_kv, encode_kv
from hf_cachegen.artifact import STATES_FILE, Limits, Reader
from hf_cachegen.artifact.artifact import Artifact, write
from hf_cachegen.artifact.encoded import EncodedContext
from hf_cachegen.artifact.entries import read_entries
from hf_cachegen.artifact.manifest import files_at
from hf_cachegen.artifact.tensors import NamedTensor, encode_tensors
from hf_cachegen.codec import tensor_bytes
from hf_cachegen.codec.tensor_bytes import DTYPES, decode, encode
from hf_cachegen.errors import (
    ArtifactError,
    CorruptError,
    LimitError,
    ManifestError,
    TensorError,
    TruncatedError,
    UnsupportedFormatError,
)
from hf_cachegen.stores import LocalStore


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return random bit patterns: also infinities and NaNs of floats."""
    size = 1
    for dim in shape:
        size *= dim
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (size * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


def smooth(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 100
    return values.to(dtype)


def same(left: Tensor, right: Tensor) -> bool:
    kind = DTYPES[left.dtype]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left.view(kind), right.view(kind))


def context() -> EncodedContext:
    keys = [torch.randn(1, 2, 20, 4, generator=torch.Generator().manual_seed(2))]
    return encode_kv(keys, keys, CacheGenConfig(lossless=True))


# The codec of one tensor.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 5), (1, 2, 4097)], ids=str)
def test_every_dtype_and_shape_is_exact(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for tensor in (random_bits(shape, dtype), smooth(shape, dtype), torch.zeros(shape, dtype=dtype)):
        for base in (None, random_bits(shape, dtype, 3), tensor):
            coding, data = encode(tensor, base)
            assert len(data) <= tensor.numel() * dtype.itemsize
            assert same(decode(data, coding, shape, dtype, base if coding == "planes" else None), tensor)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(DTYPES)), st.integers(1, 9000), st.integers(0, 1000), st.booleans())
def test_any_tensor_is_exact(dtype: torch.dtype, size: int, seed: int, wild: bool) -> None:
    tensor = random_bits((size,), dtype, seed) if wild else smooth((size,), dtype)
    coding, data = encode(tensor)
    assert same(decode(data, coding, (size,), dtype), tensor)


def test_values_that_are_no_copies_of_memory_are_coded() -> None:
    tensor = smooth((1, 64, 96), torch.float32).transpose(1, 2)[:, ::2]
    coding, data = encode(tensor)
    assert torch.equal(decode(data, coding, tensor.shape, torch.float32), tensor)


def test_similar_tensors_take_fewer_bytes_against_each_other() -> None:
    base = smooth((1, 4, 64, 64), torch.float32)
    near = base * 1.0001
    assert len(encode(near, base)[1]) < 0.75 * len(encode(near)[1])
    assert encode(near)[0] == "planes"


def test_noise_is_stored_as_it_is() -> None:
    tensor = random_bits((10_000,), torch.uint8)
    assert encode(tensor) == ("raw", tensor.numpy().tobytes())


@pytest.mark.parametrize("tensor", [torch.ones(3, dtype=torch.bool), torch.empty(0, 4)], ids=["bool", "empty"])
def test_a_tensor_that_cannot_be_coded_is_refused(tensor: Tensor) -> None:
    with pytest.raises(TensorError, match="expected a tensor of at least one value"):
        encode(tensor)


def test_damaged_bytes_are_an_error() -> None:
    shape, dtype = (1, 64, 130), torch.float32
    coding, data = encode(smooth(shape, dtype))
    assert coding == "planes"
    with pytest.raises(TruncatedError):
        decode(data[:-1], coding, shape, dtype)
    with pytest.raises(CorruptError):
        decode(data + b"x", coding, shape, dtype)
    with pytest.raises(CorruptError, match="byte planes"):
        decode(b"\xff" + data[1:], coding, shape, dtype)
    with pytest.raises(CorruptError, match="wrong sum or range"):
        decode(data[:2] + b"\x01" + data[3:], coding, shape, dtype)
    with pytest.raises(CorruptError, match="codings"):
        decode(data, "zip", shape, dtype)
    with pytest.raises(CorruptError, match="wrong sum or range"):
        decode(b"\x01\x00\x00\x10" + bytes(511) + data[515:], coding, shape, dtype)
    for at in range(0, len(data), 97):
        changed = bytearray(data)
        changed[at] ^= 0x55
        with contextlib.suppress(ArtifactError):
            assert decode(bytes(changed), coding, shape, dtype).shape == shape


def test_a_tensor_beyond_the_positions_of_a_section_is_stored_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(100)
    monkeypatch.setattr(tensor_bytes, "MAX_POSITIONS", 300)
    coding, data = encode(tensor)
    assert (coding, len(data)) == ("raw", 400)
    with pytest.raises(CorruptError, match="codings"):
        decode(b"\0", "planes", (100,), torch.float32)


# The table and the file.


def test_tensors_are_stored_with_a_context_and_read_back(tmp_path: Path) -> None:
    state = smooth((1, 4, 64, 64), torch.float32)
    named = [
        NamedTensor("a-10", state, 10), NamedTensor("a-20", state * 1.001, 20, base="a-10"),
        NamedTensor("conv", smooth((1, 8, 4), torch.bfloat16), 20), NamedTensor("mask", torch.ones(1, 7).long()),
    ]  # fmt: skip
    manifest = write(context(), tmp_path, tensors=named)
    assert manifest.required == ("states",)
    assert [entry.base for entry in manifest.states] == [None, "a-10", None, None]
    artifact = Artifact(LocalStore(tmp_path))
    assert artifact.manifest == manifest
    assert artifact.reader.verify() == artifact.nbytes_at()
    for expected, found in zip(named, artifact.tensors(), strict=True):
        assert (found.name, found.tokens) == (expected.name, expected.tokens)
        assert same(found.tensor, expected.tensor)
    assert STATES_FILE in files_at(manifest.files, 1), "every level needs them"


def test_a_copy_keeps_the_tensors_and_their_bytes(tmp_path: Path) -> None:
    write(context(), tmp_path / "first", tensors=[NamedTensor("a", torch.ones(5), 3)])
    copied = Artifact(LocalStore(tmp_path / "first")).read()
    write(copied, tmp_path / "second", tensors=[NamedTensor("b", torch.ones(2))])
    found = Artifact(LocalStore(tmp_path / "second")).tensors()
    assert [(item.name, item.tokens, item.tensor.tolist()) for item in found] == [("a", 3, [1.0] * 5), ("b", 0, [1, 1])]
    write(copied, tmp_path / "third")
    first, third = (sum(f.stat().st_size for f in (tmp_path / name).iterdir()) for name in ("first", "third"))
    assert copied.nbytes == first == third


def test_an_artifact_without_tensors_says_nothing_about_them(tmp_path: Path) -> None:
    assert write(context(), tmp_path).required == ()
    assert b"states" not in (tmp_path / "cachegen.json").read_bytes()
    assert Artifact(LocalStore(tmp_path)).tensors() == ()


def test_a_replaced_artifact_loses_its_tensors(tmp_path: Path) -> None:
    write(context(), tmp_path, tensors=[NamedTensor("a", torch.ones(5))])
    write(context(), tmp_path, overwrite=True)
    assert not (tmp_path / STATES_FILE).exists()


def test_a_reader_without_the_feature_refuses(tmp_path: Path) -> None:
    write(context(), tmp_path, tensors=[NamedTensor("a", torch.ones(5))])
    with pytest.raises(UnsupportedFormatError, match="states"):
        Reader(LocalStore(tmp_path), features={"klt"})


def test_names_and_bases_that_do_not_fit_are_refused() -> None:
    one = NamedTensor("one", torch.ones(4))
    with pytest.raises(TensorError, match="'one' twice"):
        encode_tensors([one, one])
    with pytest.raises(TensorError, match="must be an earlier tensor"):
        encode_tensors([NamedTensor("two", torch.ones(4), base="one")])
    with pytest.raises(TensorError, match="must be an earlier tensor"):
        encode_tensors([one, NamedTensor("2", torch.ones(4), base="one"), NamedTensor("3", torch.ones(4), base="2")])
    with pytest.raises(TensorError, match="differ in shape or dtype"):
        encode_tensors([one, NamedTensor("two", torch.ones(4).half(), base="one")])


def test_a_name_that_no_segment_may_have_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="expected"):
        write(context(), tmp_path, tensors=[NamedTensor("../a", torch.ones(4))])
    assert not list(tmp_path.iterdir())


def test_damage_is_found_before_decoding(tmp_path: Path) -> None:
    write(context(), tmp_path, tensors=[NamedTensor("a", torch.ones(500))])
    data = bytearray((tmp_path / STATES_FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / STATES_FILE).write_bytes(data)
    with pytest.raises(CorruptError, match=r"states\.safetensors.*checksum"):
        Artifact(LocalStore(tmp_path)).tensors()
    keys, _ = Artifact(LocalStore(tmp_path)).decode()
    assert torch.equal(keys[0], decode_kv(context())[0][0])


ROW: dict[str, Any] = {"coding": "raw", "dtype": "float32", "name": "a", "shape": [2, 3], "tokens": 7}
SECOND = {**ROW, "name": "b", "coding": "planes", "base": "a"}


def read(*rows: Any, lengths: tuple[int, ...] = (24, 20, 20), max_bytes: int = 1000) -> int:
    names = [("abc"[i], lengths[i]) for i in range(len(rows))]
    return len(read_entries(json.loads(json.dumps(rows)), names, 100, max_bytes))


def test_the_valid_rows_are_valid() -> None:
    assert read(ROW, SECOND) == 2
    assert read({**ROW, "shape": []}, lengths=(4,)) == 1


@pytest.mark.parametrize(("rows", "match"), [
    (["a"], "shape"),
    ([{**ROW, "shape": "2"}], "at most 8 dims"),
    ([{**ROW, "shape": [1] * 9}], "at most 8 dims"),
    ([{**ROW, "shape": [2, 0]}], "dims of at least 1"),
    ([{**ROW, "shape": [2, -3]}], "integer of at least 0"),
    ([{**ROW, "shape": [2, 3.0]}], "integer of at least 0"),
    ([{**ROW, "shape": [True, 3]}], "integer of at least 0"),
    ([{**ROW, "dtype": "complex64"}], "dtype"),
    ([{**ROW, "dtype": ["float32"]}], "dtype"),
    ([{**ROW, "coding": "pickle"}], "coding"),
    ([{**ROW, "tokens": -1}], "tokens"),
    ([{**ROW, "name": "b"}], "expected the name 'a'"),
    ([{**ROW, "name": "../a"}], "name"),
    ([{**ROW, "shape": [2, 2]}], "do not fit its segment"),
    ([{**ROW, "shape": [2, 4]}], "do not fit its segment"),
    ([{**ROW, "coding": "planes", "shape": [2, 2]}], "do not fit its segment"),
    ([ROW, {**SECOND, "base": "c"}], "earlier tensor"),
    ([ROW, {**SECOND, "base": "b"}], "earlier tensor"),
    ([ROW, {**SECOND, "base": 5}], "base"),
    ([{**ROW, "base": "a"}], "earlier tensor"),
    ([ROW, SECOND, {**SECOND, "name": "c", "base": "b"}], "earlier tensor"),
    ([ROW, {**SECOND, "shape": [3, 2]}], "differ in shape or dtype"),
    ([ROW, {**SECOND, "dtype": "int32"}], "differ in shape or dtype"),
], ids=str)  # fmt: skip
def test_hostile_rows(rows: list[Any], match: str) -> None:
    with pytest.raises(ManifestError, match=match) as caught:
        read(*rows)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("row", [{**ROW, "shape": [2**62, 2**62]}, {**ROW, "tokens": 101}], ids=["shape", "tokens"])
def test_a_row_above_a_limit(row: dict[str, Any]) -> None:
    with pytest.raises(LimitError):
        read(row)


def test_the_tensors_together_are_below_the_limit(tmp_path: Path) -> None:
    with pytest.raises(LimitError, match="more than 47 decoded bytes"):
        read(ROW, SECOND, max_bytes=47)
    write(context(), tmp_path, tensors=[NamedTensor("a", torch.zeros(100_000))])
    with pytest.raises(LimitError, match="more than 9999 decoded bytes"):
        Reader(LocalStore(tmp_path), Limits(max_decoded_bytes=9999))


def test_the_number_of_rows_is_that_of_the_segments() -> None:
    with pytest.raises(ManifestError, match="1 rows in states, 0 tensors"):
        read_entries([ROW], [], 100, 1000)


# Tables at 12 bits.


def test_rare_bytes_of_a_channel_of_zeros_survive_at_twelve_bits() -> None:
    """The table "always zero" has a second symbol there, which must not be taken for coded."""
    rotated = torch.full((4096, 8), 0x80808080 - (1 << 32)).to(torch.int32)
    rotated[5, 0] += 1
    bits = rotated >> 1 & 0x7FFFFFFF | (rotated & 1) * -(2**31)
    values = bits.view(torch.float32)[None, None]
    keys, _ = decode_kv(encode_kv([values], [values], CacheGenConfig(lossless=True, prob_bits=12)))
    assert same(keys[0], values)
