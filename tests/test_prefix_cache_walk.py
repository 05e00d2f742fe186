"""Chats at random, with edits, rewinds, evictions, restarts, damage, other processes: the stock call's tokens."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cachegen import PrefixCache
from tests import state_models
from tests.generation_support import ASSISTED, MODES, seeded
from tests.prefix_cache_support import WIDTH, disk_bytes, in_two_parts, same_as_stock, small
from tests.tiny_models import VOCABULARY, shared

MODE_NAMES = ("greedy", "greedy", "greedy", "sampling", "beams", "num_return_sequences", "static cache", "penalties")
BUDGET = 3_000_000
LONGEST = 160


class Walk:
    """Some chats that are changed at random and continued with a prefix cache."""

    def __init__(self, folder: Path, seed: int, name: str = "llama") -> None:
        self.random, self.folder = random.Random(seed), folder
        self.states = name in state_models.NAMES
        self.model = state_models.shared(name) if self.states else shared(name)
        self.chats: list[list[int]] = [[3, 4, 5] * 6]
        self.prefix_cache = small(folder, max_bytes=BUDGET)
        self.restarts = 0
        self.hits = 0

    def step(self) -> None:
        number = self.random.randrange(len(self.chats))
        chat = self.chats[number]
        action = self.random.random()
        if action < 0.12 or len(chat) > LONGEST:
            self.chats.append(self.words(self.random.randrange(5, 40)))
            self.chats = self.chats[-6:]
            number = len(self.chats) - 1
        elif action < 0.24:  # another chat with the same beginning
            self.chats[number] = chat[: self.random.randrange(1, len(chat) + 1)]
        elif action < 0.34:
            chat[self.random.randrange(len(chat))] = self.random.randrange(3, VOCABULARY)
        elif action < 0.40:
            self.restart()
        elif action < 0.44:
            self.prefix_cache.prune(self.random.choice([0, BUDGET // 3, BUDGET // 2]))
        elif action < 0.48:
            self.damage()
        elif action < 0.55:
            self.batch()
        self.turn(number)

    def turn(self, number: int) -> None:
        chat = self.chats[number]
        mode = self.random.choice(MODE_NAMES)
        options = dict(MODES[mode])
        if self.random.random() < 0.15 and not self.states:  # which no assistant can roll back
            options = dict(ASSISTED["prompt lookup"])
        found = same_as_stock(self.model, self.prefix_cache, torch.tensor([chat]), **options)
        self.chats[number] = found[0].tolist() + self.words(self.random.randrange(1, 12))
        if self.random.random() < 0.5:
            self.prefix_cache.flush()

    def batch(self) -> None:
        """Some chats at once, left-padded."""
        rows = [self.random.choice(self.chats) for _ in range(self.random.randrange(2, 4))]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        same_as_stock(self.model, self.prefix_cache, ids, attention_mask=mask, do_sample=False)

    def restart(self) -> None:
        self.prefix_cache.flush()
        self.hits += self.prefix_cache.stats().hits
        self.restarts += 1
        self.prefix_cache = small(self.folder, max_bytes=BUDGET, when_full=self.random.choice(["wait", "drop"]))

    def damage(self) -> None:
        self.prefix_cache.flush()
        if files := [path for path in (self.folder / "blocks").rglob("*") if path.is_file()]:
            path = self.random.choice(files)
            data = bytearray(path.read_bytes())
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            path.write_bytes(data[: self.random.choice([len(data), len(data) // 2])])

    def words(self, count: int) -> list[int]:
        return [self.random.randrange(3, VOCABULARY) for _ in range(count)]


def walk(folder: Path, seed: int, steps: int, name: str = "llama") -> Walk:
    found = Walk(folder, seed, name)
    for _ in range(steps):
        found.step()
        assert disk_bytes(folder) <= BUDGET
    found.restart()
    return found


@pytest.mark.parametrize("mode", [*dict.fromkeys(MODE_NAMES)])
def test_a_prompt_in_two_parts_gives_the_stock_tokens(mode: str) -> None:
    """What a walk falls back on where a choice is a matter of rounding tells a wrong token from a right one."""
    model: Any = shared("llama")
    ids = torch.tensor([[3, 4, 5, 6, 7] * 3])
    expected = seeded(model.generate, ids, **MODES[mode])
    wrong = expected.clone()
    wrong[0, -1] = (wrong[0, -1] + 1) % VOCABULARY
    found = list(in_two_parts(model, ids, **MODES[mode]))
    assert sum(torch.equal(expected, other) for other in found) >= len(found) - 1
    assert not any(torch.equal(wrong, other) for other in found)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_short_walk(name: str, tmp_path: Path, own_cache: None) -> None:
    found = walk(tmp_path / "prefixes", 0, 40, name)
    assert found.hits > 10
    assert found.prefix_cache.verify().damaged == ()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(4))
def test_a_walk_of_250_steps(seed: int, tmp_path: Path, own_cache: None) -> None:
    found = walk(tmp_path / "prefixes", seed, 250)
    assert found.hits > 80
    assert found.restarts > 5
    sqlite3.connect(tmp_path / "prefixes" / "index.sqlite").execute("PRAGMA integrity_check")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [name for name in ("qwen3_next", "falcon_h1", "jamba") if state_models.known(name)])
def test_a_walk_with_recurrent_states(name: str, tmp_path: Path, own_cache: None) -> None:
    found = walk(tmp_path / "prefixes", 0, 60, name)
    assert found.hits > 10
    assert found.prefix_cache.verify().damaged == ()


PROGRAM = """
import sys
from pathlib import Path
from tests.test_prefix_cache_walk import walk
print(walk(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])).hits)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_processes_that_walk_at_once(tmp_path: Path, own_cache: None) -> None:
    """Three processes share one folder; one of them is killed and begins again."""
    def begin(seed: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "prefixes"), str(seed), "60"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    running = [begin(seed) for seed in range(3)]
    try:
        running[2].wait(40)
    except subprocess.TimeoutExpired:
        running[2].kill()
    running.append(begin(3))
    for number, process in enumerate(running):
        output, _ = process.communicate()
        if number != 2:
            assert process.returncode == 0
            assert int(output) > 10
    assert PrefixCache(tmp_path / "prefixes", BUDGET, block_tokens=WIDTH).verify().damaged == ()


def test_forgetting_the_queue_of_a_killed_process_loses_only_time(tmp_path: Path, own_cache: None) -> None:
    """What was not yet stored is computed again."""
    model: Any = shared("llama")
    ids = torch.tensor([[3, 4, 5, 6] * 10])
    first = small(tmp_path / "prefixes")
    seeded(model.generate, ids)
    same_as_stock(model, first, ids, do_sample=False)
    same_as_stock(model, small(tmp_path / "prefixes"), ids, do_sample=False)
    first.flush()
