"""`accelerate launch -m hf_cachegen.encode_dataset`: an artifact for every text of a data set, by any number of
processes.

Twists: an artifact's folder is called by the hash of everything that its bytes follow from (tokens, weights,
configuration, dtype, tokenizer, encoder's options, profile), so what is there already is what would be made, and is
left alone: a second run, or one after a kill, does only what is missing. Which process takes a text depends on the
text, so equal texts meet in one process and are made once. An artifact is written whole or not at all. An index is
replaced only by one that says the same of every row in it: that of the same run, or of more rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import xxhash
from click.core import ParameterSource
from tqdm import tqdm

from hf_cachegen.artifact import MANIFEST_FILE, Reader
from hf_cachegen.cli_errors import INTERRUPTED, report
from hf_cachegen.cli_models import load_model, token_ids
from hf_cachegen.cli_options import dtype_option, encoder_options, encoder_settings, encoding_profile_option
from hf_cachegen.errors import ArtifactExistsError, ConfigError, MissingExtraError
from hf_cachegen.stores import LocalStore
from hf_cachegen.stores.naming import is_hub_id

if TYPE_CHECKING:
    from hf_cachegen.config import CacheGenConfig
    from hf_cachegen.profiles.files import Profile

INDEX_FILE = "index.jsonl"
PATIENCE = timedelta(days=7)
"""How long the first process waits for the others: a straggler is no fault."""
NAME_HEX = 32
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
"""Ends of a file's name and the reader of `datasets` for it; a .txt is one text."""
PASSING_FIELDS = ("model_id", "commit", "transformers")
"""Fields of a fingerprint that are for messages: no byte of a cache follows from them."""


@dataclass(frozen=True)
class Source:
    """Where the texts are. place: a repository on the Hub, or a file or folder; column: the field that is the context;
    limit: at most that many rows.
    """

    place: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "context"
    limit: int | None = None

    def rows(self) -> Iterator[tuple[int, str]]:
        """(number, text) of each row. Raises ConfigError, MissingExtraError."""
        try:
            from datasets import disable_progress_bars, load_dataset
        except ImportError as error:
            raise MissingExtraError("install the extra 'eval' (accelerate, datasets) to encode data sets") from error
        disable_progress_bars()
        path = Path(os.path.expanduser(self.place))
        if path.is_file() and path.suffix.lower() not in READERS:
            raise ConfigError(f"{path}: expected one of {', '.join(READERS)}")
        if not path.exists() and (path.suffix.lower() in READERS or not is_hub_id(self.place)):
            raise ConfigError(f"there is no file or folder {os.path.abspath(path)}")
        try:
            if path.is_file():
                reader = READERS[path.suffix.lower()]
                options = {"sample_by": "document"} if reader == "text" else {}
                found = load_dataset(reader, data_files=str(path), split="train", streaming=True, **options)
            else:
                found = load_dataset(str(path), self.name, split=self.split, revision=self.revision, streaming=True)
        except Exception as error:  # `datasets` raises whatever its readers and clients do
            raise ConfigError(f"cannot load {self.place!r}: {' '.join(str(error).split())[:300]}") from error
        column = "text" if path.suffix.lower() == ".txt" else self.column
        for number, row in enumerate(found):
            if number == self.limit:
                return
            text = row.get(column)
            if not isinstance(text, str) or not text.strip():
                raise ConfigError(f"{self.place}, row {number}: no text in {column!r}; there is {sorted(row)}")
            yield number, text


