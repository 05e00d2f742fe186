"""The parts of a batch's chunks are read in one compiled call: by the rules that hold for a section alone."""

from __future__ import annotations

import ctypes
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from hf_cachegen import CacheGenConfig
from hf_cachegen.codec import native
from hf_cachegen.codec.anchors import anchor_count
from hf_cachegen.codec.chunk import LossyCodec, Span
from hf_cachegen.codec.context import Encoder
from hf_cachegen.codec.upload import JOB, Sent, Upload
from hf_cachegen.errors import CorruptError, TruncatedError
from tests.kv_samples import sample_kv
from tests.lockstep import in_lockstep, needs_compiler

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler"),
]
TOKENS, LEVEL = 64, 3
LIBRARIES = {"cpu": nullcontext, "kernels": in_lockstep}


def chunk(transform: str) -> tuple[LossyCodec, list[bytes], Span]:
    """Return the first chunk of a context, with protected tokens and exceptions."""
    keys, values = sample_kv(tokens=2 * TOKENS, dim=64)
    for token in (15, 27):
        keys[0][0, 1, token, 5] *= 15
    made = Encoder(keys, values, CacheGenConfig(transform=transform, chunk_tokens=TOKENS))  # type: ignore[arg-type]
    return made.codec.inner, next(made.chunks()), Span(0, TOKENS, 2 * TOKENS)  # type: ignore[union-attr]


def sent(codec: LossyCodec, parts: list[bytes], span: Span) -> tuple[Sent, np.ndarray]:
    anchors, ordinary = anchor_count(span.tokens, codec.group_tokens), span.ordinary(codec.config, codec.group_tokens)
    jobs = np.zeros(2 if codec.group_tokens else 1, JOB)
    jobs["tokens"], jobs["first"], jobs["last"] = [span.tokens, anchors][: len(jobs)], 0, anchors
    jobs["first"][0], jobs["last"][0] = ordinary.start, ordinary.stop
    vectors = codec.n_vectors if codec.group_tokens else 0
    upload = Upload(torch.device("cpu"), len(codec.channels), LEVEL - 1, codec.config.levels - 1, vectors)
    return upload.send(parts, jobs), jobs


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("transform", ["identity", "delta"])
def test_the_jobs_point_to_the_sections(transform: str, library: str) -> None:
    codec, parts, span = chunk(transform)
    with LIBRARIES[library]():
        found, jobs = sent(codec, parts, span)
    read = codec.read(parts, span)
    assert found.sound
    exceptions = sum(len(x.positions) for x in (read.base, *read.finest, *read.rest))
    assert exceptions == jobs["n_patches"][0]
    assert exceptions or transform == "delta"
    pairs = [(jobs["base"][0], read.base)]
    pairs += [(jobs["end_digits"][0, k], coded) for k, coded in enumerate(read.finest)]
    pairs += [(jobs["digits"][0, k], coded) for k, coded in enumerate(read.rest)]
    if read.peaks is not None and read.scales is not None:
        pairs.append((jobs["base"][1], read.peaks))
        assert torch.equal(found.scales, read.scales)
    for job, coded in pairs:
        assert ctypes.string_at(int(job["data"]), int(job["bytes"])) == coded.streams.numpy().tobytes()
        offsets = np.frombuffer(ctypes.string_at(int(job["offsets"]), 8 * (1 + len(coded.tile_bytes))), np.uint64)
        assert np.diff(offsets).tolist() == coded.tile_bytes.tolist()


@pytest.mark.parametrize("transform", ["identity", "delta"])
def test_what_is_refused_is_what_a_section_alone_refuses(transform: str) -> None:
    codec, parts, span = chunk(transform)
    draw, refused = random.Random(0), 0
    for _ in range(400):
        damaged = [bytearray(part) for part in parts]
        one = draw.choice(damaged)
        at = draw.randrange(min(len(one), 90) if draw.random() < 0.8 else len(one))
        if draw.random() < 0.2:
            del one[at:]
        else:
            one[at] ^= 1 << draw.randrange(8)
        given = [bytes(part) for part in damaged]
        try:
            codec.read(given, span)
        except (CorruptError, TruncatedError):
            sound = False
        else:
            sound = True
        assert sent(codec, given, span)[0].sound == sound
        refused += not sound
    assert 50 < refused < 400


def test_pieces_of_larger_memory_are_read_in_place() -> None:
    """A store may return views of what it has fetched."""
    pieces = [bytes(range(40)), memoryview(bytes(range(40)))[3:9], memoryview(b"")]
    for given in (pieces[:1], pieces):
        found = native.segments_of(given)
        assert [ctypes.string_at(int(at), int(size)) for at, size in found] == [bytes(piece) for piece in given]
