"""The command `encode-dataset`: encode every text of a data set into an artifact, by any number of processes.

The name of an artifact's folder is the hash of everything that determines its bytes: tokens, text, weights,
configuration, dtype, tokenizer, encoder's options, profile. An existing folder is what the run would write, and is
skipped: a second run, or one after a kill, encodes only what is missing. The hash of a text selects its process, so
equal texts are encoded once. An artifact is written whole or not at all. An index is replaced only by one that agrees
with it in every row: the index of the same run, or of a run over more rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import xxhash
from click.core import ParameterSource
from tqdm import tqdm

from hf_cachegen import strict_json
from hf_cachegen.artifact import MANIFEST_FILE, Reader
from hf_cachegen.cli.models import load_model, token_ids
from hf_cachegen.cli.options import (
    OUTPUT_FOLDER,
    dtype_option,
    encoder_options,
    encoder_settings,
    encoding_profile_option,
    output_options,
    source_model_option,
    text_option,
)
from hf_cachegen.cli.output import print_json
from hf_cachegen.errors import ArtifactExistsError, ConfigError, MissingExtraError
from hf_cachegen.stores.local import open_folder
from hf_cachegen.stores.naming import is_hub_id

if TYPE_CHECKING:
    from hf_cachegen.config import CacheGenConfig
    from hf_cachegen.profiles.files import Profile

INDEX_FILE = "index.jsonl"
WAIT_FOR_OTHERS = timedelta(days=7)
"""Time limit of the processes that have finished: a slow process is not a failure."""
NAME_DIGITS = 32
"""Length of a folder's name, in hexadecimal digits."""
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
"""Suffix of a file, and the reader of `datasets` for it; a .txt file is one text."""
INFORMATIVE_FIELDS = ("model_id", "commit", "transformers")
"""Fields of a fingerprint that are used in messages only: they do not affect the bytes of an artifact."""
MISSING_EXTRA = "encode-dataset needs accelerate and datasets: pip install 'hf_cachegen[eval]'"


