"""Helpers of the tests of the command line: a tiny model with a tokenizer, a small artifact, and functions that run
commands.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from hf_cachegen import CacheGenConfig, artifact, encode_kv
from hf_cachegen.cli import main
from tests import tiny_models

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
LAYERS, HEADS, TOKENS, DIM = 3, 2, 90, 8
"""Of the artifact that `write` makes."""
# Contexts longer than the protected tokens, which every level keeps at the finest step.
LEARN = ("--context-tokens", 100, "--continuation-tokens", 8, "--samples", 10)
ENCODE = ("--chunk-tokens", 50, "--protect-last", 8)
WORDS = tuple(f"w{number}" for number in range(tiny_models.VOCABULARY - 4))


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def run_json(*arguments: object, code: int = 0, stdin: str | None = None) -> dict[str, Any]:
    """Run a command with --json: stdout must be one object, stderr empty."""
    done = run(*arguments, "--json", stdin=stdin)
    assert done.exit_code == code, done.output
    assert done.stderr == ""
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value


def text(count: int, seed: int = 7) -> str:
    """Return a text of `count` tokens."""
    return " ".join(WORDS[(seed + 31 * i + i * i) % len(WORDS)] for i in range(count))


def save_model(folder: Path, name: str = "llama", seed: int = 0) -> Path:
    """Save a tiny model, with a tokenizer of one token per word."""
    vocabulary = {word: number for number, word in enumerate(("<pad>", "<bos>", "<eos>", "<unk>", *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    tiny_models.make(name, seed).save_pretrained(folder)
    return folder


def write(folder: Path, **options: object) -> Path:
    """Write an artifact of random tensors that needs no model."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, HEADS, TOKENS, DIM, generator=generator) for _ in range(2 * LAYERS)]
    encoded = encode_kv(tensors[:LAYERS], tensors[LAYERS:], CacheGenConfig(chunk_tokens=32, protect_last=8, **options))
    artifact.write(encoded, folder, input_ids=range(TOKENS))
    return folder


def encode(model: Path, folder: Path, *options: object) -> Result:
    """Encode a text of 120 tokens into `folder`."""
    return run("encode", "-", "--model", model, "--out", folder, *ENCODE, *options, stdin=f"{text(120)}\n")


def ask(artifact: object, model: Path, *options: object) -> tuple[object, ...]:
    """Return the arguments of a short `generate`."""
    return ("generate", artifact, "--model", model, "--prompt", text(5, 3), "--max-new-tokens", 4, *options)


def documented(command: str, found: dict[str, Any]) -> bool:
    """Report whether docs/cli.md lists exactly these members, in this order."""
    row = f"| `{command}` | {', '.join(f'`{name}`' for name in found)} |"
    return row in DOCUMENT.read_text(encoding="utf-8").splitlines()
