"""Hostile profiles: every file is refused, or decodes to numbers."""

from __future__ import annotations

import copy
import json
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from hf_cachegen import CacheGenConfig, Profile, decode_kv, encode_kv
from hf_cachegen.codec.profile import MAX_HEADER_BYTES
from hf_cachegen.errors import ArtifactExistsError, CacheGenError, ConfigError, ProfileError
from tests.golden_cache import golden_chained, golden_known, golden_kv, golden_predicting, golden_profile

CONFIG = CacheGenConfig(transform="klt", chunk_tokens=32, protect_last=8)
STRANGE = [
    0, -1, 1, 2, 3, 255, 256, 10**18, 2**63, 2**64, -(2**63), 1e308, float("inf"), float("nan"), 0.5, True, None, "x",
    "", [], {}, [[0, 0, 1]], "half", "interleaved", "9" * 5000,
]  # fmt: skip
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.int8, torch.bool]


def parts(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["cachegen_profile"]), load(data)


def whole(described: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return save(plain, {"cachegen_profile": json.dumps(described)})


def paths(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths of all values inside."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [path for key in keys for path in [(*before, key), *paths(value[key], (*before, key))]]


def change_description(described: dict[str, Any], draw: random.Random) -> None:
    *folder, last = draw.choice(paths(described))
    inner = described
    for key in folder:
        inner = inner[key]
    if draw.random() < 0.2:
        del inner[last]
    else:
        inner[last] = draw.choice(STRANGE)


def change_tensor(tensors: dict[str, Tensor], draw: random.Random) -> None:
    name = draw.choice(sorted(tensors))
    x = tensors[name]
    if not x.numel() or not x.dim():
        del tensors[name]
        return
    changed, numbers = x.clone(), [0, 1, float("nan"), float("inf")] if x.is_floating_point() else [0, 1]
    changed.view(-1)[draw.randrange(x.numel())] = draw.choice(numbers)
    tensors[name] = draw.choice(
        [
            changed, x.flatten(), x[:-1].clone(), torch.cat([x, x]), x.to(draw.choice(DTYPES)), -x, torch.zeros_like(x),
            (x.double() * draw.choice([1e3, 1e14, 1e30])).to(x.dtype), x[:0].clone(), x.flatten()[0].clone(), x[None],
            torch.randint(0, 256, x.shape, generator=torch.Generator().manual_seed(draw.randrange(99))).to(x.dtype),
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    "make", [golden_profile, golden_predicting, golden_chained], ids=["plain", "predicting", "chained"]
)
@pytest.mark.parametrize("seed", range(8))
def test_any_change_is_refused_or_harmless(seed: int, make: Callable[[], Profile]) -> None:
    draw, good = random.Random(seed), parts(make().to_bytes())
    keys, values = golden_kv()
    known = None if make is golden_profile else golden_known()
    outcomes = {"refused": 0, "used": 0}
    for _ in range(60):
        described, tensors = copy.deepcopy(good)
        for _ in range(draw.choice([1, 1, 2, 3])):
            if draw.random() < 0.5 and described:
                change_description(described, draw)
            elif tensors:
                change_tensor(tensors, draw)
        data = bytearray(whole(described, tensors))
        if draw.random() < 0.2:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        try:
            profile = Profile.from_bytes(bytes(data))
            decoded = decode_kv(encode_kv(keys, values, CONFIG, profile, known=known), 1, known=known)
        except CacheGenError:
            outcomes["refused"] += 1
            continue
        assert [x.shape for x in decoded[0]] == [x.shape for x in keys]
        outcomes["used"] += 1
    assert min(outcomes.values()) > 0, outcomes


def test_a_profile_is_written_to_a_folder_alone(tmp_path: Path) -> None:
    profile = golden_profile()
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "file" / "x.safetensors"):
        with pytest.raises(ArtifactExistsError, match="must be a folder"):
            profile.save(place)
    for none in ("", "a\0b", None):
        with pytest.raises(ConfigError, match="expected a path"):
            profile.save(none)  # type: ignore[arg-type]


def raw(header: dict[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1])
def test_a_header_that_claims_to_be_huge(length: int) -> None:
    with pytest.raises(ProfileError, match="header"):
        Profile.from_bytes(length.to_bytes(8, "little") + b"{}")


def test_a_header_that_is_huge() -> None:
    with pytest.raises(ProfileError, match="header"):
        Profile.from_bytes(raw({"__metadata__": {"cachegen_profile": "x" * MAX_HEADER_BYTES}}))


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"version":' * 50_000, "9" * 100_000, '"\\ud800', "{}", "null", "[]"],
    ids=["nested lists", "nested objects", "long number", "half a surrogate", "empty object", "null", "empty list"],
)
def test_invalid_descriptions_are_refused(text: str) -> None:
    with pytest.raises(ProfileError):
        Profile.from_bytes(raw({"__metadata__": {"cachegen_profile": text}}))


def test_tensors_that_claim_to_be_huge() -> None:
    """Tensors larger than the file or than memory, or overlapping, allocate nothing."""
    for shape, offsets in (([1 << 40], [0, 1 << 42]), ([1 << 62, 4], [0, 16]), ([-1], [0, 4]), ([1], [4, 0])):
        entry = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        with pytest.raises(ProfileError):
            Profile.from_bytes(raw({"means": entry, "__metadata__": {"cachegen_profile": "{}"}}, bytes(16)))


def test_many_groups_that_each_claim_all_layers() -> None:
    """The cost of a small file must not be the number of groups times the number of layers."""
    described, tensors = parts(golden_profile().to_bytes())
    count = 2000
    described["layers"] = described["layers"][:1] * count
    described["groups"] = [[0, 0, count]] * count
    nothing = torch.zeros(0)
    tensors |= {f"sensitivity-{index}": nothing for index in range(count)}
    tensors |= {f"synthesis-{index}": nothing.half() for index in range(count)}
    refused_within(100 << 20, whole(described, tensors), "contradicts itself")


def refused_within(most: int, data: bytes, match: str) -> None:
    """Assert that reading a profile is refused, with at most that many bytes of Python's memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ProfileError, match=match):
            Profile.from_bytes(data)
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def test_predictors_that_each_claim_all_layers() -> None:
    described, tensors = parts(golden_predicting().to_bytes())
    for name in ("synthesis", "prediction"):
        tensors |= {f"predict-0-{name}-{index}": torch.zeros(0).half() for index in range(4)}
    for count, reason in ((4, "more layers than the model"), (2000, "a list of at most 4 values")):
        described["predictors"][0]["groups"] = [[0, 0, 2]] * count
        with pytest.raises(ProfileError, match=reason):
            Profile.from_bytes(whole(described, tensors))


def test_a_file_of_many_empty_tensors_is_refused() -> None:
    """Before they are made: they take no bytes of the file but their names."""
    described, tensors = parts(golden_profile().to_bytes())
    data = whole(described, tensors | {f"nothing-{index}": torch.zeros(0) for index in range(90_000)})
    refused_within(200 << 20, data, "expected at most 20 tensors")


LOOSE: dict[str, Callable[[str], str]] = {
    "NaN": lambda text: text.replace('"about": {', '"about": {"kl": NaN, '),
    "Infinity": lambda text: text.replace('"about": {', '"about": {"kl": -Infinity, '),
    "a number beyond a double": lambda text: text.replace('"about": {', '"about": {"kl": 1e999, '),
    "a long integer": lambda text: text.replace('"about": {', f'"about": {{"count": {"9" * 30}, '),
    "the same key twice": lambda text: text.replace('"about": {', '"version": 1, "about": {'),
    "the same key twice inside": lambda text: text.replace('"about": {', '"about": {"a": 1, "a": 2, '),
    "trailing data": lambda text: f"{text} {{}}",
    "trailing text": lambda text: f"{text}x",
    "deep nesting": lambda text: text.replace('"about": {', f'"about": {{"a": {"[" * 40}{"]" * 40}, '),
    "half a surrogate": lambda text: text.replace('"about": {', '"about": {"model": "\\ud800", '),
    "a version that is true": lambda text: text.replace('"version": 1', '"version": true'),
    "a version that is a float": lambda text: text.replace('"version": 1', '"version": 1.0'),
    "a step that is a text": lambda text: text.replace('"step_code": 148', '"step_code": "148"'),
    "a step that is a float": lambda text: text.replace('"step_code": 148', '"step_code": 148.5'),
    "a scaling that is true": lambda text: text.replace('"scaling": 1.0', '"scaling": true'),
    "groups of floats": lambda text: text.replace("[[0, 0, ", "[[0.0, 0, "),
}


def described_as(text: str) -> bytes:
    data = golden_profile().to_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"]["cachegen_profile"] = text
    changed = json.dumps(header).encode()
    changed += b" " * (-len(changed) % 8)
    return len(changed).to_bytes(8, "little") + changed + data[end:]


@pytest.mark.parametrize("change", LOOSE)
def test_loose_json_is_refused(change: str) -> None:
    """Two readers could read two profiles from it."""
    text = json.dumps(parts(golden_profile().to_bytes())[0], sort_keys=True)
    assert Profile.from_bytes(described_as(text)).levels == 3
    assert LOOSE[change](text) != text
    with pytest.raises(ProfileError):
        Profile.from_bytes(described_as(LOOSE[change](text)))


@pytest.mark.parametrize("change", [
    (b'"dtype":', b'"dtype":"U8","dtype":'), (b'{"__metadata__":', b'{"means":NaN,"__metadata__":'), (b"}   ", b"}{} "),
], ids=str)  # fmt: skip
def test_a_loose_header_is_refused(change: tuple[bytes, bytes]) -> None:
    data = golden_profile().to_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].rstrip() + b"   "
    changed = header.replace(*change, 1)
    assert changed != header
    changed += b" " * (-len(changed) % 8)
    with pytest.raises(ProfileError):
        Profile.from_bytes(len(changed).to_bytes(8, "little") + changed + data[end:])
    utf16 = data[8:end].decode().encode("utf-16")
    with pytest.raises(ProfileError):
        Profile.from_bytes(len(utf16).to_bytes(8, "little") + utf16 + data[end:])


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 10**30, "\ud800", object()], ids=["nan", "inf", "large", "half", "object"]
)
def test_what_could_not_be_read_again_is_not_written(value: Any, tmp_path: Path) -> None:
    profile = replace(golden_profile(), about={"kl": value})
    with pytest.raises(ProfileError, match="cannot be written"):
        profile.save(tmp_path)


@pytest.mark.parametrize("listed", [{}, "x", None, [0] * 17, [None], [{}]], ids=str)
def test_invalid_lists_of_predictors_are_refused(listed: Any) -> None:
    described, tensors = parts(golden_predicting().to_bytes())
    with pytest.raises(ProfileError):
        Profile.from_bytes(whole({**described, "predictors": listed}, tensors))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("predict-0-mean", torch.zeros(3)), ("predict-0-mean", torch.full((4,), torch.nan)),
        ("predict-0-directions", torch.zeros(4, 0)), ("predict-0-directions", torch.zeros(4, 3)),
        ("predict-0-prediction-0", torch.zeros(2, 24)), ("predict-0-prediction-0", torch.zeros(3, 24).half()),
        ("predict-0-prediction-0", torch.full((2, 24), torch.inf).half()),
        ("predict-0-base_entries", torch.zeros(39, dtype=torch.uint8)),
        ("predict-0-refine_entries", torch.zeros(1, 40, dtype=torch.uint8)),
    ],
    ids=str,
)  # fmt: skip
def test_predictors_of_other_shapes_and_numbers_are_refused(name: str, changed: Tensor) -> None:
    described, tensors = parts(golden_predicting().to_bytes())
    with pytest.raises(ProfileError):
        Profile.from_bytes(whole(described, {**tensors, name: changed}))


@pytest.mark.parametrize("change", [{"layer": 1}, {"layer": -1}, {"groups": [[0, 1, 1]]}, {"step_code": 256}], ids=str)
def test_predictors_of_other_layers_are_refused(change: dict[str, Any]) -> None:
    described, tensors = parts(golden_predicting().to_bytes())
    described["predictors"][0] |= change
    layer = described["predictors"][0]["layer"]
    tensors |= {name.replace("predict-0", f"predict-{layer}"): x.clone() for name, x in tensors.items()}
    with pytest.raises(ProfileError):
        Profile.from_bytes(whole(described, tensors))


@pytest.mark.parametrize("change", [
    {"version": 1}, {"version": 3}, {"chain": {}}, {"chain": None}, {"chain": {"reach": 0}}, {"chain": {"reach": 17}},
    {"chain": {"reach": -1}}, {"chain": {"reach": 2**70}},
    {"groups": [[0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 1]]}, {"groups": [[0, 0, 2], [1, 0, 1], [0, 1, 1], [1, 1, 1]]},
    {"groups": [[0, 0, 1], [1, 0, 1], [0, 1, 1], [0, 1, 1]]},
], ids=str)  # fmt: skip
def test_chains_of_another_order_or_reach_are_refused(change: dict[str, Any]) -> None:
    described, tensors = parts(golden_chained().to_bytes())
    with pytest.raises(ProfileError):
        Profile.from_bytes(whole(described | change, tensors))


@pytest.mark.parametrize("name", [
    "synthesis-0", "synthesis-0-scale", "summary-1", "summary-1-scale", "prediction-2", "prediction-2-scale",
    "sensitivity-3", "sensitivity-3-scale", "predict-0-synthesis-1", "predict-0-summary-0",
    "predict-0-prediction-1-scale",
])  # fmt: skip
def test_matrices_of_a_chain_in_other_shapes_and_dtypes_are_refused(name: str) -> None:
    described, tensors = parts(golden_chained().to_bytes())
    x = tensors.pop(name)
    for changed in (None, x[:-1], x.float(), x.flatten()[0], x[None], x[:, :-1] if x.dim() > 1 else x[:0]):
        with pytest.raises(ProfileError):
            Profile.from_bytes(whole(described, tensors if changed is None else {**tensors, name: changed.clone()}))


def test_a_chain_of_many_groups_costs_no_more_than_its_file() -> None:
    described, tensors = parts(golden_chained().to_bytes())
    described["layers"] = described["layers"][:1] * 1000
    described["groups"] = [[kind, layer, 1] for layer in range(1000) for kind in (0, 1)]
    with pytest.raises(ProfileError):
        Profile.from_bytes(whole(described, tensors))
