"""The text of a context, stored beside its cache: a plain text, or the messages of a chat (docs/format.md).

The tokens of context and question as one text are not always those of both apart. A reader that has the text of the
context tokenizes it together with the question. The file is an addition: a reader that does not know it ignores it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_cachegen import strict_json
from hf_cachegen.artifact.manifest import TEXT_FILE
from hf_cachegen.artifact.reader import Reader
from hf_cachegen.errors import ConfigError, CorruptError, LimitError

TEXT, MESSAGES = "text", "messages"
"""Names of the one segment of the file: UTF-8, or a JSON object whose member `messages` is a list."""
RESERVED = frozenset(
    [
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    ]
)
"""Arguments of `apply_chat_template` that a chat must not set: they change the form of the result, or the template."""


@dataclass(frozen=True)
class ContextText:
    """A plain text or a chat, never both.

    Attributes:
        text: the plain text; None for a chat.
        messages: the messages of the chat, as for `apply_chat_template`; None for a plain text.
        template: further variables of the chat template, such as `tools`.

    Raises:
        ConfigError: both or neither are given, or they cannot be stored as UTF-8 or as JSON.
    """

    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    template: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise ConfigError("expected either a text or the messages of a chat, got both or neither")
        if self.text is not None and not isinstance(self.text, str):
            raise ConfigError(f"expected a text, got {type(self.text).__name__}; pass one string")
        if self.text is not None and self.template:
            raise ConfigError("variables of a chat template are for messages; pass messages, or leave them out")
        if self.messages is not None:
            _check_chat(self.messages, self.template)
        self.segment()

    @classmethod
    def from_json(cls, data: bytes) -> ContextText:
        """Parse a chat: a JSON list of messages, or an object with `messages` and variables of the template.

        Raises:
            ConfigError: the bytes are not such a chat.
        """
        try:
            value = strict_json.loads(data)
        except ValueError as error:
            raise ConfigError(f"expected the messages of a chat as JSON: {error}") from error
        members = dict(value) if isinstance(value, dict) else {MESSAGES: value}
        messages = members.pop(MESSAGES, None)
        if not isinstance(messages, list):
            raise ConfigError(
                f'expected a JSON list of messages, or an object with "messages", got {type(value).__name__}'
            )
        return cls(messages=messages, template=members)

    def followed_by(self, question: str) -> ContextText:
        """Return this text with `question` after it. In a chat, the question is a message of the user."""
        if self.text is not None:
            return ContextText(self.text + question)
        if not question:
            return self
        return replace(self, messages=[*(self.messages or []), {"role": "user", "content": question}])

    def segment(self) -> tuple[str, bytes]:
        """Return the name and the bytes of the segment. The order of a chat's members is kept: templates show it."""
        try:
            if self.text is not None:
                return TEXT, self.text.encode("utf-8")
            members = {MESSAGES: list(self.messages or []), **self.template}
            data = json.dumps(members, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")
            strict_json.loads(data)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"this text cannot be stored as UTF-8 or JSON: {error}") from error
        return MESSAGES, data


def read_text(reader: Reader) -> ContextText | None:
    """Read the text of an artifact's context.

    Returns:
        The text; None where the artifact does not store it, or in a form that a later release defines.

    Raises:
        LimitError: it is longer than the reader's limit.
        CorruptError: it is not UTF-8, or not a chat.
        ArtifactError, StoreError: it cannot be read.
    """
    entry = reader.manifest.files.get(TEXT_FILE)
    found = [] if entry is None else [s for s in entry.segments if s.name in (TEXT, MESSAGES)]
    if len(found) != 1:
        return None
    if found[0].length > (most := reader.limits.max_text_bytes):
        raise LimitError(f"{TEXT_FILE}: a text of {found[0].length} bytes, the limit is {most}")
    data = reader.read(found[0])
    try:
        return ContextText(data.decode("utf-8")) if found[0].name == TEXT else ContextText.from_json(data)
    except ValueError as error:
        raise CorruptError(f"{TEXT_FILE}: {error}; encode the context again") from error


def _check_chat(messages: Any, template: Any) -> None:
    """Raise ConfigError unless these are messages and variables of a chat template."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ConfigError(f"expected a list of at least one message, got {str(messages)[:80]!r}")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(f'message {number}: expected an object with a "role", got {str(message)[:80]!r}')
    if wrong := sorted((RESERVED | {MESSAGES}) & template.keys()):
        raise ConfigError(f"a chat must not set {wrong}: leave them out")
