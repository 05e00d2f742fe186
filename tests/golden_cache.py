"""The cache and the profile that the golden artifacts were made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from hf_cachegen.artifact import Artifact
from hf_cachegen.artifact.manifest import PROFILE_FILE
from hf_cachegen.artifact.tensors import NamedTensor
from hf_cachegen.codec import matrices
from hf_cachegen.codec.geometry import LayerGeometry
from hf_cachegen.codec.group import Group
from hf_cachegen.codec.predictor import Known, Predictor
from hf_cachegen.codec.profile import Rotary
from hf_cachegen.models.indexed import joined
from hf_cachegen.profiles.files import Profile


def golden_kv(name: str = "") -> tuple[list[Tensor], list[Tensor]]:
    """Return (keys, values) of two layers with 50 tokens each, equal on every machine and in every release of torch.

    They are computed from integers. Tokens 0 and 40 are sinks if the name ends in "-sinks". The values of "indexed" end
    with an index key.
    """
    numbers = np.arange(2 * 2 * 2 * 50 * 12, dtype=np.uint64)
    for _ in range(3):
        numbers = numbers * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        numbers ^= numbers >> np.uint64(29)
    noise = (numbers >> np.uint64(48)).astype(np.int64) - 32768
    x = torch.from_numpy(noise).reshape(2, 2, 1, 2, 50, 12).float() / 32768
    x = x.cumsum(4) * torch.tensor([2.0 ** (c % 5 - 2) for c in range(12)]) + torch.arange(12) / 2 - 3
    x = x.bfloat16()
    if name.endswith("-sinks"):
        x[0, :, :, :, [0, 40]] /= 256
    if name == "indexed":
        return list(x[0]), [joined(values, values[:, :1] / 2) for values in x[1]]
    return list(x[0]), list(x[1])


def golden_layers(name: str) -> list[LayerGeometry] | None:
    """Return the geometry of the layers of `golden_kv(name)`; None where all are of kind "full"."""
    return [LayerGeometry("indexed", 2, 12, 1, 36, index_dim=12)] * 2 if name == "indexed" else None


def golden_tensors() -> list[NamedTensor]:
    """Return tensors to store beside the cache: of every dtype, alone and against another one, raw and coded."""
    numbers = torch.arange(3 * 4100, dtype=torch.int64) * 2654435761 % 65536 - 32768
    state = (numbers.float() / 4096).reshape(1, 3, 4100)
    later = state * 1.0078125
    return [
        NamedTensor("recurrent-20", state, 20),
        NamedTensor("recurrent-49", later, 49, "recurrent-20"),
        NamedTensor("half", later.half(), 49),
        NamedTensor("brain", later.bfloat16(), 49),
        NamedTensor("double", state.double(), 49),
        NamedTensor("positions", numbers.abs().reshape(3, 4100), 49),
        NamedTensor("small", numbers[:5].to(torch.int32)),
        NamedTensor("one", torch.tensor(7, dtype=torch.uint8)),
    ]


def golden_profile() -> Profile:
    """Return a profile of the golden cache whose products need no rounding: no rotation, a basis of ones and quarters.
    """
    layer = LayerGeometry("full", 2, 12, 2, 12)
    mixing = torch.eye(48) + torch.eye(48).flip(0) / 4
    group = [Group(kind, 0, 2, torch.eye(12).expand(4, 12, 12) * (1 + kind), mixing[:40]) for kind in (0, 1)]
    components = torch.arange(80)
    return Profile(
        layers=(layer, layer),
        rotary=Rotary("none", torch.empty(0, dtype=torch.float64)),
        means=torch.arange(96).float() / 16 - 3,
        groups=tuple(group),
        step_code=148,
        base_entries=(components % 30 + 30).to(torch.uint8),
        refine_entries=torch.stack([components % 20 + 5, components % 15 + 10]).to(torch.uint8),
        about={"model": "golden"},
    )


def golden_predicting() -> Profile:
    """Return the golden profile with a predictor from the first layer's input, of rank 2."""
    whole = golden_profile()
    mixing, predictions = torch.eye(24) + torch.eye(24).flip(0) / 4, torch.arange(48).reshape(2, 24) / 16 - 1
    groups = tuple(
        Group(kind, 1, 1, whole.groups[kind].sensitivity[2:], mixing[:20], predictions * (1 - kind)) for kind in (0, 1)
    )
    components = torch.arange(40)
    predictor = Predictor(
        layer=0,
        mean=torch.arange(4).float() / 4,
        directions=torch.arange(8).reshape(4, 2).float() / 8,
        groups=groups,
        step_code=150,
        base_entries=(components % 30 + 30).to(torch.uint8),
        refine_entries=torch.stack([components % 20 + 5, components % 15 + 10]).to(torch.uint8),
        about={"rank": 2},
    )
    return replace(whole, predictors=(predictor,))


def golden_chained() -> Profile:
    """Return a profile of the golden cache with chained layers, summaries of three numbers, and the predictor's scores.

    All numbers are multiples of 1/128, so that 8 bits hold them.
    """
    whole = golden_predicting()
    diagonal = torch.eye(24) * 127 / 128
    widths = {None: [0, 3, 6, 9], 0: [2, 5]}

    def groups(layer: int | None) -> tuple[Group, ...]:
        found = []
        for index, read in enumerate(widths[layer]):
            at, kind = index // 2 + (0 if layer is None else 1), index % 2
            numbers = (torch.arange(read * 24).reshape(read, 24) * (5 + index) % 31 - 15) / 128
            prediction = matrices.rounded(numbers, chained=True) if read else None
            sensitivity = torch.eye(12).expand(2, 12, 12) * (1 + kind) * 127 / 128
            found.append(Group(kind, at, 1, sensitivity, diagonal[:20], prediction, diagonal[5:8].flip(1).contiguous()))
        return tuple(found)

    predictor = replace(whole.predictors[0], groups=groups(0), reach=1)
    return replace(whole, groups=groups(None), reach=1, predictors=(predictor,))


def golden_known(name: str = "") -> Known:
    """Return what a loader of the golden cache would have computed, for `golden_predicting`."""
    keys, values = golden_kv(name)
    return Known(0, torch.arange(100).reshape(50, 2) % 17 / 8 - 1, tuple(keys[:1]), tuple(values[:1]))


def digests(artifact: Artifact, known: Known | None = None) -> list[str]:
    """Return the hash of the keys and values of each level."""
    found = []
    for level in range(1, artifact.levels + 1):
        tensors = [x for side in artifact.decode(level, known=known) for x in side]
        data = b"".join(t.contiguous().view(torch.int16).numpy().tobytes() for t in tensors)
        found.append(xxhash.xxh3_128_hexdigest(data))
    return found


def recorded(golden: Path) -> list[str]:
    """Return the digests that were stored beside a golden artifact."""
    return golden.with_name(f"{golden.name}.digests").read_text().split()


def record(golden: Path, artifact: Artifact, known: Known | None = None) -> None:
    """Store the digests of a golden artifact beside it."""
    golden.with_name(f"{golden.name}.digests").write_text("\n".join(digests(artifact, known)) + "\n")


def require_same_files(made: Path, golden: Path) -> None:
    """Compare the files of two artifacts, but for the manifest, which names its writer, and the profile."""
    for file in sorted(golden.iterdir()):
        if file.name not in ("cachegen.json", PROFILE_FILE):
            assert (made / file.name).read_bytes() == file.read_bytes(), file.name
