"""WikiText-2: perplexity of a text's next `suffix` tokens on the decoded cache of the `prefix` tokens before them.

Windows do not overlap, and nothing is generated. They are cut at token ends of the whole text, so a window tokenised by
itself may differ from `prefix` by a token or two. The Hub's default is the raw text. A tokenised copy has `<unk>` for
rare words, which makes perplexities of different copies incomparable: their number is in the run's source.
"""

from __future__ import annotations

from eval.datasets.hub_rows import rows
from eval.datasets.request import Request, read_text
from eval.examples import Dataset, Example, Question
from hf_cachegen.errors import ConfigError

UNKNOWN = "<unk>"


def wikitext(
    request: Request, path: str = "", repo: str = "Salesforce/wikitext", name: str = "wikitext-2-raw-v1",
    revision: str = "main", split: str = "test", prefix: int = 1024, suffix: int = 256,
) -> Dataset:  # fmt: skip
    """Cut a text into windows.

    Args:
        request: limit and tokenizer.
        path: a plain text file, instead of the Hub.
        repo: repository on the Hub.
        name: configuration.
        revision: branch, tag or commit.
        split: split.
        prefix: tokens of a context.
        suffix: tokens whose perplexity is measured.

    Raises:
        ConfigError: the text cannot be read, or a length is below 1.
    """
    if prefix < 1 or suffix < 1:
        raise ConfigError(f"expected prefix and suffix of at least 1 token, got {prefix} and {suffix}")
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
    return Dataset("WikiText-2", tuple(examples), (), 0, source={**source, UNKNOWN: text.count(UNKNOWN)})
