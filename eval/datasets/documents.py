"""Any texts: perplexity of each document's next `suffix` tokens on the decoded cache of its first `prefix` tokens.

A document is a file, or one field of each row of a JSONL file. Documents that are too short are left out. So a model's
caches of source code or of conversations are measured without questions about them:

    documents:path=/usr/lib/python3.11/*.py,title=Python
    documents:path=cachegen_longchat.jsonl,field=prompt,title=LongChat
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator

from eval.datasets.request import Request, read_rows, read_text
from eval.datasets.request import field as required
from eval.examples import Dataset, Example, Question
from hf_cachegen.errors import ConfigError


def documents(
    request: Request, path: str = "", field: str = "", title: str = "documents", prefix: int = 1024, suffix: int = 128
) -> Dataset:
    """Take one window from the start of each document.

    Args:
        request: limit and tokenizer.
        path: the files, as a pattern; `$NAME` is replaced from the environment.
        field: the field of a row of a JSONL file; empty where a file is one document.
        title: name of the data in reports.
        prefix: tokens of a context.
        suffix: tokens whose perplexity is measured.

    Raises:
        ConfigError: there is no file, a file has another form, or a length is below 1.
    """
    if prefix < 1 or suffix < 1:
        raise ConfigError(f"expected prefix and suffix of at least 1 token, got {prefix} and {suffix}")
    files = sorted(glob.glob(os.path.expanduser(os.path.expandvars(path))))
    if not files:
        raise ConfigError(f"documents: expected files at path={path!r}, found none")
    examples: list[Example] = []
    digest = hashlib.sha256()
    for name, text in _texts(files, field):
        if len(examples) == request.limit:
            break
        encoded = request.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in encoded["offset_mapping"]]
        if len(ends) < prefix + suffix:
            continue
        middle, last = ends[prefix - 1], ends[prefix + suffix - 1]
        digest.update(text[:last].encode())
        examples.append(Example(name, text[:middle], (Question("", (), text[middle:last]),)))
    return Dataset(title, tuple(examples), (), 0, source={"sha256": digest.hexdigest()})


def _texts(files: list[str], name: str) -> Iterator[tuple[str, str]]:
    for path in files:
        if not name:
            yield os.path.basename(path), read_text(path)[0]
            continue
        for number, row in enumerate(read_rows(path)[0]):
            text = required(row, name, f"{path}, row {number + 1}")
            if not isinstance(text, str):
                raise ConfigError(f"{path}, row {number + 1}: expected a text in {name!r}")
            yield f"{os.path.basename(path)}/{number}", text
