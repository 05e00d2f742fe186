"""What the tests of the command line share: a tiny model with a tokenizer in a folder, and a way to run a command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from hf_cachegen.cli import main
from tests import tiny_models

WORDS = tuple(f"w{number}" for number in range(tiny_models.VOCABULARY - 4))


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def run_json(*arguments: object, code: int = 0, stdin: str | None = None) -> dict[str, Any]:
    """Runs a command with --json: stdout must be one object, stderr empty."""
    done = run(*arguments, "--json", stdin=stdin)
    assert done.exit_code == code, done.output
    assert done.stderr == ""
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value


def text(count: int, seed: int = 7) -> str:
    """A text of `count` tokens."""
    return " ".join(WORDS[(seed + 31 * i + i * i) % len(WORDS)] for i in range(count))


def save_model(folder: Path, name: str = "llama", seed: int = 0) -> Path:
    """A tiny model with a tokenizer of one token per word."""
    vocabulary = {word: number for number, word in enumerate(("<pad>", "<bos>", "<eos>", "<unk>", *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    tiny_models.make(name, seed).save_pretrained(folder)
    return folder
