"""Answer questions from many documents: each is prefilled once, and a question loads the cache of its document.

    python examples/rag_many_documents.py
    python examples/rag_many_documents.py --model MODEL --documents texts/ --ask "What does the harbour charge?"

Retrieval here counts the rare words that a question shares with a document; replace it by your own search. The
caches are folders on disk, and those used last stay in memory.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cachegen import CacheGenCache

EXAMPLES = Path(__file__).resolve().parent
MODEL = EXAMPLES.parent / "eval" / "reference" / "model"
NAMES = ("happy-watch", "calm-roof", "loud-walnut")
QUESTIONS = [f"Tell me what is the REGISTER_CONTENT in line {name}?" for name in NAMES]
IN_MEMORY = 8
"""Caches that stay decoded in memory."""


def words(text: str) -> set[str]:
    """Return the distinct words of a text, in lower case."""
    return set(re.findall(r"[\w-]+", text.lower()))


class Search:
    """Find the document with the rarest words of a question (inverse document frequency)."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.words = {name: words(text) for name, text in texts.items()}
        self.seen_in = Counter(word for found in self.words.values() for word in found)

    def best(self, question: str) -> str:
        """Return the name of the best document."""

        def score(name: str) -> float:
            shared = words(question) & self.words[name]
            return sum(math.log(1 + len(self.words) / self.seen_in[word]) for word in shared)

        return max(self.words, key=score)


def main(arguments: list[str] | None = None) -> None:
    """Prefill the documents that have no cache, then answer each question from the document that fits it best."""
    parser = argparse.ArgumentParser(description="Answer from many documents, each with a compressed KV cache.")
    parser.add_argument("--model", default=str(MODEL), help="Path or name of a causal language model.")
    parser.add_argument("--documents", type=Path, default=EXAMPLES / "documents", help="Folder of text files.")
    parser.add_argument("--ask", action="append", help="Question; may be given several times.")
    parser.add_argument("--caches", type=Path, help="Folder of the caches (default: that of the documents).")
    options = parser.parse_args(arguments)

    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(options.documents.glob("*.txt"))}
    if not texts:
        parser.error(f"expected text files (.txt) in {options.documents}, found none")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    caches = options.caches or options.documents

    start, tokens, prefilled = time.perf_counter(), 0, 0
    for name, text in texts.items():
        if not (caches / f"{name}.cachegen").exists():
            context = tokenizer(text, return_tensors="pt").input_ids
            CacheGenCache.from_context(model, context, tokenizer=tokenizer).save_pretrained(caches / f"{name}.cachegen")
            tokens, prefilled = tokens + context.shape[1], prefilled + 1
    print(f"prefilled {prefilled} of {len(texts)} documents, {tokens} tokens, in {time.perf_counter() - start:.1f} s")

    @lru_cache(maxsize=IN_MEMORY)
    def cache_of(name: str) -> CacheGenCache:
        return CacheGenCache.from_pretrained(caches / f"{name}.cachegen", model=model, tokenizer=tokenizer)

    stop: dict[str, Any] = {"stop_strings": "\n", "tokenizer": tokenizer}
    search = Search(texts)
    for question in options.ask or QUESTIONS:
        name = search.best(question)
        inputs = tokenizer(f"{texts[name]}{question}\n", return_tensors="pt").to(model.device)
        cache = cache_of(name)
        output = model.generate(**inputs, cache=cache, max_new_tokens=64, do_sample=False, **stop)
        answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()
        print(f"> {question}\n{answer}  [{name}]")


if __name__ == "__main__":
    main()
