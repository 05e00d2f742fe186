"""Profile: what was learnt about one model, so that its caches code small: basis, step and table entries.

With x the rows of a group of layers' K (rope undone) or V less their mean, coefficients are y = x W and rows come back
as x = y U. F [heads, dim, dim] is how much the model's own continuation minds an error in each head
(`calibration.py`), with a floor; U has the eigenvectors of the covariance of x F^(1/2), times F^(-1/2), so W = F U^T
need not be kept. In this space every coefficient of every layer costs the same divergence per squared error: one step
serves all.

A profile is one safetensors file; its digest names it in the artifacts that need it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from hf_cachegen.errors import ArtifactExistsError, ProfileError
from hf_cachegen.geometry import LayerGeometry

PROFILE_FILE = "cachegen_profile.safetensors"
"""Its name within a model's folder, where it is looked for by default."""
PROFILE_VERSION = 1
MAX_FILE_BYTES = 1 << 34
LARGEST_NUMBER = 1e15
"""Of means, sensitivities and frequencies; a real profile's are of order 1, or of its model's keys and values."""
LARGEST_SCALING = 1e3
RotaryStyle = Literal["none", "half", "interleaved"]


@dataclass(frozen=True)
class Rotary:
    """The model's rotation of keys, where it is known: channel pairs (i, i + r/2) for "half", (2i, 2i + 1) for
    "interleaved", of the first r channels of a head, by position times inv_freq float64 [r/2]; keys are also scaled by
    `scaling`.
    """

    style: RotaryStyle
    inv_freq: Tensor
    scaling: float = 1.0

    def apply(self, keys: Tensor, positions: Tensor, sign: int) -> Tensor:
        """keys float32 [tokens, heads, dim] rotated (sign 1) or rotated back (sign -1), positions int64 [tokens]."""
        if self.style == "none":
            return keys
        angle = positions.to(torch.float64)[:, None] * self.inv_freq.to(positions.device)
        cos, sin = angle.cos().float()[:, None], (sign * angle.sin()).float()[:, None]
        width = 2 * len(self.inv_freq)
        part, rest = keys[..., :width], keys[..., width:]
        if self.style == "half":
            a, b = part.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        else:
            a, b = part[..., 0::2], part[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return torch.cat([turned * self.scaling**sign, rest], -1)


@dataclass(frozen=True)
class Group:
    """A joint basis: layers [first, first + count) of K (kind 0) or V (kind 1).

    sensitivity float32 [heads of all its layers, dim, dim]; synthesis float32 [components, channels].
    """

    kind: int
    first: int
    count: int
    sensitivity: Tensor
    synthesis: Tensor

    @cached_property
    def analysis(self) -> Tensor:
        """W = F U^T, float32 [channels, components]."""
        heads, dim, _ = self.sensitivity.shape
        columns = self.synthesis.mT.reshape(heads, dim, -1)
        return torch.bmm(self.sensitivity, columns).reshape(heads * dim, -1).contiguous()


@dataclass(frozen=True, eq=False)
class Profile:
    """Everything that the klt transform needs of one model. Make one by `learn`, or `load` it.

    means float32 [columns of one row of the batch]; step_code: the finest step, as `codec.quantize` codes it;
    base_entries uint8 [components] and refine_entries uint8 [levels - 1, components] name tables of the shipped
    codebook; `about` says which model (its fingerprint), from how much text, and the divergence measured at each
    level.
    """

    layers: tuple[LayerGeometry, ...]
    rotary: Rotary
    means: Tensor
    groups: tuple[Group, ...]
    step_code: int
    base_entries: Tensor
    refine_entries: Tensor
    about: dict[str, Any]

    @property
    def levels(self) -> int:
        return 1 + len(self.refine_entries)

    @cached_property
    def digest(self) -> str:
        """XXH3-128 of the file, in hex."""
        return xxhash.xxh3_128_hexdigest(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file. The basis is kept in float16; its numbers are of order 1."""
        tensors = {
            "means": self.means, "inv_freq": self.rotary.inv_freq, "base_entries": self.base_entries,
            "refine_entries": self.refine_entries,
        }  # fmt: skip
        for index, group in enumerate(self.groups):
            tensors[f"sensitivity-{index}"] = group.sensitivity
            tensors[f"synthesis-{index}"] = group.synthesis.half()
        described = {
            "version": PROFILE_VERSION,
            "layers": [layer.to_dict() for layer in self.layers],
            "rotary": {"style": self.rotary.style, "scaling": self.rotary.scaling},
            "groups": [[group.kind, group.first, group.count] for group in self.groups],
            "step_code": self.step_code,
            "about": self.about,
        }
        return save_tensors(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            {"cachegen_profile": json.dumps(described, sort_keys=True)},
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Profile:
        """Raises ProfileError for bytes that are no profile, or one that contradicts itself."""
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            described = json.loads(header["__metadata__"]["cachegen_profile"])
            tensors = load_tensors(data)
            if any(x.dtype != torch.float16 for name, x in tensors.items() if name.startswith("synthesis-")):
                raise ProfileError("the basis must be float16")
            if described["version"] != PROFILE_VERSION:
                raise ProfileError(f"a profile of version {described['version']}; this release reads {PROFILE_VERSION}")
            groups = tuple(
                Group(int(kind), int(first), int(count), tensors[f"sensitivity-{i}"], tensors[f"synthesis-{i}"].float())
                for i, (kind, first, count) in enumerate(described["groups"])
            )
            rotary = Rotary(described["rotary"]["style"], tensors["inv_freq"], float(described["rotary"]["scaling"]))
            layers = tuple(LayerGeometry.from_dict(layer) for layer in described["layers"])
            profile = cls(
                layers, rotary, tensors["means"], groups, int(described["step_code"]), tensors["base_entries"],
                tensors["refine_entries"], dict(described["about"]),
            )  # fmt: skip
        except (SafetensorError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise ProfileError(f"this is not a profile: {error}") from error
        profile._check()
        profile.__dict__["digest"] = xxhash.xxh3_128_hexdigest(data)
        return profile

    def _check(self) -> None:
        """Raises ProfileError unless shapes and dtypes fit each other."""
        channels = [(layer.heads, layer.k_dim, layer.v_heads, layer.v_dim) for layer in self.layers]
        components, covered = 0, []
        sound = bool(channels) and 0 <= self.step_code < 256 and self._rotary_is_sound()
        for group in self.groups:
            inside = group.kind in (0, 1) and 0 <= group.first < group.first + group.count <= len(channels)
            places = (
                [c[2 * group.kind :][:2] for c in channels[group.first : group.first + group.count]] if inside else []
            )
            heads, dims = sum(h for h, _ in places), {d for _, d in places}
            shape = tuple(group.sensitivity.shape)
            sound &= len(dims) == 1 and shape == (heads, *dims, *dims) and group.synthesis.dim() == 2
            sound = sound and group.synthesis.shape[1] == heads * shape[1]
            covered += (
                [(group.kind, layer) for layer in range(group.first, group.first + group.count)] if inside else []
            )
            components += group.synthesis.shape[0] if group.synthesis.dim() else 0
            sound = sound and group.sensitivity.dtype == torch.float32 and _moderate(group.sensitivity)
            sound = sound and bool(torch.isfinite(group.synthesis).all())
        width = sum(h * d + vh * vd for h, d, vh, vd in channels)
        sound = sound and sorted(covered) == [(kind, layer) for kind in (0, 1) for layer in range(len(channels))]
        sound = sound and tuple(self.means.shape) == (width,) and self.means.dtype == torch.float32
        sound = sound and _moderate(self.means)
        sound = sound and self.base_entries.dtype == self.refine_entries.dtype == torch.uint8
        sound = sound and tuple(self.base_entries.shape) == (components,) and self.refine_entries.dim() == 2
        if not sound or self.refine_entries.shape[1] != components or self.levels > 3:
            raise ProfileError("this profile contradicts itself: the shapes of its tensors do not fit its layers")

    def _rotary_is_sound(self) -> bool:
        """Whether it turns channels that all layers' keys have, by angles and a scale that are numbers."""
        rotary, narrowest = self.rotary, min((layer.k_dim for layer in self.layers), default=0)
        fits = rotary.inv_freq.dim() == 1 and 2 * rotary.inv_freq.numel() <= narrowest
        fits = fits and rotary.inv_freq.dtype == torch.float64 and _moderate(rotary.inv_freq)
        known = rotary.style in ("none", "half", "interleaved")
        return known and fits and 1 / LARGEST_SCALING <= rotary.scaling <= LARGEST_SCALING

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Writes the file into a folder (such as the model's), or to a path that ends in .safetensors; returns its
        path. Raises ArtifactExistsError where another one is there, which artifacts may need, unless overwrite.
        """
        place = Path(path)
        place = place if place.suffix == ".safetensors" else place / PROFILE_FILE
        place.parent.mkdir(parents=True, exist_ok=True)
        data = self.to_bytes()
        if place.exists() and not overwrite:
            if place.is_file() and place.stat().st_size == len(data) and place.read_bytes() == data:
                return place
            raise ArtifactExistsError(f"there is another profile at {place}: pass overwrite=True to replace it")
        with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=place.parent) as folder:
            partial = Path(folder) / place.name  # in a folder of its own, so that it has the usual permissions
            partial.write_bytes(data)
            os.replace(partial, place)
        return place

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """From a file, or from a folder that holds one. Raises ProfileError."""
        place = Path(path)
        place = place / PROFILE_FILE if place.is_dir() else place
        if not place.is_file():
            raise ProfileError(f"there is no profile at {place}; learn one with hf_cachegen.learn_profile")
        if place.stat().st_size > MAX_FILE_BYTES:
            raise ProfileError(f"{place} has {place.stat().st_size} bytes; a profile has at most {MAX_FILE_BYTES}")
        return cls.from_bytes(place.read_bytes())


def _moderate(x: Tensor) -> bool:
    """Whether all its numbers are finite, and none absurd."""
    return bool((x.abs() <= LARGEST_NUMBER).all())


def _has_digest(place: Path, digest: str) -> bool:
    """Whether the file's bytes have it; nothing is made of them."""
    if place.stat().st_size > MAX_FILE_BYTES:
        return False
    found = xxhash.xxh3_128()
    with place.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest() == digest


def require_layers(profile: Profile, layers: Sequence[LayerGeometry]) -> None:
    """Raises ProfileError unless the profile is of a model with these layers."""
    if tuple(layers) != profile.layers:
        raise ProfileError(
            f"the profile is of {profile.about.get('model', 'another model')!r}, whose layers differ from this "
            f"cache's: expected {profile.layers[0]} x {len(profile.layers)}, got {layers[0]} x {len(layers)}"
        )


def find(
    profile: Profile | str | os.PathLike[str] | None, *folders: str | os.PathLike[str], digest: str | None = None
) -> Profile | None:
    """The profile itself, the one at a path, or for "auto" the first of these folders that has one (of this digest, if
    any will not do; a file that has another digest is not parsed).
    """
    if profile is None or isinstance(profile, Profile):
        return profile
    if profile != "auto":
        return Profile.load(profile)
    places = (Path(folder) / PROFILE_FILE for folder in folders if folder)
    right = (place for place in places if place.is_file() and (digest is None or _has_digest(place, digest)))
    found = (Profile.load(place) for place in right)
    return next((one for one in found if digest in (None, one.digest)), None)
