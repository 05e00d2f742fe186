"""Calls of models with recurrent states: where they begin, and which checkpoints they leave.

A state cannot be cut, so a prompt begins at the last stored checkpoint before its end, and a call leaves checkpoints at
ends of blocks: after the last whole block of the prompt and of the answer, and every `state_every` tokens. The prompt
is read up to its last whole block here, with a stop at every checkpoint, and the stock generate reads the rest. A pad
may change the states of a model that does not mask it, so prompts with masked tokens are left to the stock generate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode

from hf_cachegen.models.continuation import Continuation, read
from hf_cachegen.models.kinds import LayerContent, layer_contents
from hf_cachegen.models.recurrent import Checkpoint, capture_states
from hf_cachegen.models.row_cache import row_of, state_cache
from hf_cachegen.models.running import layer_devices
from hf_cachegen.prefix_cache.advance import CHUNK_TOKENS
from hf_cachegen.prefix_cache.rules import Rules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_cachegen.prefix_cache.call import PrefixCall

MAX_STEPS = 256
"""Most tokens that a model which reads them one by one after its states reads so; computing all is faster for more."""
MAX_REST = 32
"""Most tokens that such a model reads one by one for the sake of a new checkpoint before them."""


@dataclass(frozen=True)
class Held:
    """What is loaded of one row.

    Attributes:
        tensors: layer 0's keys, its values, ...: at least as many tokens as the checkpoint's.
        checkpoint: the states, [1, ...] each; None where nothing is loaded.
    """

    tensors: Sequence[Tensor] = ()
    checkpoint: Checkpoint | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens that the row begins with."""
        return 0 if self.checkpoint is None else self.checkpoint.tokens


