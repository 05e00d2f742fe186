"""The client process: it holds a model, and on request loads a context over the network and generates one token.

    python -m benchmarks.network.client THREADS      (in the client's namespace; `Client` starts it)

One process for all measurements, since importing and loading take longer than any of them. Its first line of input is
the context; then for each line {"how": ..., "slo": ...} a line of JSON goes out. Whatever the way, the clock runs from
the call until the first token is there; the cache of segments on disk is empty before it.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.network.contexts import Context
    from benchmarks.network.lab import Lab

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
"""Keep freed memory, like a server that loads many contexts: mapping new pages costs as much as decoding."""
ADAPTIVE, TEXT, UNIFORM = "adaptive", "text", "uniform 8-bit"


class Client:
    """The controller's end: start the process in a lab's client namespace, and send it requests."""

    def __init__(self, lab: Lab, context: Context, url: str, threads: int = 2) -> None:
        values = {**asdict(context), "model": str(context.model), "prompt": context.prompt[0].tolist(), "url": url}
        command = [sys.executable, "-m", "benchmarks.network.client", str(threads)]
        # Threads that wait by spinning would take the cores from the link, the server and each other.
        environment = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads), **KEEP_MEMORY}
        self._process = lab.start(
            lab.client, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, environment=environment
        )
        self._send(values)
        self._answer()

    def _send(self, values: dict[str, Any]) -> None:
        if self._process.stdin is None:
            raise RuntimeError("the client has no input")
        self._process.stdin.write(json.dumps(values) + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(30)

    def ask(self, how: str, slo: float | None = None) -> dict[str, Any]:
        """Request one measurement; the answer is {"error": ...} where it failed."""
        self._send({"how": how, "slo": slo})
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = "" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client ended with {self._process.wait(5)}")
        found: dict[str, Any] = json.loads(line)
        return found


class _Measure:
    """The measurements of the process, by name."""

    def __init__(self, values: dict[str, Any], threads: int) -> None:
        import torch

        from benchmarks.network.contexts import load_model

        torch.set_num_threads(threads)
        self.model = load_model(Path(values["model"]))
        self.prompt = torch.tensor([values["prompt"]])
        self.artifact = f"{values['url']}/{values['artifact']}"
        self.uniform = f"{values['url']}/{values['uniform']}"
        self.tokens = values["tokens"]

    def __call__(self, how: str, slo: float | None) -> dict[str, Any]:
        import torch

        gc.collect()  # a collection takes 50 ms or more: not during a measurement
        with tempfile.TemporaryDirectory(prefix="cachegen-segments-") as folder, torch.no_grad():
            processor, start = time.process_time(), time.monotonic()
            if how == TEXT:
                found = self._text()
            elif how == UNIFORM:
                found = self._uniform()
            elif how == ADAPTIVE:
                found = self._stream(folder, slo=slo)
            else:
                found = self._stream(folder, level=int(how.removeprefix("level ")))
            end = time.monotonic()
            found["ttft"], found["processor"] = end - start, time.process_time() - processor
        return {"how": how, "slo": slo, **found}

    def _generate(self, **options: Any) -> None:
        import hf_cachegen

        hf_cachegen.generate(self.model, self.prompt, max_new_tokens=1, do_sample=False, **options)

    def _text(self) -> dict[str, Any]:
        self._generate()
        return {"bytes": 0}

    def _stream(self, folder: str, slo: float | None = None, level: int | None = None) -> dict[str, Any]:
        from hf_cachegen.streaming import ContextReady, Event, Link

        ready: list[ContextReady] = []

        def on_event(event: Event) -> None:
            if isinstance(event, ContextReady):
                ready.append(event)

        # A new link each time, so that nothing is known from an earlier run.
        options = {"level": level, "cache_dir": folder, "link": Link(), "on_event": on_event}
        self._generate(cache=self.artifact, slo=slo, stream=options)
        if not ready:
            raise RuntimeError("the prompt was prefilled instead of loaded from its cache")
        report = ready[0].report
        decodes = [chunk.decode_seconds for chunk in report.chunks if chunk.decode_seconds]
        return {
            "ready": ready[0].seconds,
            "bytes": report.loaded_bytes,
            "choices": [chunk.choice for chunk in report.chunks],
            "chunk_decode": statistics.median(decodes) if decodes else 0.0,
            "faults": list(report.faults),
        }

    def _uniform(self) -> dict[str, Any]:
        import torch
        from transformers import DynamicCache

        from benchmarks.network import uniform8
        from hf_cachegen.codec.geometry import Geometry, LayerGeometry
        from hf_cachegen.models.compat import CACHE_ARGUMENT
        from hf_cachegen.stores import RemoteStore
        from hf_cachegen.stores.remote import open_files

        config = self.model.config
        heads, dim = config.num_key_value_heads, config.head_dim
        layers = (LayerGeometry("full", heads, dim, heads, dim),) * config.num_hidden_layers
        geometry = Geometry(layers, tokens=self.tokens, batch=1, dtype="bfloat16")
        start, store = time.monotonic(), RemoteStore(open_files(self.uniform))
        keys, values, nbytes = uniform8.fetch(store, geometry)
        ready = time.monotonic() - start
        past = DynamicCache(list(zip(keys, values, strict=True)))
        mask = torch.ones_like(self.prompt)
        self._generate(**{CACHE_ARGUMENT: past}, attention_mask=mask)
        return {"ready": ready, "bytes": nbytes}


def main(threads: int) -> None:
    """Answer requests until the input ends."""
    # Libraries may print, but the pipe carries answers only.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    measure = _Measure(json.loads(sys.stdin.readline()), threads)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            found = measure(**json.loads(line))
        except Exception as error:
            found = {**json.loads(line), "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