@dataclass(frozen=True)
class TextDataset:
    """The texts to encode.

    Attributes:
        location: a repository on the Hub, a file or a folder.
        name, split, revision: of a repository or folder, as in `datasets.load_dataset`.
        column: the field that holds the context.
        limit: the maximum number of rows; None for all.
    """

    location: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "context"
    limit: int | None = None

    def rows(self) -> Iterator[tuple[int, str]]:
        """Yield (number, text) of each row. Raises ConfigError, MissingExtraError."""
        try:
            from datasets import disable_progress_bars, load_dataset
        except ImportError as error:
            raise MissingExtraError(MISSING_EXTRA) from error
        disable_progress_bars()
        path = Path(os.path.expanduser(self.location))
        if os.path.isfile(path) and path.suffix.lower() not in READERS:
            raise ConfigError(f"{path}: expected a file of type {', '.join(READERS)}")
        if not os.path.exists(path) and (path.suffix.lower() in READERS or not is_hub_id(self.location)):
            raise ConfigError(f"expected a data set; there is no file or folder {os.path.abspath(path)}")
        if self.revision is not None and os.path.exists(path):
            raise ConfigError(f"a revision is for a data set on the Hub; {self.location!r} is local")
        try:
            if os.path.isfile(path):
                reader = READERS[path.suffix.lower()]
                options = {"sample_by": "document"} if reader == "text" else {}
                found = load_dataset(reader, data_files=str(path), split="train", streaming=True, **options)
            else:
                found = load_dataset(str(path), self.name, split=self.split, revision=self.revision, streaming=True)
        except Exception as error:  # `datasets` raises whatever its readers and clients do
            raise ConfigError(f"cannot load {self.location!r}: {' '.join(str(error).split())[:300]}") from error
        column = "text" if path.suffix.lower() == ".txt" else self.column
        for number, row in enumerate(self._read(found)):
            if number == self.limit:
                return
            text = row.get(column)
            if not isinstance(text, str) or not text.strip():
                raise ConfigError(
                    f"{self.location}, row {number}: expected a text in the column {column!r}; the columns are "
                    f"{sorted(row)}"
                )
            yield number, text

    def _read(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the rows of a data set. Raises ConfigError where its reader fails."""
        try:
            yield from rows
        except Exception as error:  # `datasets` raises whatever its readers and clients do
            raise ConfigError(f"cannot read {self.location!r}: {' '.join(str(error).split())[:300]}") from error


@dataclass(frozen=True)
class Encoding:
    """The model and the options that every text is encoded with."""

    model: Any
    tokenizer: Any
    config: CacheGenConfig
    profile: Profile | None
    keep_text: bool = True

    def name(self, ids: list[int], text: str) -> str:
        """Return the name of the folder of the artifact of a text and its tokens."""
        from hf_cachegen.models.fingerprint import Fingerprint

        fingerprint = Fingerprint.of(self.model, ids, self.tokenizer).to_dict()
        for field in INFORMATIVE_FIELDS:
            fingerprint.pop(field, None)
        profile = self.profile.digest if self.profile is not None and self.config.transform in ("auto", "klt") else None
        # Earlier releases did not predict: without a predictor the name is theirs.
        config = self.config.to_dict()
        if self.config.predict_layers != "auto":
            layer = None if profile is None or self.profile is None else self.profile.usable(self.config.predicted)
            config = replace(self.config, predict_layers=layer).to_dict()
        determined_by = {"fingerprint": fingerprint, "config": config, "profile": profile}
        if self.keep_text:
            determined_by["text"] = hashlib.sha256(text.encode()).hexdigest()
        return hashlib.sha256(json.dumps(determined_by, sort_keys=True).encode()).hexdigest()[:NAME_DIGITS]

    def write(self, text: str, folder: Path) -> bool:
        """Prefill a text and write its artifact.

        Returns:
            False if another process has written it in the meantime: two texts may have the same tokens.
        """
        from hf_cachegen.cache import CacheGenCache

        cache = CacheGenCache.from_text(
            self.model, self.tokenizer, text, self.config, self.profile, keep_text=self.keep_text
        )
        try:
            cache.save_pretrained(folder)
        except ArtifactExistsError:
            return False
        return True


@click.command("encode-dataset", short_help="Encode every text of a data set.")
@click.option("--dataset", required=True, help="Repository on the Hub, folder, or .jsonl, .parquet, .csv or .txt file.")
@click.option("--name", help="Configuration of the data set.")
@click.option("--split", default="train", show_default=True, help="Split of a repository or folder.")
@click.option("--dataset-revision", help="Branch, tag or commit of the data set.")
@click.option("--column", default="context", show_default=True, help="Column that holds the contexts.")
@click.option("--limit", type=click.IntRange(min=1), help="Maximum number of rows.")
@source_model_option
@click.option("--revision", help="Branch, tag or commit of the model.")
@click.option("--device", help="Device: cpu, cuda:0, ...  [default: a GPU per process if available, else cpu]")
@click.option("--out", required=True, type=OUTPUT_FOLDER, help="Output folder.")
@text_option
@dtype_option
@encoding_profile_option
@encoder_options
@output_options
@click.pass_context
def encode_dataset(
    context: click.Context, /, dataset: str, name: str | None, split: str, dataset_revision: str | None, column: str,
    limit: int | None, model: str, revision: str | None, device: str | None, out: Path, keep_text: bool, dtype: str,
    profile: str, as_json: bool, debug: bool, **options: Any,
) -> None:  # fmt: skip
    """Encode every text of a data set into its own folder below --out, and write index.jsonl, with a line for each row.

    Existing artifacts are not encoded again, so an interrupted run continues when the same command is run again. The
    index of a different run is not replaced. To use several processes: accelerate launch -m hf_cachegen.encode_dataset.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MissingExtraError(MISSING_EXTRA) from error
    import torch

    config, found_profile = encoder_settings(
        options, lambda field: context.get_parameter_source(field) is not ParameterSource.DEFAULT, profile, model
    )
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=WAIT_FOR_OTHERS)
    texts = TextDataset(dataset, name, split, dataset_revision, column, limit)
    loaded, tokenizer = load_model(model, revision=revision, dtype=dtype, device=device or str(state.device))
    encoding = Encoding(loaded, tokenizer, config, found_profile, keep_text)
    out.mkdir(parents=True, exist_ok=True)
    progress = state.is_local_main_process and not as_json
    made = encode_rows(encoding, texts, out, state.process_index, state.num_processes, progress)
    state.wait_for_everyone()
    if state.is_main_process:
        rows, artifacts, size = write_index(out, state.num_processes)
        if as_json:
            print_json({"out": str(out), "rows": rows, "artifacts": artifacts, "bytes": size})
        else:
            click.echo(f"{out}: {rows} rows, {artifacts} artifacts, {size:,} bytes")
    if not as_json:
        click.echo(f"process {state.process_index}: {made} encoded", err=True)


