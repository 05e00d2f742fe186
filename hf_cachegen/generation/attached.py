"""A prepared model: its `generate` hands calls with a cache over to this package, and leaves all others alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from transformers import GenerationMixin

from hf_cachegen.context import CachedContext
from hf_cachegen.errors import UnsupportedModelError
from hf_cachegen.models.compat import CACHE_NAMES, unwrapped
from hf_cachegen.models.requirements import require_instance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Prefixes(Protocol):
    """What a prefix cache (`hf_cachegen.PrefixCache`) is to `generate` and `attach`."""

    def check(self, model: PreTrainedModel) -> None:
        """Raise UnsupportedModelError unless prefixes of this model can be reused."""
        ...

    def generate(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any], stock: Callable[..., Any],
        start: Callable[..., Any], slo: float | None,
    ) -> Any:  # fmt: skip
        """Call `start` with a stock cache of what is stored of the prompt, or `stock` where that cannot be."""
        ...


class Attached:
    """The `generate` of a prepared model. An object, not a closure, so that models can be copied and pickled.

    Args:
        model: the model.
        start: `hf_cachegen.generate`, which is called with the model and the arguments of the call.
    """

    def __init__(self, model: PreTrainedModel, start: Callable[..., Any]):
        self.model, self.own, self.stock, self.start = model, model.__dict__.get("generate"), model.generate, start
        self.prefix_cache: Prefixes | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.start(self.model, *args, **{"prefix_cache": self.prefix_cache, **kwargs})

    def undo(self, model: PreTrainedModel) -> None:
        if self.own is None:
            del model.__dict__["generate"]
        else:
            model.__dict__["generate"] = self.own


def stock_generate(model: PreTrainedModel) -> Callable[..., Any]:
    """Return the `generate` that a model had before it was prepared."""
    attached = model.__dict__.get("generate")
    return attached.stock if isinstance(attached, Attached) else model.generate


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`; a model that is not attached stays as it is.

    Args:
        model: the model, or a wrapper of it.

    Returns:
        The same model.
    """
    require_instance(model)
    for part in (model, unwrapped(model)):
        attached = part.__dict__.get("generate")
        if isinstance(attached, Attached):
            attached.undo(part)
    return model


def _hand_over(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return the stock generate of all models, which hands a call with a CacheGenCache to its prepared model.

    In `model.generate(cache=CacheGenCache.from_pretrained(..., model=model))` Python looks up `model.generate` before
    the argument is computed, and so before the model is prepared. Every other call is the stock one.
    """

    @functools.wraps(stock)
    def generate_or_hand_over(self: Any, *args: Any, **kwargs: Any) -> Any:
        attached = self.__dict__.get("generate")
        if isinstance(attached, Attached) and any(isinstance(kwargs.get(n), CachedContext) for n in CACHE_NAMES):
            if type(self).generate is not GenerationMixin.generate:
                raise UnsupportedModelError(
                    f"{type(self).__name__} has a generate of its own: make the cache before the call, not in it"
                )
            return attached(*args, **kwargs)
        return stock(self, *args, **kwargs)

    return generate_or_hand_over


GenerationMixin.generate = _hand_over(GenerationMixin.generate)
