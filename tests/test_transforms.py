"""The protocol of transforms: this file adds one, without a change in any other file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from kv_samples import same, sample_kv
from torch import Tensor

from hf_cachegen import CacheGenConfig, decode_kv, encode_kv
from hf_cachegen.artifact.artifact import Artifact, write
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.context import Encoder
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.profile import Profile
from hf_cachegen.codec.rows import ContextRows
from hf_cachegen.codec.transforms import BUILT_IN, Fitted, Transform, register, transform_of, unregister
from hf_cachegen.config import TransformName
from hf_cachegen.errors import ConfigError, CorruptError, ManifestError, TensorError, TruncatedError
from hf_cachegen.stores import LocalStore

MARK = b"toy!"


class Toy(Transform):
    """Base: the values rounded to multiples of 2^-levels. Each refinement: the rounding error of its level."""

    name = "toy"

    def __init__(self, channels: int, levels: int):
        self.channels, self.count = channels, levels

    @classmethod
    def fit(cls, context: ContextRows, config: CacheGenConfig, profile: Profile | None) -> Fitted:
        for rows, _ in context.chunks():
            if not bool(torch.isfinite(rows).all()):
                raise TensorError("a toy codes finite values")
        return Fitted(cls(context.geometry.channels, config.levels), None)

    @classmethod
    def from_side(cls, side: bytes, geometry: Geometry, config: CacheGenConfig, profile: Profile | None) -> Toy:
        if side != MARK:
            raise CorruptError(f"the side information of a toy is {MARK!r}, got {side!r}")
        return cls(geometry.channels, config.levels)

    @classmethod
    def side_lengths(cls, geometry: Geometry, config: CacheGenConfig) -> range:
        return range(len(MARK), len(MARK) + 1)

    def side_bytes(self) -> bytes:
        return MARK

    def encode(self, rows: Tensor, span: Span) -> list[bytes]:
        rest, parts = rows.double().cpu(), []
        for level in range(self.count):
            unit = 2.0 ** -(8 * level)
            coarse = (rest / unit).round() * unit
            parts.append(coarse.numpy().tobytes())
            rest = rest - coarse
        return parts

    def decode_into(self, parts: Sequence[bytes | memoryview], span: Span, target: Target, row: int = 0) -> None:
        rows = torch.zeros(span.tokens, self.channels, dtype=torch.float64)
        for part in parts:
            if len(part) != 8 * rows.numel():
                raise TruncatedError(f"a part of {len(part)} bytes, expected {8 * rows.numel()}")
            rows += torch.frombuffer(bytearray(part), dtype=torch.float64).reshape(rows.shape)
        target.put(rows.to(target.dtype).to(target.device), row)


@pytest.fixture
def toy() -> Iterator[CacheGenConfig]:
    register(Toy)
    yield CacheGenConfig(transform="toy", chunk_tokens=64)
    unregister("toy")


def test_a_registered_transform_round_trips_in_memory(toy: CacheGenConfig) -> None:
    keys, values = sample_kv(dtype=torch.float32)
    encoded = encode_kv(keys, values, toy)
    assert (encoded.config.transform, encoded.side, encoded.levels) == ("toy", MARK, 3)
    errors = []
    for level in (1, 2, 3):
        decoded = decode_kv(encoded, level)
        errors.append(max(float((a - b).abs().max()) for a, b in zip(decoded[0], keys, strict=True)))
    assert errors[0] <= 0.5
    assert errors[1] <= 2.0**-9
    assert errors[2] <= 2.0**-17
    assert encoded.report["layers"][0]["k_error"] == sorted(encoded.report["layers"][0]["k_error"], reverse=True)
    assert "k_bits" not in encoded.report["layers"][0]


def test_a_registered_transform_round_trips_through_files(toy: CacheGenConfig, tmp_path: Path) -> None:
    keys, values = sample_kv(dtype=torch.float32)
    encoded = encode_kv(keys, values, toy)
    write(Encoder(keys, values, toy), tmp_path / "a")
    artifact = Artifact(LocalStore(tmp_path / "a"))
    assert artifact.read() == encoded
    assert (artifact.pin, artifact.manifest.required) == (None, ())
    for level in (1, 2, 3):
        found, expected = artifact.decode(level), decode_kv(encoded, level)
        assert same(found[0], expected[0])
        assert same(found[1], expected[1])


def test_its_artifacts_are_refused_where_it_is_not_registered(toy: CacheGenConfig, tmp_path: Path) -> None:
    write(encode_kv(*sample_kv(layers=1, tokens=20), toy), tmp_path / "a")
    unregister("toy")
    with pytest.raises(ManifestError, match="'toy'"):
        Artifact(LocalStore(tmp_path / "a"))


def test_its_errors_are_raised(toy: CacheGenConfig) -> None:
    keys, values = sample_kv(layers=1, tokens=20)
    keys[0][0, 0, 3, 3] = float("inf")
    with pytest.raises(TensorError, match="finite"):
        encode_kv(keys, values, toy)


def test_names_are_unique_and_known() -> None:
    with pytest.raises(ConfigError, match="toy"):
        CacheGenConfig(transform="toy")
    for transform in BUILT_IN:
        with pytest.raises(ConfigError, match="another name"):
            register(transform)
        unregister(transform.name)  # built-in transforms stay
    with pytest.raises(ConfigError, match="auto"):
        transform_of(CacheGenConfig())
    named = {transform_of(CacheGenConfig(transform=name)).name for name in TransformName.__args__ if name != "auto"}
    assert named == {transform.name for transform in BUILT_IN} - {"lossless"}
    with pytest.raises(ConfigError, match="lossless"):
        CacheGenConfig(transform="lossless")


@pytest.mark.parametrize("transform", [t for t in BUILT_IN if not t.needs_profile], ids=lambda t: t.name)
def test_approximations_equal_the_coded_rows(transform: type[Transform]) -> None:
    """Compare the built-in transforms' direct computation with the protocol's default, which codes."""
    lossless = transform.name == "lossless"
    config = CacheGenConfig(transform="identity" if lossless else transform.name, lossless=lossless, chunk_tokens=64)
    encoder = Encoder(*sample_kv(), config)
    assert type(encoder.codec) is transform
    for rows, span in encoder.rows.chunks():
        short, long = encoder.codec.approximations(rows, span), Transform.approximations(encoder.codec, rows, span)
        for one, other in zip(short, long, strict=True):
            assert torch.equal(one.float(), other)
