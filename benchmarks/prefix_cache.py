"""What a prefix cache is worth: time to first token, bytes written, memory and disk, for three kinds of use.

    python -m benchmarks.prefix_cache --model runs/smollm2-135m --text wikitext2_valid.txt --out runs/prefix_cache

chat: a conversation that grows turn by turn. rag: a system prompt, then some of a few documents in changing order, then
a question. agent: a task, then tool outputs, each answered by a short call. Every prompt is answered in these ways:

none: without a cache. memory: with the stock DynamicCache of the call before, as far as it is a prefix (what a single
process can do). torch.save: the same, written after each call and read before the next. prefix cache: the prefix cache,
opened again before each call, as after a restart; what it stores is stored before the clock of the next call starts.

llama.cpp: a server of llama.cpp, whose slot is saved and erased after each call and restored before the next; only with
--llama and --llama-slots, the address of the server and the folder of its slot files. It is given the same token ids.
Its answers may differ, since its kernels round otherwise. Any server will do that was started with one slot:

    llama-server -m smollm2-135m-bf16.gguf --slot-save-path slots/ -np 1 -c 8192 -t 2 --port 8189

Times are from the call to the first logits; of llama.cpp, from the restore to the end of the prompt.
"""

from __future__ import annotations

import json
import os
import platform
import random
import resource
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LogitsProcessor, LogitsProcessorList

from hf_cachegen import PrefixCache
from hf_cachegen.generation import generate
from hf_cachegen.models.compat import CACHE_ARGUMENT

ANSWER_TOKENS = 24


class First(LogitsProcessor):
    """Notes when the first logits are there."""

    def __init__(self) -> None:
        self.begun, self.seconds = time.perf_counter(), 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seconds = self.seconds or time.perf_counter() - self.begun
        return scores


class Way:
    """One way to answer; `answer` returns the new tokens and the seconds until the first."""

    name = "none"
    written = 0

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder = model, folder

    def answer(self, ids: list[int]) -> tuple[list[int], float]:
        first = First()
        return self._generate(ids, first), first.seconds

    def _generate(self, ids: list[int], first: First, **options: Any) -> list[int]:
        output = generate(
            self.model, torch.tensor([ids]), max_new_tokens=ANSWER_TOKENS, min_new_tokens=ANSWER_TOKENS,
            do_sample=False, logits_processor=LogitsProcessorList([first]), **options,
        )  # fmt: skip
        return output[0, len(ids) :].tolist()

    def disk(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


class Memory(Way):
    """The cache of the call before, cut to the common prefix."""

    name = "memory"

    def __init__(self, model: Any, folder: Path) -> None:
        super().__init__(model, folder)
        self.ids: list[int] = []
        self.kv: list[tuple[torch.Tensor, torch.Tensor]] = []

    def answer(self, ids: list[int]) -> tuple[list[int], float]:
        first = First()
        self.load()
        common = next((n for n, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b),
                      min(len(self.ids), len(ids)))  # fmt: skip
        common = min(common, len(ids) - 1)
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.kv if common else []):
            cache.update(keys[:, :, :common], values[:, :, :common], index)
        new = self._generate(ids, first, **{CACHE_ARGUMENT: cache})
        self.ids = [*ids, *new][: cache.get_seq_length()]
        self.kv = [(layer.keys, layer.values) for layer in cache.layers]
        self.save()
        return new, first.seconds

    def load(self) -> None:
        pass

    def save(self) -> None:
        pass


class Saved(Memory):
    """As in memory, through a file."""

    name = "torch.save"

    def load(self) -> None:
        if (self.folder / "kv.pt").is_file():
            self.ids, self.kv = torch.load(self.folder / "kv.pt", weights_only=True)

    def save(self) -> None:
        torch.save((self.ids, [(k.clone(), v.clone()) for k, v in self.kv]), self.folder / "kv.pt")
        self.written += (self.folder / "kv.pt").stat().st_size
        self.ids, self.kv = [], []


class Prefixes(Way):
    """The prefix cache, in a fresh object for every call."""

    name = "prefix cache"
    max_bytes: int | str | None = None

    def answer(self, ids: list[int]) -> tuple[list[int], float]:
        first = First()
        cache = PrefixCache(self.folder, self.max_bytes, min_tokens=64, block_tokens=128)
        new = self._generate(ids, first, prefix_cache=cache)
        cache.flush()
        self.written += cache.stats().bytes_written
        return new, first.seconds


class Llama(Way):
    """A slot file of llama.cpp, through its server."""

    name = "llama.cpp"
    address = ""
    slots = Path()

    def answer(self, ids: list[int]) -> tuple[list[int], float]:
        begun, file = time.perf_counter(), self.folder.name
        if (self.slots / file).is_file():
            self._post("/slots/0?action=restore", {"filename": file})
        restored = time.perf_counter() - begun
        found = self._post("/completion", {
            "prompt": ids, "n_predict": ANSWER_TOKENS, "ignore_eos": True, "cache_prompt": True, "id_slot": 0,
            "temperature": 0, "return_tokens": True,
        })  # fmt: skip
        self.written += self._post("/slots/0?action=save", {"filename": file})["n_written"]
        self._post("/slots/0?action=erase", {})
        return found["tokens"], restored + found["timings"]["prompt_ms"] / 1000

    def disk(self) -> int:
        path = self.slots / self.folder.name
        return path.stat().st_size if path.is_file() else 0

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=3600) as response:
            return json.load(response)


WAYS = (Way, Memory, Saved, Prefixes)


