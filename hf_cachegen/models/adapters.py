"""The identity of adapters: every setting and weight of PEFT's tuner layers that changes a key or a value.

PEFT is not imported. A tuner layer names its parts in `adapter_layer_names` and keeps what belongs to one adapter in
dictionaries under the adapter's name: weights, and settings such as `scaling` (which alpha, rank, rank stabilisation,
weighted combination and rescale_adapter_scale all come down to) or a variant such as DoRA. An adapter's identity is all
of them, of the layers in which it is active; its name does not matter. A merged adapter is part of the base weights,
and a disabled one of nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hf_cachegen.errors import UnsupportedModelError
from hf_cachegen.models.checksum import checksum_of_text
from hf_cachegen.models.compat import unwrapped
from hf_cachegen.models.storage import has_adapters, stored
from hf_cachegen.models.weights import WRAPPED, checksums_of

NO_EFFECT = ("Dropout", "Identity")
"""Modules that do nothing in evaluation mode."""
UNSET: tuple[Any, ...] = (None, False, "", (), [])
"""Values of a setting that is off: a later release of PEFT adds settings, off by default."""


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that are active in a layer of `model`, merged ones included."""
    return tuple(sorted({name for _, _, module in _tuner_layers(model) for name in module.active_adapters}))


def adapter_checksums(model: nn.Module) -> tuple[str, ...]:
    """Compute one checksum for each adapter that takes part in the forward pass, merged ones excluded.

    Returns:
        Checksums of 32 hexadecimal digits, sorted.

    Raises:
        UnsupportedModelError: What the adapters do cannot be derived from their settings.
    """
    texts: dict[str, list[str]] = {}
    for path, name, module in _tuner_layers(model):
        if getattr(module, "merged_adapters", None):
            continue
        for position, adapter in enumerate(module.active_adapters):
            found = list(_settings(module, adapter, path))
            if found:
                texts.setdefault(adapter, []).append(f"{name} {type(module).__name__} {position}")
                texts[adapter] += found
    return tuple(sorted(checksum_of_text(lines) for lines in texts.values()))


def require_identifiable(model: nn.Module) -> None:
    """Raise UnsupportedModelError for adapters that do not compute what their settings say."""
    for path, _, module in _tuner_layers(model, disabled=True):
        if getattr(module, "disable_adapters", False):
            if getattr(module, "merged_adapters", None):
                raise UnsupportedModelError(
                    f"the adapters {module.merged_adapters} of {path} are merged and disabled at once, so the next "
                    "forward pass will unmerge them: call unmerge_adapter() first"
                )


def require_inactive(model: Any, input_ids: Sequence[int]) -> None:
    """Raise UnsupportedModelError for a context that holds the invocation tokens of an activated LoRA.

    Such an adapter works from its invocation tokens on, which it looks for in each forward pass. A context without them
    is computed by the base model, and a question may invoke the adapter.
    """
    configs = getattr(model, "peft_config", None)
    for name, config in (configs if isinstance(configs, Mapping) else {}).items():
        tokens = list(getattr(config, "alora_invocation_tokens", None) or [])
        starts = range(len(input_ids) - len(tokens) + 1) if tokens else ()
        if any(list(input_ids[start : start + len(tokens)]) == tokens for start in starts):
            raise UnsupportedModelError(
                f"the context holds the invocation tokens {tokens} of the activated adapter {name!r}: end the context "
                "before them, and put them into the prompt"
            )


def _tuner_layers(model: nn.Module, disabled: bool = False) -> Iterator[tuple[str, str, Any]]:
    """(path, name without wrappers, module) of every layer with adapters that are not disabled."""
    for path, module in unwrapped(model).named_modules():
        if has_adapters(module) and (disabled or not getattr(module, "disable_adapters", False)):
            yield path, ".".join(part for part in path.split(".") if part not in WRAPPED), module


def _settings(module: nn.Module, adapter: str, path: str) -> Iterator[str]:
    """What a tuner layer keeps of one adapter, each as text."""
    named: dict[str, Any] = {**vars(module), **module._modules}
    for name, kept in sorted(named.items()):
        if name[0] != "_" and name not in WRAPPED and adapter in _keys(kept):
            yield from _texts(f"{path}.{name}.{adapter}", name, kept[adapter])


def _keys(kept: Any) -> Any:
    keys = getattr(kept, "keys", None)
    return keys() if isinstance(kept, (Mapping, nn.Module)) and callable(keys) else ()


def _texts(path: str, name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Tensor):
        owner = nn.Module()
        yield f"{name} {checksums_of([stored(owner, path, name, value)])[0]}"
    elif isinstance(value, nn.Module):
        kind = type(value).__name__
        if kind.endswith(NO_EFFECT):
            return
        yield f"{name} {kind}"
        for inner_path, inner in value.named_modules():
            for local, tensor in (*inner._parameters.items(), *inner._buffers.items()):
                if tensor is not None:
                    kept = stored(inner, f"{path}.{inner_path}", local, tensor)
                    yield f"{name}.{inner_path}.{local} {checksums_of([kept])[0]}"
    elif isinstance(value, (int, float, str)) and value not in UNSET:
        yield f"{name} {value!r}"
    elif value is not None and not isinstance(value, (int, float, str, list, tuple, Mapping)):
        yield f"{name} {type(value).__qualname__ if not isinstance(value, type) else value.__qualname__}"
    elif isinstance(value, (list, tuple, Mapping)) and len(value):
        yield f"{name} {value!r}"