@dataclass(frozen=True)
class Encoding:
    """What every text is encoded with."""

    model: Any
    tokenizer: Any
    config: CacheGenConfig
    profile: Profile | None

    def name(self, ids: list[int]) -> str:
        """The folder of the artifact of these tokens."""
        from hf_cachegen.models.fingerprint import Fingerprint

        fingerprint = Fingerprint.of(self.model, ids, self.tokenizer).to_dict()
        for field in PASSING_FIELDS:
            fingerprint.pop(field, None)
        profile = self.profile.digest if self.profile is not None and self.config.transform in ("auto", "klt") else None
        made_of = {"fingerprint": fingerprint, "config": self.config.to_dict(), "profile": profile}
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:NAME_HEX]

    def write(self, ids: list[int], folder: Path) -> bool:
        """Prefills the tokens and writes their artifact; False where another process was faster: two texts may have the
        same tokens.
        """
        from hf_cachegen.cache import CacheGenCache

        cache = CacheGenCache.from_context(self.model, ids, self.config, self.profile, tokenizer=self.tokenizer)
        try:
            cache.save_pretrained(folder)
        except ArtifactExistsError:
            return False
        return True


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--dataset", required=True, help="Repository on the Hub, folder, or .jsonl, .parquet, .csv, .txt file.")
@click.option("--name", help="Configuration of the data set.")
@click.option("--split", default="train", show_default=True, help="Of a repository or folder.")
@click.option("--dataset-revision", help="Branch, tag or commit of the data set.")
@click.option("--column", default="context", show_default=True, help="Field that holds the text of a context.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many rows.")
@click.option("--model", required=True, help="Folder or Hub id of a causal language model.")
@click.option("--revision", help="Branch, tag or commit of the model.")
@click.option("--device", help="cpu, cuda:0, ...  [default: a GPU for each process, else cpu]")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder of the artifacts.")
@dtype_option
@encoding_profile_option
@encoder_options
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def main(
    context: click.Context, /, dataset: str, name: str | None, split: str, dataset_revision: str | None, column: str,
    limit: int | None, model: str, revision: str | None, device: str | None, out: Path, dtype: str, profile: str,
    debug: bool, **options: Any,
) -> None:  # fmt: skip
    """Write the artifact of every text of a data set into a folder of its own below --out, and index.jsonl: a line for
    each row, with its artifact. What is there already is not made again; the index of another run is not replaced.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MissingExtraError("install the extra 'eval' (accelerate, datasets) to encode data sets") from error
    import torch

    config, found_profile = encoder_settings(
        options, lambda field: context.get_parameter_source(field) is not ParameterSource.DEFAULT, profile, model
    )
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)
    source = Source(dataset, name, split, dataset_revision, column, limit)
    loaded, tokenizer = load_model(model, revision=revision, dtype=dtype, device=device or str(state.device))
    encoding = Encoding(loaded, tokenizer, config, found_profile)
    out.mkdir(parents=True, exist_ok=True)
    made = encode_rows(encoding, source, out, state.process_index, state.num_processes, state.is_local_main_process)
    state.wait_for_everyone()
    if state.is_main_process:
        rows, artifacts, size = write_index(out, state.num_processes)
        click.echo(f"{out}: {rows} rows, {artifacts} artifacts, {size:,} bytes")
    click.echo(f"process {state.process_index}: {made} made", err=True)


def encode_rows(encoding: Encoding, source: Source, out: Path, rank: int, processes: int, progress: bool) -> int:
    """Makes the artifacts of this process's rows, and its part of the index; returns how many were made.

    Raises ArtifactExistsError at the first row of which the index that is there says something else.
    """
    made, lines, earlier = 0, [], _indexed(out)
    for number, text in tqdm(source.rows(), "rows", unit="row", disable=not progress):
        if xxhash.xxh3_64_intdigest(text.encode()) % processes != rank:
            continue
        ids = token_ids(encoding.tokenizer, text, start=True)
        name = encoding.name(ids)
        if earlier.get(number, name) != name:
            raise _another_run(out, f"row {number} is another artifact there")
        if not (out / name / MANIFEST_FILE).is_file():
            made += encoding.write(ids, out / name)
        size = sum(Reader(LocalStore(out / name)).sizes.values())
        lines.append({"row": number, "artifact": name, "tokens": len(ids), "bytes": size})
    _replace(_part(out, rank), lines)
    return made


def write_index(out: Path, processes: int) -> tuple[int, int, int]:
    """Joins the processes' parts in the order of the rows; returns (rows, artifacts, their bytes).

    Raises ArtifactExistsError where the index that is there has rows which this one would lack.
    """
    parts = [_part(out, rank) for rank in range(processes)]
    lines = [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: line["row"])
    if lost := sorted(_indexed(out).keys() - {line["row"] for line in lines}):
        raise _another_run(out, f"row {lost[0]} would be lost")
    _replace(out / INDEX_FILE, lines)
    for part in parts:
        part.unlink()
    sizes = {line["artifact"]: line["bytes"] for line in lines}
    return len(lines), len(sizes), sum(sizes.values())


def _indexed(out: Path) -> dict[int, str]:
    """The artifact of each row in the index that is there. Raises ArtifactExistsError for a file that is no index."""
    try:
        text = (out / INDEX_FILE).read_text(encoding="utf-8")
        return {line["row"]: line["artifact"] for line in map(json.loads, text.splitlines())}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise _another_run(out, "it is no index of artifacts") from error


def _another_run(out: Path, why: str) -> ArtifactExistsError:
    return ArtifactExistsError(
        f"{out / INDEX_FILE} is of another run, and would be replaced: {why}; choose another --out, or remove it"
    )


def _part(out: Path, rank: int) -> Path:
    return out / f".{INDEX_FILE}.{rank:03}"


def _replace(path: Path, lines: list[dict[str, Any]]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped; the same command goes on where it ended", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        sys.exit(report(error, sys.argv[1:]))
