"""Profile: the arrays learnt from one model so that its caches code small: basis, step and table entries.

Let x be the rows of a group of layers' K (rotation undone) or V, minus their mean. Coefficients are y = x W, and rows
are restored as x = y U. F [heads, dim, dim] is the sensitivity of the model's own continuation to an error in each head
(`profiles/learning`), with a floor. U has the eigenvectors of the covariance of x F^(1/2), times F^(-1/2), so W = F U^T
need not be stored. In this space every coefficient of every layer costs the same divergence per squared error, so one
step serves all.

A profile is one safetensors file. Its digest names it in the side information of the caches that need it. The package
`hf_cachegen/profiles` reads, writes and publishes such files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from hf_cachegen import strict_json
from hf_cachegen.codec import chain
from hf_cachegen.codec.described import mapping, members, number, whole
from hf_cachegen.codec.geometry import MAX_LAYERS, LayerGeometry
from hf_cachegen.codec.group import Group, covered, moderate
from hf_cachegen.codec.matrices import read_heads, written_heads
from hf_cachegen.codec.predictor import MAX_PREDICTORS, Predictor
from hf_cachegen.codec.transfer import send
from hf_cachegen.errors import ProfileError

PROFILE_VERSION = 1
CHAINED_VERSION = 2
"""Of profiles whose layers are chained (`codec.chain`). Earlier releases would leave the prediction out."""
CHAINED_GROUPS_VERSION = 3
"""Of profiles in whose chain a group has several layers."""
VERSIONS = (PROFILE_VERSION, CHAINED_VERSION, CHAINED_GROUPS_VERSION)
MAX_HEADER_BYTES = 1 << 25
"""Limit of a file's safetensors header: enough for some thousand layers."""
PART_TENSORS, GROUP_TENSORS = 4, 8
"""Most tensors that a profile or a predictor has itself, and for each of its groups."""
LARGEST_SCALING = 1e3
RotaryStyle = Literal["none", "half", "interleaved"]
P = TypeVar("P", bound="Profile")


@dataclass(frozen=True)
class Rotary:
    """The model's rotation of keys, where it is known.

    Attributes:
        style: The pairs of channels that are rotated, of the first r channels of a head: (i, i + r/2) for "half",
            (2i, 2i + 1) for "interleaved".
        inv_freq: float64 [r/2], radians per position.
        scaling: Keys are also multiplied by this.
    """

    style: RotaryStyle
    inv_freq: Tensor
    scaling: float = 1.0

    def apply(self, keys: Tensor, positions: Tensor, sign: int) -> Tensor:
        """Rotate keys float32 [tokens, heads, dim] by sign 1, or back by sign -1, at positions int64 [tokens]."""
        return self.turn(keys, self.angles(positions), sign)

    def angles(self, positions: Tensor) -> Tensor:
        """Return cosines and sines at positions int64 [tokens]: float32 [2, tokens, 1, r/2]."""
        return angles_of(send(self.inv_freq, positions.device), positions)

    def turn(self, keys: Tensor, angles: Tensor, sign: int) -> Tensor:
        """Rotate keys float32 [tokens, heads, dim] by the given `angles` (sign 1), or back (sign -1)."""
        if self.style == "none":
            return keys
        cos, sin = angles[0], sign * angles[1]
        if self.scaling != 1:
            cos, sin = cos * self.scaling**sign, sin * self.scaling**sign
        width = 2 * len(self.inv_freq)
        part, turned = keys[..., :width], torch.empty_like(keys)
        turned[..., width:] = keys[..., width:]
        half = slice(0, width // 2), slice(width // 2, width)
        first, second = half if self.style == "half" else (slice(0, width, 2), slice(1, width, 2))
        a, b = part[..., first], part[..., second]
        torch.mul(a, cos, out=turned[..., first]).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=turned[..., second]).addcmul_(a, sin)
        return turned


def angles_of(inv_freq: Tensor, positions: Tensor) -> Tensor:
    """Return `Rotary.angles` for frequencies float64 [r/2] on the device of positions."""
    angle = positions.to(torch.float64)[:, None, None] * inv_freq
    found = torch.empty(2, *angle.shape, device=angle.device)
    torch.cos(angle, out=found[0])
    torch.sin(angle, out=found[1])
    return found


