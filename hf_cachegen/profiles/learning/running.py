"""Run a model for learning: a context's exact keys and values, and the rotation of the keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_cachegen.codec.geometry import LayerGeometry
from hf_cachegen.codec.profile import Rotary
from hf_cachegen.errors import TensorError
from hf_cachegen.models.compat import run, takes
from hf_cachegen.models.continuation import positions
from hf_cachegen.models.kinds import empty_cache, holds_states, layer_contents
from hf_cachegen.models.layers import capture
from hf_cachegen.models.recurrent import Checkpoint, capture_states
from hf_cachegen.models.requirements import positions_change
from hf_cachegen.models.state import fresh_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sample = tuple[Tensor, Tensor]
"""(context_ids [1, tokens], continuation_ids [1, tokens]), int64."""
NO_ROTATION = Rotary("none", torch.empty(0, dtype=torch.float64))
PROBE_TOKENS = 16
PROBE_TOKEN = 7
FLAT = 0.2
"""A rotation is the model's if undoing it leaves less than this share of the spread of a repeated token's keys."""


def require_sample(index: int, sample: Sample) -> None:
    """Raise TensorError unless the sample is a context of two or more tokens and a continuation of one or more."""
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise TensorError(f"sample {index}: expected (context_ids, continuation_ids), got {type(sample).__name__}")
    for name, ids, least in (("context", sample[0], 2), ("continuation", sample[1], 1)):
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            found = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TensorError(f"sample {index}: its {name} must be an int64 tensor [1, tokens], got {found}")
        if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < least:
            raise TensorError(
                f"sample {index}: its {name} must be [1, tokens] with at least {least} tokens, got {list(ids.shape)}"
            )


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: Tensor) -> tuple[list[Tensor], list[Tensor], tuple[LayerGeometry, ...]]:
    """Return the (keys, values, layers) of a context [1, tokens]."""
    past = empty_cache(model.config)
    with fresh_state(model):
        run(model, ids.to(model.device), past, last_logits_only=True)
    kv = capture(past, model.config)
    return list(kv.keys), list(kv.values), kv.geometry.layers


@torch.no_grad()
def states_after(model: PreTrainedModel, ids: Tensor) -> Checkpoint | None:
    """Return the states of recurrent layers after a context [1, tokens]; None for a model without them."""
    if not holds_states(model.config):
        return None
    past = empty_cache(model.config)
    with fresh_state(model):
        run(model, ids.to(model.device), past)
    return capture_states(past, layer_contents(model.config), ids.shape[1])


@torch.no_grad()
def find_rotary(model: PreTrainedModel) -> Rotary:
    """Find the rotation of the model's keys.

    The first layer's keys of a repeated token depend only on the token and the position. If undoing the rotation of the
    model's own rotary module makes them equal, this rotation is returned, else style "none".
    """
    none = NO_ROTATION
    modules = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    frequencies = {tuple(m.inv_freq.double().flatten().tolist()) for m in modules}
    if len(frequencies) != 1 or positions_change(model.config, 1, PROBE_TOKENS):
        return none
    inv_freq = torch.tensor(frequencies.pop(), dtype=torch.float64)
    scaling = float(getattr(modules[0], "attention_scaling", 1.0))
    token = torch.full((1, PROBE_TOKENS), PROBE_TOKEN % model.config.get_text_config().vocab_size)
    keys, _, layers = prefill(model, token)
    if layers[0].kind == "mla" or 2 * len(inv_freq) > layers[0].k_dim:
        return none
    if holds_states(model.config):
        return _rotary_after_states(model, token, inv_freq, scaling)
    rows = keys[0][0].float().transpose(0, 1).cpu()
    spread = {"none": _spread(rows)}
    for style in ("half", "interleaved"):
        spread[style] = _spread(Rotary(style, inv_freq, scaling).apply(rows, torch.arange(PROBE_TOKENS), -1))
    best = min(("half", "interleaved"), key=spread.__getitem__)
    return Rotary(best, inv_freq, scaling) if spread[best] < FLAT * spread["none"] else none  # type: ignore[arg-type]


def _rotary_after_states(model: PreTrainedModel, token: Tensor, inv_freq: Tensor, scaling: float) -> Rotary:
    """Find the rotation in a model whose first keys also depend on the states of the layers before them.

    These do not depend on positions. So the same tokens at later positions have the same keys, rotated further.
    """
    if not takes(model, "position_ids"):
        return NO_ROTATION
    rows = []
    for first in (0, PROBE_TOKENS):
        past = empty_cache(model.config)
        with fresh_state(model):
            run(model, token.to(model.device), past, **positions(model, token.to(model.device), first))
        rows.append(capture(past, model.config).keys[0][0].float().transpose(0, 1).cpu())
    apart = {"none": float((rows[1] - rows[0]).norm())}
    for style in ("half", "interleaved"):
        rotary = Rotary(style, inv_freq, scaling)
        at = torch.arange(PROBE_TOKENS)
        apart[style] = float((rotary.apply(rows[1], at + PROBE_TOKENS, -1) - rotary.apply(rows[0], at, -1)).norm())
    best = min(("half", "interleaved"), key=apart.__getitem__)
    found = Rotary(best, inv_freq, scaling)  # type: ignore[arg-type]
    return found if apart[best] < FLAT * apart["none"] else NO_ROTATION


def _spread(rows: Tensor) -> float:
    return float((rows - rows.mean(0)).norm() / rows.norm().clamp_min(1e-9))
