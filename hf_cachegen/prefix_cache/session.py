"""From arguments of generate to its result, by way of the prefix cache."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hf_cachegen.errors import CacheGenError, TensorError, UnsupportedModelError
from hf_cachegen.models.call import GenerateCall
from hf_cachegen.models.layers import dtype_name
from hf_cachegen.models.requirements import layer_kinds, positions_change
from hf_cachegen.models.row_cache import row_geometry, row_of
from hf_cachegen.models.running import layer_devices
from hf_cachegen.models.state import fresh_state
from hf_cachegen.prefix_cache.binding import Binding, bind
from hf_cachegen.prefix_cache.block import Block
from hf_cachegen.prefix_cache.cache import PrefixCache
from hf_cachegen.prefix_cache.call import FirstStep, Known, PrefixCall
from hf_cachegen.prefix_cache.keys import chain
from hf_cachegen.prefix_cache.loading import NOTHING, Loader
from hf_cachegen.prefix_cache.tiers import Found
from hf_cachegen.streaming.prefill_speed import KNOWN_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOG = logging.getLogger("hf_cachegen.prefix_cache")


@dataclass(frozen=True)
class Prefix:
    """What a call begins with: a stock cache, and the number of blocks of each row that need not be stored."""

    cache: Cache
    stored: list[int]


class Session:
    """One call. Arguments are those of `PrefixCache.generate`."""

    def __init__(
        self, prefix_cache: PrefixCache, model: PreTrainedModel, stock: Callable[..., Any],
        start: Callable[..., Any], slo: float | None,
    ) -> None:  # fmt: skip
        self.prefix_cache, self.model, self.stock, self.start, self.slo = prefix_cache, model, stock, start, slo
        self.begun = time.monotonic()
        self.counters = prefix_cache.counters

    def generate(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Generate. What the prefix cache cannot serve goes to the stock generate as it was given."""
        try:
            found = self._supported(args, kwargs)
            if found is None:
                return self.stock(*args, **kwargs)
            call, binding = found
            with fresh_state(self.model):
                prefix = self._prefix(call, binding)
        except (TypeError, TensorError):
            return self.stock(*args, **kwargs)  # its own message is the better one
        except (CacheGenError, RuntimeError, OSError, sqlite3.Error) as error:  # of a full device, too
            self.counters.add(errors=1)
            LOG.warning("the prompt is computed without the prefix cache: %s", error)
            return self.stock(*args, **kwargs)
        timer = FirstStep()
        result = self.start(self.model, call.call, prefix.cache, [timer])
        try:
            self._measure(call, binding, timer)
            self._store(call, binding, prefix, result)
        except Exception:  # the answer is there, and must not be lost
            self.counters.add(errors=1)
            LOG.exception("what this call computed is not stored, or in part")
        return result

    def _supported(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[PrefixCall, Binding] | None:
        """Return the call and its binding; None for a call that cannot start from a cache."""
        try:
            arguments = GenerateCall(self.model, args, kwargs)
        except UnsupportedModelError as error:
            LOG.info("without the prefix cache: %s", error)
            self.counters.add(unsupported=1)
            return None
        if getattr(arguments.settings, "is_assistant", False):
            return None
        if arguments.media is not None:
            LOG.info("without the prefix cache: the keys of its blocks are of tokens alone, and the prompt has media")
            self.counters.add(unsupported=1)
            return None
        devices = layer_devices(self.model, len(layer_kinds(self.model.config)))
        if self.model.training or torch.is_autocast_enabled(devices[0].type):
            LOG.info("without the prefix cache: keys and values of training mode or autocast are not the model's own")
            self.counters.add(unsupported=1)
            return None
        call = PrefixCall(self.model, arguments, devices)
        longest = max((len(row.tokens) for row in call.rows), default=0)
        if longest == 0 or positions_change(self.model.config, 1, longest):
            LOG.info("without the prefix cache: the rotary frequencies depend on the prompt's length")
            self.counters.add(unsupported=1)
            return None
        return call, bind(self.prefix_cache, self.model)

    def _prefix(self, call: PrefixCall, binding: Binding) -> Prefix:
        """Find and load what is stored of the prompt, and make the cache to start from."""
        own, width = self.prefix_cache, self.prefix_cache.block_tokens
        chains = [chain(binding.family.salt, row.tokens, width) for row in call.rows]
        where = [
            own.tiers.find(keys) if len(row.tokens) >= own.min_tokens else Found(())
            for row, keys in zip(call.rows, chains, strict=True)
        ]
        stored = [found.count for found in where]
        started, loaded = time.perf_counter(), [NOTHING] * len(chains)
        if any(stored) and self._pays(call, binding, where):
            loader = Loader(own.tiers, binding, self.model.config, dtype_name(self.model.dtype), call.devices,
                            self._keeper(chains))  # fmt: skip
            loaded, decoded = loader.rows(chains, where, partial(self._wait, call, binding))
            seconds = time.perf_counter() - started
            stored = [row.blocks for row in loaded]  # what could not be read is stored again
            if decoded:
                binding.load.add(decoded * width, seconds)
        seconds = time.perf_counter() - started
        cache = call.begin([row.tensors for row in loaded])
        reused = call.reused([row.blocks * width for row in loaded])
        computed = call.tokens - reused
        saved = self._prefill_seconds(binding, 0, reused)
        self.counters.add(
            calls=1, hits=int(reused > 0), tokens_reused=reused, tokens_computed=computed, load_seconds=seconds,
            saved_seconds=0.0 if saved is None or not reused else saved - seconds,
        )  # fmt: skip
        LOG.info("prefix cache: %d of %d prompt tokens reused, loaded in %.3f s", reused, call.tokens, seconds)
        return Prefix(cache, stored)

    def _keeper(self, chains: Sequence[Sequence[bytes]]) -> Callable[[Block, bytes], None]:
        """Return what keeps blocks from elsewhere in the local tier."""

        def keep(block: Block, data: bytes) -> None:
            before = next(keys for keys in chains if block.depth < len(keys) and keys[block.depth] == block.key)
            self.prefix_cache.keep(block, data, before[: block.depth])

        return keep

    def _pays(self, call: PrefixCall, binding: Binding, where: Sequence[Found]) -> bool:
        """Report whether loading is expected to be faster than computing."""
        if self.prefix_cache.reuse == "always":
            return True
        counts = [found.count * self.prefix_cache.block_tokens for found in where]
        seconds = [self._prefill_seconds(binding, 0, count) for count in counts]
        known = None if None in seconds else sum(value for value in seconds if value is not None)
        if binding.load.pays(sum(counts), known):
            return True
        self.counters.add(declined=1)
        return False

    def _wait(self, call: PrefixCall, binding: Binding, block: int) -> float | None:
        """Return how long this block may be waited for: until the rest of the prompt must be computed for the SLO."""
        if self.slo is None:
            return None
        held = block * self.prefix_cache.block_tokens
        rest = self._prefill_seconds(binding, held, max(1, call.length - held)) or 0.0
        return max(0.0, self.begun + self.slo - rest - time.monotonic())

    @staticmethod
    def _prefill_seconds(binding: Binding, first: int, tokens: int) -> float | None:
        return binding.prefill.seconds(first, tokens) if binding.prefill.known and tokens else None

    def _measure(self, call: PrefixCall, binding: Binding, timer: FirstStep) -> None:
        """Learn the model's prefill speed from what the call computed before its first token."""
        cached = call.end
        computed = call.length - cached
        if len(call.rows) == 1 and timer.rows == 1 and timer.seconds and computed >= KNOWN_TOKENS:
            binding.prefill.add(cached, computed, timer.seconds)
            self.prefix_cache.worker.submit(0, binding.prefill.save)

    def _store(self, call: PrefixCall, binding: Binding, prefix: Prefix, result: Any) -> None:
        """Hand what is new to the background: copies of the new whole blocks of every row."""
        width, used, seen = self.prefix_cache.block_tokens, [], set()
        for text in call.known(prefix.cache, result):
            if len(text.tokens) < self.prefix_cache.min_tokens:
                continue
            keys = chain(binding.family.salt, text.tokens, width)
            used.append(keys)
            for depth in range(min(prefix.stored[text.prompt_row], len(keys)), len(keys)):
                if keys[depth] not in seen:
                    seen.add(keys[depth])
                    self._store_block(binding, prefix.cache, text, keys, depth)
        for keys in used:
            self.prefix_cache.note_use(keys)

    def _store_block(
        self, binding: Binding, cache: Cache, text: Known, keys: Sequence[bytes], depth: int
    ) -> None:
        width = self.prefix_cache.block_tokens
        first = depth * width
        try:
            views = row_of(cache, text.row, text.pad + first, text.pad + first + width)
        except TensorError as error:
            LOG.info("block %s is not stored: %s", keys[depth].hex()[:16], error)
            return
        # Copies: the cache may go to the caller, who may change it.
        tensors: list[Tensor] = [view.detach().to("cpu", copy=True).contiguous() for view in views]
        parent = keys[depth - 1] if depth else binding.family.salt
        tokens = text.tokens[first : first + width]
        layers = row_geometry(self.model.config, tensors)
        encode = partial(
            binding.coding.encode, binding.family, parent, depth, tokens, tensors[::2], tensors[1::2], layers
        )
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.prefix_cache.store(keys[depth], encode, nbytes, keys[:depth])
