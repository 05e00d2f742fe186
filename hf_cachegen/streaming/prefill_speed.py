"""How long a model takes to compute the keys and values of some tokens: measured once, kept on disk, bettered by use.

    seconds(first, tokens) = forward + token * tokens * (1 + attention * (first + tokens / 2))

`forward` is what any forward pass costs, `token` what a token does. `attention` is the share of attention to one
earlier token, which follows from the architecture: 2 * layers * heads * head_dim / parameters. The two speeds are
fitted to the measurements: non-negative least squares of relative errors.

Measurements err to one side: a model that is compiled on the way, or a device's first call, takes a hundred times as
long as what comes after it. By the formula a pass takes at most as many times another's seconds as it has its work, or
no longer where it has less. One that takes WARM_UP times that was a warm-up, and does not count; nor does the first of
a model of which nothing is known, which nothing can be held against.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_cachegen.models.compat import run, unwrapped
from hf_cachegen.models.layers import dtype_name
from hf_cachegen.models.running import evaluation_mode, layer_devices
from hf_cachegen.models.state import fresh_state
from hf_cachegen.stores.segment_cache import default_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sample = tuple[int, int, float]
"""(first token, tokens, seconds)"""
KEPT = 32
"""Samples that count, the latest."""
WARM_UP = 10.0
"""How many times slower than any model is, by another measurement, a pass must be for a warm-up. Less is noise: a
question's time has what a call of generate costs in it."""
BELIEVED = 3
"""So many such passes in a row are no warm-up: the machine is slower than it was."""
KNOWN_TOKENS = 32
PROBES = (16, 16, 64, 256)
"""Tokens of the forward passes of a measurement. The first is a model's slowest, and is measured again."""


class PrefillSpeed:
    """Of one model on its device. `samples` may be empty: then nothing is known. Threads may share it."""

    def __init__(self, attention: float, samples: list[Sample] | None = None, path: Path | None = None) -> None:
        self.attention, self._path = attention, path
        self.samples = list(samples or [])[-KEPT:]
        self._lock = threading.Lock()
        self._in_doubt = 0
        self._speeds = self._fit()

    @property
    def known(self) -> bool:
        """Whether enough tokens were measured at once to tell of a chunk; those of a question may be too few."""
        return any(tokens >= KNOWN_TOKENS for _, tokens, _ in self.samples)

    def seconds(self, first: int, tokens: int) -> float | None:
        """What a forward pass over tokens [first, first + tokens) takes after those before them; None: not known."""
        if not self.samples:
            return None
        forward, token = self._speeds
        return forward + token * self._work(first, tokens)

    def add(self, first: int, tokens: int, seconds: float) -> None:
        """Takes a measurement into account, in the place of an earlier one of the same tokens, unless it was a warm-up;
        earlier ones that turn out to have been warm-ups, or that are believed no longer, are forgotten.
        """
        new = first, tokens, seconds
        with self._lock:
            faster = [sample for sample in self.samples if self._warmed_up(new, sample)]
            self._in_doubt = self._in_doubt + 1 if faster or not self.samples else 0
            if 0 < self._in_doubt < (BELIEVED if faster else 2):
                return
            self._in_doubt = 0
            others = [sample for sample in self.samples if sample[:2] != new[:2] and sample not in faster]
            self.samples = [*(sample for sample in others if not self._warmed_up(sample, new)), new][-KEPT:]
            self._speeds = self._fit()

    def _warmed_up(self, slow: Sample, other: Sample) -> bool:
        """Whether, by the other measurement, this one is of a warm-up."""
        works = [self._work(first, tokens) for first, tokens, _ in (slow, other)]
        return slow[2] > WARM_UP * other[2] * max(1.0, works[0] / works[1])

    def save(self) -> None:
        """Keeps the measurements for other processes; does nothing where that cannot be written."""
        if self._path is None or not self.samples:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, name = tempfile.mkstemp(prefix=".tmp-", dir=self._path.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump([list(sample) for sample in self.samples], file)
            os.replace(name, self._path)

    def _work(self, first: int, tokens: int) -> float:
        return tokens * (1 + self.attention * (first + tokens / 2))

    def _fit(self) -> tuple[float, float]:
        """(forward, token), each at least 0, with the least sum of squared relative errors."""
        rows = [(1 / seconds, self._work(first, tokens) / seconds) for first, tokens, seconds in self.samples]
        a, b, c = (sum(x[i] * x[j] for x in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
        u, v = sum(x[0] for x in rows), sum(x[1] for x in rows)
        if not rows:
            return 0.0, 0.0
        determinant = a * c - b * b
        if determinant > 1e-9 * a * c:
            forward, token = (u * c - v * b) / determinant, (a * v - b * u) / determinant
            if forward >= 0 and token >= 0:
                return forward, token
        return min(((0.0, v / c), (u / a, 0.0)), key=lambda s: sum((s[0] * x + s[1] * y - 1) ** 2 for x, y in rows))


_known: dict[str, PrefillSpeed] = {}
_known_lock = threading.Lock()


def speed_of(model: PreTrainedModel) -> PrefillSpeed:
    """What is known of `model` here; the same object each time in a process, its samples from disk at first."""
    key = _key(model)
    path = Path(default_directory(), f"prefill-{key}.json")
    with _known_lock:
        if str(path) not in _known:
            _known[str(path)] = PrefillSpeed(_attention(model), _read(path), path)
        return _known[str(path)]


def measure(model: PreTrainedModel) -> PrefillSpeed:
    """Measures `model` by forward passes over PROBES tokens, and keeps what was found.

    Streams measure by themselves while they wait for the network, less well; better is to call this once before.
    """
    speed = speed_of(model)
    for tokens in PROBES:
        probe(model, speed, tokens)
    speed.save()
    return speed


@torch.no_grad()
def probe(model: PreTrainedModel, speed: PrefillSpeed, tokens: int) -> None:
    """One measurement: a forward pass over so many tokens."""
    text = model.config.get_text_config(decoder=True)
    place = layer_devices(model, text.num_hidden_layers)[0]
    ids = torch.arange(tokens, device=place)[None] % text.vocab_size
    with evaluation_mode(model), fresh_state(model):
        start = time.perf_counter()
        run(model, ids, None, last_logits_only=True).logits.sum().item()
        speed.add(0, tokens, time.perf_counter() - start)


def _attention(model: PreTrainedModel) -> float:
    text = model.config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None) or 1
    width = heads * (getattr(text, "head_dim", None) or getattr(text, "hidden_size", heads) // heads)
    return 2 * text.num_hidden_layers * width / max(1, unwrapped(model).num_parameters())


def _key(model: PreTrainedModel) -> str:
    """What a speed depends on: architecture, dtype, attention, device and threads."""
    text: dict[str, Any] = {**model.config.to_dict(), "_name_or_path": ""}
    place = next(unwrapped(model).parameters()).device
    machine = torch.cuda.get_device_name(place) if place.type == "cuda" else f"{platform.processor()} {os.cpu_count()}"
    attention = getattr(model.config, "_attn_implementation", "")
    about = [text, dtype_name(model.dtype), attention, str(place.type), machine, torch.get_num_threads()]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _read(path: Path) -> list[Sample]:
    """The samples in a file; none where it is not one."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        samples = [(int(first), int(tokens), float(seconds)) for first, tokens, seconds in rows]
    except (OSError, ValueError, TypeError):
        return []
    return [s for s in samples if s[0] >= 0 and s[1] > 0 and 0 < s[2] < math.inf]
