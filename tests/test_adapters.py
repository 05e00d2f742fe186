"""Every setting of an adapter that changes keys or values counts; its name, and disabled adapters, do not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_cachegen import CacheGenCache
from hf_cachegen.errors import UnsupportedModelError, WrongWeightsError
from hf_cachegen.models.adapters import adapter_checksums, require_identifiable
from hf_cachegen.models.fingerprint import Fingerprint
from hf_cachegen.models.weights import weights_checksum
from tests import tiny_models
from tests.generation_support import CONTEXT, fed, prompt

TARGETS = ["k_proj", "v_proj", "down_proj"]


class Layer(nn.Module):
    """A layer with the attributes of a tuner layer of PEFT, without PEFT."""

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("r", "scaling", "lora_dropout")

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B, self.lora_dropout = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self.active_adapters: list[str] = []
        self.disable_adapters = False

    def add(self, name: str, scaling: float = 1.0, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.lora_A[name] = nn.Linear(32, 4, bias=False)
        self.lora_B[name] = nn.Linear(4, 16, bias=False)
        self.lora_dropout[name] = nn.Dropout(0.1)
        self.r[name], self.scaling[name] = 4, scaling
        self.active_adapters.append(name)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        for name in [] if self.disable_adapters or self.merged_adapters else self.active_adapters:
            out = out + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return out


@pytest.fixture(name="wrapped")
def _wrapped() -> tuple[Any, Layer]:
    model = tiny_models.make("llama")
    attention = model.model.layers[1].self_attn
    attention.k_proj = Layer(attention.k_proj)
    return model, attention.k_proj


def test_a_wrapper_without_adapters_is_the_model(wrapped: tuple[Any, Layer]) -> None:
    model, layer = wrapped
    known = Fingerprint.of(tiny_models.shared("llama"), [1])
    known.check(model)
    layer.add("french")
    with pytest.raises(WrongWeightsError, match=r"adapters \[\], .* has \['french'\]"):
        known.check(model)
    layer.disable_adapters = True
    known.check(model)
    assert weights_checksum(model) == known.checksum


@pytest.mark.parametrize("change", ["scaling", "weight", "rank", "another", "order"])
def test_settings_and_weights_of_an_adapter_count(wrapped: tuple[Any, Layer], change: str) -> None:
    model, layer = wrapped
    layer.add("french")
    if change == "order":
        layer.add("german", seed=1)
    known = Fingerprint.of(model, [1])
    known.check(model)
    if change == "scaling":
        layer.scaling["french"] *= 1.01
    elif change == "weight":
        with torch.no_grad():
            layer.lora_B["french"].weight[3, 1] += 1e-4
    elif change == "rank":
        layer.r["french"] = 8
    elif change == "another":
        layer.add("german", seed=1)
    else:
        layer.active_adapters.reverse()
    with pytest.raises(WrongWeightsError, match="adapters"):
        known.check(model)


def test_names_and_dropout_do_not_count(wrapped: tuple[Any, Layer]) -> None:
    model, layer = wrapped
    layer.add("french")
    known = adapter_checksums(model)
    layer.active_adapters.clear()
    layer.add("francais")
    layer.lora_dropout["francais"] = nn.Identity()
    assert adapter_checksums(model) == known


def test_a_merged_adapter_is_part_of_the_weights(wrapped: tuple[Any, Layer]) -> None:
    model, layer = wrapped
    layer.add("french")
    layer.merged_adapters.append("french")
    assert adapter_checksums(model) == ()
    layer.disable_adapters = True
    with pytest.raises(UnsupportedModelError, match=r"\['french'\] of .*k_proj are merged and disabled at once"):
        require_identifiable(model)


def test_a_context_that_invokes_an_activated_adapter_is_refused_before_the_prefill() -> None:
    model: Any = tiny_models.make("llama")
    model.peft_config = {"french": SimpleNamespace(alora_invocation_tokens=[5, 6]), "plain": SimpleNamespace()}
    with fed(model) as lengths, pytest.raises(UnsupportedModelError, match=r"tokens \[5, 6\] of .* 'french'"):
        CacheGenCache.from_context(model, [3, 4, 5, 6], profile=None)
    assert not lengths
    assert CacheGenCache.from_context(model, [3, 4, 6, 5], profile=None).kv.geometry.tokens == 4


def lora(**options: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})


def adapted(config: Any, seed: int = 2) -> Any:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_models.make("llama"), config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name or "ia3_" in name or "hada_" in name:
                weight.normal_(std=0.3)
    return model


CONFIGS: dict[str, Callable[[], Any]] = {
    "alpha": lambda: lora(lora_alpha=9),
    "rank": lambda: lora(r=8, lora_alpha=16),
    "rank-stabilised": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "alpha pattern": lambda: lora(alpha_pattern={"v_proj": 9}),
    "fewer layers": lambda: lora(layers_to_transform=[0, 1]),
    "saved module": lambda: lora(modules_to_save=["embed_tokens"]),
    "trained tokens": lambda: lora(trainable_token_indices=[5, 6]),
    "ia3": lambda: pytest.importorskip("peft").IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "loha": lambda: pytest.importorskip("peft").LoHaConfig(r=4, alpha=8, target_modules=TARGETS),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_of_peft_differ(name: str) -> None:
    model, other = adapted(lora()), adapted(CONFIGS[name]())
    known = Fingerprint.of(model, [1])
    known.check(adapted(lora()))
    assert weights_checksum(other) == known.checksum == weights_checksum(tiny_models.shared("llama"))
    for one, two in ((known, other), (Fingerprint.of(other, [1]), model)):
        with pytest.raises(WrongWeightsError, match="adapters"):
            one.check(two)
    Fingerprint.of(other, [1]).check(adapted(CONFIGS[name]()))


@contextlib.contextmanager
def _rescaled(model: Any) -> Iterator[None]:
    helpers = pytest.importorskip("peft.helpers")
    with helpers.rescale_adapter_scale(model, 0.5):
        yield


@contextlib.contextmanager
def _scaled_layer(model: Any) -> Iterator[None]:
    layer = model.base_model.model.model.layers[2].self_attn.k_proj
    layer.scale_layer(1.5)
    yield
    layer.unscale_layer()


@contextlib.contextmanager
def _merged(model: Any) -> Iterator[None]:
    model.merge_adapter()
    yield
    model.unmerge_adapter()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "rescaled": _rescaled,
    "a scaled layer": _scaled_layer,
    "disabled": lambda model: model.disable_adapter(),
    "merged": _merged,
}


@pytest.mark.parametrize("change", CHANGES)
def test_temporary_changes_of_an_adapter(change: str) -> None:
    model = adapted(lora())
    known = Fingerprint.of(model, [1])
    with CHANGES[change](model), pytest.raises(WrongWeightsError):
        known.check(model)
    if change == "merged":
        # Subtracting what was added does not give the same bits.
        assert adapter_checksums(model) == known.adapter_checksums
    else:
        known.check(model)


def test_merging_and_unloading_equals_merging() -> None:
    merged = adapted(lora())
    merged.merge_adapter()
    known = Fingerprint.of(merged, [1])
    known.check(adapted(lora()).merge_and_unload())


def test_several_and_weighted_adapters_count() -> None:
    model = adapted(lora())
    one = Fingerprint.of(model, [1])
    model.add_adapter("second", lora(lora_alpha=4))
    one.check(model)
    model.base_model.set_adapter(["default", "second"])
    both = Fingerprint.of(model, [1])
    assert len(both.adapter_checksums or ()) == 2
    with pytest.raises(WrongWeightsError, match=r"adapters \['default'\], .* has \['default', 'second'\]"):
        one.check(model)
    weighted = []
    for weights in ([0.3, 0.7], [0.4, 0.6]):
        name = f"mix{int(10 * weights[0])}"
        model.base_model.add_weighted_adapter(["default", "second"], weights, name, combination_type="linear")
        model.set_adapter(name)
        weighted.append(adapter_checksums(model))
    assert len({*weighted, one.adapter_checksums, both.adapter_checksums}) == 4


def test_a_question_may_invoke_an_activated_adapter() -> None:
    model = adapted(lora(alora_invocation_tokens=[50, 51], task_type="CAUSAL_LM", init_lora_weights=False))
    ids = torch.cat([prompt(5), torch.tensor([[50, 51, 7]])], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**inputs), expected)
    cache = CacheGenCache.from_context(model, CONTEXT)
    assert torch.equal(model.generate(**inputs), expected), "a prepared model without a cache"
    assert torch.equal(model.generate(**inputs, cache=cache), expected)
