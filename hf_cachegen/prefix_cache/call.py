"""One call of generate with a prefix cache: what it can begin with, and what is new when it has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode

from hf_cachegen.models.call import GenerateCall
from hf_cachegen.models.row_cache import cached_rows, dynamic_cache, holds_keys, static_cache
from hf_cachegen.prefix_cache.advance import advance
from hf_cachegen.prefix_cache.rows import common_end, prompt_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ONE_BY_ONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
"""Strategies after which row r of the cache holds row r of the result. Beams are reordered: of those only the prompt
is kept."""


@dataclass(frozen=True)
class Known:
    """The text that one row of a filled cache holds.

    Attributes:
        row: row of the cache.
        prompt_row: row of the prompt that it began with.
        pad: positions before the text.
        tokens: the text, prompt and generated.
    """

    row: int
    prompt_row: int
    pad: int
    tokens: tuple[int, ...]


class PrefixCall:
    """A call of generate whose prompt may begin with what is stored.

    Args:
        model: the model.
        call: the call's arguments, which can start from a cache.
        devices: the device of each layer.
    """

    def __init__(self, model: PreTrainedModel, call: GenerateCall, devices: Sequence[torch.device]) -> None:
        self.model, self.call, self.devices = model, call, devices
        self.rows = prompt_rows(call.ids, call.mask)
        self.length = int(call.ids.shape[1])
        self.chunk = call.settings.prefill_chunk_size
        self.end = 0

    @property
    def repeats(self) -> int:
        """Rows of the cache for each row of the prompt."""
        return max(self.call.settings.num_beams, self.call.settings.num_return_sequences)

    @property
    def tokens(self) -> int:
        """Tokens of all rows of the prompt."""
        return sum(len(row.tokens) for row in self.rows)

    def begin(self, tensors: Sequence[Sequence[Tensor]]) -> Cache:
        """Return the stock cache to start from, all rows filled up to `self.end`.

        Args:
            tensors: what is loaded of each row: layer 0's keys, its values, ...; empty for nothing.
        """
        loaded = [int(row[0].shape[2]) if row else 0 for row in tensors]
        self.end = common_end(self.rows, loaded, self.length, self.chunk)
        filled = advance(self.model, self.rows, tensors, self.end, self.chunk, self.devices[0])
        pads = [row.pad for row in self.rows]
        settings, repeats = self.call.settings, self.repeats
        end = self.end if any(row is not None for row in filled) else 0
        if settings.cache_implementation == "static":
            return static_cache(self.model.config, filled, pads, end, repeats, self.call.longest)
        return dynamic_cache(self.model.config, filled, pads, end, repeats)

    def reused(self, loaded: Sequence[int]) -> int:
        """Return the tokens of the prompt that need not be computed, of these loaded ones."""
        return sum(min(count, max(0, self.end - row.pad)) for row, count in zip(self.rows, loaded, strict=True))

    def known(self, cache: Cache, result: Any) -> Iterator[Known]:
        """Yield the text of every row of the cache that generating has left."""
        sequences: Tensor = result if isinstance(result, Tensor) else result.sequences
        count, length = cached_rows(cache)
        if not any(map(holds_keys, cache.layers)):  # states alone, which count nothing
            count, length = len(self.rows) * self.repeats, int(sequences.shape[1]) - 1
        repeats = count // len(self.rows)
        texts = None
        if self.call.mode in ONE_BY_ONE and sequences.shape[0] == count:
            texts = sequences[:, self.length :].tolist()
        for row in range(count):
            prompt = self.rows[row // repeats]
            if texts is None and row % repeats:
                continue  # the same prompt again
            tokens = prompt.tokens
            if texts is not None and prompt.whole:
                tokens += tuple(self._until_end(texts[row]))
            yield Known(row, row // repeats, prompt.pad, tokens[: max(0, length - prompt.pad)])

    def _until_end(self, generated: list[int]) -> list[int]:
        """Cut what pads a row that ended before others."""
        ends = self.call.settings.eos_token_id
        last = {ends} if isinstance(ends, int) else set(torch.as_tensor(ends).flatten().tolist()) if ends else set()
        found = next((index for index, token in enumerate(generated) if token in last), None)
        return generated if found is None else generated[: found + 1]


class FirstStep(LogitsProcessor):
    """Measures when the first logits are there. Changes nothing."""

    def __init__(self) -> None:
        self.begun, self.seconds, self.rows = time.perf_counter(), 0.0, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores as they are."""
        if not self.rows:
            if scores.is_cuda:
                torch.cuda.synchronize(scores.device)
            self.seconds, self.rows = time.perf_counter() - self.begun, int(scores.shape[0])
        return scores
