"""Contexts of encoder-decoder models: what the decoder reads of an encoded text or sound.

The context is the encoder's input, one row of it. Kept are the keys and values of every cross-attention layer, one for
each position of the encoder, which the codec stores like any others. The encoder's output, and the decoder's own keys
and values for a prefix of its prompt, are kept exactly. The encoder attends in both directions, so a context is reused
for the same input alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from hf_cachegen.artifact.tensors import NamedTensor
from hf_cachegen.codec.geometry import Geometry, LayerGeometry
from hf_cachegen.errors import CorruptError, TensorError, UnsupportedModelError, WrongModelError
from hf_cachegen.models.compat import CACHE_ARGUMENT, takes, unwrapped
from hf_cachegen.models.inputs import one_row
from hf_cachegen.models.layers import KVTensors, dtype_name
from hf_cachegen.models.media import KINDS, Medium, digest_of
from hf_cachegen.models.running import evaluation_mode
from hf_cachegen.models.state import fresh_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENCODER_OUTPUT, DECODER_IDS = "encoder-output", "decoder-ids"
"""Names in an artifact of the encoder's output, and of the decoder's prefix."""
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Relative differences of logits with kept and with computed keys that are rounding."""
REFUSED = {
    "florence2": "its generate embeds the text of a prompt together with its pictures before the encoder",
    "musicgen": "its decoder reads several codebooks for each token",
    "musicgen_melody": "its decoder reads several codebooks for each token",
}
"""Reasons for refusing encoder-decoder models, by model type."""


@dataclass(frozen=True)
class EncoderState:
    """What is kept of an encoded input beside the keys and values of cross-attention.

    Attributes:
        output: the encoder's output, [1, positions, hidden size].
        decoder_ids: a prefix of the decoder's prompt, int64 [1, tokens]; no tokens if none is kept.
        keys: the decoder's own keys for that prefix, for each layer [1, heads, tokens, dim]; empty if none is kept.
        values: the same for values.
    """

    output: Tensor
    decoder_ids: Tensor
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()

    def named(self) -> list[NamedTensor]:
        """Return the tensors to store in an artifact."""
        found = [NamedTensor(ENCODER_OUTPUT, self.output)]
        if self.keys:
            found.append(NamedTensor(DECODER_IDS, self.decoder_ids))
            for index, pair in enumerate(zip(self.keys, self.values, strict=True)):
                found += [NamedTensor(_name(side, index), tensor) for side, tensor in enumerate(pair)]
        return found

    @classmethod
    def from_named(cls, tensors: Iterable[NamedTensor], geometry: Geometry) -> EncoderState | None:
        """Read the tensors of an artifact, None where it has no output of an encoder. Inverse of `named`; tensors of
        other names are left out.

        Raises:
            CorruptError: a tensor is missing, or of another shape or dtype than the geometry has.
        """
        held = {named.name: named.tensor for named in tensors}
        output, ids = held.get(ENCODER_OUTPUT), held.get(DECODER_IDS, torch.zeros(1, 0, dtype=torch.long))
        if output is None:
            return None
        if output.ndim != 3 or tuple(output.shape[:2]) != (1, geometry.tokens):
            raise _damaged(ENCODER_OUTPUT, f"[1, {geometry.tokens}, hidden size]", output)
        if ids.ndim != 2 or ids.shape[0] != 1 or ids.dtype != torch.long:
            raise _damaged(DECODER_IDS, "int64 [1, tokens]", ids)
        sides: tuple[list[Tensor], list[Tensor]] = [], []
        for index, layer in enumerate(geometry.layers if ids.shape[1] else ()):
            for side, (heads, dim) in enumerate(((layer.heads, layer.k_dim), (layer.v_heads, layer.v_dim))):
                tensor = held.get(_name(side, index))
                if tensor is None or (*tensor.shape, dtype_name(tensor.dtype)) != (
                    1, heads, ids.shape[1], dim, geometry.dtype
                ):  # fmt: skip
                    raise _damaged(_name(side, index), f"{geometry.dtype} [1, {heads}, {ids.shape[1]}, {dim}]", tensor)
                sides[side].append(tensor)
        return cls(output, ids, tuple(sides[0]), tuple(sides[1]))

    def prefix(self, decoder_ids: Tensor) -> int:
        """Return the number of leading tokens that all rows share with the kept prefix, but for the last one.

        Args:
            decoder_ids: int64 [rows, tokens], the decoder's prompt.
        """
        size = min(self.decoder_ids.shape[1], decoder_ids.shape[1] - 1) if self.keys else 0
        same = (decoder_ids[:, :size].cpu() == self.decoder_ids[:, :size]).all(0)
        return int(same.int().cumprod(0).sum())


