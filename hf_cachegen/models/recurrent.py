"""The states of recurrent layers: checkpoints of a context.

A state summarises all tokens before a position and cannot be cut to fewer. So a context keeps *checkpoints*: the states
after some numbers of its tokens. A prompt resumes from the last checkpoint at or before the point where it leaves the
context; the keys and values of attention layers are cut to it, and the model computes everything after it. The last
token of a prompt is always computed, so the last checkpoint of a context is one token before its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_cachegen.artifact.tensors import NamedTensor
from hf_cachegen.errors import CorruptError, UnsupportedModelError, WrongModelError
from hf_cachegen.models.kinds import STATE_TENSORS, LayerContent
from hf_cachegen.models.prefix import Reuse
from hf_cachegen.models.state_coding import dequantise, quantise

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

_NAME = re.compile(r"(conv|recurrent)-(\d{1,6})-(\d{1,4})-(\d{1,12})(-codes|-scales)?")
"""Names in an artifact: the kind, the layer, the number of the state in its layer, the tokens of the checkpoint, and
the part of a quantised state."""
QUANTISED = "recurrent_states"
"""The states that can be quantised. Those of convolutions are small."""
_SUFFIX = "_states"

StateKey = tuple[int, str, int]
"""The layer, one of STATE_TENSORS, and the number of the state in its layer."""


@dataclass(frozen=True)
class Checkpoint:
    """All states of a cache after `tokens` tokens, each [1, ...]."""

    tokens: int
    states: Mapping[StateKey, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the exact states."""
        return sum(state.numel() * state.dtype.itemsize for state in self.states.values())


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a context, by rising numbers of tokens; none for a model without states.

    Attributes:
        all: the checkpoints.
        bits: bits per value of a recurrent state in an artifact; None to store it exactly.
    """

    all: tuple[Checkpoint, ...] = ()
    bits: int | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The positions of the checkpoints."""
        return tuple(checkpoint.tokens for checkpoint in self.all)

    @property
    def nbytes(self) -> int:
        """Bytes of the exact states of all checkpoints."""
        return sum(checkpoint.nbytes for checkpoint in self.all)

    def last(self, most: int) -> Checkpoint | None:
        """Return the last checkpoint after at most `most` tokens; None if there is none."""
        return max((c for c in self.all if c.tokens <= most), key=lambda c: c.tokens, default=None)

    def named(self) -> list[NamedTensor]:
        """Return the tensors to store. Earlier checkpoints may be coded against the last one."""
        found = []
        for checkpoint in reversed(self.all):
            for (layer, tensor, number), state in checkpoint.states.items():
                stem = f"{tensor.removesuffix(_SUFFIX)}-{layer}-{number}"
                base = None if checkpoint is self.all[-1] else f"{stem}-{self.all[-1].tokens}"
                name = f"{stem}-{checkpoint.tokens}"
                if self.bits is None or tensor != QUANTISED or not state.is_floating_point():
                    found.append(NamedTensor(name, state, checkpoint.tokens, base))
                    continue
                codes, scales = quantise(state, self.bits)
                found.append(NamedTensor(f"{name}-codes", codes, checkpoint.tokens, base and f"{base}-codes"))
                found.append(NamedTensor(f"{name}-scales", scales, checkpoint.tokens, base and f"{base}-scales"))
        return found

    @classmethod
    def from_named(cls, tensors: Iterable[NamedTensor], tokens: int) -> Checkpoints:
        """Read the tensors of an artifact. Inverse of `named`; tensors of other names are left out.

        Args:
            tensors: the named tensors of the artifact.
            tokens: length of the context in tokens.

        Raises:
            CorruptError: a checkpoint lies outside the context, or a name contradicts its position.
        """
        found: dict[int, dict[StateKey, Tensor]] = {}
        parts: dict[tuple[int, StateKey], dict[str, Tensor]] = {}
        for named in tensors:
            match = _NAME.fullmatch(named.name)
            if match is None:
                continue
            if int(match[4]) != named.tokens or not 1 <= named.tokens <= tokens:
                raise CorruptError(
                    f"expected a state after 1 to {tokens} tokens, got {named.name!r} after {named.tokens} tokens; "
                    "encode the context again"
                )
            key = int(match[2]), match[1] + _SUFFIX, int(match[3])
            if match[5] is None:
                found.setdefault(named.tokens, {})[key] = named.tensor
            else:
                parts.setdefault((named.tokens, key), {})[match[5]] = named.tensor
        for (position, key), part in parts.items():
            if len(part) != 2 or key in found.get(position, {}):
                raise CorruptError(f"expected codes and scales of {key[1]} in layer {key[0]}, got {sorted(part)}")
            found.setdefault(position, {})[key] = dequantise(part["-codes"], part["-scales"])
        return cls(tuple(Checkpoint(position, found[position]) for position in sorted(found)))

    def check(self, expected: Mapping[StateKey, tuple[tuple[int, ...], torch.dtype]], model: str) -> None:
        """Raise WrongModelError unless every checkpoint has the states of a model.

        Args:
            expected: shape and dtype of each state of the model; empty for a model without states.
            model: name of the model, for the message.
        """
        if expected and not self.all:
            raise WrongModelError(f"expected states of recurrent layers for {model}, the cache has none: make it again")
        for checkpoint in self.all:
            got = {key: (tuple(state.shape), state.dtype) for key, state in checkpoint.states.items()}
            wrong = sorted(key for key in {*expected, *got} if expected.get(key) != got.get(key))
            if wrong:
                layer, tensor, number = wrong[0]
                raise WrongModelError(
                    f"{tensor}[{number}] of layer {layer} after {checkpoint.tokens} tokens: expected "
                    f"{expected.get(wrong[0])} as in {model}, got {got.get(wrong[0])}"
                )


