"""Quantised checkpoints from disk, loaded with the libraries behind them: one identity each, whatever ran before.

The checkpoints are quantised here by hand. FP8 and GGUF have kernels for GPUs alone, so these models run on the
definition of their formats in Transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from hf_cachegen import CacheGenCache, CacheGenConfig
from hf_cachegen.errors import UnsupportedModelError, WrongWeightsError
from hf_cachegen.models.weights import weights_checksum
from tests import tiny_models

CONFIG: dict[str, Any] = dict(
    vocab_size=97, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32,
)  # fmt: skip
TOKENS = tiny_models.tokens(20)
SCHEMES = ("W8A16", "W4A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK")


def llama(seed: int) -> Any:
    torch.manual_seed(seed)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG)).to(torch.bfloat16).eval()


def check_one_identity(load: Callable[[int], Any], folder: Path) -> None:
    """A cache made before the first forward pass of a model is used by the same model, and by one loaded again."""
    model = load(0)
    known = weights_checksum(model)
    CacheGenCache.from_context(model, TOKENS, CacheGenConfig(lossless=True), profile=None).save_pretrained(folder)
    assert weights_checksum(model) == known
    for fresh in (model, load(0)):
        assert weights_checksum(fresh) == known
        CacheGenCache.from_pretrained(folder, model=fresh)
    other = load(1)
    assert weights_checksum(other) != known
    with pytest.raises(WrongWeightsError):
        CacheGenCache.from_pretrained(folder, model=other)


def compressed_checkpoint(path: Path, scheme: str, seed: int) -> Path:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    model = llama(seed)
    groups = {"linear": quantization.preset_name_to_scheme(scheme, ["Linear"])}
    quantization.apply_quantization_config(
        model, quantization.QuantizationConfig(config_groups=groups, ignore=["lm_head"])
    )
    weights = groups["linear"].weights
    largest = 448.0 if weights.type == "float" else 2.0 ** (weights.num_bits - 1) - 1
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "weight_scale", None) is not None:
                module.weight_scale.fill_(module.weight.abs().max() / largest)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)
    return path


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors(scheme: str, tmp_path: Path) -> None:
    """The first forward pass replaces the compressed weights with dense ones."""
    paths = [compressed_checkpoint(tmp_path / str(seed), scheme, seed) for seed in (0, 1)]

    def load(seed: int) -> Any:
        return hf.AutoModelForCausalLM.from_pretrained(paths[seed], dtype=torch.bfloat16).eval()

    model = load(0)
    before = {name for name, _ in model.named_parameters()}, model.model.layers[0].self_attn.k_proj.quantization_status
    check_one_identity(load, tmp_path / "artifact")
    with torch.no_grad():
        model(TOKENS)
    after = {name for name, _ in model.named_parameters()}, model.model.layers[0].self_attn.k_proj.quantization_status
    assert before != after


def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a stand-in for compressed-tensors with one format: a packed weight is the weight plus 1."""

    class Compressor:
        @staticmethod
        def decompress(tensors: dict[str, Tensor], scheme: Any) -> dict[str, Tensor]:
            rest = {name: tensor for name, tensor in tensors.items() if name != "weight_packed"}
            return {**rest, "weight": tensors["weight_packed"] - 1}

    base = SimpleNamespace(get_value_from_registry={"plus one": Compressor}.__getitem__)
    parts = {"compressors": {"BaseCompressor": base}, "compressors.format": {"infer_module_format": lambda *_: None}}
    monkeypatch.setitem(sys.modules, "compressed_tensors", ModuleType("compressed_tensors"))
    for name, values in parts.items():
        module = ModuleType(f"compressed_tensors.{name}")
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def packed(model: Any, name: str, form: str) -> Any:
    module = model.get_submodule(name)
    module.register_parameter("weight_packed", nn.Parameter(module.weight.detach() + 1))
    del module.weight
    module.quantization_status, module.quantization_scheme = "compressed", SimpleNamespace(format=form)
    return module


