"""WikiText-2: perplexity of a text's next `suffix` tokens on the decoded cache of the `prefix` tokens before them.

Windows follow each other without overlap; nothing is generated. Windows are cut at token ends of the whole text, so a
window tokenised by itself may differ from `prefix` by a token or two.
"""

from __future__ import annotations

from eval.datasets.hub_rows import rows
from eval.datasets.request import Request, read_text
from eval.examples import Dataset, Example, Question
from hf_cachegen.errors import ConfigError


def wikitext(
    request: Request, path: str = "", repo: str = "Salesforce/wikitext", name: str = "wikitext-2-raw-v1",
    revision: str = "main", split: str = "test", prefix: int = 1024, suffix: int = 256,
) -> Dataset:  # fmt: skip
    """path: a plain text instead of the Hub's."""
    if prefix < 1 or suffix < 1:
        raise ConfigError(f"prefix and suffix must be at least 1, got {prefix} and {suffix}")
    if path:
        text, source = read_text(path)
    else:
        found, source = rows(repo, name, split, revision)
        text = "".join(row["text"] for row in found)
    encoded = request.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [end for _, end in encoded["offset_mapping"]]
    window, examples = prefix + suffix, []
    for number in range(len(ends) // window):
        if number == request.limit:
            break
        first = ends[number * window - 1] if number else 0
        middle, last = ends[number * window + prefix - 1], ends[(number + 1) * window - 1]
        examples.append(Example(str(number), text[first:middle], (Question("", (), text[middle:last]),)))
    return Dataset("WikiText-2", tuple(examples), (), 0, source=source)
