"""Retrieval at any length: pairs of keys and values, and a needle in a text.

- `key-values`: a JSON object of random keys and numbers, and questions about some of its keys (the form of Liu et al.
  2023, "Lost in the Middle", with numbers as values);
- `needle`: a text with one sentence that states a number, at each of some depths (the form of Kamradt's test).

Both are seeded, and score the last integer of the answer. How long a context a model can do is for the exact cache to
say: a run's report warns where it cannot.
"""

from __future__ import annotations

import json
import random

from eval.datasets.request import Request, read_text
from eval.examples import Dataset, Example, Question
from hf_cachegen.errors import ConfigError

CONTEXTS = 20
ANSWER_TOKENS = 16
VALUES = (10_000, 99_999)
KEY_BITS = 32
KEYS_BEFORE = "Below is a JSON object with numbers.\n\n"
KEYS_QUESTION = '\n\nThe value of the key "{key}" is'
NEEDLE = "The secret number of {city} is {number}."
NEEDLE_QUESTION = "\n\nThe secret number of {city} is"
CITIES = ("Lisbon", "Nairobi", "Kyoto", "Lima", "Oslo", "Hanoi", "Quito", "Cairo")


def key_values(request: Request, pairs: int = 40, questions: int = 4) -> Dataset:
    """Generate retrieval of values by their keys.

    Args:
        request: limit and seed.
        pairs: keys of an object, about 14 to 20 tokens each.
        questions: questions about each object.

    Raises:
        ConfigError: there are fewer pairs than questions.
    """
    if not 1 <= questions <= pairs:
        raise ConfigError(f"key-values: expected from 1 question to one for each of the {pairs} pairs, got {questions}")
    examples = []
    for index in range(request.count(CONTEXTS)):
        rng = random.Random(f"key-values {request.seed} {index}")
        record = {f"{rng.getrandbits(KEY_BITS):08x}": str(rng.randint(*VALUES)) for _ in range(pairs)}
        context = KEYS_BEFORE + json.dumps(record, indent=0)
        asked = tuple(
            Question(KEYS_QUESTION.format(key=key), (record[key],), f' "{record[key]}"\n')
            for key in rng.sample(list(record), questions)
        )
        examples.append(Example(str(index), context, asked))
    return Dataset("Key-value retrieval", tuple(examples), ("line",), ANSWER_TOKENS, first_line=True)


def needle(request: Request, path: str = "", tokens: int = 1000, depths: int = 5) -> Dataset:
    """Hide a sentence in a text, at each of `depths` positions from the start to the end.

    Args:
        request: limit, seed and tokenizer.
        path: the text file; contexts take consecutive parts of it.
        tokens: length of a context in tokens, the needle not counted.
        depths: contexts take these depths in turn.

    Raises:
        ConfigError: the text is too short, or a number is below 1.
    """
    if not path or tokens < 1 or depths < 1:
        raise ConfigError("needle needs path=FILE, tokens= and depths= of at least 1")
    text, source = read_text(path)
    encoded = request.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [0, *(end for _, end in encoded["offset_mapping"])]
    count = request.count(CONTEXTS)
    if count * tokens >= len(ends):
        raise ConfigError(f"{path}: expected at least {count * tokens} tokens, found {len(ends) - 1}")
    examples = []
    for index in range(count):
        rng = random.Random(f"needle {request.seed} {index}")
        part = text[ends[index * tokens] : ends[(index + 1) * tokens]]
        city, number = rng.choice(CITIES), str(rng.randint(*VALUES))
        share = (index % depths) / max(1, depths - 1)
        at = part.rfind(" ", 0, round(share * len(part))) + 1
        context = f"{part[:at]}{NEEDLE.format(city=city, number=number)} {part[at:]}"
        question = Question(NEEDLE_QUESTION.format(city=city), (number,), f" {number}.\n")
        examples.append(Example(str(index), context, (question,)))
    return Dataset("Needle in a text", tuple(examples), ("line",), ANSWER_TOKENS, first_line=True, source=source)
