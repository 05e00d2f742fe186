"""Start decoding chunks without waiting for their device: several in one launch where it can, others one by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hf_cachegen.codec import abi
from hf_cachegen.codec.batch import OUTSTANDING, Batches, serves
from hf_cachegen.codec.chunk import LossyCodec, Placed, Span
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.transfer import Check, Checks


def launch(codec: LossyCodec, chunks: Iterable[Placed], target: Target) -> Check:
    """Start decoding each chunk into its rows of the target, all at one level.

    After an error these rows are undefined.

    Returns:
        What waits for the last of it.

    Raises:
        TruncatedError, CorruptError: The bytes are damaged; the result raises these too.
    """
    launches = Launches(codec, target)
    for parts, span, row in chunks:
        launches.add(parts, span, row)
    launches.flush()
    return launches.finish


class Launches:
    """Chunks of one level on their way into a target.

    Args:
        codec: Of the chunks.
        target: Receives the rows.
    """

    def __init__(self, codec: LossyCodec, target: Target):
        self._codec, self._target = codec, target
        self._batches: Batches | None = None
        self._alone = Checks(OUTSTANDING * abi.MAX_BATCH)
        self._served = serves(codec, target)

    def add(self, parts: Sequence[bytes | memoryview], span: Span, row: int) -> None:
        """Take a chunk, which is written from row `row` on.

        Raises:
            TruncatedError, CorruptError: The bytes of this chunk, or of one before it, are damaged.
        """
        if self._served and self._batches is None:
            self._batches = Batches(self._codec, len(parts), self._target)
        self._launch_alone([(parts, span, row)] if self._batches is None else self._batches.add(parts, span, row))

    def flush(self) -> None:
        """Launch what was added. Raises TruncatedError or CorruptError for damaged bytes of it, or of chunks before it.
        """
        if self._batches is not None:
            self._launch_alone(self._batches.flush())

    def finish(self) -> None:
        """Launch what was added, and wait for all. Raises TruncatedError or CorruptError for damaged bytes."""
        self.flush()
        if self._batches is not None:
            self._batches.finish()
        self._alone.finish()

    def _launch_alone(self, chunks: Sequence[Placed]) -> None:
        for parts, span, row in chunks:
            self._alone.add(self._codec.launch_alone(parts, span, self._target, row))
