"""The code that a model runs: patched methods and functions change keys and values without changing a module.

Patches replace a method of a class, a function that the model's file names (`modeling_llama.apply_rotary_pos_emb`), or
an attention function in the registry of Transformers; hooks can be global. Which objects these names mean is read
before every reuse of a cache. A patch in another file, such as one of torch itself, is not seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
"""Where torch keeps the hooks that run in every module."""
Named = tuple[dict[str, Any], tuple[str, ...]]
"""The globals of a file and the names that a function of it uses."""


def code_of(kinds: Iterable[type[nn.Module]]) -> list[Any]:
    """List the functions that modules of these classes run, to be compared by identity."""
    found: list[Any] = [*ALL_ATTENTION_FUNCTIONS.values()]
    for hooks in GLOBAL_HOOKS:
        found += getattr(torch_module, hooks, {}).values()
    for kind in kinds:
        found.append(kind.forward)
        found += vars(kind).values()
        for names, used in _named(kind.forward):
            found += map(names.get, used)
    return found


@lru_cache(maxsize=1024)
def _named(function: Any) -> tuple[Named, ...]:
    """The globals that a function uses, and those that functions of the same file use which it calls."""
    first = inspect.unwrap(function)
    todo, found = [first], list[Named]()
    seen = {first}
    for function in todo:
        code = getattr(function, "__code__", None)
        if code is None:
            continue
        found.append((function.__globals__, code.co_names))
        for name in code.co_names:
            called = inspect.unwrap(function.__globals__.get(name))
            if isinstance(called, FunctionType) and called.__globals__ is function.__globals__ and called not in seen:
                seen.add(called)
                todo.append(called)
    return tuple(found)
