"""The identity of a weight is independent of its storage: a quantised model has one before and after its first pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from hf_cachegen.errors import UnsupportedModelError
from hf_cachegen.models.weights import weights_checksum
from tests import tiny_models

CONFIG: dict[str, Any] = dict(
    vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip


def checkpoint(folder: Path, seed: int) -> Path:
    path = folder / str(seed)
    torch.manual_seed(seed)
    hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG)).save_pretrained(path)
    return path


def _bitsandbytes(**options: Any) -> Callable[[], Any]:
    def config() -> Any:
        pytest.importorskip("bitsandbytes")
        return hf.BitsAndBytesConfig(**options)

    return config


def _torchao(name: str, **options: Any) -> Callable[[], Any]:
    def config() -> Any:
        pytest.importorskip("torchao")
        import torchao.quantization as quantization

        return hf.TorchAoConfig(getattr(quantization, name)(**options))

    return config


METHODS: dict[str, Callable[[], Any]] = {
    "bitsandbytes nf4": _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes fp4": _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "bitsandbytes nf4 twice": _bitsandbytes(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "bitsandbytes int8": _bitsandbytes(load_in_8bit=True),
    "torchao int8": _torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao fp8": _torchao("Float8WeightOnlyConfig"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_has_one_identity(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def load(seed: int) -> Any:
        path = checkpoint(tmp_path, seed)
        return hf.AutoModelForCausalLM.from_pretrained(path, quantization_config=METHODS[method](), dtype=dtype).eval()

    model = load(0)
    known = weights_checksum(model)
    with torch.no_grad():
        model(tiny_models.tokens(12))
    assert weights_checksum(model) == known
    assert weights_checksum(load(0)) == known
    assert weights_checksum(load(1)) != known


class Wrapper(torch.Tensor):
    """A tensor subclass of two plain tensors, like those of torchao and others."""

    def __new__(cls, values: torch.Tensor, scales: torch.Tensor, bits: int = 8) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, values: torch.Tensor, scales: Any, bits: int = 8) -> None:
        self.values, self.scales, self.bits = values, scales, bits

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["values", "scales"], {"bits": self.bits, "made_by": object()}

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} on a Wrapper")


def test_a_subclass_is_its_inner_tensors_and_its_context() -> None:
    model = tiny_models.make("llama")
    values, scales = torch.arange(12, dtype=torch.int8).view(3, 4), torch.ones(3)

    def checksum(*parts: Any) -> str:
        model.register_parameter("odd", torch.nn.Parameter(Wrapper(*parts), requires_grad=False))
        return weights_checksum(model)

    known = checksum(values, scales)
    assert checksum(values.clone(), scales.clone()) == known
    assert checksum(values, scales, 4) != known
    assert checksum(values, scales * 2) != known
    scales[1] = 5
    assert weights_checksum(model) != known


def test_a_part_of_a_distributed_weight_is_refused() -> None:
    model = tiny_models.make("llama")
    kind = type("DTensor", (torch.Tensor,), {})
    model.odd = torch.nn.Parameter(torch.ones(2).as_subclass(kind))
    with pytest.raises(UnsupportedModelError, match="weight odd is a DTensor"):
        weights_checksum(model)


def test_weights_of_8_bits_without_scales_are_refused() -> None:
    model = tiny_models.make("llama")
    kind = type("Int8Params", (torch.nn.Parameter,), {"SCB": None})
    weight = torch.Tensor._make_subclass(kind, torch.ones(2, dtype=torch.int8), False)
    model.register_buffer("odd", weight)
    with pytest.raises(UnsupportedModelError, match="weight odd has 8 bits and no scales"):
        weights_checksum(model)
