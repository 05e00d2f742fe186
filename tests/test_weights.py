"""Every byte of every weight counts in every storage, and an unchanged model is not read again."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from hf_cachegen import CacheGenCache, attach
from hf_cachegen.codec import native
from hf_cachegen.errors import UnsupportedModelError, WrongWeightsError
from hf_cachegen.models import checksum, weights
from hf_cachegen.models.buffers import computed_buffers, wrong_buffers
from hf_cachegen.models.checksum import checksums, torch_block_sums
from hf_cachegen.models.identity import identify
from hf_cachegen.models.object_state import model_state
from hf_cachegen.models.weights import weights_checksum
from tests import tiny_models

SIZES = (0, 1, 7, 8, 9, 16376, 16384, 16385, 100_003)


def noise(count: int, offset: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count + offset,), dtype=torch.uint8, generator=generator)[offset:]


@pytest.mark.skipif(not native.available(), reason="needs the compiled library")
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("size", SIZES)
def test_torch_and_the_library_agree(size: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.Isa[isa.upper()] not in native.available_isas():
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setenv("CACHEGEN_CPU", isa)
    for offset in (0, 3):
        data = noise(size, offset)
        fast = checksums([data])
        monkeypatch.setattr(native, "available", lambda *_: False)
        assert fast == checksums([data])
        monkeypatch.undo()
        monkeypatch.setenv("CACHEGEN_CPU", isa)


def test_the_definition_is_fixed() -> None:
    """Checksums are stored in artifacts, so they must not change."""
    data = torch.arange(100_003, dtype=torch.int64).remainder(251).to(torch.uint8)
    assert checksums([data]) == ["fe31f70abbb188e50dad21ed4dbbd42a"]
    words = data[:24].view(torch.int64).tolist()
    keys = [checksum.signed(key) for key in checksum.words(3, checksum.KEY_SEED)]

    def half(value: int, shift: int) -> int:
        low = value >> shift & 0xFFFF_FFFF
        return low - (1 << 32) if low >> 31 else low

    mixed = [word ^ key for word, key in zip(words, keys, strict=True)]
    products = sum(half(value, 0) * half(value, 32) for value in mixed)
    sums = [sum(words) & checksum.MASK_64, products & checksum.MASK_64]
    assert torch_block_sums(data[:24]).tolist() == [checksum.signed(value) for value in sums]


@pytest.mark.parametrize("position", [0, 1, 8191, 16383, 16384, 99_999])
def test_every_bit_counts(position: int) -> None:
    data = noise(100_000)
    known = checksums([data])
    for bit in range(8):
        data[position] ^= 1 << bit
        assert checksums([data]) != known
        data[position] ^= 1 << bit
    assert checksums([data]) == known


def test_flipped_signs_and_exchanged_values_count() -> None:
    """A plain sum of products does not find these changes."""
    values = torch.randn(4096)
    known = checksums([values])
    for change in ([1, 3], [1, 2], list(range(4096)), list(range(1, 4096, 2))):
        other = values.clone()
        other[change] = -other[change]
        assert checksums([other]) != known
    exchanged = values.clone()
    exchanged[[0, 2, 1, 3]] = values[[2, 0, 3, 1]]
    assert checksums([exchanged]) != known


def test_strides_do_not_count() -> None:
    values = torch.randn(300, 70)
    assert checksums([values]) == checksums([values.t().contiguous().t()])
    assert checksums([values[:, ::2]]) == checksums([values[:, ::2].contiguous()])


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int16])
def test_any_dtype_can_be_read(dtype: torch.dtype) -> None:
    values = torch.randn(33).to(dtype)
    assert checksums([values, values[0]])[0] == checksums([values.clone()])[0]


def test_every_value_of_every_weight_counts() -> None:
    model = tiny_models.make("llama")
    known = weights_checksum(model)
    for number, weight in enumerate(model.parameters()):
        position = number * 7919 % weight.numel()
        with torch.no_grad():
            before = weight.view(-1)[position].clone()
            weight.view(-1)[position] = torch.nextafter(before, torch.tensor(torch.inf))
            assert weights_checksum(model) != known
            weight.view(-1)[position] = before
    assert weights_checksum(model) == known


def test_names_and_shapes_count() -> None:
    model = tiny_models.make("llama")
    known = weights_checksum(model)
    attention = model.model.layers[0].self_attn
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
    assert weights_checksum(model) != known


def test_wrappers_and_copies_do_not_count() -> None:
    model = tiny_models.make("llama")
    known = weights_checksum(model)
    assert weights_checksum(copy.deepcopy(model)) == known
    assert weights_checksum(torch.compile(model)) == known


def test_an_unchanged_model_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.make("llama")
    known = identify(model)
    read: list[int] = []

    def counted(tensors: Any) -> list[str]:
        found = checksums(tensors)
        read.append(len(found))
        return found

    monkeypatch.setattr(weights, "checksums", counted)
    with torch.no_grad():
        model(tiny_models.tokens(5))
        model.generate(tiny_models.tokens(5), max_new_tokens=2)
    assert identify(model) is known
    assert read == []
    with torch.no_grad():
        model.model.norm.weight += 1
    assert identify(model).checksum != known.checksum
    assert read == [1]


def test_tied_weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.make("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    read: list[int] = []
    stock = weights.checksums
    monkeypatch.setattr(weights, "checksums", lambda tensors: read.append(len(f := stock(tensors))) or f)
    tied = weights_checksum(model)
    assert read == [len(list(model.parameters()))]
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.clone())
    assert weights_checksum(model) == tied


@pytest.mark.parametrize("change", ["counted", "past the counter", "another tensor", "inference mode"])
def test_a_write_changes_the_state(change: str) -> None:
    model = tiny_models.make("llama")
    weight = model.model.layers[1].mlp.up_proj.weight
    state, known = model_state(model), weights_checksum(model)
    assert state.same(model_state(model))
    with torch.no_grad():
        if change == "counted":
            weight[3, 4] += 1e-3
        elif change == "past the counter":
            weight.data.mul_(1.01)
        elif change == "another tensor":
            weight.data = weight.data * 1.01
        else:
            with torch.inference_mode():
                model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight * 1.01)
    assert not state.same(model_state(model))
    assert weights_checksum(model) != known


def _patch(owner: Any, name: str) -> Callable[[Any, pytest.MonkeyPatch], None]:
    """Replace a function with one that does the same."""
    return lambda model, patch: patch.setattr(owner, name, partial(getattr(owner, name)))


def _set(name: str, value: Any) -> Callable[[Any, pytest.MonkeyPatch], None]:
    return lambda model, patch: setattr(model.model.layers[2].self_attn, name, value)


CHANGES: dict[str, Callable[[Any, pytest.MonkeyPatch], Any]] = {
    "hook": lambda model, patch: model.lm_head.register_forward_hook(lambda *_: None),
    "pre-hook": lambda model, patch: model.lm_head.register_forward_pre_hook(lambda *_: None),
    "hook of all modules": lambda model, patch: patch.setitem(torch_module._global_forward_hooks, 10**9, print),
    "forward of an object": lambda model, patch: setattr(model.model.norm, "forward", model.model.norm.forward),
    "forward of a class": _patch(modeling_llama.LlamaRMSNorm, "forward"),
    "function of the file": _patch(modeling_llama, "apply_rotary_pos_emb"),
    "function that it calls": _patch(modeling_llama, "rotate_half"),
    "attention function": lambda model, patch: patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", print),
    "scalar": _set("scaling", 0.3),
    "dtype": _set("kept_dtype", torch.bfloat16),
    "function": _set("kept_function", nn.functional.gelu),
    "tuple": _set("kept_tuple", (1, 3)),
    "list edited": lambda model, patch: model.model.layers[2].self_attn.kept_list.append(3),
    "dictionary edited": lambda model, patch: model.model.layers[2].self_attn.kept_dict.update(a=2),
    "training": lambda model, patch: model.train(),
    "class of a module": lambda model, patch: setattr(model.lm_head, "__class__", type("Other", (nn.Linear,), {})),
    "layers exchanged": lambda model, patch: model.model.layers._modules.update({"1": model.model.layers[2]}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_hooks_settings_and_code_change_the_state(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.make("llama")
    attention = model.model.layers[2].self_attn
    attention.kept_dtype, attention.kept_function = torch.float32, nn.functional.silu
    attention.kept_tuple, attention.kept_list, attention.kept_dict = (1, 2), [1, 2], {"a": 1}
    state = model_state(model)
    assert model_state(model, state).same(state)
    CHANGES[change](model, monkeypatch)
    assert not model_state(model, state).same(state)
    assert not state.same(model_state(model))


def test_objects_of_a_call_do_not_change_the_state() -> None:
    """Models leave positions and masks of a call in attributes."""
    model = tiny_models.make("llama")
    model.rope_deltas = torch.zeros(1)
    state = model_state(model)
    model.rope_deltas = torch.ones(1)
    assert model_state(model, state).same(state)


@pytest.mark.parametrize("kind", ["plain", "attached", "offloaded"])
def test_what_is_known_of_a_model_does_not_keep_it_alive(kind: str) -> None:
    model = tiny_models.make("llama")
    if kind == "attached":
        attach(model)
    if kind == "offloaded":  # accelerate's hooks hold methods of the model
        model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert identify(copy.deepcopy(model)).checksum == identify(model).checksum
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_every_byte_is_read_again_on_request(tmp_path: Path) -> None:
    """A write through `.data` that changes no sampled value is not seen otherwise."""
    model, tokens = tiny_models.make("llama"), tiny_models.tokens(20)
    CacheGenCache.from_context(model, tokens, profile=None).save_pretrained(tmp_path)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-5
    CacheGenCache.from_pretrained(tmp_path, model=model)
    with pytest.raises(WrongWeightsError, match="other weights"):
        CacheGenCache.from_pretrained(tmp_path, model=model, verify="all")
    with pytest.raises(WrongWeightsError, match="other weights"):
        CacheGenCache.from_pretrained(tmp_path, model=model)


def test_computed_buffers_are_compared_within_rounding() -> None:
    model = tiny_models.make("llama")
    known = computed_buffers(model)
    assert list(known) == ["model.rotary_emb.inv_freq"]
    rotary = model.model.rotary_emb
    rotary.inv_freq = torch.nextafter(rotary.inv_freq, torch.tensor(2.0))
    assert computed_buffers(model) != known
    assert wrong_buffers(known, computed_buffers(model)) == []
    rotary.inv_freq[-1] *= 1.0001
    assert wrong_buffers(known, computed_buffers(model)) == list(known)
    assert wrong_buffers(known, computed_buffers(tiny_models.make("llama").bfloat16())) == list(known)
    assert wrong_buffers(known, {}) == list(known)


def test_larger_buffers_are_compared_by_sums() -> None:
    model = tiny_models.make("llama")
    model.register_buffer("scale", torch.randn(50, 7), persistent=False)
    known = computed_buffers(model)
    model.scale *= 1 + 1e-7
    assert wrong_buffers(known, computed_buffers(model)) == []
    model.scale[3, 3] *= 1.01
    assert wrong_buffers(known, computed_buffers(model)) == ["scale"]


def test_frequencies_that_the_model_rewrites_are_left_out() -> None:
    """The frequencies of dynamic rope grow with the longest input seen."""
    model = tiny_models.make("llama")
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = 32
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    state, known = model_state(model), computed_buffers(model)
    before = model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        model(tiny_models.tokens(80))
    assert not torch.equal(before, model.model.rotary_emb.inv_freq)
    assert computed_buffers(model) == known
    assert state.tensors == model_state(model).tensors
    model.model.rotary_emb.original_inv_freq *= 1.01
    assert computed_buffers(model) != known


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloading_does_not_change_the_checksum(where: str, tmp_path: Path) -> None:
    known = weights_checksum(tiny_models.make("llama"))
    model = tiny_models.make("llama")
    if where == "cpu":
        model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    assert weights_checksum(model) == known
    with torch.no_grad():
        model(tiny_models.tokens(4))
    assert weights_checksum(model) == known
    if where == "disk":
        next(tmp_path.glob("*lm_head*")).unlink()
        with pytest.raises(UnsupportedModelError, match=r"weight lm_head.weight is offloaded to .* cannot be read"):
            weights_checksum(model)


class Half(torch.Tensor):
    """A tensor subclass that does not name its inner tensors."""


def test_a_weight_that_cannot_be_read_is_refused_by_name() -> None:
    model = tiny_models.make("llama")
    weight = nn.Parameter(torch.randn(3).as_subclass(Half))
    weight.scales = [torch.ones(3)]
    model.odd = weight
    with pytest.raises(UnsupportedModelError, match=r"weight odd is a .*Half, whose value cannot be read .*scales"):
        weights_checksum(model)
    model.odd = nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(UnsupportedModelError, match="weight odd is on the meta device"):
        identify(model)
