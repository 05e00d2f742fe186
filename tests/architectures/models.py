"""The entries of the mappings of the installed Transformers, and a tiny model of each."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.architectures.families import SETTINGS
from tests.architectures.shrink import shrink


@dataclass(frozen=True)
class Entry:
    """One entry of a mapping: a model type and the class of its model.

    Attributes:
        model_type: the key of the mapping.
        model_class: the name of the class.
        task: "text" for the causal-LM mapping, "image-text" for the other.
    """

    model_type: str
    model_class: str
    task: str

    @property
    def name(self) -> str:
        return self.model_type if self.task == "text" else f"{self.model_type}+"


def entries() -> list[Entry]:
    """Return the entries of both mappings; a class that both name for one type occurs once."""
    texts = [Entry(name, _first(kind), "text") for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()]
    known = {(entry.model_type, entry.model_class) for entry in texts}
    pictures = [
        Entry(name, _first(kind), "image-text")
        for name, kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
        if (name, _first(kind)) not in known
    ]
    return texts + pictures


def _first(kind: Any) -> str:
    return kind if isinstance(kind, str) else kind[0]


def configuration(entry: Entry) -> Any:
    """Return the tiny configuration of an entry."""
    settings = {**SETTINGS.get(entry.model_type, {}), **SETTINGS.get(entry.name, {})}
    kind = CONFIG_MAPPING[entry.model_type]
    default = kind(**settings.pop("default", {})).to_dict()
    small = shrink(default, settings, SETTINGS)
    if default.get("is_decoder") is False and not default.get("is_encoder_decoder"):
        small["is_decoder"] = True
    return kind(**small)


def _own(config: Any, kind: Any) -> Any:
    """Return the configuration that a class takes: the given one, or the part of it that is for this class."""
    expected = kind.config_class
    if isinstance(config, expected):
        return config
    parts = [config.get_text_config(decoder=True), *(getattr(config, name) for name in type(config).sub_configs)]
    return next((part for part in parts if isinstance(part, expected)), config)


def make(entry: Entry) -> Any:
    """Return a tiny model in evaluation mode, fp32 on the CPU, with weights so large that every token counts."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = _own(configuration(entry), getattr(transformers, entry.model_class))
        for part in (config, config.get_text_config(decoder=True)):
            if hasattr(part, "initializer_range"):
                part.initializer_range = 0.3
        model = getattr(transformers, entry.model_class)(config).eval()
        for parameter in model.parameters():
            if not bool(parameter.any()):  # biases, and gates whose equal values would make a choice arbitrary
                torch.nn.init.normal_(parameter, std=0.1)
    return model
