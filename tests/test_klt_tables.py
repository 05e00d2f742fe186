"""The klt transform on contexts unlike the profile's samples: tables of their own, idle components, both products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_cachegen import CacheGenConfig, Profile, decode_kv, encode_kv
from hf_cachegen.codec import basis
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.context import codec_of
from hf_cachegen.codec.geometry import Geometry, LayerGeometry
from hf_cachegen.codec.profile import Group, Rotary
from hf_cachegen.codec.rows import gather, spans_of
from hf_cachegen.codec.transforms.klt import DIGEST_BYTES, Klt
from hf_cachegen.errors import ArtifactError, CorruptError, ProfileError, TensorError, TruncatedError

CONFIG = CacheGenConfig(transform="klt", chunk_tokens=32, protect_first=2, protect_last=8)
LAYERS = (LayerGeometry("full", 2, 8, 2, 8),) * 3
TOKENS = 100
COMPONENTS = 2 * 48


def make_profile(entry: int = 60, **changes: object) -> Profile:
    """Of three layers, in one group for K and one for V: a random rotation for a basis, everything alike sensitive."""
    generator = torch.Generator().manual_seed(1)
    turned = [torch.linalg.qr(torch.randn(48, 48, generator=generator)).Q for _ in range(2)]
    eye = torch.eye(8).expand(6, 8, 8)
    groups = tuple(Group(kind, 0, 3, eye, q.half().float()) for kind, q in enumerate(turned))
    entries = torch.full((3, COMPONENTS), entry, dtype=torch.uint8)
    angles = 10.0 ** -torch.arange(3, dtype=torch.float64)
    whole = Profile(
        LAYERS, Rotary("half", angles), torch.linspace(-2, 2, 96), groups, 148, entries[0], entries[1:], {"model": "m"}
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def kv(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Channels whose spread falls from `scale` to a thousandth of it."""
    generator = torch.Generator().manual_seed(0)
    spread = scale * torch.logspace(0, -3, 8)
    x = torch.randn(2, 3, 1, 2, TOKENS, 8, generator=generator) * spread
    return list(x[0].to(dtype)), list(x[1].to(dtype))


def geometry(dtype: str = "float32") -> Geometry:
    return Geometry(LAYERS, tokens=TOKENS, batch=1, dtype=dtype)


def size(codec: Klt, cache: tuple[list[Tensor], list[Tensor]]) -> int:
    """Bytes of all parts and the side information."""
    chunks = ((gather(*cache, span), span) for span in spans_of(TOKENS, 32))
    return len(codec.side_bytes()) + sum(len(part) for rows, span in chunks for part in codec.encode(rows, span))


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_a_context_has_tables_of_its_own_where_they_pay(scale: float) -> None:
    profile, cache = make_profile(), kv(scale)
    encoded = encode_kv(*cache, CONFIG, profile)
    own = codec_of(encoded.geometry, encoded.config, encoded.side, profile)
    assert isinstance(own, Klt)
    assert own.side_bytes() == encoded.side
    assert len(encoded.side) > DIGEST_BYTES
    given = Klt(geometry(), CONFIG, profile)
    assert size(own, cache) < size(given, cache)
    for level in (1, 2, 3):  # tables change the bytes alone
        for span in spans_of(TOKENS, 32):
            rows = gather(*cache, span)
            parts = [codec.encode(rows, span)[:level] for codec in (own, given)]
            assert torch.equal(own.decode(parts[0], span), given.decode(parts[1], span))


def test_no_tables_are_named_where_the_profiles_serve() -> None:
    profile = make_profile()
    encoded = encode_kv(*kv(), CONFIG, profile)
    own = codec_of(encoded.geometry, encoded.config, encoded.side, profile)
    assert isinstance(own, Klt)
    taught = replace(profile, base_entries=own.entries[0], refine_entries=own.entries[1:])
    assert encode_kv(*kv(), CONFIG, taught).side == bytes.fromhex(taught.digest)


def side(*parts: bytes, profile: Profile) -> bytes:
    return bytes.fromhex(profile.digest) + b"".join(parts)


