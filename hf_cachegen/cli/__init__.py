"""The command line, `hf-cachegen`: encode a text into an artifact, and answer questions from artifacts.

An ARTIFACT is a folder, a repository on the Hub ("user/name") or a URL. Results go to stdout, progress and errors to
stderr; with --json, stdout is one JSON object. Commands import torch and transformers inside their functions, so that
`inspect`, `verify` and `--help` start fast.

Each group of commands is one file; a new command is added to COMMANDS below.
"""

from __future__ import annotations

import click

from hf_cachegen._version import __version__
from hf_cachegen.cli import (
    cache,
    contexts,
    convert,
    demo,
    encode_dataset,
    inspection,
    prefix_cache,
    profiles,
    stores,
    stream,
)
from hf_cachegen.cli.errors import EXIT_CODES, PROGRAM, ErrorGroup

EPILOG = "\b\nExit codes:\n" + "\n".join(f"{code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())
COMMANDS = (
    contexts.encode, contexts.generate, inspection.inspect, inspection.verify, stream.stream, profiles.learn,
    profiles.push_profile, profiles.pull_profile, convert.convert, encode_dataset.encode_dataset, stores.push,
    stores.pull, stores.ls, stores.sign, stores.seal, stores.check, cache.cache,
    prefix_cache.prefix_cache_commands, demo.demo,
)  # fmt: skip


@click.group(PROGRAM, cls=ErrorGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM)
def main() -> None:
    """Save the KV caches of Transformers models as small files, and generate from them."""


for command in COMMANDS:
    main.add_command(command)