@dataclass(frozen=True)
class EncoderInput:
    """The input of an encoder.

    Attributes:
        name: of the model input: "input_ids", "input_features", ...
        value: [rows, ...].
        mask: [rows, ...], 0 on pads; None if none was given.
    """

    name: str
    value: Tensor
    mask: Tensor | None

    def media(self, positions: int) -> tuple[Medium, ...]:
        """Return the sound or picture of a context, which fills all positions; nothing for a text."""
        if self.name == "input_ids":
            return ()
        kind = next((kind.name for kind in KINDS if self.name in kind.inputs), "")
        return (Medium(kind, 1, 0, positions, self.digest(0)),)

    def digest(self, row: int) -> str:
        """Return the XXH3-128 of a row, and of its mask where that has zeros."""
        tensors = {self.name: self.value[row : row + 1]}
        if self.mask is not None and bool((self.mask[row] == 0).any()):
            tensors["attention_mask"] = self.mask[row : row + 1]
        return digest_of(tensors)

    def same(self, ids: Tensor, media: tuple[Medium, ...]) -> bool:
        """Report whether every row is the input of a context: its token ids [1, tokens], or its sound."""
        if media:
            return all(self.digest(row) == media[0].digest for row in range(len(self.value)))
        if self.value.ndim != 2 or self.value.shape[1] != ids.shape[1] or self.name != "input_ids":
            return False
        masked = self.mask is not None and bool((self.mask == 0).any())
        return not masked and bool((self.value.cpu() == ids).all())


