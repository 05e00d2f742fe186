"""Prompts with media beside a cached context: what of them is cached, and what the model is fed with the rest.

The media of a prompt are compared with those of the context one by one. Media that are cached whole are not computed
again. Positions are those of the whole prompt, computed from its media by the model itself: models with positions of
several axes (M-RoPE) need the grids of all pictures, and must not use the offset that an earlier call has left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from hf_cachegen.errors import TensorError, UnsupportedModelError
from hf_cachegen.models.compat import CACHE_ARGUMENT, prepared_inputs, prompt_positions, takes, unwrapped
from hf_cachegen.models.continuation import continuation_of
from hf_cachegen.models.kinds import empty_cache, holds_states, layer_contents
from hf_cachegen.models.media import MediaInputs, Medium, Span
from hf_cachegen.models.prefill import StateOptions
from hf_cachegen.models.prefix import Reuse, common_tokens, match, reuse_of
from hf_cachegen.models.recurrent import Checkpoints, capture_states
from hf_cachegen.models.running import layer_devices

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Covered:
    """The part of a batch of prompts that a context covers.

    Attributes:
        reuse: the cached positions.
        media: the media of the prompts; None where there are none.
        spans: the media of each row.
    """

    reuse: Reuse
    media: MediaInputs | None
    spans: tuple[tuple[Span, ...], ...]

    def rest(self, repeats: int) -> dict[str, Tensor]:
        """Return the model inputs for the media that are not cached, with each row `repeats` times."""
        if self.media is None:
            return {}
        left = [[span for span in row if span.end > self.reuse.length] for row in self.spans]
        return self.media.select([span for row in left for _ in range(repeats) for span in row])


def cover(
    context: Tensor, held: Sequence[Medium], input_ids: Tensor, attention_mask: Tensor, media: MediaInputs | None
) -> Covered:
    """Compare a context with a batch of prompts, tokens and media.

    Args:
        context: int64 [tokens].
        held: the media of the context.
        input_ids: int64 [rows, length], the prompts.
        attention_mask: [rows, length], 0 on pads.
        media: the media of the prompts.

    Raises:
        TensorError: the shapes do not fit.
    """
    if media is None and not held:
        return Covered(match(context, input_ids, attention_mask), None, ())
    pads, shared = common_tokens(context, input_ids, attention_mask)
    spans: list[tuple[Span, ...]] = []
    for row, (pad, common) in enumerate(zip(pads, shared, strict=True)):
        own = () if media is None else media.spans[row]
        found, shared[row] = _compare(held, own, media, row, pad, common)
        spans.append(tuple(found))
    reuse = reuse_of(pads, shared, input_ids.shape[1], min(shared) == len(context))
    length = reuse.length
    while media is not None and length > 0 and not media.may_cut(spans, length):
        length -= 1
    return Covered(replace(reuse, length=length), media, tuple(spans))


def _compare(
    held: Sequence[Medium], own: Sequence[Span], media: MediaInputs | None, row: int, pad: int, common: int
) -> tuple[list[Span], int]:
    """Compare the media of a context with those of a row.

    Returns:
        The media of the row, split where the context has fewer of them together; and the number of tokens in common.
    """
    rest, same = list(own), []
    for medium in held:
        index = next((i for i, span in enumerate(rest) if span.kind.name == medium.kind), None)
        if index is None or media is None or medium.end > common:
            common = min(common, medium.first)
            break
        first, *others = _split(rest[index], medium, media, row, pad)
        if (first.items, first.first - pad, first.end - pad) != (medium.items, medium.first, medium.end) or (
            media.digest(first, row) != medium.digest
        ):
            common = min(common, medium.first)
            break
        rest[index : index + 1] = others
        same.append(first)
    spans = sorted([*same, *rest], key=lambda span: span.first)
    # A medium of the prompt that the context does not have: its placeholders may be text there.
    return spans, min([common, *(max(0, span.first - pad) for span in rest)])


def _split(span: Span, medium: Medium, media: MediaInputs, row: int, pad: int) -> list[Span]:
    """Split media that belong together after those that the context holds."""
    end, more = medium.end + pad, span.items - medium.items
    later = media.placeholders[row, end : span.end].nonzero() if more > 0 else torch.empty(0)
    if not len(later):
        return [span]
    return [
        replace(span, items=medium.items, end=end),
        replace(span, start=span.start + medium.items, items=more, first=end + int(later[0])),
    ]


def positions(model: PreTrainedModel, ids: Tensor, mask: Tensor, media: MediaInputs) -> dict[str, Tensor]:
    """Return the positions of a whole prompt with media, as arguments of generate."""
    return prompt_positions(model, ids, {**media.tensors, **media.types, "attention_mask": mask})


def prefill_media(
    model: PreTrainedModel, ids: Tensor, media: MediaInputs, tokens: int, states: StateOptions, progress: bool
) -> tuple[DynamicCache, Checkpoints]:
    """Compute a context with media, as the stock generate computes a prompt.

    Args:
        model: the model, in evaluation mode and with fresh state.
        ids: the context, int64 [1, tokens].
        media: its media.
        tokens: tokens per forward pass; more where a medium would be cut.
        states: which checkpoints of recurrent states to keep; a checkpoint within a medium lies before it.
        progress: show a progress bar.

    Returns:
        The filled cache, which holds all tokens of sliding layers too; and the checkpoints.

    Raises:
        TensorError: the media do not fit the placeholders.
        UnsupportedModelError: the model reads a single token at a time after its recurrent states.
    """
    stops: list[int] = []
    if holds_states(model.config):
        found = continuation_of(model)
        if not found.several:
            raise UnsupportedModelError(
                f"{type(unwrapped(model)).__name__} reads a single token at a time after its recurrent states, so a "
                "question cannot hold media: keep the text before the first medium"
            )
        stops = [_before(media, position) for position in states.positions(ids.shape[1], found)]
    kept, contents = [], layer_contents(model.config)
    past, bar = empty_cache(model.config), tqdm(desc="prefill", unit="token", total=ids.shape[1], disable=not progress)
    ids = ids.to(layer_devices(model, len(contents))[0])
    prepare = unwrapped(model).prepare_inputs_for_generation
    spans, first = media.spans, 0
    whole: Mapping[str, Any] = {**media.types, **positions(model, ids, torch.ones_like(ids), media)}
    options = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    while first < ids.shape[1]:
        end = min(first + tokens, ids.shape[1])
        while not media.may_cut(spans, end):
            end += 1
        end = min([end, *(stop for stop in stops if stop > first)])
        inputs = {
            CACHE_ARGUMENT: past, "use_cache": True, "is_first_iteration": True, **options,
            **{name: value[..., :end].to(ids.device) for name, value in whole.items()},
        }  # fmt: skip
        chunk = media.select([span for span in spans[0] if first <= span.first < end])
        chunk = {name: value.to(ids.device) for name, value in chunk.items()}
        try:
            model(**prepared_inputs(prepare, ids[:, :end], end - first, inputs, chunk), return_dict=True)
        except ValueError as error:
            raise TensorError(
                f"the model cannot put the media into tokens {first} to {end} of the context: {error}; pass the whole "
                "output of the processor"
            ) from error
        bar.update(end - first)
        first = end
        if first in stops:
            kept.append(capture_states(past, contents, first))
    bar.close()
    return past, Checkpoints(tuple(kept))


def _before(media: MediaInputs, position: int) -> int:
    """Return the last position up to this one at which a context may be cut; 0 if there is none."""
    while position > 0 and not media.may_cut(media.spans, position):
        position -= 1
    return position
