"""dtypes, kinds of attention, devices of accelerate and compiled forward passes: tokens are those of the stock model.

The stock model reads the prompt in the same two parts, since in half precision one pass rounds otherwise than two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hf_cachegen import CacheGenCache, CacheGenConfig, generate
from hf_cachegen.models.compat import CACHE_ARGUMENT, run
from hf_cachegen.models.running import layer_devices
from tests import tiny_models

CONTEXT, QUESTION = tiny_models.tokens(40), tiny_models.tokens(6, 5)
PROMPT = torch.cat([CONTEXT, QUESTION], 1)
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def stored(model: Any, directory: Path) -> CacheGenCache:
    """Return the cache of CONTEXT, through a lossless artifact."""
    CacheGenCache.from_context(model, CONTEXT).save_pretrained(directory, CacheGenConfig(lossless=True))
    return CacheGenCache.from_pretrained(directory, model)


def stock(model: Any, cache: Any = None) -> torch.Tensor:
    """Return what the stock model generates when it reads the context and the question apart."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        run(model, CONTEXT, cache)
    return model.generate(PROMPT, **{CACHE_ARGUMENT: cache}, **SETTINGS)


def with_attention(name: str, attention: str, dtype: torch.dtype) -> Any:
    model = tiny_models.make(name).to(dtype)
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek"])
def test_each_dtype_and_attention(name: str, dtype: torch.dtype, attention: str, tmp_path: Path) -> None:
    model = with_attention(name, attention, dtype)
    cache = stored(model, tmp_path)
    assert cache.kv.keys[0].dtype == dtype
    assert torch.equal(generate(model, PROMPT, cache=cache, **SETTINGS), stock(model))
    lossy = CacheGenCache.from_context(model, CONTEXT)
    lossy.save_pretrained(tmp_path / "lossy")
    loaded = CacheGenCache.from_pretrained(tmp_path / "lossy", model)
    assert torch.isfinite(run(model, QUESTION, loaded.to_dynamic()).logits).all()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_flex_attention(dtype: torch.dtype, tmp_path: Path) -> None:
    """On a CPU flex attention is compiled, which needs a C++ compiler."""
    try:
        model = with_attention("llama", "flex_attention", dtype)
        expected = stock(model)
    except Exception as error:
        pytest.skip(f"the stock model cannot use flex attention here: {type(error).__name__}: {error!s:.200}")
    assert torch.equal(generate(model, PROMPT, cache=stored(model, tmp_path), **SETTINGS), expected)


@pytest.mark.parametrize("middle", ["cpu", "disk"])
def test_offloaded_layers(middle: str, tmp_path: Path) -> None:
    """accelerate keeps weights on the meta device and loads them for each forward pass."""
    pytest.importorskip("accelerate")
    plain = tiny_models.make("llama")
    plain.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{index}": middle if index in (1, 2) else "cpu" for index in range(4)}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload"), dtype=torch.float32
    )
    on_meta = {p.device.type for p in model.model.layers[1].parameters()} == {"meta"}
    assert on_meta is (middle == "disk")
    assert layer_devices(model, 4) == [torch.device("cpu")] * 4
    cache = stored(model, tmp_path / "artifact")
    assert torch.equal(generate(model, PROMPT, cache=cache, **SETTINGS), stock(plain))
    loaded = CacheGenCache.from_pretrained(tmp_path / "artifact", plain)
    assert torch.equal(generate(plain, PROMPT, cache=loaded, **SETTINGS), stock(plain)), "one identity"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapped", ["forward", "model"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_compiled_forward_pass_with_a_static_cache(name: str, wrapped: str, tmp_path: Path) -> None:
    plain = tiny_models.make(name)
    expected = stock(plain, StaticCache(config=plain.config, max_cache_len=64))
    cache = stored(plain, tmp_path)
    model = tiny_models.make(name)
    if wrapped == "forward":
        model.forward = torch.compile(model.forward, backend="aot_eager")
    else:
        model = torch.compile(model, backend="aot_eager")
    found = generate(model, PROMPT, cache=cache, cache_implementation="static", **SETTINGS)
    assert torch.equal(found, expected)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_forward_pass_compiled_to_native_code(tmp_path: Path) -> None:
    model = tiny_models.make("llama")
    cache = stored(model, tmp_path)
    expected = stock(model, StaticCache(config=model.config, max_cache_len=64))
    model.forward = torch.compile(model.forward)
    try:
        found = generate(model, PROMPT, cache=cache, cache_implementation="static", **SETTINGS)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"torch.compile cannot compile here: {error!s:.200}")
    assert torch.equal(found, expected)
