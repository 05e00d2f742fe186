"""Every model but its own refuses a cache, with an error that names the difference."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch

from hf_cachegen.errors import (
    ManifestError,
    UnsupportedModelError,
    WrongDtypeError,
    WrongModelError,
    WrongTokenizerError,
    WrongWeightsError,
)
from hf_cachegen.models.fingerprint import Fingerprint, hash_tokens
from tests import tiny_models


class Tokenizer:
    """The part of a tokenizer that a fingerprint reads."""

    name_or_path = "tiny"

    def __init__(self, template: str = "{{ x }}", cut: int = 10) -> None:
        self.special_tokens_map = {"eos_token": "</s>"}
        self.chat_template = template
        self.cut = cut

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1}

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 2 for letter in text[: self.cut]]}


@pytest.fixture(name="of_llama")
def _of_llama() -> Fingerprint:
    return Fingerprint.of(tiny_models.shared("llama"), [1, 2, 3], Tokenizer())  # type: ignore[arg-type]


def test_the_same_model_passes(of_llama: Fingerprint) -> None:
    of_llama.check(tiny_models.shared("llama"))
    of_llama.check(tiny_models.make("llama"))


def test_a_fingerprint_survives_its_dictionary(of_llama: Fingerprint) -> None:
    assert Fingerprint.from_dict(of_llama.to_dict()) == of_llama
    assert of_llama.tokens == hash_tokens([1, 2, 3])


def test_names_and_run_time_settings_do_not_count(of_llama: Fingerprint) -> None:
    model = tiny_models.make("llama")
    model.config._name_or_path = "somewhere/else"
    model.config.use_cache = False
    model.config.pad_token_id = 7
    of_llama.check(model)


def test_another_architecture_is_the_wrong_model(of_llama: Fingerprint) -> None:
    with pytest.raises(WrongModelError, match='model_type: expected "llama", got "qwen3"'):
        of_llama.check(tiny_models.shared("qwen3"))


def test_another_rope_is_the_wrong_model(of_llama: Fingerprint) -> None:
    model = tiny_models.make("llama")
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5000.0}
    with pytest.raises(WrongModelError, match="rope_parameters"):
        of_llama.check(model)


def test_another_release_may_have_more_defaults(of_llama: Fingerprint) -> None:
    older = {name: value for name, value in of_llama.config.items() if name != "mlp_bias"}
    with pytest.raises(WrongModelError, match="mlp_bias: expected None, got false"):
        Fingerprint.from_dict({**of_llama.to_dict(), "config": older}).check(tiny_models.shared("llama"))
    values = {**of_llama.to_dict(), "config": older, "transformers": "5.0.0"}
    Fingerprint.from_dict(values).check(tiny_models.shared("llama"))


def test_another_dtype_is_refused(of_llama: Fingerprint) -> None:
    with pytest.raises(WrongDtypeError, match=r"made in float32, this LlamaForCausalLM .* runs in bfloat16"):
        of_llama.check(tiny_models.make("llama").bfloat16())


def test_other_weights_are_refused(of_llama: Fingerprint) -> None:
    with pytest.raises(WrongWeightsError, match="other weights"):
        of_llama.check(tiny_models.make("llama", seed=1))


@pytest.mark.parametrize("weight", ["model.layers.3.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_change_of_any_one_weight_is_refused(of_llama: Fingerprint, weight: str) -> None:
    model = tiny_models.make("llama")
    with torch.no_grad():
        model.get_parameter(weight).mul_(1.01)
    with pytest.raises(WrongWeightsError):
        of_llama.check(model)


@pytest.mark.parametrize("persistent", [True, False], ids=["persistent", "computed"])
@pytest.mark.parametrize("value", [torch.ones(3), torch.arange(3)], ids=["float", "integer"])
def test_every_buffer_counts(of_llama: Fingerprint, persistent: bool, value: torch.Tensor) -> None:
    model = tiny_models.make("llama")
    model.register_buffer("scratch", value, persistent=persistent)
    with pytest.raises(WrongWeightsError):
        of_llama.check(model)
    known = Fingerprint.of(model, [1])
    model.scratch[1] += 1
    with pytest.raises(WrongWeightsError):
        known.check(model)


def test_another_tokenizer_is_refused(of_llama: Fingerprint) -> None:
    model = tiny_models.shared("llama")
    of_llama.check(model, Tokenizer())  # type: ignore[arg-type]
    for other in (Tokenizer(template="{{ y }}"), Tokenizer(cut=9)):
        with pytest.raises(WrongTokenizerError, match="another tokenizer or chat template than 'tiny'"):
            of_llama.check(model, other)  # type: ignore[arg-type]


def test_offloading_does_not_change_the_fingerprint(of_llama: Fingerprint) -> None:
    model = accelerate.cpu_offload(tiny_models.make("llama"), execution_device=torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    of_llama.check(model)
    other = accelerate.cpu_offload(tiny_models.make("llama", seed=1), execution_device=torch.device("cpu"))
    with pytest.raises(WrongWeightsError):
        of_llama.check(other)


def test_weights_without_a_value_are_refused(of_llama: Fingerprint) -> None:
    with pytest.raises(UnsupportedModelError, match="on the meta device"):
        of_llama.check(tiny_models.make("llama").to("meta"))


def test_an_unchanged_model_costs_no_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    count = SimpleNamespace(transfers=0)
    stock = torch.Tensor.cpu

    def cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        count.transfers += 1
        return stock(self, *args, **kwargs)

    model = tiny_models.make("llama")
    known = Fingerprint.of(model, [1])
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    known.check(model)
    assert count.transfers == 0


@pytest.mark.parametrize(
    "damage",
    [
        {"config": []},
        {"config": {"a": 1}},
        {"config": {str(i): "x" for i in range(5000)}},
        {"adapters": "french"},
        {"adapters": [1]},
        {"weights": None},
        {"dtype": 7},
        {"commit": 7},
        {"tokenizer": []},
        {"checksum": 1},
        {"probe": []},
        {"buffers": ["x"]},
        {"buffers": {"x": 1}},
        {"buffers": {str(i): "x" for i in range(100)}},
        {"adapter_checksums": "x"},
        {"adapter_checksums": [1]},
    ],
)
def test_hostile_fingerprints_are_refused(of_llama: Fingerprint, damage: dict[str, Any]) -> None:
    with pytest.raises(ManifestError):
        Fingerprint.from_dict({**of_llama.to_dict(), **damage})
    with pytest.raises(ManifestError):
        Fingerprint.from_dict([damage])


def test_samples_fall_into_every_column() -> None:
    """Weights that differ everywhere except in one column are other weights; so is half a row of a wide matrix."""
    from hf_cachegen.models.sampled_weights import PROBES, _positions

    for rows, columns in ((128, 256), (4096, 1024), (2560, 640), (1000, 333)):
        positions = _positions(rows * columns)
        assert len(set(positions.tolist())) == PROBES
        assert int(positions.max()) < rows * columns
        hit = (positions % columns).unique()
        assert len(hit) >= min(columns, PROBES) // 3
        assert len((positions // columns).unique()) >= min(rows, PROBES) // 3
    assert _positions(5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("keep", ["first column", "last column", "first row", "even columns"])
def test_changes_beside_a_part_of_every_matrix_are_noticed(keep: str) -> None:
    model = tiny_models.make("llama")
    known = Fingerprint.of(model, [1, 2, 3])
    other = copy.deepcopy(model)
    kept = {
        "first column": (slice(None), 0),
        "last column": (slice(None), -1),
        "first row": (0,),
        "even columns": (slice(None), slice(None, None, 2)),
    }
    with torch.no_grad():
        for weight in other.parameters():
            if weight.dim() == 2:
                before = weight.clone()
                weight.add_(torch.randn_like(weight))
                weight[kept[keep]] = before[kept[keep]]
    with pytest.raises(WrongWeightsError):
        known.check(other)