def require_encoder_decoder(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for an encoder-decoder model whose contexts cannot be kept."""
    base = unwrapped(model)
    name, reason = type(base).__name__, REFUSED.get(model.config.model_type)
    if reason is None and not takes(model, "encoder_outputs"):
        reason = "its forward pass takes no output of an encoder"
    if reason is not None:
        raise UnsupportedModelError(f"the encoder of {name} cannot be left out: {reason}")


def input_name(model: PreTrainedModel) -> str:
    """Return the name of the encoder's input."""
    base = unwrapped(model)
    return str(getattr(base.get_encoder(), "main_input_name", base.main_input_name))


def context_input(model: PreTrainedModel, inputs: Any) -> tuple[EncoderInput, Tensor | None]:
    """Return the input of the encoder, and the decoder's prefix, of a context.

    Args:
        model: the model.
        inputs: token ids, [tokens] or [1, tokens]; or model inputs by name, with or without `decoder_input_ids`.

    Raises:
        TensorError: they are not one row, or a text has pads.
        UnsupportedModelError: an input is not known.
    """
    name = input_name(model)
    named = dict(inputs.items()) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    named = {key: value for key, value in named.items() if value is not None}
    unknown = sorted(named.keys() - {name, "attention_mask", "decoder_input_ids"})
    if unknown or name not in named:
        raise UnsupportedModelError(
            f"expected {name}, with or without attention_mask and decoder_input_ids, for the encoder of "
            f"{type(unwrapped(model)).__name__}; got {sorted(named)}: leave out {unknown}"
        )
    value = one_row(named[name]) if name == "input_ids" else named[name]
    mask = named.get("attention_mask")
    known = any(name in kind.inputs for kind in KINDS)
    if not isinstance(value, Tensor) or len(value) != 1 or not (known or name == "input_ids"):
        raise TensorError(f"expected {name} as a tensor of one row, got {list(getattr(value, 'shape', []))}")
    if name == "input_ids" and mask is not None and bool((torch.as_tensor(mask) == 0).any()):
        raise TensorError("expected a context without pads, got an attention_mask with zeros")
    decoder = named.get("decoder_input_ids")
    return EncoderInput(name, value, mask), None if decoder is None else one_row(decoder)


@torch.no_grad()
def encode(model: PreTrainedModel, given: EncoderInput, decoder_ids: Tensor | None) -> tuple[KVTensors, EncoderState]:
    """Run the encoder, and the decoder over its prefix.

    Args:
        model: the model.
        given: the input of the encoder, one row.
        decoder_ids: the decoder's prefix, int64 [1, tokens]; None to keep none.

    Returns:
        The keys and values of cross-attention, one for each position of the encoder; and everything else.

    Raises:
        UnsupportedModelError: the decoder does not continue from what it keeps.
    """
    base = unwrapped(model)
    device = base.device if base.device.type != "meta" else torch.device("cpu")
    with evaluation_mode(model), fresh_state(model):
        inputs = {given.name: given.value.to(device)}
        if given.mask is not None:
            inputs["attention_mask"] = given.mask.to(device)
        encoder = base.get_encoder()
        read = {key: value for key, value in inputs.items() if key == given.name or takes(encoder, key)}
        output = encoder(**read, return_dict=True).last_hidden_state
        ids = torch.tensor([[_start(base)]]) if decoder_ids is None else decoder_ids
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        expected = _decode(model, ids.to(device), output, inputs.get("attention_mask"), cache)
        kv = _captured(cache.cross_attention_cache, type(base).__name__, output)
        own: list[Any] = cache.self_attention_cache.layers
        # The layers are views: the second step below must not extend them.
        pairs = [(layer.keys.clone(), layer.values.clone()) for layer in own]
        state = EncoderState(output, torch.zeros(1, 0, dtype=torch.long))
        if decoder_ids is not None:
            state = EncoderState(output, decoder_ids, tuple(k for k, _ in pairs), tuple(v for _, v in pairs))
        rebuilt = build(kv, 1)
        if (held := state.prefix(ids)) > 0:
            fill_prefix(rebuilt, state, held, 1)
        got = _decode(model, ids[:, held:].to(device), output, inputs.get("attention_mask"), rebuilt)
    error = (got.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)
    if not float(error) <= TOLERANCES.get(model.dtype, max(TOLERANCES.values())):
        raise UnsupportedModelError(
            f"{type(base).__name__} computes other logits from the keys of its cross-attention than from the output of "
            f"its encoder (by {float(error):.2g}, relative), so its context cannot be reused"
        )
    return kv, state


def build(kv: KVTensors, rows: int) -> EncoderDecoderCache:
    """Build a stock cache of `rows` rows, whose cross-attention is filled and whose self-attention is empty."""
    cross = DynamicCache()
    for index, (keys, values) in enumerate(zip(kv.keys, kv.values, strict=True)):
        cross.update(*(side.expand(rows, -1, -1, -1).contiguous() for side in (keys, values)), index)
    return EncoderDecoderCache(DynamicCache(), cross)


def fill_prefix(cache: EncoderDecoderCache, state: EncoderState, tokens: int, rows: int) -> None:
    """Fill an empty self-attention cache with the first `tokens` tokens of the kept prefix."""
    for index, (keys, values) in enumerate(zip(state.keys, state.values, strict=True)):
        cross = cache.cross_attention_cache.layers[index].keys
        sides = (side[:, :, :tokens].to(cross.device).expand(rows, -1, -1, -1).contiguous() for side in (keys, values))
        cache.self_attention_cache.update(*sides, index)


def outputs(state: EncoderState, rows: int, device: torch.device) -> BaseModelOutput:
    """Return the encoder's output for `rows` rows, as the stock generate takes it."""
    return BaseModelOutput(last_hidden_state=state.output.to(device).expand(rows, -1, -1).contiguous())


_shapes: WeakKeyDictionary[Any, tuple[LayerGeometry, ...]] = WeakKeyDictionary()


@torch.no_grad()
def require_decoder(model: PreTrainedModel, geometry: Geometry, state: EncoderState | None) -> None:
    """Raise WrongModelError unless a geometry is that of the cross-attention of a model.

    The decoder is run once for each model, over one position.
    """
    base = unwrapped(model)
    if state is None:
        raise WrongModelError(f"expected the output of an encoder for {type(base).__name__}, the cache has none")
    if base not in _shapes:
        width = state.output.shape[-1]
        output = torch.zeros(1, 1, width, dtype=model.dtype, device=base.device)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        try:
            with evaluation_mode(model), fresh_state(model):
                _decode(model, torch.tensor([[_start(base)]], device=base.device), output, None, cache)
        except RuntimeError as error:
            raise WrongModelError(f"the decoder of {type(base).__name__} reads no output of width {width}") from error
        _shapes[base] = _captured(cache.cross_attention_cache, type(base).__name__, output).geometry.layers
    if geometry.layers != _shapes[base]:
        raise WrongModelError(
            f"expected the cross-attention of {len(_shapes[base])} layers as in {type(base).__name__}, the first of "
            f"them {_shapes[base][0]}; the cache has {len(geometry.layers)}, {geometry.layers[:1]}"
        )


def probe_kv(model: PreTrainedModel, ids: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Compute the keys and values of cross-attention for a short text."""
    kv, _ = encode(model, EncoderInput("input_ids", torch.tensor([ids]), None), None)
    return list(kv.keys), list(kv.values)


def _decode(model: PreTrainedModel, ids: Tensor, output: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    """Run the decoder; return the logits of its last token."""
    options = {} if mask is None or not takes(model, "attention_mask") else {"attention_mask": mask}
    encoded = BaseModelOutput(last_hidden_state=output)
    found = model(
        encoder_outputs=encoded, decoder_input_ids=ids, use_cache=True, return_dict=True,
        **{CACHE_ARGUMENT: cache}, **options,
    )  # fmt: skip
    logits: Tensor = found.logits[:, -1]
    return logits


def _captured(cross: DynamicCache, name: str, output: Tensor) -> KVTensors:
    layers: list[Any] = cross.layers
    for index, layer in enumerate(layers):
        if not layer.is_initialized or layer.keys.shape[2] != output.shape[1]:
            raise UnsupportedModelError(
                f"cross-attention layer {index} of {name} does not hold one key for each of {output.shape[1]} "
                "positions of the encoder, so its context cannot be kept"
            )
    if not layers:
        raise UnsupportedModelError(f"{name} keeps no keys of cross-attention")
    geometry = Geometry(
        layers=tuple(
            LayerGeometry("full", k.shape[1], k.shape[3], v.shape[1], v.shape[3], None)
            for k, v in ((layer.keys, layer.values) for layer in layers)
        ),
        tokens=int(output.shape[1]),
        batch=1,
        dtype=dtype_name(layers[0].keys.dtype),
    )
    return KVTensors(tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers), geometry)


def _start(base: Any) -> int:
    """Return the token with which the decoder starts."""
    for config in (base.generation_config, base.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if isinstance(token := getattr(config, name, None), int):
                return token
    return 0


def _name(side: int, index: int) -> str:
    return f"decoder-{('keys', 'values')[side]}-{index}"


def _damaged(name: str, expected: str, found: Tensor | None) -> CorruptError:
    got = "none" if found is None else f"{dtype_name(found.dtype)} {list(found.shape)}"
    return CorruptError(f"expected a tensor {name!r}, {expected}, got {got}: encode the context again")
