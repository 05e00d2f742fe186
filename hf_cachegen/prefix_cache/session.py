"""From arguments of generate to its result, by way of the prefix cache."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hf_cachegen.errors import CacheGenError, TensorError, UnsupportedModelError
from hf_cachegen.models.call import GenerateCall
from hf_cachegen.models.kinds import layer_contents
from hf_cachegen.models.layers import dtype_name
from hf_cachegen.models.recurrent import Checkpoint
from hf_cachegen.models.requirements import positions_change
from hf_cachegen.models.row_cache import row_geometry, row_of
from hf_cachegen.models.running import kv_devices, layer_devices
from hf_cachegen.models.state import fresh_state
from hf_cachegen.prefix_cache.binding import Binding, bind
from hf_cachegen.prefix_cache.block import Block
from hf_cachegen.prefix_cache.call import ONE_BY_ONE, FirstStep, Known, PrefixCall
from hf_cachegen.prefix_cache.checkpoint import encode_checkpoint
from hf_cachegen.prefix_cache.keys import chain, checkpoint_key
from hf_cachegen.prefix_cache.levels import Time
from hf_cachegen.prefix_cache.loading import NOTHING, Loaded, Loader
from hf_cachegen.prefix_cache.resuming import Resuming
from hf_cachegen.prefix_cache.stateful import Held, Stateful, Watch, row_states, unfit
from hf_cachegen.prefix_cache.storage import Storage
from hf_cachegen.prefix_cache.tiers import Found
from hf_cachegen.streaming.prefill_speed import KNOWN_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOG = logging.getLogger("hf_cachegen.prefix_cache")


@dataclass(frozen=True)
class Prefix:
    """What a call begins with.

    Attributes:
        cache: a stock cache.
        stored: for each row of the prompt, the number of blocks that need not be stored.
        states: of a model with recurrent states: new checkpoints, [rows of the prompt, ...] each.
        coarse: number of blocks that were loaded below their stored level.
        resumed: (row of the prompt, tokens) of the checkpoints that rows begin at.
        watch: what takes checkpoints of the answer.
        held: tokens that were held before `seconds`, of a model with recurrent states.
        seconds: time of reading what the stock generate is not left.
    """

    cache: Cache
    stored: list[int]
    coarse: int = 0
    states: list[Checkpoint] = field(default_factory=list)
    resumed: list[tuple[int, int]] = field(default_factory=list)
    watch: Watch | None = None
    held: int | None = None
    seconds: float = 0.0


class Session:
    """One call. Arguments are those of `PrefixCache.generate`."""

    def __init__(
        self, prefix_cache: Storage, model: PreTrainedModel, stock: Callable[..., Any],
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
            if prefix is None:
                return self.stock(*args, **kwargs)
        except (TypeError, TensorError):
            return self.stock(*args, **kwargs)  # its own message is the better one
        except (CacheGenError, RuntimeError, OSError, sqlite3.Error) as error:  # of a full device, too
            self.counters.add(errors=1)
            LOG.warning("the prompt is computed without the prefix cache: %s", error)
            return self.stock(*args, **kwargs)
        timer = FirstStep()
        processors = [timer] if prefix.watch is None else [timer, prefix.watch]
        result = self.start(self.model, call.call, prefix.cache, processors, call.end)
        try:
            self._measure(call, binding, timer, prefix)
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
        devices = kv_devices(self.model)
        if self.model.training or torch.is_autocast_enabled(_device(self.model).type):
            LOG.info("without the prefix cache: keys and values of training mode or autocast are not the model's own")
            self.counters.add(unsupported=1)
            return None
        call = PrefixCall(self.model, arguments, devices)
        longest = max((len(row.tokens) for row in call.rows), default=0)
        if longest == 0 or positions_change(self.model.config, 1, longest):
            LOG.info("without the prefix cache: the rotary frequencies depend on the prompt's length")
            self.counters.add(unsupported=1)
            return None
        binding = bind(self.prefix_cache, self.model)
        if binding.continuation is not None and (reason := unfit(call)):
            LOG.info("without the prefix cache: the model has recurrent states, and %s", reason)
            self.counters.add(unsupported=1)
            return None
        return call, binding

    def _prefix(self, call: PrefixCall, binding: Binding) -> Prefix | None:
        """Find and load what is stored of the prompt, and make the cache to start from; None where there is none."""
        own, width = self.prefix_cache, self.prefix_cache.rules.block_tokens
        chains = [chain(binding.family.salt, row.tokens, width) for row in call.rows]
        left, started = self._left(call, binding), time.perf_counter()
        where = [
            own.tiers.find(keys) if len(row.tokens) >= own.rules.min_tokens else Found(())
            for row, keys in zip(call.rows, chains, strict=True)
        ]
        resuming = None
        local = [found.runs[0][1] if found.runs and found.runs[0][0] is None else 0 for found in where]
        if binding.continuation is not None:
            stateful = Stateful(self.model, binding.continuation, own.rules)
            resuming = Resuming(own.tiers, self.model, binding.family, stateful, call.length)
            where = [resuming.cut(row, chains[row], found, left) for row, found in enumerate(where)]
        loaded, keep = [NOTHING] * len(chains), self._keeper(chains)
        stored, coarse = [found.count for found in where], 0
        if any(stored) and self._pays(call, binding, where):
            loader = Loader(own.tiers, binding, self.model.config, dtype_name(self.model.dtype), call.devices, keep)
            loaded, decoded = loader.rows(chains, where, left)
            stored = [row.blocks for row in loaded]  # what could not be read is stored again
            if resuming is not None:
                loaded = [resuming.settle(row, chains[row], where[row], got, left) for row, got in enumerate(loaded)]
            coarse = loader.coarse
            if decoded:
                binding.load.add(decoded * width, time.perf_counter() - started)
                binding.decode.add(decoded * width, loader.decode_seconds)
        seconds = time.perf_counter() - started
        if resuming is None:
            prefix = Prefix(call.begin([row.tensors for row in loaded]), stored, coarse=coarse)
        else:
            for block, data in resuming.arrived:
                keep(block, data)
            # Blocks after the checkpoint are computed, but need not be stored again.
            stored = [
                max(count, held) if count == found.count else count
                for count, held, found in zip(stored, local, where, strict=True)
            ]
            begun = self._resumed(call, resuming, loaded)
            if begun is None:
                return None
            prefix = replace(begun, stored=stored, coarse=coarse)
        reused = call.reused([row.blocks * width for row in loaded])
        computed = call.tokens - reused
        saved = self._prefill_seconds(binding, 0, reused)
        self.counters.add(
            calls=1, hits=int(reused > 0), blocks_coarse=coarse, tokens_reused=reused, tokens_computed=computed,
            load_seconds=seconds, saved_seconds=0.0 if saved is None or not reused else saved - seconds,
        )  # fmt: skip
        LOG.info("prefix cache: %d of %d prompt tokens reused, loaded in %.3f s", reused, call.tokens, seconds)
        return prefix

    def _resumed(self, call: PrefixCall, resuming: Resuming, loaded: Sequence[Loaded]) -> Prefix | None:
        """Begin a call of a model with recurrent states; None where the stock generate computes it all."""
        stateful, begun = resuming.stateful, time.perf_counter()
        rows = [
            Held(got.tensors, resuming.found[row]) if got.blocks else Held() for row, got in enumerate(loaded)
        ]
        found = stateful.begin(call, rows, call.length >= self.prefix_cache.rules.min_tokens)
        if found is None:
            LOG.info("without the prefix cache: the model cannot read the prompt in the chunks asked for")
            self.counters.add(unsupported=1)
            return None
        cache, states = found
        watch = stateful.watch(cache, len(states)) if call.call.mode in ONE_BY_ONE else None
        keys = [(row, held.tokens) for row, held in enumerate(rows) if held.tokens]
        return Prefix(cache, [], 0, states, keys, watch, max(row.tokens for row in rows), time.perf_counter() - begun)

    def _keeper(self, chains: Sequence[Sequence[bytes]]) -> Callable[[Block, bytes], None]:
        """Return what keeps blocks from elsewhere in the local tier."""

        def keep(block: Block, data: bytes) -> None:
            before = next((keys[: block.depth] for keys in chains if block.parent in keys[: block.depth]), [])
            if block.missing:
                self.prefix_cache.complete(block.key, before)
            else:
                self.prefix_cache.keep(block, data, before)

        return keep

    def _pays(self, call: PrefixCall, binding: Binding, where: Sequence[Found]) -> bool:
        """Report whether loading is expected to be faster than computing."""
        if self.prefix_cache.rules.reuse == "always":
            return True
        counts = [found.count * self.prefix_cache.rules.block_tokens for found in where]
        seconds = [self._prefill_seconds(binding, 0, count) for count in counts]
        known = None if None in seconds else sum(value for value in seconds if value is not None)
        if binding.load.pays(sum(counts), known):
            return True
        self.counters.add(declined=1)
        return False

    def _left(self, call: PrefixCall, binding: Binding) -> Time:
        """Return how long blocks may be waited for: until the rest of the prompt must be computed for the SLO."""
        if self.slo is None:
            return Time()
        end, width = self.begun + self.slo, self.prefix_cache.rules.block_tokens

        def seconds(blocks: int) -> float:
            rest = self._prefill_seconds(binding, blocks * width, max(1, call.length - blocks * width)) or 0.0
            return max(0.0, end - rest - time.monotonic())

        def refinements(blocks: int) -> float:
            return max(0.0, seconds(blocks) - (binding.decode.seconds(blocks * width) or 0.0))

        return Time(seconds, refinements if binding.coding.levels > 1 else None)

    @staticmethod
    def _prefill_seconds(binding: Binding, first: int, tokens: int) -> float | None:
        return binding.prefill.seconds(first, tokens) if binding.prefill.known and tokens else None

    def _measure(self, call: PrefixCall, binding: Binding, timer: FirstStep, prefix: Prefix) -> None:
        """Learn the model's prefill speed from what the call computed before its first token."""
        cached = call.end if prefix.held is None else prefix.held
        computed = call.length - cached
        if len(call.rows) == 1 and timer.rows == 1 and timer.seconds and computed >= KNOWN_TOKENS:
            binding.prefill.add(cached, computed, prefix.seconds + timer.seconds)
            self.prefix_cache.worker.submit(0, binding.prefill.save)

    def _store(self, call: PrefixCall, binding: Binding, prefix: Prefix, result: Any) -> None:
        """Hand what is new to the background: copies of the new whole blocks of every row, and new checkpoints."""
        width, used, seen = self.prefix_cache.rules.block_tokens, [], set()
        for text in call.known(prefix.cache, result):
            if len(text.tokens) < self.prefix_cache.rules.min_tokens:
                continue
            keys = chain(binding.family.salt, text.tokens, width)
            resumed = [tokens // width for row, tokens in prefix.resumed if row == text.prompt_row]
            used.append([*keys, *(checkpoint_key(keys[blocks - 1]) for blocks in resumed)])
            if prefix.coarse:
                continue  # what follows a coarser level is not what this family promises
            for depth in range(min(prefix.stored[text.prompt_row], len(keys)), len(keys)):
                if keys[depth] not in seen:
                    seen.add(keys[depth])
                    self._store_block(binding, prefix.cache, text, keys, depth)
            taken = [(states, text.prompt_row) for states in prefix.states]
            taken += [(states, text.row) for states in (prefix.watch.taken if prefix.watch else ())]
            for states, row in taken:
                blocks = states.tokens // width
                if blocks <= len(keys) and checkpoint_key(keys[blocks - 1]) not in seen:
                    seen.add(checkpoint_key(keys[blocks - 1]))
                    self._store_states(binding, row_states(states, row), keys[:blocks])
        for chained in used:
            self.prefix_cache.note_use(chained)

    def _store_states(self, binding: Binding, states: Checkpoint, keys: Sequence[bytes]) -> None:
        encode = partial(encode_checkpoint, binding.family, keys[-1], len(keys), states)
        self.prefix_cache.store(checkpoint_key(keys[-1]), encode, states.nbytes, keys)

    def _store_block(
        self, binding: Binding, cache: Cache, text: Known, keys: Sequence[bytes], depth: int
    ) -> None:
        width = self.prefix_cache.rules.block_tokens
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


def _device(model: PreTrainedModel) -> torch.device:
    """Return the device of the first layer."""
    return layer_devices(model, len(layer_contents(model.config)))[0]