def test_a_compressed_weight_is_what_the_first_pass_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch)
    model = tiny_models.make("llama")
    module = packed(model, "lm_head", "plus one")
    known = weights_checksum(model)
    with torch.no_grad():
        module.weight_packed[3, 2] += 1
    assert weights_checksum(model) != known
    with torch.no_grad():
        module.weight_packed[3, 2] -= 1
    module.weight = nn.Parameter(module.weight_packed.detach() - 1)
    del module.weight_packed
    module.quantization_status = "decompressed"
    assert weights_checksum(model) == known


def test_an_unknown_compression_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.make("llama")
    packed(model, "lm_head", "of tomorrow")
    for _ in range(2):  # without the library, and with one that does not know the format
        with pytest.raises(UnsupportedModelError, match=r"weights of lm_head are compressed .* run one forward pass"):
            weights_checksum(model)
        library(monkeypatch)


def test_fp8_with_block_scales() -> None:
    """FineGrainedFP8 keeps weights in float8 on GPUs; a CPU dequantises them while it loads."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")

    def load(seed: int) -> Any:
        model = llama(seed)
        for layer in model.model.layers:
            dense = layer.mlp.up_proj.weight.detach().float()
            layer.mlp.up_proj = fp8.FP8Linear(128, 128, block_size=(128, 128))
            scale = dense.abs().max() / 448
            layer.mlp.up_proj.weight = nn.Parameter((dense / scale).to(torch.float8_e4m3fn), requires_grad=False)
            layer.mlp.up_proj.weight_scale_inv = nn.Parameter(scale.view(1, 1), requires_grad=False)
        return model

    model = load(0)
    known = weights_checksum(model)
    assert weights_checksum(load(0)) == known
    assert weights_checksum(load(1)) != known
    layer = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.weight_scale_inv *= 1.001
    assert weights_checksum(model) != known
    layer.weight_scale_inv.data /= 1.001
    layer.weight.view(torch.uint8)[5, 7] ^= 1
    assert weights_checksum(model) != known


def gguf_checkpoint(path: Path, seed: int) -> Path:
    """LFM2 with attention in every layer, in blocks of 8 bits: of the models here, Transformers packs this one."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(seed)
    config = hf.Lfm2Config(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["full_attention"] * 2, block_auto_adjust_ff_dim=False,
    )  # fmt: skip
    writer = gguf.GGUFWriter(path, "lfm2")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv([2, 2])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_shortconv_l_cache(3)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([str(number) for number in range(97)])
    names = {
        "model.embed_tokens": "token_embd", "model.embedding_norm": "token_embd_norm", "model.layers": "blk",
        "operator_norm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_output", "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm", "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up",
        "feed_forward.w2": "ffn_down",
    }  # fmt: skip
    for name, tensor in hf.Lfm2ForCausalLM(config).state_dict().items():
        if name != "lm_head.weight":
            for ours, theirs in names.items():
                name = name.replace(f"{ours}.", f"{theirs}.")
            values, kind = tensor.float().numpy(), None
            if values.ndim == 2:
                kind = gguf.GGMLQuantizationType.Q8_0
                values = gguf.quants.quantize(values, kind)
            writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_packed_and_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("transformers.integrations.gguf.kernels")
    paths = [gguf_checkpoint(tmp_path / f"{seed}.gguf", seed) for seed in (0, 1)]

    class Kernel:
        """The kernels' definition, by the dequantisation of Transformers."""

        def supports(self, ggml_type: int) -> bool:
            return True

        def mul_mat_vec(self, weight: Tensor, x: Tensor, ggml_type: int, out_features: int) -> Tensor:
            dense: Tensor = kernels.dequantize(weight, ggml_type, x.dtype)
            return x @ dense.reshape(out_features, -1).T

    def load(seed: int) -> Any:
        return hf.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=paths[seed].name, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    for kernel, kind in ((False, "Linear"), (Kernel(), "GgufLinear")):
        monkeypatch.setattr(kernels, "_gguf_kernel", kernel)
        assert type(load(0).model.layers[0].self_attn.k_proj).__name__ == kind
        check_one_identity(load, tmp_path / kind)
