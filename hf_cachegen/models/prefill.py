"""Run a model over a context, and keep checkpoints of its states on the way.

A model without states reads chunk after chunk. One with states also stops at every checkpoint. A model that reads only
one token after its states reads everything up to the first checkpoint in one pass, and the rest token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from hf_cachegen.errors import ConfigError, UnsupportedModelError
from hf_cachegen.models.compat import run, unwrapped
from hf_cachegen.models.continuation import Continuation, continuation_of, read
from hf_cachegen.models.kinds import empty_cache, layer_contents
from hf_cachegen.models.recurrent import Checkpoints, capture_states
from hf_cachegen.models.requirements import positions_change
from hf_cachegen.models.running import layer_devices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DISTANCES = (0, 16, 128, 1024)
"""Default checkpoints, in tokens before the last one: a prompt that leaves the context d tokens before its end computes
at most about 8 d tokens again."""
STEPS = 32
"""Largest distance for a model that reads token by token after its states."""
STATE_BUDGET = 512 << 20
"""Bytes of all checkpoints of a context by default."""


@dataclass(frozen=True)
class StateOptions:
    """Where checkpoints of recurrent states are kept; nothing for a model without states.

    Attributes:
        every: tokens between two checkpoints; None for the end and a few before it (DISTANCES).
        budget: largest number of bytes of all checkpoints. Evenly chosen ones are left out above it, never the last.
        bits: bits per value of a recurrent state in an artifact, 2 to 8; None to store it exactly.

    Raises:
        ConfigError: a value is out of its range.
    """

    every: int | None = None
    budget: int = STATE_BUDGET
    bits: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("state_every", self.every), ("state_budget", self.budget)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise ConfigError(f"state_bits must be 2 to 8, or None for exact states, got {self.bits}")

    def positions(self, tokens: int, found: Continuation) -> list[int]:
        """Return the positions of the checkpoints of a context, rising.

        Args:
            tokens: length of the context in tokens.
            found: how the model continues from its states.
        """
        end = tokens - found.least
        if end < 1:
            return [tokens]
        if self.every is not None:
            chosen = [*range(self.every, end, self.every), end]
        else:
            chosen = sorted(end - d for d in DISTANCES if d < end and (found.several or d <= STEPS))
        stride = -(-len(chosen) // max(1, self.budget // max(1, found.state_bytes)))
        return chosen[::-1][::stride][::-1]


def prefill(
    model: PreTrainedModel, ids: Tensor, chunk_tokens: int, options: StateOptions, progress: bool
) -> tuple[DynamicCache, Checkpoints]:
    """Fill a cache with a context. The caller puts the model into evaluation mode.

    Args:
        model: the model, or a wrapper of it.
        ids: the context, int64 [1, tokens].
        chunk_tokens: tokens per forward pass.
        options: which checkpoints to keep.
        progress: show a progress bar.

    Returns:
        The cache, whose layers with keys and values hold all tokens; and the checkpoints.

    Raises:
        UnsupportedModelError: the model does not continue from its states.
    """
    contents, tokens = layer_contents(model.config), ids.shape[1]
    cache = empty_cache(model.config)
    ids = ids.to(layer_devices(model, len(contents))[0])
    if not any(content.states for content in contents):
        for chunk in tqdm(ids.split(chunk_tokens, 1), "prefill", unit="chunk", disable=not progress):
            run(model, chunk, cache, last_logits_only=True)
        return cache, Checkpoints()
    if positions_change(model.config, 1, tokens):
        raise UnsupportedModelError(
            f"{type(unwrapped(model)).__name__} has recurrent states, and the rotation of its keys depends on the "
            "whole length: its context cannot be computed in parts"
        )
    found = continuation_of(model)
    positions = options.positions(tokens, found)
    at, kept = 0, []
    for stop in tqdm(_stops(tokens, positions, chunk_tokens, found), "prefill", unit="chunk", disable=not progress):
        read(model, ids[:, at:stop], cache, at)
        at = stop
        if at in positions:
            kept.append(capture_states(cache, contents, at))
    return cache, Checkpoints(tuple(kept), options.bits)


def _stops(tokens: int, positions: list[int], chunk_tokens: int, found: Continuation) -> list[int]:
    """Return the ends of the forward passes, rising: every checkpoint, and the end of the context."""
    if not found.several:
        return [*range(positions[0], tokens + 1)]
    stops, at = [], 0
    for position in sorted({*positions, tokens}):
        parts = -(-(position - at) // chunk_tokens)
        stops += [at + (position - at) * part // parts for part in range(1, parts + 1)]
        at = position
    return stops
