"""Learning a profile: an interrupted run resumes, and holds one sample's cache at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cachegen import CacheGenConfig, Profile, learn_profile
from hf_cachegen.errors import ConfigError
from hf_cachegen.profiles.learning import Sample, journal, learning, moments
from tests.tiny_models import VOCABULARY, make

CONFIG = CacheGenConfig(transform="klt", chunk_tokens=32, protect_last=8)
STAGES = ("learn", "step", "tables")


def samples(seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(3, VOCABULARY, (1, 40), generator=generator),
            torch.randint(3, VOCABULARY, (1, 8), generator=generator),
        )
        for _ in range(7)
    ]


@pytest.fixture(scope="module")
def model() -> Any:
    return make("llama")


@pytest.fixture(scope="module")
def whole(model) -> Profile:
    """Learn in one run, without a file."""
    return learn_profile(model, samples(), config=CONFIG, seed=3)


class Killed(BaseException):
    pass


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write everything after every sample."""
    monkeypatch.setattr(journal, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(journal, "SHARE_OF_TIME", 0)


def learn_until(model, path: Path, stage: str, monkeypatch: pytest.MonkeyPatch, records: int = 2) -> None:
    """Run until a stage has written `records` records, then kill the run."""
    keep = journal.Journal.keep

    def dying(self, name: str, sums, done: int) -> None:
        keep(self, name, sums, done)
        if (name, done) == (stage, records):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "keep", dying)
        with pytest.raises(Killed):
            learn_profile(model, samples(), config=CONFIG, seed=3, journal=path)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes_to_the_same_profile(model, whole, stage, tmp_path, monkeypatch) -> None:
    path = tmp_path / "made" / "journal"
    learn_until(model, path, stage, monkeypatch)
    seen: list[str] = []
    keep = journal.Journal.keep
    monkeypatch.setattr(journal.Journal, "keep", lambda *args: (seen.append(args[1]), keep(*args)))
    assert learn_profile(model, samples(), config=CONFIG, seed=3, journal=path).digest == whole.digest
    assert seen.count("learn") == {"learn": 3}.get(stage, 0)  # of 5: 2 of 7 are held out
    assert seen.count("tables") == {"tables": 3}.get(stage, 5)


@pytest.mark.usefixtures("eager")
def test_a_run_that_was_killed_at_the_end_is_finished(model, whole, tmp_path, monkeypatch) -> None:
    learn_until(model, tmp_path / "journal", "tables", monkeypatch, 5)
    again = learn_profile(model, samples(), config=CONFIG, seed=3, journal=tmp_path / "journal")
    assert again.digest == whole.digest


@pytest.mark.usefixtures("eager")
def test_a_journal_belongs_to_one_run(model, tmp_path, monkeypatch) -> None:
    path = tmp_path / "journal"
    learn_until(model, path, "learn", monkeypatch)
    kept = path.read_bytes()
    others: list[dict[str, Any]] = [{"seed": 4}, {"floor": 1.0}, {"target_kl": 0.1}, {"undo_rotation": False}]
    for options in others:
        with pytest.raises(ConfigError, match="another learning"):
            learn_profile(model, samples(), **{"config": CONFIG, "seed": 3, "journal": path, **options})
    with pytest.raises(ConfigError, match="another learning"):
        learn_profile(model, samples(seed=1), config=CONFIG, seed=3, journal=path)
    with pytest.raises(ConfigError, match="another learning"):
        learn_profile(make("llama", seed=5), samples(), config=CONFIG, seed=3, journal=path)
    assert path.read_bytes() == kept
    for damaged in (b"", b"something else", kept[:-1], kept.replace(b'"F64"', b'"I64"')):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="journal"):
            learn_profile(model, samples(), config=CONFIG, seed=3, journal=path)


def test_nothing_is_written_without_a_journal(model, whole, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    learn_profile(model, samples(), config=CONFIG, seed=3)
    assert not list(tmp_path.iterdir())
    learn_profile(model, samples(), config=CONFIG, seed=3, journal="journal")
    assert not list(tmp_path.iterdir())  # the run is shorter than the time between two records


@pytest.mark.parametrize("module", [moments, learning], ids=["moments", "learning"])
def test_one_samples_cache_is_held_at_a_time(model, module, monkeypatch) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    most = 0
    prefill = module.prefill

    def watched(*args):
        nonlocal most
        keys, values, layers = prefill(*args)
        held.append(weakref.ref(keys[0]))
        most = max(most, sum(ref() is not None for ref in held))
        return keys, values, layers

    monkeypatch.setattr(module, "prefill", watched)
    learn_profile(model, samples(), config=CONFIG)
    assert len(held) > 5
    assert most <= 2  # the new one, and the previous one that a name still refers to
