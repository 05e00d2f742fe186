"""The contexts that are sent: one of the reference model, and a longer one of a larger model with random weights.

The larger model answers nonsense and its KV cache is noise, which codes worse than any trained model's; but its sizes
are real, and so is the time its prefill takes, which is what a network benchmark needs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.network import uniform8
from eval.reference import MODEL_PATH, held_out_lines
from hf_cachegen import CacheGenCache, CacheGenConfig
from hf_cachegen.artifact import PROFILE_FILE
from hf_cachegen.artifact.artifact import Artifact
from hf_cachegen.artifact.manifest import digest
from hf_cachegen.stores import LocalStore

VOCABULARY = 4096
LARGER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 768,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 1 << 15,
}
REFERENCE_LINES = 128
QUESTION_TOKENS = 16
NAMES = ("reference", "larger")


@dataclass(frozen=True)
class Context:
    """Folders below the served one, and the prompt: context and question, token ids [1, tokens].

    sizes: bytes of "level 1", ..., "uniform 8-bit" and "exact".
    """

    name: str
    model: Path
    artifact: str
    uniform: str
    prompt: Tensor
    tokens: int
    sizes: dict[str, int]


def load_model(path: Path) -> Any:
    """Load a model in bfloat16, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


def make(name: str, served: Path, tokens: int = 8192, chunk_tokens: int = 512) -> Context:
    """Make the context of that name under `served`, or return the one that an earlier call made."""
    # An artifact belongs to one profile, and the reference model's may be learnt again.
    profile = digest((MODEL_PATH / PROFILE_FILE).read_bytes())[:8]
    folder = f"reference-{chunk_tokens}-{profile}" if name == "reference" else f"larger-{tokens}-{chunk_tokens}"
    note = served / folder / "context.json"
    if not note.exists():
        model, path, context, prompt = _reference() if name == "reference" else _larger(served / folder, tokens)
        cache = CacheGenCache.from_context(model, context)
        config = CacheGenConfig(chunk_tokens=chunk_tokens)
        cache.save_pretrained(served / folder / "artifact", config, overwrite=True)
        uniform = uniform8.write(cache.kv.keys, cache.kv.values, chunk_tokens, served / folder / "uniform8")
        artifact = Artifact(LocalStore(served / folder / "artifact"))
        sizes = {f"level {n}": artifact.nbytes_at(n) for n in range(1, config.levels + 1)}
        sizes |= {"uniform 8-bit": uniform, "exact": cache.kv.geometry.nbytes}
        found = {"model": str(path), "prompt": prompt[0].tolist(), "tokens": context.shape[1], "sizes": sizes}
        note.write_text(json.dumps(found))
    found = json.loads(note.read_text())
    return Context(
        name, Path(found["model"]), f"{folder}/artifact", f"{folder}/uniform8", torch.tensor([found["prompt"]]),
        found["tokens"], found["sizes"],
    )  # fmt: skip


def _reference() -> tuple[Any, Path, Tensor, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    document = held_out_lines(0, REFERENCE_LINES, 1)
    context = tokenizer(document.text, return_tensors="pt").input_ids
    prompt = tokenizer(document.text + document.questions[0].prompt, return_tensors="pt").input_ids
    return load_model(MODEL_PATH), MODEL_PATH, context, prompt


def _larger(folder: Path, tokens: int) -> tuple[Any, Path, Tensor, Tensor]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LARGER)).to(torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "model")
    prompt = torch.randint(3, VOCABULARY, (1, tokens + QUESTION_TOKENS), generator=torch.Generator().manual_seed(1))
    return load_model(folder / "model"), folder / "model", prompt[:, :tokens], prompt
