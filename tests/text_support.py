"""Tokenizers whose tokens of a whole text differ from those of its parts, and templates that change earlier turns."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>", "<think>", "</think>")
LETTERS = "abcdefghijklmnopqrstuvwxyz.?:"
MERGES = [("a", "b"), ("ab", "c"), ("e", "f"), (SPACE, "t"), ("t", "h")]

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A template that brings its own BOS."""
DROPS_THINKING = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>"
    "{% if not loop.last and '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A template that keeps the thinking of the last message alone, as templates of reasoning models do."""


def tokenizer_of(*, space: bool = False, bos: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of letters with a few merges.

    Args:
        space: put a space in front of every text, as SentencePiece does.
        bos: put a BOS in front of every text.
        template: the chat template.
    """
    pieces = [*SPECIAL, SPACE, " ", "\n", *LETTERS, *("".join(pair) for pair in MERGES)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES, unk_token="<unk>"))
    if space:
        tokens.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=False)
        tokens.decoder = decoders.Metaspace(SPACE)
    else:
        tokens.decoder = decoders.Fuse()
    tokens.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    if bos:
        tokens.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=template,
    )  # fmt: skip
