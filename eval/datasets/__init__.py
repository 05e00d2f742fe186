"""The data sets by name, with their options: "longeval-lines:tokens=4000", "jsonl:path=mine.jsonl,scores=f1+em".

A loader is a function of a Request and keyword options whose defaults say their types; `load` parses the specification
and calls it. What a data set's rows look like is known in its own file alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from eval.datasets import jsonl, longbench, longeval, narrativeqa, reference, triviaqa, wikitext
from eval.datasets.request import Request
from eval.examples import Dataset, Example
from hf_cachegen.errors import ConfigError

Loader = Callable[..., Dataset]

LOADERS: dict[str, Loader] = {
    "reference-lines": reference.lines,
    "reference-topics": reference.topics,
    "reference-stories": reference.stories,
    "longeval-lines": longeval.lines,
    "longeval-topics": longeval.topics,
    "longbench-triviaqa": longbench.triviaqa,
    "longbench-narrativeqa": longbench.narrativeqa,
    "triviaqa": triviaqa.triviaqa,
    "narrativeqa": narrativeqa.narrativeqa,
    "wikitext": wikitext.wikitext,
    "jsonl": jsonl.jsonl,
}


def load(spec: str, request: Request) -> Dataset:
    """The data set that `spec` names. Raises ConfigError for names, options and data that are none."""
    name, _, rest = spec.partition(":")
    if name not in LOADERS:
        raise ConfigError(f"there is no data set {name!r}; there are {', '.join(LOADERS)}")
    loader = LOADERS[name]
    parameters = dict(list(inspect.signature(loader).parameters.items())[1:])
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or key not in parameters:
            raise ConfigError(f"{name}: no option {item!r}; it takes {', '.join(f'{p}=' for p in parameters)}")
        options[key] = _typed(value, parameters[key].default, f"{name}:{key}")
    dataset = loader(request, **options)
    if not dataset.examples:
        raise ConfigError(f"{spec} has no examples")
    _require_distinct(dataset)
    used = {key: options.get(key, parameter.default) for key, parameter in parameters.items()}
    return replace(dataset, source={"spec": spec, **used, **dataset.source})


def _typed(value: str, default: Any, where: str) -> Any:
    if isinstance(default, int):
        try:
            return int(value)
        except ValueError as error:
            raise ConfigError(f"{where} must be a whole number, got {value!r}") from error
    return value


def _require_distinct(dataset: Dataset) -> None:
    seen: dict[str, Example] = {}
    for example in dataset.examples:
        if example.id in seen:
            raise ConfigError(f"{dataset.name}: two examples are called {example.id!r}")
        seen[example.id] = example
