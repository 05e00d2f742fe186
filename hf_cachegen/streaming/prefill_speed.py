"""Measure how long a model takes to compute keys and values. The result is kept on disk, and improves with use.

    seconds(first, tokens) = forward + token * tokens * (1 + attention * (first + tokens / 2))

`forward` is the cost of any forward pass, `token` that of a token. `attention` is the share of attention to one earlier
token, which follows from the architecture: 2 * layers * heads * head_dim / parameters. The two speeds are fitted to the
measurements by non-negative least squares of relative errors.

Some measurements are far too long: a model that is compiled during the pass, or a device's first call, takes a hundred
times as long as later passes. By the formula the times of two passes differ at most as their work does, and the smaller
pass is not the slower one. A pass that takes WARM_UP times longer than that was a warm-up, and does not count. Nor does
the first pass of an unknown model, which cannot be compared with another.
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

from hf_cachegen import strict_json
from hf_cachegen.models.compat import run, unwrapped
from hf_cachegen.models.layers import dtype_name
from hf_cachegen.models.requirements import require_instance
from hf_cachegen.models.running import evaluation_mode, layer_devices
from hf_cachegen.models.state import fresh_state
from hf_cachegen.stores.segment_cache import default_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sample = tuple[int, int, float]
"""(first token, tokens, seconds)"""
KEPT = 32
"""Number of samples that count: the latest."""
WARM_UP = 10.0
"""A warm-up is this many times slower than another measurement allows. Less is noise: the time of a question includes
that of a call of generate."""
BELIEVED = 3
"""This many such passes in a row are no warm-up: the machine has become slower."""
KNOWN_TOKENS = 32
"""Tokens of a pass that measures a chunk's speed; a shorter one measures the cost of a pass."""
PROBES = (16, 16, 64, 256)
"""Tokens of the forward passes of a measurement. The first pass of a model is its slowest, so it is repeated."""


class PrefillSpeed:
    """The speed of one model on its device. Threads may share it.

    Args:
        attention: See above.
        samples: Measurements; empty: nothing is known.
        path: Where `save` keeps them; None: nowhere.
    """

    def __init__(self, attention: float, samples: list[Sample] | None = None, path: Path | None = None) -> None:
        self.attention, self._path = attention, path
        self.samples = list(samples or [])[-KEPT:]
        self._lock = threading.Lock()
        self._in_doubt, self._saved = 0, True
        self._speeds = self._fit()

    @property
    def known(self) -> bool:
        """Whether a pass was measured that is long enough to predict that of a chunk."""
        return any(tokens >= KNOWN_TOKENS for _, tokens, _ in self.samples)

    def seconds(self, first: int, tokens: int) -> float | None:
        """Return the expected seconds of a forward pass over tokens [first, first + tokens); None: not known."""
        if not self.samples:
            return None
        forward, token = self._speeds
        return forward + token * self._work(first, tokens)

    def add(self, first: int, tokens: int, seconds: float) -> None:
        """Add a measurement, which replaces an earlier one of the same tokens, unless it was a warm-up.

        Earlier measurements are forgotten if this one shows that they were warm-ups, or that the machine has changed.
        """
        new = first, tokens, seconds
        with self._lock:
            faster = [sample for sample in self.samples if self._warmed_up(new, sample)]
            self._in_doubt = self._in_doubt + 1 if faster or not self.samples else 0
            if 0 < self._in_doubt < (BELIEVED if faster else 2):
                return
            self._in_doubt, self._saved = 0, False
            others = [sample for sample in self.samples if sample[:2] != new[:2] and sample not in faster]
            self.samples = [*(sample for sample in others if not self._warmed_up(sample, new)), new][-KEPT:]
            self._speeds = self._fit()

    def _warmed_up(self, slow: Sample, other: Sample) -> bool:
        """Whether the other measurement shows that this one is of a warm-up."""
        works = [self._work(first, tokens) for first, tokens, _ in (slow, other)]
        return slow[2] > WARM_UP * other[2] * max(1.0, works[0] / works[1])

    def save(self) -> None:
        """Keep the measurements for other processes. Does nothing where they cannot be written."""
        if self._path is None or self._saved:
            return
        self._saved = True
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, name = tempfile.mkstemp(prefix=".tmp-", dir=self._path.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump([list(sample) for sample in self.samples], file)
            os.replace(name, self._path)

    def _work(self, first: int, tokens: int) -> float:
        return tokens * (1 + self.attention * (first + tokens / 2))

    def _fit(self) -> tuple[float, float]:
        """Return (forward, token), each at least 0, with the least sum of squared relative errors."""
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
    """Return the speed of `model` on its device, the same object each time in a process.

    Its first samples are those that `save` has kept.
    """
    key = _key(model)
    path = Path(default_directory(), f"prefill-{key}.json")
    with _known_lock:
        if str(path) not in _known:
            _known[str(path)] = PrefillSpeed(_attention(model), _read(path), path)
        return _known[str(path)]


def measure(model: PreTrainedModel) -> PrefillSpeed:
    """Measure `model` by forward passes over PROBES tokens, and keep the result.

    Streams measure a model too, less exactly, while they wait for the network. Call this once before to spare them.

    Returns:
        The speed of the model on its device.
    """
    require_instance(model)
    speed = speed_of(model)
    for tokens in PROBES:
        probe(model, speed, tokens)
    speed.save()
    return speed


@torch.no_grad()
def probe(model: PreTrainedModel, speed: PrefillSpeed, tokens: int) -> None:
    """Measure one forward pass over that many tokens."""
    text = model.config.get_text_config(decoder=True)
    device = layer_devices(model, text.num_hidden_layers)[0]
    ids = torch.arange(tokens, device=device)[None] % text.vocab_size
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
    """A hash of what a speed depends on: architecture, dtype, attention, device and threads."""
    text: dict[str, Any] = {**model.config.to_dict(), "_name_or_path": ""}
    device = next(unwrapped(model).parameters()).device
    cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if cuda else f"{platform.processor()} {os.cpu_count()}"
    attention = getattr(model.config, "_attn_implementation", "")
    about = [text, dtype_name(model.dtype), attention, str(device.type), machine, torch.get_num_threads()]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _read(path: Path) -> list[Sample]:
    """The samples in a file; none where it is not such a file."""
    try:
        rows = strict_json.loads(path.read_bytes())
        samples = [(int(first), int(tokens), float(seconds)) for first, tokens, seconds in rows]
    except (OSError, ValueError, TypeError):
        return []
    return [s for s in samples if s[0] >= 0 and s[1] > 0 and 0 < s[2] < math.inf]