def encode_rows(encoding: Encoding, texts: TextDataset, out: Path, rank: int, processes: int, progress: bool) -> int:
    """Encode the rows of one process, and write its part of the index.

    Args:
        rank: the number of this process, from 0.
        processes: the number of processes.
        progress: whether to draw a progress bar.

    Returns:
        The number of artifacts that were encoded.

    Raises:
        ArtifactExistsError: the existing index names a different artifact for a row.
    """
    made, lines, earlier = 0, [], _indexed(out)
    for number, text in tqdm(texts.rows(), "rows", unit="row", disable=not progress):
        if xxhash.xxh3_64_intdigest(text.encode()) % processes != rank:
            continue
        ids = token_ids(encoding.tokenizer, text, start=True)
        name = encoding.name(ids, text)
        if earlier.get(number, name) != name:
            raise _different_run(out, f"row {number} is a different artifact in it")
        store = open_folder(out / name)
        if not (out / name / MANIFEST_FILE).is_file():
            made += encoding.write(text, out / name)
        size = sum(Reader(store).sizes.values())
        lines.append({"row": number, "artifact": name, "tokens": len(ids), "bytes": size})
    _replace(_part(out, rank), lines)
    return made


def write_index(out: Path, processes: int) -> tuple[int, int, int]:
    """Join the parts of all processes, in the order of the rows.

    Returns:
        (rows, artifacts, bytes of the artifacts).

    Raises:
        ArtifactExistsError: the existing index has rows that this one lacks.
    """
    parts = [_part(out, rank) for rank in range(processes)]
    lines = [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: line["row"])
    if lost := sorted(_indexed(out).keys() - {line["row"] for line in lines}):
        raise _different_run(out, f"row {lost[0]} would be lost")
    _replace(out / INDEX_FILE, lines)
    for part in parts:
        part.unlink()
    sizes = {line["artifact"]: line["bytes"] for line in lines}
    return len(lines), len(sizes), sum(sizes.values())


def _indexed(out: Path) -> dict[int, str]:
    """Return the artifact of each row in the existing index. Raises ArtifactExistsError if it is not an index."""
    try:
        lines = (out / INDEX_FILE).read_bytes().splitlines()
        return {line["row"]: line["artifact"] for line in map(strict_json.loads, lines)}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise _different_run(out, "it is not an index of artifacts") from error


def _different_run(out: Path, why: str) -> ArtifactExistsError:
    return ArtifactExistsError(
        f"{out / INDEX_FILE} belongs to a different run ({why}); choose another --out, or delete the file"
    )


def _part(out: Path, rank: int) -> Path:
    return out / f".{INDEX_FILE}.{rank:03}"


def _replace(path: Path, lines: list[dict[str, Any]]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(partial, path)
