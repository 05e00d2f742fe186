"""Every family of the mappings of the installed Transformers: docs/models.md holds what was found.

The sweep over all of them is slow; a few families of different kinds are examined in every run.
"""

from __future__ import annotations

import json

import pytest
import transformers

from tests.architectures.checks import examine
from tests.architectures.models import entries
from tests.architectures.page import render
from tests.architectures.sweep import PAGE, RESULTS, sweep

SAMPLE = (
    "llama", "gpt2", "roberta", "gemma3_text", "deepseek_v3", "llama4_text", "mixtral", "bloom", "git", "qwen2_vl+",
)  # fmt: skip
BY_NAME = {entry.name: entry for entry in entries()}


def recorded() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_a_family_of_each_kind_passes(name: str) -> None:
    outcome = examine(BY_NAME[name])
    assert (outcome.status, outcome.reason) == ("passes", "")


def test_the_page_is_the_one_of_the_recorded_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(recorded()), "run python -m tests.architectures --write"


def test_the_page_lists_every_family_of_its_release() -> None:
    results = recorded()
    assert f"Transformers {results['transformers']}" in PAGE.read_text(encoding="utf-8")
    if results["transformers"] == transformers.__version__:
        assert list(results["families"]) == list(BY_NAME)


def test_no_family_is_silently_wrong() -> None:
    families = recorded()["families"]
    assert [name for name, each in families.items() if each["status"] == "fails"] == []
    assert sum(each["status"] == "passes" for each in families.values()) >= 125
    assert all(each["reason"] for each in families.values() if each["status"] != "passes")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_families_are_as_recorded() -> None:
    results = recorded()
    if results["transformers"] != transformers.__version__:
        pytest.skip(f"the results are of Transformers {results['transformers']}")
    found = sweep(entries(), jobs=2)["families"]
    kept = {name: each["status"] for name, each in results["families"].items()}
    assert {name: each["status"] for name, each in found.items()} == kept
