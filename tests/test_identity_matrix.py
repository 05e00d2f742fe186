"""Every pair of a model that made a cache and a model that uses it: a typed error, or the tokens without a cache.

A variant is one difference from one small model. Two variants that compute the same are in one group and accept each
other's caches; all other pairs are refused, in both directions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_cachegen import CacheGenCache, CacheGenConfig, generate
from hf_cachegen.errors import (
    MismatchError,
    PromptMismatchError,
    WrongDtypeError,
    WrongModelError,
    WrongTokenizerError,
    WrongWeightsError,
)
from tests import tiny_models

TOKENS = tiny_models.tokens(40)
PROMPT = torch.cat([TOKENS, tiny_models.tokens(6, seed=3)], dim=1)
EXACT = CacheGenConfig(lossless=True)
Change = Callable[[Any], Any]


class Adapter(nn.Module):
    """A LoRA layer with the structure of PEFT."""

    def __init__(self, base: nn.Linear, scaling: float) -> None:
        super().__init__()
        self.base_layer = base
        torch.manual_seed(5)
        down, up = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)
        self.lora_A, self.lora_B = nn.ModuleDict({"a": down}), nn.ModuleDict({"a": up})
        self.scaling = {"a": scaling}
        self.merged_adapters: list[str] = []
        self.active_adapters, self.disable_adapters = ["a"], False

    adapter_layer_names = ("lora_A", "lora_B")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        return out if self.disable_adapters else out + self.lora_B["a"](self.lora_A["a"](x)) * self.scaling["a"]


def _edit(edit: Callable[[Any], Any]) -> Change:
    def change(model: Any) -> Any:
        with torch.no_grad():
            edit(model)
        return model

    return change


def _weight(name: str, amount: float) -> Change:
    return _edit(lambda model: model.get_parameter(name).view(-1)[11].add_(amount))


def _config(**values: Any) -> Change:
    def change(model: Any) -> Any:
        config = copy.deepcopy(model.config)
        for name, value in values.items():
            setattr(config, name, value)
        other = type(model)(config).eval()
        other.load_state_dict(model.state_dict())
        return other

    return change


def _adapter(scaling: float, enabled: bool = True) -> Change:
    def change(model: Any) -> Any:
        attention = model.model.layers[1].self_attn
        attention.v_proj = Adapter(attention.v_proj, scaling)
        attention.v_proj.disable_adapters = not enabled
        return model

    return change


def _hook(model: Any) -> Any:
    model.model.layers[2].self_attn.k_proj.register_forward_hook(lambda module, given, out: out * 1.001)
    return model


def _attention(implementation: str) -> Change:
    def change(model: Any) -> Any:
        model.set_attn_implementation(implementation)
        return model

    return change


def _named(model: Any) -> Any:
    model.config._name_or_path = "somewhere/else"
    return model


def _rope(**values: Any) -> Change:
    return _config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **values})


VARIANTS: dict[str, tuple[str, Change]] = {
    "model": ("the same", lambda model: model),
    "another name": ("the same", _named),
    "eager attention": ("the same", _attention("eager")),
    "adapter disabled": ("the same", _adapter(1.0, enabled=False)),
    "hook that only looks": ("the same", _edit(lambda m: m.model.layers[0].register_forward_hook(lambda *_: None))),
    "weight of layer 0": ("w0", _weight("model.layers.0.self_attn.k_proj.weight", 1e-4)),
    "weight of the head": ("w1", _weight("lm_head.weight", 1e-4)),
    "embedding of one token": ("w2", _weight("model.embed_tokens.weight", 1e-4)),
    "norm": ("w3", _weight("model.layers.3.input_layernorm.weight", 1e-4)),
    "bfloat16": ("bfloat16", lambda model: _keep_rope(model, torch.bfloat16)),
    "float16": ("float16", lambda model: _keep_rope(model, torch.float16)),
    "rope theta": ("theta", _rope(rope_theta=10001.0)),
    "rope scaling": ("linear", _rope(rope_type="linear", factor=2.0)),
    "rope frequencies edited": ("inv_freq", _edit(lambda model: model.model.rotary_emb.inv_freq[-1:].mul_(1.01))),
    "epsilon": ("eps", _config(rms_norm_eps=1e-5)),
    "window of 16": ("window 16", _config(sliding_window=16)),
    "window of 24": ("window 24", _config(sliding_window=24)),
    "adapter": ("adapter", _adapter(1.0)),
    "adapter of another scaling": ("adapter 2", _adapter(1.001)),
    "hook that scales": ("hook", _hook),
    "module setting": ("setting", _edit(lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.36))),
}


def _keep_rope(model: Any, dtype: torch.dtype) -> Any:
    """Cast a model like `from_pretrained(dtype=)`, which does not cast the rotary frequencies."""
    frequencies = model.model.rotary_emb.inv_freq
    model = model.to(dtype)
    model.model.rotary_emb.inv_freq = frequencies
    return model


def make(name: str) -> Any:
    model = tiny_models.make("mistral")
    model.config.sliding_window = None
    return VARIANTS[name][1](_config()(model))


@cache
def shared(name: str) -> Any:
    return make(name)


@pytest.fixture(scope="module", name="caches")
def _caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CacheGenCache]:
    """Return a cache made by every variant, loaded without a model."""
    folder, found = tmp_path_factory.mktemp("matrix"), {}
    for number, name in enumerate(VARIANTS):
        path = folder / str(number)
        CacheGenCache.from_context(make(name), TOKENS, EXACT, profile=None).save_pretrained(path)
        found[name] = CacheGenCache.from_pretrained(path)
    return found


@pytest.mark.parametrize("maker", VARIANTS)
@pytest.mark.parametrize("user", VARIANTS)
def test_a_pair_is_refused_or_right(maker: str, user: str, caches: dict[str, CacheGenCache]) -> None:
    model, made = shared(user), caches[maker]
    if VARIANTS[maker][0] != VARIANTS[user][0]:
        with pytest.raises((WrongModelError, WrongDtypeError, WrongWeightsError)):
            generate(model, PROMPT, cache=made, max_new_tokens=1)
        return
    options = {"max_new_tokens": 2, "do_sample": False}
    assert torch.equal(generate(model, PROMPT, cache=made, **options), model.generate(PROMPT, **options))


@pytest.mark.parametrize("other", ["gemma3", "gpt_neox", "llama", "qwen3"])
def test_another_architecture_is_refused(other: str, caches: dict[str, CacheGenCache]) -> None:
    with pytest.raises(MismatchError):
        generate(tiny_models.shared(other), PROMPT, cache=caches["model"], max_new_tokens=1)


def tokenizer(template: str) -> Any:
    class Tokenizer:
        name_or_path, special_tokens_map, chat_template = "tiny", {"eos_token": "</s>"}, template

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

        def __call__(self, text: str) -> Any:
            return {"input_ids": [len(text)]}

    return Tokenizer()


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    model = shared("model")
    CacheGenCache.from_context(model, TOKENS, profile=None, tokenizer=tokenizer("a")).save_pretrained(tmp_path / "a")
    CacheGenCache.from_pretrained(tmp_path / "a", model, tokenizer=tokenizer("a"))
    with pytest.raises(WrongTokenizerError):
        CacheGenCache.from_pretrained(tmp_path / "a", model, tokenizer=tokenizer("b"))


PROMPTS: dict[str, Tensor] = {
    "another first token": torch.cat([PROMPT[:, :1] * 0 + 5, PROMPT[:, 1:]], dim=1),
    "another token within": torch.cat([PROMPT[:, :20], PROMPT[:, 21:]], dim=1),
    "only a part": PROMPT[:, :25],
    "the context alone": TOKENS,
    "another text": tiny_models.tokens(30, seed=9),
    "the context again": torch.cat([TOKENS, TOKENS], dim=1),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_another_prompt_is_computed_or_refused(name: str, caches: dict[str, CacheGenCache]) -> None:
    model, prompt, loaded = shared("model"), PROMPTS[name], caches["model"]
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(generate(model, prompt, cache=loaded, **options), model.generate(prompt, **options))
    if not torch.equal(prompt[:, :40], TOKENS):
        with pytest.raises(PromptMismatchError):
            generate(model, prompt, cache=loaded, on_mismatch="error", **options)