class FileHashes(NamedTuple):
    """XXH3-128 and SHA-256 of a profile's file, in hex, and its length in bytes."""

    digest: str
    sha256: str
    nbytes: int

    @classmethod
    def of(cls, data: bytes) -> FileHashes:
        """Hash these bytes."""
        return cls(xxhash.xxh3_128_hexdigest(data), hashlib.sha256(data).hexdigest(), len(data))


@dataclass(eq=False)
class Profile:
    """The arrays that the klt transform needs of one model. They are constants: derived arrays are computed once.

    Attributes:
        layers: The model's layers.
        rotary: The rotation of its keys.
        means: float32 [channels of all layers].
        groups: The joint bases.
        step_code: The finest step, in the code of `codec.quantize`.
        base_entries: uint8 [components]: entries of the shipped codebook.
        refine_entries: uint8 [levels - 1, components]: entries of the shipped codebook.
        about: The model (its fingerprint), the amount of text, and the divergence measured at each level.
        predictors: What predicts the caches from the first layers, by ascending layer.
        reach: How many layers before it the groups begin that a group is predicted from (`codec.chain`). 0: there is no
            chain.
        place: The repository and commit (hf://...) that it was loaded from or pushed to, if any. Artifacts that are
            made with it name them. `dataclasses.replace` drops it.
        read: The hashes of the file that it was read from, if any. `dataclasses.replace` drops them.
    """

    layers: tuple[LayerGeometry, ...]
    rotary: Rotary
    means: Tensor
    groups: tuple[Group, ...]
    step_code: int
    base_entries: Tensor
    refine_entries: Tensor
    about: dict[str, Any]
    predictors: tuple[Predictor, ...] = ()
    reach: int = 0
    place: str | None = field(init=False, default=None)
    read: FileHashes | None = field(init=False, default=None)

    @property
    def levels(self) -> int:
        """Number of levels that it has table entries for."""
        return 1 + len(self.refine_entries)

    @property
    def divergences(self) -> list[float] | None:
        """KL of each level without prediction, nats per token of the samples held out when learning; None if `about`
        does not contain it.
        """
        return self.divergences_at(None)

    def divergences_at(self, layer: int | None) -> list[float] | None:
        """Return the KL of each level for `predict_layers=layer`, as `divergences` does."""
        measured = self.at(layer).about.get("measured")
        rows = measured if isinstance(measured, list) else []
        found = [kl for row in rows if isinstance(row, dict) and isinstance(kl := row.get("kl"), float)]
        sound = len(found) == len(rows) == self.levels and all(0 <= kl < math.inf for kl in found)
        return found if sound else None

    @property
    def entries(self) -> Tensor:
        """The table entries of the base and of each refinement, uint8 [levels, components]."""
        return torch.cat([self.base_entries[None], self.refine_entries])

    @property
    def sensitivities(self) -> dict[tuple[int, int], Tensor]:
        """The sensitivity of each (kind, layer), float32 [heads, dim, dim]."""
        found = {}
        for group in self.groups:
            layers = range(group.first, group.first + group.count)
            heads = [(self.layers[layer].heads, self.layers[layer].v_heads)[group.kind] for layer in layers]
            for layer, part in zip(layers, group.sensitivity.split(heads), strict=True):
                found[group.kind, layer] = part
        return found

    def at(self, layer: int | None) -> Profile | Predictor:
        """Return what codes a context: the predictor of a layer, or for None the profile. Raises ProfileError."""
        return self if layer is None else self.predictor(layer)

    def usable(self, layer: int | None) -> int | None:
        """Return `predict_layers` as this profile allows it: its default, 0, is None where there is no predictor."""
        return None if layer == 0 and all(one.layer for one in self.predictors) else layer

    def predictor(self, layer: int) -> Predictor:
        """Return the predictor from the hidden state that enters `layer`. Raises ProfileError if there is none."""
        for found in self.predictors:
            if found.layer == layer:
                return found
        raise ProfileError(
            f"expected a profile with a predictor for predict_layers={layer}, {self.digest} has them for "
            f"{[found.layer for found in self.predictors]}: learn one with learn_profile(predict_layers=...)"
        )

    @property
    def model(self) -> str:
        """Name of the model; "" if it is unknown."""
        return str(self.about.get("model") or "")

    @property
    def digest(self) -> str:
        """XXH3-128 of the file, in hex."""
        return self.hashes.digest

    @cached_property
    def hashes(self) -> FileHashes:
        """Hashes of the file that it was read from, else of the bytes that `to_bytes` returns."""
        return self.read or FileHashes.of(self.to_bytes())

    @property
    def version(self) -> int:
        """The version of its file."""
        if not self.reach:
            return PROFILE_VERSION
        return CHAINED_VERSION if all(group.count == 1 for group in self.groups) else CHAINED_GROUPS_VERSION

    def to_bytes(self) -> bytes:
        """Return the file. The basis is stored in float16, in a chain in 8 bits; its numbers are of order 1."""
        tensors = {
            "means": self.means, "inv_freq": self.rotary.inv_freq, "base_entries": self.base_entries,
            "refine_entries": self.refine_entries,
        }  # fmt: skip
        for index, group in enumerate(self.groups):
            tensors |= written_heads(f"sensitivity-{index}", group.sensitivity, chained=self.reach > 0)
            tensors |= group.tensors("", index)
        described = {
            "version": self.version,
            "layers": [layer.to_dict() for layer in self.layers],
            "rotary": {"style": self.rotary.style, "scaling": self.rotary.scaling},
            "groups": [[group.kind, group.first, group.count] for group in self.groups],
            "step_code": self.step_code,
            "about": self.about,
        }
        if self.reach:
            described["chain"] = {"reach": self.reach}
        if self.predictors:  # profiles without them keep their bytes
            described["predictors"] = [one.described() for one in self.predictors]
            for one in self.predictors:
                tensors |= one.tensors()
        return save_tensors(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            {"cachegen_profile": _written(described)},
        )

    @classmethod
    def from_bytes(cls: type[P], data: bytes, place: str | None = None) -> P:
        """Read the bytes of a file.

        Args:
            data: The file.
            place: Its repository and commit (hf://...), if any.

        Raises:
            ProfileError: The bytes are no profile, or contradict themselves.
        """
        try:
            length = int.from_bytes(data[:8], "little")
            if length > MAX_HEADER_BYTES:
                raise ProfileError(f"its header may have at most {MAX_HEADER_BYTES} bytes, got {length}")
            header = strict_json.loads(data[8 : 8 + length])
            described = strict_json.loads(header["__metadata__"]["cachegen_profile"].encode())
            version = whole(described["version"])
            if version not in VERSIONS:
                raise ProfileError(
                    f"expected a version from {VERSIONS[0]} to {VERSIONS[-1]}, got version {version}: install a later "
                    "release to read it"
                )
            chained = version != PROFILE_VERSION
            reach = whole(described["chain"]["reach"]) if chained else 0
            layers = tuple(LayerGeometry.from_dict(layer) for layer in members(described["layers"], MAX_LAYERS))
            listed = members(described["groups"], 2 * len(layers))
            predictors = members(described.get("predictors", []), MAX_PREDICTORS)
            _require_count(header, [listed, *(members(one["groups"], 2 * len(layers)) for one in predictors)])
            tensors = load_tensors(data)
            groups = tuple(
                Group.read(
                    (whole(kind), whole(first), whole(count)), read_heads(tensors, f"sensitivity-{i}", chained=chained),
                    tensors, "", i, chained,
                )
                for i, (kind, first, count) in enumerate(listed)
            )  # fmt: skip
            rotary = Rotary(described["rotary"]["style"], tensors["inv_freq"], number(described["rotary"]["scaling"]))
            profile = cls(
                layers, rotary, tensors["means"], groups, whole(described["step_code"]), tensors["base_entries"],
                tensors["refine_entries"], mapping(described["about"]), (), reach,
            )  # fmt: skip
            profile._check(version)
            profile.predictors = profile._predictors(predictors, tensors)
        except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ProfileError(f"these bytes are not a profile: {error}") from error
        profile.read, profile.place = FileHashes.of(data), place
        return profile

    def _check(self, version: int) -> None:
        """Raise ProfileError unless shapes and dtypes fit each other, and the version that the file states."""
        channels = [(layer.heads, layer.k_dim, layer.v_heads, layer.v_dim) for layer in self.layers]
        sound = bool(channels) and 0 <= self.step_code < 256 and self._rotary_is_sound()
        sound = sound and version == self.version and chain.is_sound(self.groups, self.reach)
        pairs = covered(self.groups, channels, chain.widths_read(self.groups, self.reach)) if sound else None
        sound = pairs is not None and sorted(pairs) == [(k, layer) for k in (0, 1) for layer in range(len(channels))]
        components = sum(len(group.synthesis) for group in self.groups) if sound else 0
        width = sum(h * d + vh * vd for h, d, vh, vd in channels)
        sound = sound and tuple(self.means.shape) == (width,) and self.means.dtype == torch.float32
        sound = sound and moderate(self.means)
        sound = sound and self.base_entries.dtype == self.refine_entries.dtype == torch.uint8
        sound = sound and tuple(self.base_entries.shape) == (components,) and self.refine_entries.dim() == 2
        if not sound or self.refine_entries.shape[1] != components or self.levels > 3:
            raise ProfileError("this profile contradicts itself: the shapes of its tensors do not fit its layers")

    def _predictors(self, listed: Sequence[Any], tensors: dict[str, Tensor]) -> tuple[Predictor, ...]:
        """Read the predictors that a file lists. Raises ProfileError, LookupError, TypeError, ValueError."""
        found = tuple(Predictor.read(one, tensors, self.sensitivities, self.reach) for one in listed)
        shapes = [(layer.heads, layer.k_dim, layer.v_heads, layer.v_dim) for layer in self.layers]
        ascending = all(a.layer < b.layer for a, b in pairwise(found))
        if not ascending or not all(one.is_sound(shapes, self.levels) for one in found):
            raise ProfileError("this profile contradicts itself: a predictor does not fit its layers")
        return found

    def _rotary_is_sound(self) -> bool:
        """Return whether it rotates channels that all layers' keys have, by finite angles and a moderate scale."""
        rotary, narrowest = self.rotary, min((layer.k_dim for layer in self.layers), default=0)
        fits = rotary.inv_freq.dim() == 1 and 2 * rotary.inv_freq.numel() <= narrowest
        fits = fits and rotary.inv_freq.dtype == torch.float64 and moderate(rotary.inv_freq)
        known = rotary.style in ("none", "half", "interleaved")
        return known and fits and 1 / LARGEST_SCALING <= rotary.scaling <= LARGEST_SCALING


