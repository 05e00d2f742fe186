"""The klt transform on contexts unlike the profile's samples: own tables, components of zeros, both matrix products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_cachegen import Profile, decode_kv, encode_kv
from hf_cachegen.codec import basis, native, sparse
from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.context import codec_of
from hf_cachegen.codec.rows import gather, spans_of
from hf_cachegen.codec.transforms.klt import DIGEST_BYTES, Klt
from hf_cachegen.errors import ArtifactError, CorruptError, ProfileError, TensorError, TruncatedError
from tests.klt_support import COMPONENTS, CONFIG, TOKENS, geometry, make_profile


def kv(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Return channels whose spread falls from `scale` to a thousandth of it."""
    generator = torch.Generator().manual_seed(0)
    spread = scale * torch.logspace(0, -3, 8)
    x = torch.randn(2, 3, 1, 2, TOKENS, 8, generator=generator) * spread
    return list(x[0].to(dtype)), list(x[1].to(dtype))


def size(codec: Klt, cache: tuple[list[Tensor], list[Tensor]]) -> int:
    """Return the bytes of all parts and the side information."""
    chunks = ((gather(*cache, span), span) for span in spans_of(TOKENS, 32))
    return len(codec.side_bytes()) + sum(len(part) for rows, span in chunks for part in codec.encode(rows, span))


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_a_context_has_own_tables_where_they_save_bytes(scale: float) -> None:
    profile, cache = make_profile(), kv(scale)
    encoded = encode_kv(*cache, CONFIG, profile)
    own = codec_of(encoded.geometry, encoded.config, encoded.side, profile)
    assert isinstance(own, Klt)
    assert own.side_bytes() == encoded.side
    assert len(encoded.side) > DIGEST_BYTES
    given = Klt(geometry(), CONFIG, profile)
    assert size(own, cache) < size(given, cache)
    for level in (1, 2, 3):  # tables change only the bytes
        for span in spans_of(TOKENS, 32):
            rows = gather(*cache, span)
            parts = [codec.encode(rows, span)[:level] for codec in (own, given)]
            assert torch.equal(own.decode(parts[0], span), given.decode(parts[1], span))


def test_no_tables_are_stored_where_the_profiles_suffice() -> None:
    profile = make_profile()
    encoded = encode_kv(*kv(), CONFIG, profile)
    own = codec_of(encoded.geometry, encoded.config, encoded.side, profile)
    assert isinstance(own, Klt)
    taught = replace(profile, base_entries=own.entries[0], refine_entries=own.entries[1:])
    assert encode_kv(*kv(), CONFIG, taught).side == bytes.fromhex(taught.digest)


def side(*parts: bytes, profile: Profile) -> bytes:
    return bytes.fromhex(profile.digest) + b"".join(parts)


def test_invalid_side_information_is_refused() -> None:
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


@pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("narrow", [False, True], ids=["float32 product", "bfloat16 product"])
@pytest.mark.parametrize("width", [0, 16, 40, 48])
def test_leading_components_are_multiplied_densely_and_the_others_sparsely(
    width: int, dtype: torch.dtype, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(basis, "multiplies_bfloat16", lambda: narrow)
    monkeypatch.setattr(basis, "LEADING", 5)
    codec = Klt(geometry(str(dtype)[6:]), CONFIG, make_profile())
    span = Span(32, 32, TOKENS)
    y = codec.inner.steps * torch.randint(-4, 5, (32, COMPONENTS), generator=torch.Generator().manual_seed(2))
    y[torch.rand(y.shape, generator=torch.Generator().manual_seed(3)) < 0.7] = 0
    with monkeypatch.context() as patch:
        patch.setattr(sparse, "offered", lambda _: False)
        plain = codec.basis.rows(y, span)
    monkeypatch.setattr(sparse, "dense_width", lambda *_: width)
    parts = codec.inner.encode(y, span)
    torch.testing.assert_close(codec.decode(parts, span, dtype).float(), plain, rtol=0.02, atol=0.02)


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


def test_errors_name_the_values_that_cannot_be_coded() -> None:
    for value, message in ((float("nan"), "values of layer 1 are not all finite"), (3e38, "too large")):
        keys, values = kv()
        values[1][0, 1, 60, 3] = value
        with pytest.raises(TensorError, match=message):
            encode_kv(keys, values, CONFIG, make_profile())
