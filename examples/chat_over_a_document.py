"""Chat over a document: the document is prefilled once, and every question of the conversation starts from its cache.

    python examples/chat_over_a_document.py
    python examples/chat_over_a_document.py --model MODEL --document report.txt --ask "Who wrote it?" --ask "When?"

The cache lies in a folder beside the document, so the next conversation does not prefill it either. With a chat
template the context ends where two conversations with different first questions stop being equal.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cachegen import CacheGenCache

EXAMPLES = Path(__file__).resolve().parent
MODEL = EXAMPLES.parent / "eval" / "reference" / "model"
NAMES = ("calm-roof", "tall-wheel", "bleak-dog")
QUESTIONS = [f"Tell me what is the REGISTER_CONTENT in line {name}?" for name in NAMES]


def tokens(tokenizer: Any, document: str, turns: list[tuple[str, str]], question: str) -> Any:
    """Token ids and attention mask, [1, tokens], of the document, the conversation so far and a question."""
    if tokenizer.chat_template is None:
        said = "".join(f"{asked}\n{answer}\n" for asked, answer in turns)
        return tokenizer(f"{document}{said}{question}\n", return_tensors="pt")
    messages, before = [], f"{document}\n\n"
    for asked, answer in turns:
        messages += [{"role": "user", "content": before + asked}, {"role": "assistant", "content": answer}]
        before = ""
    messages.append({"role": "user", "content": before + question})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")


def context_of(tokenizer: Any, document: str) -> Any:
    """The tokens, [1, tokens], with which every conversation about the document begins."""
    one, other = (tokens(tokenizer, document, [], question).input_ids[0] for question in ("Why?", "How?"))
    shorter = min(len(one), len(other))
    differ = (one[:shorter] != other[:shorter]).nonzero()
    return one[None, : int(differ[0]) if len(differ) else shorter]


def main(arguments: list[str] | None = None) -> None:
    """Prefill the document unless its cache is there, then answer one question after the other."""
    parser = argparse.ArgumentParser(description="Chat over a document from its compressed KV cache.")
    parser.add_argument("--model", default=str(MODEL), help="Path or name of a causal language model.")
    parser.add_argument("--document", type=Path, default=EXAMPLES / "documents" / "harbor.txt", help="Text file.")
    parser.add_argument("--ask", action="append", help="Question; may be given several times.")
    parser.add_argument("--cache", type=Path, help="Folder of the cache (default: beside the document).")
    options = parser.parse_args(arguments)

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    document = options.document.read_text(encoding="utf-8")
    folder = options.cache or options.document.with_suffix(".cachegen")

    if not folder.exists():
        context = context_of(tokenizer, document)
        CacheGenCache.from_context(model, context, tokenizer=tokenizer).save_pretrained(folder)
    cache = CacheGenCache.from_pretrained(folder, model=model, tokenizer=tokenizer)
    print(f"{cache.report.context_tokens} tokens, {cache.report.ratio:.1f} times fewer bytes than exact")

    # The small model of the repository does not know when to stop; a chat model does.
    stop = {"stop_strings": "\n", "tokenizer": tokenizer} if tokenizer.chat_template is None else {}
    turns: list[tuple[str, str]] = []
    for question in options.ask or QUESTIONS:
        inputs = tokens(tokenizer, document, turns, question)
        output = model.generate(**inputs.to(model.device), cache=cache, max_new_tokens=128, do_sample=False, **stop)
        answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()
        print(f"> {question}\n{answer}")
        turns.append((question, answer))


if __name__ == "__main__":
    main()