def chat(words: list[int], turns: int, draw: random.Random) -> Iterator[list[int]]:
    """Prompts of a conversation about a text; each ends with a new message, the answers are filled in by the caller."""
    ids = words[:600]
    for turn in range(turns):
        ids = ids + words[1000 + 60 * turn : 1060 + 60 * turn]
        ids = ids + (yield ids)


def rag(words: list[int], turns: int, draw: random.Random) -> Iterator[list[int]]:
    """Prompts of a system prompt, two of four documents, and a question."""
    documents = [words[1000 + 300 * number : 1300 + 300 * number] for number in range(4)]
    for turn in range(turns):
        picked = draw.sample(range(4), 2)
        yield words[:256] + documents[picked[0]] + documents[picked[1]] + words[3000 + 20 * turn : 3020 + 20 * turn]


def agent(words: list[int], turns: int, draw: random.Random) -> Iterator[list[int]]:
    """Prompts of a task and of tool outputs of changing length."""
    ids = words[:400]
    for turn in range(turns):
        first = 1000 + 200 * turn
        ids = ids + words[first : first + draw.randrange(40, 200)]
        ids = ids + (yield ids)


USES = {"chat": chat, "rag": rag, "agent": agent}


def measure(model: Any, words: list[int], use: str, kind: type[Way], turns: int) -> dict[str, Any]:
    """Answer all prompts of one use in one way."""
    with tempfile.TemporaryDirectory() as folder:
        way, seconds, tokens, answers = kind(model, Path(folder)), [], 0, []
        prompts = USES[use](words, turns, random.Random(0))
        prompt = next(prompts, None)
        while prompt is not None:
            tokens += len(prompt)
            new, first = way.answer(prompt)
            seconds.append(first)
            answers.append(new)
            try:
                prompt = prompts.send(new)
            except StopIteration:
                prompt = None
        return {
            "use": use, "way": way.name, "prompts": len(seconds), "prompt_tokens": tokens, "first_seconds": seconds,
            "mean_after_the_first": statistics.mean(seconds[1:]), "written": way.written, "disk": way.disk(),
            "answers": answers,
        }  # fmt: skip


def steady(model: Any, words: list[int], calls: int) -> dict[str, Any]:
    """Memory and disk while many different prompts pass through a small budget."""
    with tempfile.TemporaryDirectory() as folder:
        way, draw, rows = Prefixes(model, Path(folder)), random.Random(1), []
        way.max_bytes = 60_000_000
        for _ in range(calls):
            first = draw.randrange(0, 8) * 400
            way.answer(words[first : first + draw.randrange(200, 400)])
            rows.append({"disk": way.disk(), "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})
        return {"budget": way.max_bytes, "calls": rows}


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"{found['model']}, {found['dtype']}, {found['machine']}; {found['turns']} prompts of each use.", "",
        "| use | way | TTFT, first prompt | TTFT, mean of the others | bytes written | on disk at the end |",
        "|---|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in found["rows"]:
        lines.append(
            f"| {row['use']} | {row['way']} | {row['first_seconds'][0]:.2f} s | {row['mean_after_the_first']:.2f} s | "
            f"{row['written'] / 1e6:.1f} MB | {row['disk'] / 1e6:.1f} MB |"
        )
    calls = found["steady"]["calls"]
    half = calls[len(calls) // 2 :]
    lines += [
        "", f"Steady state over {len(calls)} calls with a budget of {found['steady']['budget'] / 1e6:.0f} MB: at most "
        f"{max(row['disk'] for row in calls) / 1e6:.1f} MB on disk; the peak of resident memory grew by "
        f"{(half[-1]['peak_rss'] - half[0]['peak_rss']) / 1e6:.1f} MB over the second half.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--model", required=True, help="Folder of the model.")
@click.option("--text", required=True, type=click.Path(path_type=Path), help="Text to cut prompts from.")
@click.option("--dtype", default="bfloat16", show_default=True, help="Dtype of the model.")
@click.option("--turns", default=6, show_default=True, help="Prompts of each use.")
@click.option("--steady-calls", default=20, show_default=True, help="Calls of the steady state.")
@click.option("--llama", help="Address of a llama.cpp server to compare with, such as http://127.0.0.1:8189.")
@click.option("--llama-slots", type=click.Path(path_type=Path), help="Folder of the slot files of that server.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the results.")
def main(
    model: str, text: Path, dtype: str, turns: int, steady_calls: int, llama: str | None, llama_slots: Path | None,
    out: Path,
) -> None:  # fmt: skip
    """Measure a prefix cache against the other ways."""
    if (llama is None) != (llama_slots is None):
        raise click.UsageError("--llama and --llama-slots belong together")
    ways: tuple[type[Way], ...] = WAYS
    if llama is not None and llama_slots is not None:
        Llama.address, Llama.slots = llama.rstrip("/"), llama_slots
        ways = (*WAYS, Llama)
    machine = (
        f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}, "
        f"load average before the run {os.getloadavg()[0]:.1f}"
    )
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    words = tokenizer(text.read_text(encoding="utf-8")[:60_000]).input_ids
    Way(loaded, Path()).answer(words[:600])  # a warm-up
    rows = []
    for use in USES:
        for kind in ways:
            rows.append(measure(loaded, words, use, kind, turns))
            print(use, kind.name, [round(s, 2) for s in rows[-1]["first_seconds"]], flush=True)
        same = [row["answers"] == rows[-len(ways)]["answers"] for row in rows[-len(ways) :]]
        print(use, "same answers as without a cache:", same, flush=True)
    found = {
        "model": Path(model).name, "dtype": dtype, "machine": machine, "turns": turns, "rows": rows,
        "steady": steady(loaded, words, steady_calls),
    }  # fmt: skip
    for row in rows:
        del row["answers"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "prefix_cache.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (out / "prefix_cache.md").write_text(table(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
