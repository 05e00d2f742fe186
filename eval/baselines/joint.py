"""Principal components of a model's whole cache: the basis of the baselines that need calibration.

Keys of all layers and heads form one vector for each token, values another. Keys are rotated back to position zero
first (rotary embeddings in the half-split layout of Llama), as KVTC does. The basis is learnt once for a model from
contexts that no evaluation uses, and stored in one file:

    python -m eval.baselines.joint --model MODEL --text books.txt --contexts 16 --tokens 2048 --out basis.safetensors
    python -m eval.baselines.joint --model MODEL --dataset NAME --seed 1000000 --contexts 8 --out basis.safetensors
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval import datasets
from eval.baselines.stored import rows, unrows
from eval.command import run_command
from eval.datasets.request import Request
from eval.models import load_model, load_tokenizer, token_ids
from hf_cachegen import CacheGenCache
from hf_cachegen.errors import ConfigError

SIDES = ("keys", "values")
PROBE_TOKENS = 16
PROBE_TOKEN = 7
FLAT = 0.2
"""A rotation is accepted if undoing it leaves less than this share of the spread of a repeated token's keys."""


@dataclass(frozen=True, eq=False)
class Basis:
    """The components of one side; equal to itself alone, so that results can be kept for it.

    Attributes:
        mean: float32 [channels].
        vectors: float32 [channels, components], orthonormal, the largest variance first.
        sample: float32 [tokens, components], coefficients of calibration tokens, for bit allocation.
    """

    mean: Tensor
    vectors: Tensor
    sample: Tensor


