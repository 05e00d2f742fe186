"""A probe: what a model computes for the first tokens of a context, to be compared where no hash can see a difference.

Hooks, edited attributes, patched functions and other code change keys and values without changing a weight or a
setting. So an artifact records one number for each layer, K or V, and token of the first PROBE_TOKENS tokens: the
projection of that vector onto fixed signs. A loader runs the tokens again, in one forward pass, and compares. The
states of recurrent layers after these tokens count like keys and values: each is cut into as many equal parts.

Let x be the vector recorded, y the one computed now, of n channels, and s its signs: |s.(y - x)| / |y| estimates the
relative difference |y - x| / |y|. Of a layer's tokens the root mean square over all but the farthest quarter counts, so
that a few tokens that a mixture of experts routes otherwise do not decide; the largest over layers, K and V is the
distance. Equal models on other kernels, batch sizes or devices are apart by rounding (`TOLERANCES`; docs/identity.md
has what was measured); a smaller change than that cannot be distinguished from another kernel, and matters as little.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_cachegen.errors import ManifestError, WrongWeightsError
from hf_cachegen.models import compat, encoder_decoder
from hf_cachegen.models.checksum import words
from hf_cachegen.models.indexed import with_index
from hf_cachegen.models.kinds import STATE_TENSORS, empty_cache, kv_layers, layer_contents
from hf_cachegen.models.running import evaluation_mode, layer_devices
from hf_cachegen.models.state import fresh_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 16
"""Tokens recorded and run again: what a forward pass costs least for, and enough that chance does not hide a change."""
KEPT_TOKENS = 0.75
"""Part of a layer's tokens that counts, the nearest ones."""
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Distances between two runs of one model, by dtype: at least four times the largest that was measured."""
SIGN_SEED = 0x7072_6F62_65


@dataclass(frozen=True)
class Distance:
    """The largest relative difference of a probe, and where it is."""

    value: float
    layer: int
    side: str


def record(keys: Sequence[Tensor], values: Sequence[Tensor]) -> str:
    """Record the first tokens of a cache.

    Args:
        keys: For each layer [1, heads, tokens, dim].
        values: For each layer [1, heads, tokens, dim].

    Returns:
        Base64 of little-endian float32 [layers, 2, min(tokens, PROBE_TOKENS)]: 2.5 kB for 30 layers.
    """
    return base64.b64encode(_projected(keys, values)[0].numpy().astype("<f4").tobytes()).decode()


@torch.no_grad()
def run(model: PreTrainedModel, input_ids: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Compute keys and values of the first PROBE_TOKENS tokens of a context, in one forward pass in evaluation mode.

    Returns:
        (keys, values) as for `record`; the states of recurrent layers follow, as pairs of convolution and recurrence.
    """
    if model.config.is_encoder_decoder:
        return encoder_decoder.probe_kv(model, list(input_ids[:PROBE_TOKENS]))
    contents = layer_contents(model.config)
    device = layer_devices(model, len(contents))[0]
    cache = empty_cache(model.config)
    ids = torch.tensor([list(input_ids[:PROBE_TOKENS])], device=device)
    with evaluation_mode(model), fresh_state(model):
        compat.run(model, ids, cache, last_logits_only=True)
    layers = kv_layers(cache)
    keys, values = [layer.keys for layer in layers], [with_index(layer) for layer in layers]
    for layer, content in zip(cache.layers, contents, strict=False):
        for number in range(getattr(layer, "number_of_states", 0) if content.states else 0):
            pair = [getattr(layer, name)[number] for name in STATE_TENSORS]
            keys.append(_parts(pair[0], ids.shape[1]))
            values.append(_parts(pair[1], ids.shape[1]))
    return keys, values