def _written(described: dict[str, Any]) -> str:
    """Return the description as JSON that `from_bytes` reads. Raises ProfileError for `about` that it would not."""
    try:
        text = json.dumps(described, sort_keys=True, allow_nan=False)
        strict_json.loads(text.encode())
    except (TypeError, ValueError) as error:
        raise ProfileError(f"this profile cannot be written: its description is not strict JSON: {error}") from error
    return text


def _require_count(header: dict[str, Any], listed: Sequence[Sequence[Any]]) -> None:
    """Raise ProfileError for a file with more tensors than groups could have. `listed`: the groups of each part."""
    most = sum(PART_TENSORS + GROUP_TENSORS * len(groups) for groups in listed)
    if len(header) > 1 + most:
        raise ProfileError(f"expected at most {most} tensors, as its groups have, the file has {len(header) - 1}")


def require_layers(profile: Profile, layers: Sequence[LayerGeometry]) -> None:
    """Raise ProfileError unless the profile is of a model with these layers."""
    if tuple(layers) != profile.layers:
        raise ProfileError(
            f"the profile is of {profile.about.get('model', 'another model')!r}, whose layers differ from this "
            f"cache's: expected {profile.layers[0]} x {len(profile.layers)}, got {layers[0]} x {len(layers)}"
        )
