"""The data sets by name, with their options: "longeval-lines:tokens=4000", "jsonl:path=mine.jsonl,scores=f1+em".

A loader is a function of a Request and keyword options; the type of an option is that of its default. `load` parses the
specification and calls the loader. The form of a data set's rows is known in its own file only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from eval.datasets import documents, jsonl, longbench, longeval, narrativeqa, reference, retrieval, triviaqa, wikitext
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
    "documents": documents.documents,
    "key-values": retrieval.key_values,
    "needle": retrieval.needle,
    "jsonl": jsonl.jsonl,
}


def load(spec: str, request: Request) -> Dataset:
    """Load the data set that a specification names.

    Args:
        spec: "NAME" or "NAME:OPTION=VALUE,...".
        request: tokenizer, limit and seed.

    Raises:
        ConfigError: the name, an option or the data are not valid.
    """
    name, _, rest = spec.partition(":")
    if name not in LOADERS:
        raise ConfigError(f"unknown data set {name!r}: expected one of {', '.join(LOADERS)}")
    loader = LOADERS[name]
    parameters = dict(list(inspect.signature(loader).parameters.items())[1:])
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or key not in parameters:
            known = ", ".join(f"{parameter}=" for parameter in parameters)
            raise ConfigError(f"{name}: unknown option {item!r}: expected some of {known}")
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
            raise ConfigError(f"{where}: expected a whole number, got {value!r}") from error
    return value


def _require_distinct(dataset: Dataset) -> None:
    seen: dict[str, Example] = {}
    for example in dataset.examples:
        if example.id in seen:
            raise ConfigError(f"{dataset.name}: two examples have the id {example.id!r}")
        seen[example.id] = example
