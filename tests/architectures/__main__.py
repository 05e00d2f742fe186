"""Examine all families: `python -m tests.architectures [--write] [NAME ...]`."""

from __future__ import annotations

import argparse

from tests.architectures.models import entries
from tests.architectures.sweep import merged, sweep, write


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description="Examine all families.")
    parser.add_argument("names", nargs="*", help="Families to examine (default: all).")
    parser.add_argument("--write", action="store_true", help="Write the results (those of the names given) and the page.")
    parser.add_argument("--jobs", type=int, default=2, help="Processes (default: 2).")
    given = parser.parse_args()
    chosen = [entry for entry in entries() if not given.names or entry.name in given.names]
    results = sweep(chosen, given.jobs)
    if given.write:
        write(results if not given.names else merged(results))


if __name__ == "__main__":
    main()
