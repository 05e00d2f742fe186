"""The prompts of `generate` and `stream`: the text of the context and the question, tokenized as one text."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import click

from hf_cachegen.artifact import MEDIA_FEATURE, ContextText, Reader, read_text
from hf_cachegen.cli.options import read_text as read_file
from hf_cachegen.cli.output import note
from hf_cachegen.errors import ConfigError, ManifestError, UnsupportedModelError
from hf_cachegen.stores import Access, open_store


@dataclass(frozen=True)
class Asked:
    """What the user asks, from --prompt, --context and --chat.

    Attributes:
        question: the question; None where the chat holds it.
        whole: the text or chat that comes before the question; None for the one in the artifact.
    """

    question: str | None
    whole: ContextText | None

    @classmethod
    def of(cls, prompt: str | None, context: Any, chat: Any) -> Asked:
        """Read the values of --prompt ("-" for stdin), --context and --chat. Raises UsageError, BadParameter."""
        if prompt is None and chat is None:
            raise click.UsageError("expected --prompt, or a chat with --chat", click.get_current_context())
        if context is not None and chat is not None:
            raise click.UsageError("expected either --context or --chat, got both", click.get_current_context())
        whole = None if context is None else ContextText(read_file(context))
        whole = whole if chat is None else read_chat(chat)
        return cls(sys.stdin.read() if prompt == "-" else prompt, whole)

    def ids(self, artifact: str, access: Access, tokenizer: Any, as_json: bool) -> list[int]:
        """Tokenize the whole prompt for an artifact.

        Args:
            artifact: its location. Its text is read where the user gave none.
            access: how to read it.
            tokenizer: the tokenizer of the model.
            as_json: print no note.

        Returns:
            The token ids. Where the text of the context is not known, those of the question follow the stored ones.

        Raises:
            ConfigError: the chat template refuses the messages.
            UnsupportedModelError: the context holds media, which a text cannot name.
            ArtifactError, StoreError: the artifact cannot be read.
        """
        from hf_cachegen.models.text import plain_ids, prompt_ids

        text, question, stored = self.whole, self.question or "", None
        if text is None:
            reader = Reader(open_store(artifact, access))
            if MEDIA_FEATURE in reader.manifest.required:
                raise UnsupportedModelError(
                    f"{artifact} is a context with pictures, video or audio, which this command cannot pass to the "
                    "model: call model.generate(**inputs, cache=cache) with the output of the processor"
                )
            text, stored = read_text(reader), reader
        if text is not None:
            return prompt_ids(tokenizer, text.followed_by(question), answer=True)
        ids = stored.input_ids() if stored is not None else None
        if ids is None:
            raise ManifestError(f"{artifact}: expected a context, found tensors without tokens; encode a text")
        if question and not as_json:
            note(
                "the artifact does not store its text, so the tokens of the question follow those of the context; they "
                "may differ from the tokens of both as one text: pass the text with --context, or encode it again"
            )
        return [*ids, *plain_ids(tokenizer, question, start=False)]


def read_chat(file: Any) -> ContextText:
    """Read a chat from a JSON file. Raises BadParameter where it holds none."""
    try:
        return ContextText.from_json(read_file(file).encode("utf-8"))
    except ConfigError as error:
        raise click.BadParameter(f"{file.name}: {error}", param_hint="'--chat'") from error


def token_counts(cache: Any, inputs: dict[str, Any], answer: Any) -> dict[str, int]:
    """Count tokens for --json: of the context, of the rest of the prompt, of the answer, and the lost ones."""
    from hf_cachegen.models.media_prompt import cover

    ids, context = inputs["input_ids"], cache.input_ids.shape[1]
    common = cover(cache.input_ids[0], cache.fingerprint.media, ids, inputs["attention_mask"], None).reuse.common
    return {
        "context_tokens": context, "question_tokens": ids.shape[1] - common, "new_tokens": len(answer),
        "lost_tokens": context - common,
    }  # fmt: skip


def note_loss(counts: dict[str, int]) -> None:
    """Print a note where the prompt does not begin with all tokens of the context."""
    if lost := counts["lost_tokens"]:
        note(
            f"{lost:,} of {counts['context_tokens']:,} tokens of the context are computed again: the prompt has other "
            "tokens there, at the seam of context and question or where the chat template changes earlier turns"
        )