def _parts(state: Tensor | None, parts: int) -> Tensor:
    """Cut a state [1, ...] into equal parts, padded with zeros: [1, 1, parts, values]. No state is zeros."""
    flat = torch.zeros(1) if state is None else state.detach().flatten().float()
    size = -(-len(flat) // parts)
    return nn.functional.pad(flat, (0, parts * size - len(flat))).reshape(1, 1, parts, size)


def distance(recorded: str, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Distance:
    """Compare a record with keys and values computed now. Raises ManifestError for a record that is none of them."""
    now, norms = _projected(keys, values)
    try:
        data = base64.b64decode(recorded, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ManifestError("fingerprint: the probe is not base64") from error
    if len(data) != 4 * now.numel():
        raise ManifestError(f"fingerprint: the probe has {len(data)} bytes, this model's has {4 * now.numel()}")
    then = torch.frombuffer(bytearray(data), dtype=torch.float32).view(now.shape)
    by_layer = _by_layer((now - then).abs() / norms.clamp_min(torch.finfo(torch.float32).tiny))
    place = int(by_layer.argmax())
    return Distance(float(by_layer.max()), place // 2, ("keys", "values")[place % 2])


def apart(recorded: str, own: str) -> float:
    """Compare two records of PROBE_TOKENS same tokens, without running a model.

    A record has no norms, so the projections' own size stands for them. Raises ManifestError for a text that is none.
    """
    try:
        data = [base64.b64decode(text, validate=True) for text in (recorded, own)]
    except (ValueError, binascii.Error) as error:
        raise ManifestError("the probe of a block is not base64") from error
    if len(data[0]) != len(data[1]) or len(data[0]) % (4 * PROBE_TOKENS) or not data[0]:
        raise ManifestError(f"the probe of a block has {len(data[0])} bytes, this model's has {len(data[1])}")
    then, now = (torch.frombuffer(bytearray(part), dtype=torch.float32).view(-1, PROBE_TOKENS) for part in data)
    norms = now.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return float(_by_layer((now - then).abs() / norms).max())


def tolerance_of(dtype: str) -> float:
    """Return the distance that rounding in a dtype allows."""
    if dtype == "float32" and torch.get_float32_matmul_precision() != "highest":
        dtype = "float16"  # TF32 multiplies numbers of as many digits
    return TOLERANCES.get(dtype, max(TOLERANCES.values()))


def check(model: PreTrainedModel, input_ids: Sequence[int], recorded: str, dtype: str) -> None:
    """Run the first tokens again and compare. Raises WrongWeightsError, which says what was compared."""
    tolerance = tolerance_of(dtype)
    found = distance(recorded, *run(model, input_ids))
    if not found.value <= tolerance:
        count = min(len(input_ids), PROBE_TOKENS)
        encoder = model.config.is_encoder_decoder
        contents = [] if encoder else layer_contents(model.config)
        of_states = not encoder and found.layer >= sum(content.kind is not None for content in contents)
        what = "states of recurrent layers" if of_states else f"{found.side} of layer {found.layer}"
        raise WrongWeightsError(
            f"the model's weights and settings are those of the cache, but its {what} for "
            f"the first {count} tokens differ from the recorded ones by {found.value:.2g} (relative; rounding in "
            f"{dtype} allows {tolerance:.2g}): look for forward hooks, edited attributes or patched code, or pass "
            'verify="weights" to skip this comparison'
        )


def _projected(keys: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(projections, norms) of every layer's K and V: float32 [layers, 2, tokens], on the CPU."""
    projections, norms = [], []
    for tensor in (side for pair in zip(keys, values, strict=True) for side in pair):
        rows = tensor[0, :, :PROBE_TOKENS].detach().transpose(0, 1).flatten(1).float().cpu()
        projections.append((rows * _signs(rows.shape[1])).sum(1))
        norms.append(rows.norm(dim=1))
    shape = (len(keys), 2, -1)
    return torch.stack(projections).view(shape), torch.stack(norms).view(shape)


def _by_layer(relative: Tensor) -> Tensor:
    """Root mean square of the differences [..., tokens] of the nearest tokens."""
    nearest = relative.nan_to_num(nan=torch.inf).sort(-1).values[..., : max(1, int(KEPT_TOKENS * relative.shape[-1]))]
    return nearest.square().mean(-1).sqrt()


@lru_cache(maxsize=16)
def _signs(channels: int) -> Tensor:
    """Fixed pseudo-random signs: float32 [channels]."""
    bits = words(-(-channels // 64), SIGN_SEED)
    return torch.tensor([1.0 - 2 * (bits[channel // 64] >> channel % 64 & 1) for channel in range(channels)])