def shorten(reuse: Reuse, checkpoints: Checkpoints, prompt_tokens: int, least: int) -> tuple[Reuse, Checkpoint | None]:
    """Shorten the reused part of a batch to a checkpoint.

    A padded row is computed: its states would have to be those of another number of tokens than in the other rows, and
    a pad may change the states of a model that does not mask it.

    Args:
        reuse: the part that keys and values cover.
        checkpoints: those of the context.
        prompt_tokens: positions of the prompts, pads included.
        least: number of positions that the model must compute.

    Returns:
        The shortened part, and its checkpoint; length 0 and None where nothing can be reused.
    """
    most = min(reuse.length, prompt_tokens - least)
    checkpoint = None if any(reuse.pads) else checkpoints.last(most)
    return replace(reuse, length=0 if checkpoint is None else checkpoint.tokens), checkpoint


def capture_states(cache: Cache, contents: Sequence[LayerContent], tokens: int) -> Checkpoint:
    """Copy the states of a filled cache.

    Args:
        cache: the cache that the model filled with `tokens` tokens.
        contents: what its layers hold.
        tokens: number of tokens that it has read.

    Raises:
        UnsupportedModelError: there are no states.
    """
    found: dict[StateKey, Tensor] = {}
    for index, (layer, content) in enumerate(zip(cache.layers, contents, strict=True)):
        held = [
            (tensor, number, state)
            for tensor in content.states
            for number, state in getattr(layer, tensor).items()
            if state is not None
        ]
        # Some releases give layers without attention a layer for states, which stays empty.
        found.update({(index, tensor, number): state.detach().clone() for tensor, number, state in held})
    if not found:
        raise UnsupportedModelError(
            f"the cache holds no states after {tokens} tokens: the model keeps them outside its cache"
        )
    return Checkpoint(tokens, found)


def put_states(layer: Any, states: Mapping[tuple[str, int], Tensor], rows: int, device: torch.device) -> None:
    """Fill the states of a fresh stock layer, each in memory of its own: stock layers write into it.

    Args:
        layer: the layer.
        states: for (one of STATE_TENSORS, number) the state, [1, ...].
        rows: number of rows of the cache.
        device: device of the layer.
    """
    for (tensor, number), state in states.items():
        filled = state.to(device).expand(rows, *state.shape[1:]).clone(memory_format=torch.contiguous_format)
        # The names are those of the layer's own arguments.
        layer.lazy_initialization(**{tensor: filled, "state_idx": number})
        getattr(layer, tensor)[number].copy_(filled)
        layer.has_previous_state[number] = True
        layer.device = device


def states_of(checkpoint: Checkpoint, layer: int) -> dict[tuple[str, int], Tensor]:
    """Return the states of one layer at a checkpoint."""
    return {
        (tensor, number): state
        for (index, tensor, number), state in checkpoint.states.items()
        if index == layer and tensor in STATE_TENSORS
    }
