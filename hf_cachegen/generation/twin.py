"""A second object over the weights of a model, whose inputs leave out the cached tokens and media.

The first step of assisted decoding feeds the whole prompt even beside a cache, and its candidates need the whole
prompt. So does the first step with a cache that holds states alone. The stock generate would also compute the features
of all media that it is given, and repeat them for beams in the order of the whole prompt's placeholders. The model
itself is not changed, so other threads may use it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_cachegen.models.compat import prepared_inputs, unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def twin_of(model: PreTrainedModel, prepare_rest: Callable[..., Any]) -> PreTrainedModel:
    """Return the second object.

    Args:
        model: the model, or a wrapper of it.
        prepare_rest: called with the model's own `prepare_inputs_for_generation`, and then with its arguments.
    """
    model = unwrapped(model)
    prepare = model.prepare_inputs_for_generation
    twin = object.__new__(type(model))
    twin.__dict__.update(model.__dict__)
    twin.__dict__["prepare_inputs_for_generation"] = functools.wraps(prepare)(functools.partial(prepare_rest, prepare))
    return twin


def rest_by_cache(
    media: Mapping[str, Tensor] | None, prepare: Any, input_ids: Tensor, next_sequence_length: int | None = None,
    **inputs: Any,
) -> Any:  # fmt: skip
    """Prepare the tokens, and in the first step the media, that the cache does not hold."""
    return prepared_inputs(prepare, input_ids, next_sequence_length, inputs, media)


def rest_of_first(
    rest: int, prepare: Any, input_ids: Tensor, next_sequence_length: int | None = None, **inputs: Any
) -> Any:
    """Prepare the last `rest` tokens in the first step, and what the model asks for in the others."""
    if not inputs.get("is_first_iteration"):
        return prepared_inputs(prepare, input_ids, next_sequence_length, inputs)
    # A mask for the whole prompt would not fit its rest. No row of such a call is padded.
    mask = inputs.get("attention_mask")
    inputs["attention_mask"] = None if mask is None else mask[:, -rest:]
    return prepared_inputs(prepare, input_ids, rest, inputs)