class Stateful:
    """How one model with recurrent states begins a call.

    Args:
        model: the model.
        continuation: how it continues from its states.
        rules: where checkpoints are wanted.
    """

    def __init__(self, model: PreTrainedModel, continuation: Continuation, rules: Rules) -> None:
        self.model, self.found, self.width = model, continuation, rules.block_tokens
        self.every = -(-rules.state_every // self.width)
        self.most = max(2, rules.state_budget // max(1, continuation.state_bytes))
        self.contents: list[LayerContent] = layer_contents(model.config)
        self.devices = layer_devices(model, len(self.contents))

    def usable(self, tokens: int) -> int:
        """Return how many blocks of a prompt of so many tokens may be held: the last tokens are always computed."""
        return max(0, tokens - self.found.least) // self.width

    def pays(self, held: int, tokens: int) -> bool:
        """Report whether a prompt of so many tokens may continue from `held` ones."""
        return self.found.several or tokens - held <= MAX_STEPS

    def stops(self, first: int, tokens: int) -> list[int]:
        """Return where checkpoints of a prompt are taken, after its first tokens: ends of blocks, rising."""
        last = self.usable(tokens)
        if not self.found.several and first == 0:
            # Only its first pass reads several tokens.
            return [last * self.width] if last and tokens - last * self.width <= MAX_REST else []
        blocks = [n for n in range(first // self.width + 1, last + 1) if n % self.every == 0 or n == last]
        stride = max(1, -(-len(blocks) // (self.most - 1)))  # one is left for the answer
        return [n * self.width for n in blocks[::-1][::stride][::-1]]

    @torch.no_grad()
    def begin(self, call: PrefixCall, rows: Sequence[Held], store: bool) -> tuple[Cache, list[Checkpoint]] | None:
        """Return the cache that the stock generate starts from, and new checkpoints, [rows of the prompt, ...] each.

        Sets `call.end`. Returns None where the prompt cannot be read in the chunks that the call asks for.

        Args:
            call: the call; no row has masked tokens.
            rows: what is loaded of each row.
            store: whether checkpoints are wanted.
        """
        length, first = call.length, max(row.tokens for row in rows)
        stops = self.stops(first, length) if store else []
        end = max([first, *stops, 0 if call.chunk is None else length - call.chunk])
        if end > length - self.found.least or (call.chunk is not None and end > call.chunk and not self.found.several):
            return None
        cache = self._joined(call, rows, first)
        if not self.found.several and end:
            end = length - 1  # the stock generate would read the rest together
        behind = store and any(row.tokens < first for row in rows)
        taken = [on_cpu(capture_states(cache, self.contents, first))] if behind else []
        taken += self._read(call.call.ids, cache, first, end, stops, call.chunk)
        call.end = end
        if call.repeats > 1:
            parts = [row_of(cache, row, 0, end) if end else [] for row in range(len(rows))]
            states = capture_states(cache, self.contents, end) if end else None
            cache = state_cache(self.model.config, parts, states, end, call.repeats, self.devices)
        return cache, taken

    def _joined(self, call: PrefixCall, rows: Sequence[Held], first: int) -> Cache:
        """Return the cache of all rows at their common beginning; rows that are behind are read up to there."""
        known: dict[tuple[int, ...], Held] = {}
        found = []
        for prompt, row in zip(call.rows, rows, strict=True):
            wanted = prompt.tokens[:first]
            if row.tokens < first:
                if wanted not in known:
                    known[wanted] = self._advanced(wanted, row)
                row = known[wanted]
            found.append(row)
        states = None
        if first:
            parts = [row.checkpoint.states for row in found if row.checkpoint is not None]
            states = Checkpoint(first, {key: torch.cat([part[key] for part in parts]) for key in parts[0]})
        return state_cache(self.model.config, [row.tensors for row in found], states, first, 1, self.devices)

    def _advanced(self, tokens: Sequence[int], row: Held) -> Held:
        if not self.pays(row.tokens, len(tokens)):
            row = Held()
        cache = state_cache(self.model.config, [row.tensors], row.checkpoint, row.tokens, 1, self.devices)
        self._read(torch.tensor([tokens], device=self.devices[0]), cache, row.tokens, len(tokens), [], None)
        return Held(row_of(cache, 0, 0, len(tokens)), capture_states(cache, self.contents, len(tokens)))

    def _read(
        self, ids: Tensor, cache: Cache, first: int, end: int, stops: Sequence[int], chunk: int | None
    ) -> list[Checkpoint]:
        """Read tokens [first, end) of all rows; return the states at the stops, on the CPU."""
        ids, taken = ids.to(self.devices[0]), []
        for start, stop in pairwise(self._ends(first, end, stops, chunk or CHUNK_TOKENS)):
            read(self.model, ids[:, start:stop], cache, start)
            if stop in stops:
                taken.append(on_cpu(capture_states(cache, self.contents, stop)))
        return taken

    def _ends(self, first: int, end: int, stops: Sequence[int], chunk: int) -> list[int]:
        """Return the beginning of the first forward pass, and the ends of all, rising."""
        if self.found.several:
            return sorted({first, end, *stops, *range(first, end, chunk)})
        return [first, *range(max(first + 1, min([*stops, end]) if first == 0 else 0), end + 1)]

    def watch(self, cache: Cache, taken: int) -> Watch:
        """Return what takes checkpoints of the answer, after so many of the prompt."""
        return Watch(cache, self.contents, self.width, self.every, max(1, self.most - taken))


def unfit(call: PrefixCall) -> str:
    """Return why a call of a model with recurrent states is left to the stock generate; "" where it is not."""
    if any(row.pad or not row.whole for row in call.rows):
        return "a row of the prompt has masked tokens, which may change a state"
    if call.call.mode is GenerationMode.ASSISTED_GENERATION:
        return "assisted decoding rolls back what a state cannot"
    if call.call.settings.cache_implementation == "static":
        return "static caches of some releases of Transformers leave out its states"
    return ""


class Watch(LogitsProcessor):
    """Takes checkpoints at ends of blocks while the model generates: the latest, and every `every` blocks."""

    def __init__(self, cache: Cache, contents: Sequence[LayerContent], width: int, every: int, most: int) -> None:
        self.cache, self.contents, self.width, self.every, self.most = cache, contents, width, every, most
        self.taken: list[Checkpoint] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores as they are."""
        tokens = int(input_ids.shape[1])
        if tokens % self.width == 0:
            if self.taken and self.taken[-1].tokens // self.width % self.every:
                self.taken.pop()
            self.taken.append(on_cpu(capture_states(self.cache, self.contents, tokens)))
            del self.taken[: max(0, len(self.taken) - self.most)]
        return scores


def on_cpu(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose tensors are on the CPU."""
    return Checkpoint(checkpoint.tokens, {key: state.cpu() for key, state in checkpoint.states.items()})


def row_states(checkpoint: Checkpoint, row: int) -> Checkpoint:
    """Return the states of one row, [1, ...] each, in memory of their own."""
    states: dict[Any, Tensor] = {key: state[row : row + 1].clone() for key, state in checkpoint.states.items()}
    return Checkpoint(checkpoint.tokens, states)