@dataclass(frozen=True)
class Joint:
    """The bases of a model's keys and values; inv_freq: float64 [head_dim / 2], empty where keys are not rotated."""

    keys: Basis
    values: Basis
    inv_freq: Tensor

    def coefficients(self, kind: int, side: Sequence[Tensor]) -> Tensor:
        """Return the coefficients of a context, float32 [tokens, components].

        Args:
            kind: 0 for keys, 1 for values.
            side: per layer [1, heads, tokens, head_dim], as cached.

        Raises:
            ConfigError: the cache has another shape than the model of the basis.
        """
        basis = (self.keys, self.values)[kind]
        found = self._joined(kind, side)
        if found.shape[1] != len(basis.mean):
            raise ConfigError(
                f"the basis is for {len(basis.mean)} channels of {SIDES[kind]}, this cache has {found.shape[1]}: learn "
                "one for this model with python -m eval.baselines.joint"
            )
        return (found - basis.mean) @ basis.vectors

    def restored(self, kind: int, coefficients: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Return keys or values, float32 in the shapes of `like`, from coefficients [tokens, components]."""
        basis = (self.keys, self.values)[kind]
        joined = coefficients @ basis.vectors[:, : coefficients.shape[1]].mT + basis.mean
        parts = joined.split([x.shape[1] * x.shape[3] for x in like], 1)
        side = [unrows(part, x) for part, x in zip(parts, like, strict=True)]
        return [rotated(x, self.inv_freq, 1) for x in side] if kind == 0 else side

    def _joined(self, kind: int, side: Sequence[Tensor]) -> Tensor:
        return joined([rotated(x.float().cpu(), self.inv_freq, -1) for x in side] if kind == 0 else side)

    def save(self, path: Path) -> None:
        """Write the basis to one safetensors file."""
        tensors = {"inv_freq": self.inv_freq}
        for name, basis in zip(SIDES, (self.keys, self.values), strict=True):
            tensors |= {f"{name}.mean": basis.mean, f"{name}.vectors": basis.vectors.contiguous(),
                        f"{name}.sample": basis.sample.contiguous()}  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> Joint:
        """Read a basis. Raises ConfigError for a file that is not one."""
        try:
            found = load_file(path)
            bases = [Basis(*(found[f"{name}.{part}"] for part in ("mean", "vectors", "sample"))) for name in SIDES]
            return cls(bases[0], bases[1], found["inv_freq"])
        except (OSError, SafetensorError, KeyError) as error:
            raise ConfigError(f"{path} is not a basis that eval.baselines.joint wrote: {error!r}") from error


def joined(side: Sequence[Tensor]) -> Tensor:
    """Return all layers of a side as float32 [tokens, channels of all layers]."""
    return torch.cat([rows(x.cpu()) for x in side], 1)


def rotated(keys: Tensor, inv_freq: Tensor, sign: int, positions: Tensor | None = None) -> Tensor:
    """Rotate keys by their positions (sign 1) or back to position zero (sign -1).

    Args:
        keys: [1, heads, tokens, head_dim].
        inv_freq: float64 [head_dim / 2 or less]; empty where keys are not rotated.
        sign: 1 or -1.
        positions: [tokens]; None for 0, 1, ...
    """
    if not len(inv_freq):
        return keys
    where = torch.arange(keys.shape[2]) if positions is None else positions
    angles = where.double()[:, None] * inv_freq
    cos, sin = angles.cos().float(), sign * angles.sin().float()
    first, second, rest = keys.split([len(inv_freq), len(inv_freq), keys.shape[3] - 2 * len(inv_freq)], 3)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], 3)


def find_rotation(model: Any) -> Tensor:
    """Return the frequencies of a model's rotary embedding, float64 [head_dim / 2], empty where it has none.

    The frequencies are accepted if undoing the rotation makes the first layer's keys of a repeated token equal.
    """
    none = torch.empty(0, dtype=torch.float64)
    found = [m.inv_freq for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if not found:
        return none
    inv_freq = found[0].double().cpu()
    cache = CacheGenCache.from_context(model, [PROBE_TOKEN] * PROBE_TOKENS, profile=None)
    keys = cache.kv.keys[0].float().cpu()
    if 2 * len(inv_freq) > keys.shape[3]:
        return none
    spread = [float((x - x.mean(2, keepdim=True)).norm()) for x in (keys, rotated(keys, inv_freq, -1))]
    return inv_freq if spread[1] < FLAT * spread[0] else none


def learn(model: Any, contexts: Sequence[Sequence[int]]) -> Joint:
    """Learn the bases of a model's keys and values.

    Args:
        model: a causal language model.
        contexts: token ids of each context, 2 tokens or more.

    Raises:
        ConfigError: there is no context.
    """
    if not contexts:
        raise ConfigError("learning a basis takes at least one context, got none")
    inv_freq = find_rotation(model)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for ids in contexts:
        kv = CacheGenCache.from_context(model, list(ids), profile=None).kv
        sides[0].append(joined([rotated(x.float().cpu(), inv_freq, -1) for x in kv.keys]))
        sides[1].append(joined(kv.values))
    return Joint(_basis(torch.cat(sides[0])), _basis(torch.cat(sides[1])), inv_freq)


def _basis(x: Tensor) -> Basis:
    """Return the principal components of rows [tokens, channels]; no more than there are tokens."""
    mean = x.mean(0)
    vectors = torch.linalg.svd(x - mean, full_matrices=False).Vh.mT
    return Basis(mean, vectors, (x - mean) @ vectors)


@click.command()
@click.option("--model", required=True, help="Folder or Hub id of a causal language model.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="Text file, cut into contexts.")
@click.option("--dataset", "specs", multiple=True, help="Data set as for `python -m eval run`, repeatable.")
@click.option("--contexts", default=16, show_default=True, help="Number of contexts of the text and each data set.")
@click.option("--tokens", default=2048, show_default=True, help="Length of a context of the text in tokens.")
@click.option("--seed", default=0, show_default=True, help="Random seed of generated data.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Path of the basis.")
def main(
    model: str, text: Path | None, specs: tuple[str, ...], contexts: int, tokens: int, seed: int, out: Path
) -> None:
    """Learn the joint basis of a model's cache from consecutive parts of a text and from contexts of data sets."""
    tokenizer = load_tokenizer(model)
    parts: list[list[int]] = []
    if text is not None:
        ids = token_ids(tokenizer, text.read_text(encoding="utf-8"), start=False)
        parts += [ids[first : first + tokens] for first in range(0, len(ids) - tokens + 1, tokens)][:contexts]
    for spec in specs:
        examples = datasets.load(spec, Request(tokenizer, contexts, seed)).examples
        parts += [token_ids(tokenizer, example.context, start=True) for example in examples]
    learn(load_model(model), parts).save(out)
    click.echo(f"{out}: {len(parts)} contexts, {sum(map(len, parts))} tokens")


if __name__ == "__main__":
    run_command(main, "eval.baselines.joint")
