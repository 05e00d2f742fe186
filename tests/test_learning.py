"""Learning a profile: an interrupted run resumes, memory is limited, and the step is found with few measurements."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_cachegen import CacheGenConfig, Profile, learn_profile
from hf_cachegen.errors import ConfigError
from hf_cachegen.models import stepping
from hf_cachegen.profiles.learning import Sample, exact, journal, learning, moments, progress
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


def test_sinks_do_not_shape_the_sensitivity_of_other_tokens(model, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = moments.gradients

    def louder(*given: Any) -> Any:
        for kind, layer, gradient in gradients(*given):
            changed = gradient.clone()
            changed[[0, 5]] *= 1000
            yield kind, layer, changed

    def learnt(*sinks: int) -> str:
        monkeypatch.setattr(moments, "find_sinks", lambda _: torch.tensor(sinks))
        return learn_profile(model, samples(), config=CONFIG, seed=3).digest

    expected = learnt(0, 5)
    monkeypatch.setattr(moments, "gradients", louder)
    assert learnt(0, 5) == expected
    assert learnt(0) != expected


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
        if (name.split()[0], done) == (stage, records):
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
    # A coarse level decides here, so the tables are counted at several steps.
    first, *others = [seen.count(name) for name in dict.fromkeys(seen) if name.startswith("tables")]
    assert first == {"tables": 3}.get(stage, 5)
    assert others
    assert set(others) == {5}


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
    for about in ("[" * 100_000, '{"key":"x","done":{"learn":Infinity}}', "{}"):
        save_file({"x": torch.zeros(1)}, path, {"cachegen_learning": about})
        with pytest.raises(ConfigError, match="not the journal"):
            learn_profile(model, samples(), config=CONFIG, seed=3, journal=path)


def test_nothing_is_written_without_a_journal(model, whole, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    learn_profile(model, samples(), config=CONFIG, seed=3)
    assert not list(tmp_path.iterdir())
    learn_profile(model, samples(), config=CONFIG, seed=3, journal="journal")
    assert not list(tmp_path.iterdir())  # the run is shorter than the time between two records


def test_learning_within_inference_mode(model, whole) -> None:
    """It needs gradients, also with samples that were made there."""
    with torch.inference_mode():
        found = learn_profile(model, samples(), config=CONFIG, seed=3)
    assert found.to_bytes() == whole.to_bytes()


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["nothing", "all that is read again"])
def test_exact_caches_are_kept_within_a_limit(model, whole, limit, monkeypatch) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    most = 0
    prefill = exact.prefill

    def watched(*args, **options):
        nonlocal most
        found = prefill(*args, **options)
        held.append(weakref.ref(found[0][0]))
        most = max(most, sum(ref() is not None for ref in held))
        return found

    monkeypatch.setattr(exact, "prefill", watched)
    monkeypatch.setattr(exact, "MOST_KEPT_BYTES", limit)
    monkeypatch.setattr(learning, "MAX_TABLE_SAMPLES", 2)
    found = learn_profile(model, samples(), config=CONFIG, seed=3)
    monkeypatch.setattr(exact, "MOST_KEPT_BYTES", limit // 2)
    assert learn_profile(model, samples(), config=CONFIG, seed=3).digest == found.digest
    if limit:
        assert len(held) == 2 * (1 + 7)  # every sample is computed once, after two tokens that show the geometry
        assert most <= 2 + 2 + 2  # held out; for the tables; the new one and the previous one
    else:
        assert len(held) > 2 * (1 + 7)
        assert most <= 2  # the new one, and the previous one that a name still refers to


class Measured:
    """Divergences that grow with the code, and the number of measurements."""

    def __init__(self, scales: list[float], factors: tuple[float, ...] = (20.0, 4.0, 1.0)):
        self.scales, self.factors, self.asked = scales, factors, list[tuple[int, int, int]]()

    def value(self, code: int, sample: int, level: int) -> float:
        return self.scales[sample] * self.factors[level] * 1.3 ** (code - 150)

    def __call__(self, code: int, sample: int, level: int) -> dict[int, float]:
        self.asked.append((code, sample, level))
        return {level: self.value(code, sample, level)}

    def within(self, code: int, targets: tuple[float, ...]) -> bool:
        means = [
            sum(self.value(code, s, level) for s in range(len(self.scales))) / len(self.scales) for level in (0, 1, 2)
        ]
        return all(mean <= target for mean, target in zip(means, targets, strict=True))


@pytest.mark.parametrize(
    "targets", [(0.1, 0.01, 0.001), (0.1, 0.01, 10.0), (0.001, 10.0, 10.0), (1e9, 1e9, 1e9), (1e-30,) * 3],
    ids=["finest", "middle", "coarsest", "all codes", "none"],
)  # fmt: skip
@pytest.mark.parametrize("scales", [[1.0], [1.0, 1.1, 0.9, 1.0], [1e-4, 1.0, 1.0, 1.0], [50.0, 1.0, 1.0, 1.0]])
def test_the_step_is_the_largest_within_the_targets(targets, scales) -> None:
    measured = Measured(scales)
    known = journal.unknown(256, len(scales), 3)
    kept: list[int] = []
    found = stepping.StepSearch(known, targets, measured, lambda: kept.append(1)).largest()
    assert found == max((code for code in range(1, 256) if measured.within(code, targets)), default=0)
    assert len(set(measured.asked)) == len(measured.asked) == len(kept)
    again = Measured(scales)
    assert stepping.StepSearch(known, targets, again, lambda: None).largest() == found
    assert not again.asked


def test_the_step_takes_few_measurements() -> None:
    measured = Measured([1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 1.0])
    stepping.StepSearch(journal.unknown(256, 8, 3), (0.1, 0.01, 0.001), measured, lambda: None).largest()
    assert len(measured.asked) < 8 * 8 * 3 / 3  # a bisection over all samples and levels takes 192


def test_progress_is_logged_at_a_limited_rate(model, monkeypatch, caplog) -> None:
    caplog.set_level("INFO", "hf_cachegen.profiles.learning")
    learn_profile(model, samples(), config=CONFIG)
    found = [record.message for record in caplog.records]
    stages = list(dict.fromkeys(text.split(":")[0].split()[0] for text in found))
    assert stages == ["learn", "held", "bases", "step", "chain", "tables", "measure"]
    assert found[1].startswith("learn: 5 of 5 samples, ")
    caplog.clear()
    monkeypatch.setattr(progress, "SECONDS_BETWEEN", 0.0)
    learn_profile(model, samples(), config=CONFIG)
    assert sum(record.message.startswith("learn: ") for record in caplog.records) == 6
    assert any("measurements" in record.message for record in caplog.records)


def test_a_coarse_level_can_decide(model) -> None:
    fine = learn_profile(model, samples(), config=CONFIG, target_kl=(9.0, 9.0, 0.01))
    targets = [row["kl"] / 2 for row in fine.about["measured"][:2]]
    found = learn_profile(model, samples(), config=CONFIG, target_kl=(targets[0], 9.0, 0.01))
    assert found.step_code < fine.step_code
    assert found.about["measured"][0]["kl"] <= 1.05 * targets[0]
    larger = learn_profile(model, samples(), config=CONFIG, target_kl=(2.5 * targets[0], 9.0, 0.01))
    assert larger.digest != found.digest
    assert larger.step_code == fine.step_code