def test_side_information_that_no_encoder_writes() -> None:
    profile = make_profile(refine_entries=torch.ones(2, COMPONENTS, dtype=torch.uint8))
    profile = replace(profile, groups=tuple(replace(g, synthesis=g.synthesis[:47]) for g in profile.groups))
    profile = replace(profile, base_entries=profile.base_entries[:94], refine_entries=profile.refine_entries[:, :94])
    none = bytes(12)
    first, beyond = b"\x01" + bytes(11), bytes(11) + b"\x40"  # component 0; component 94, of 0 to 93
    sound = side(first, b"\x07", none, none, profile=profile)
    found = codec_of(geometry(), CONFIG, sound, profile)
    assert isinstance(found, Klt)
    assert found.entries[0].tolist() == [7, *[60] * 93]
    for damaged in (
        side(beyond, b"\x07", none, none, profile=profile),
        side(first, b"\xff", none, none, profile=profile),
        side(none, none, first, b"\xf0", profile=profile),
        sound + b"\x00",
    ):
        with pytest.raises(CorruptError):
            codec_of(geometry(), CONFIG, damaged, profile)
    for length in range(len(sound)):
        with pytest.raises((TruncatedError, ProfileError) if length <= DIGEST_BYTES else TruncatedError):
            codec_of(geometry(), CONFIG, sound[:length] if length != DIGEST_BYTES else sound[:15], profile)
    with pytest.raises(ProfileError):
        codec_of(geometry(), CONFIG, bytes([sound[0] ^ 1]) + sound[1:], profile)
    with pytest.raises(ArtifactError):
        codec_of(geometry(), CONFIG, sound + bytes(10_000), profile)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("narrow", [False, True], ids=["float32 product", "bfloat16 product"])
def test_idle_components_count_where_an_exception_says_so(
    dtype: torch.dtype, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last three components in four of a group have the table "always zero", which one chunk contradicts."""
    monkeypatch.setattr(basis, "multiplies_bfloat16", lambda: narrow)
    monkeypatch.setattr(basis, "LEADING", 5)
    entries = torch.full((3, COMPONENTS), 60, dtype=torch.uint8)
    entries[:, torch.arange(COMPONENTS) % 48 >= 12] = 0
    codec = Klt(geometry(str(dtype)[6:]), CONFIG, make_profile(), entries)
    multiplied: list[list[int]] = []
    shortened = basis._shortened

    def watched(part: Tensor, idle: Tensor) -> Tensor:
        found = shortened(part, idle)
        if not multiplied or len(multiplied[-1]) == 2:
            multiplied.append([])
        multiplied[-1].append(found.shape[1])
        return found

    monkeypatch.setattr(basis, "_shortened", watched)
    span = Span(32, 32, TOKENS)
    y = codec.inner.steps * torch.randint(-4, 5, (32, COMPONENTS), generator=torch.Generator().manual_seed(2))
    y[:, entries[0] == 0] = 0
    for exception in (False, True):
        y[5, 40] = 20 * codec.inner.steps[1] if exception else 0
        parts = codec.inner.encode(y, span)
        plain = codec.basis.rows(codec.inner.decode(parts, span), span)
        torch.testing.assert_close(codec.decode(parts, span, dtype).float(), plain, rtol=0.02, atol=0.02)
        assert multiplied.pop() == [12 + 36 * exception, 12]


def test_the_two_products_differ_by_a_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = encode_kv(*kv(30.0, torch.bfloat16), CONFIG, make_profile())
    for level in (1, 3):
        found = []
        for narrow in (False, True):
            monkeypatch.setattr(basis, "multiplies_bfloat16", lambda narrow=narrow: narrow)
            found.append([x for xs in decode_kv(encoded, level) for x in xs])
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype == torch.bfloat16
            assert (a.float() - b.float()).norm() < 2**-8 * a.float().norm()


def test_values_that_cannot_be_coded_are_named() -> None:
    for value, message in ((float("nan"), "values of layer 1 are not all finite"), (3e38, "too large")):
        keys, values = kv()
        values[1][0, 1, 60, 3] = value
        with pytest.raises(TensorError, match=message):
            encode_kv(keys, values, CONFIG, make_profile())
