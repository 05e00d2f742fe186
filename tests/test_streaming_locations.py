"""Streams of every kind of artifact and location, and calls from their callbacks."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import transformers as hf
from transformers import DynamicCache

from hf_cachegen.artifact import Reader
from hf_cachegen.cache import CacheGenCache
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import LevelError, MismatchError, SignatureError, TensorError
from hf_cachegen.models.compat import CACHE_ARGUMENT
from hf_cachegen.stores import LocalStore
from hf_cachegen.stores.sealed import seal
from hf_cachegen.stores.signed import sign
from hf_cachegen.streaming import ChunkReady, Event, StreamReport
from tests.http_server import Server
from tests.signing_support import KEY, PUBLIC, pem
from tests.streaming_support import CONTEXT, at_level, same_kv, serve, threads_end, write
from tests.tiny_models import SUPPORTED, shared

pytestmark = pytest.mark.usefixtures("own_cache")

ROOT = Path(__file__).resolve().parent.parent


def stream(location: Any, **options: Any) -> CacheGenCache:
    return CacheGenCache.stream(location, shared("llama"), **options)


@pytest.mark.parametrize("config", [
    CacheGenConfig(transform="delta", chunk_tokens=16),
    CacheGenConfig(transform="identity", lossless=True, levels=1, chunk_tokens=16),
    CacheGenConfig(transform="identity", chunk_tokens=512),
], ids=["delta", "lossless", "one chunk"])  # fmt: skip
def test_every_codec_streams(server: Server, tmp_path: Path, config: CacheGenConfig) -> None:
    folder = tmp_path / "artifact"
    CacheGenCache.from_context(shared("llama"), CONTEXT, config).save_pretrained(folder)
    assert same_kv(stream(serve(server, folder), slo=30.0), at_level(folder))


def test_sealed_and_signed_artifacts_stream(server: Server, folder: Path, tmp_path: Path) -> None:
    sign(folder, pem(KEY, tmp_path / "key.pem"))
    url = serve(server, folder, "signed")
    assert same_kv(stream(url, public_key=PUBLIC), at_level(folder))
    secret = tmp_path / "secret.key"
    secret.write_bytes(bytes(range(32)))
    seal(folder, tmp_path / "sealed", secret)
    server.files.update({f"sealed/{path.name}": path.read_bytes() for path in (tmp_path / "sealed").iterdir()})
    assert same_kv(stream(f"{server.url}/sealed", key=secret, slo=30.0), at_level(folder))


def test_an_unsigned_artifact_does_not_stream(server: Server, folder: Path) -> None:
    """It is not recomputed either: the caller asked for a signature."""
    with pytest.raises(SignatureError):
        stream(serve(server, folder), public_key=PUBLIC, slo=30.0)


def test_any_filesystem_streams(folder: Path) -> None:
    files = fsspec.filesystem("memory")
    for path in folder.iterdir():
        files.pipe(f"/streamed/{path.name}", path.read_bytes())
    cache = stream("memory://streamed", slo=30.0)
    assert same_kv(cache, at_level(folder))
    assert isinstance(cache.report, StreamReport)
    assert cache.report.wire_bytes > 0


def rounded_alike(a: CacheGenCache, b: CacheGenCache) -> bool:
    """Return whether two caches differ by one rounding at most, in 1 of 10,000 values at most.

    A product in bfloat16 rounds a few values differently, depending on how many rows it has.
    """
    pairs = list(zip((*a.kv.keys, *a.kv.values), (*b.kv.keys, *b.kv.values), strict=True))
    other, count = sum(int((x != y).sum()) for x, y in pairs), sum(x.numel() for x, _ in pairs)
    one = torch.finfo(pairs[0][0].dtype).eps
    return other <= count * 1e-4 and all(torch.allclose(x, y, rtol=one, atol=one / 64) for x, y in pairs)


def test_an_artifact_of_the_klt_transform_streams(server: Server, tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(ROOT / "eval" / "reference" / "model", dtype=torch.bfloat16)
    ids = torch.arange(300)[None] % 200 + 3
    config = CacheGenConfig(transform="klt", chunk_tokens=64)
    CacheGenCache.from_context(model, ids, config).save_pretrained(tmp_path / "artifact")
    url = serve(server, tmp_path / "artifact")
    coarse, finest = (CacheGenCache.from_pretrained(tmp_path / "artifact", model, level) for level in (1, 3))
    assert rounded_alike(CacheGenCache.stream(url, model, level=1), coarse)
    cache = CacheGenCache.stream(url, model, refine="while_generating")
    assert cache.refinement is not None
    assert cache.refinement.wait(30)
    assert rounded_alike(cache, finest)


def test_a_callback_may_end_its_refinement(server: Server, folder: Path) -> None:
    """Callbacks are called with no lock held."""
    url = serve(server, folder)
    held: list[CacheGenCache] = []

    def on_event(event: Event) -> None:
        if held and isinstance(event, ChunkReady) and held[0].refinement is not None:
            held[0].refinement.close(5.0)

    gate = threading.Event()
    server.always = lambda request, body, headers: (
        gate.wait(30) if "refine" in request.path else None,
        request.answer(206, body, headers),
    )[1]
    held.append(stream(url, refine="while_generating", on_event=on_event))
    gate.set()
    assert held[0].refinement is not None
    assert held[0].refinement.wait(30)
    assert threads_end()


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_recomputed_chunk_reads_the_decoded_tokens_before_it(server: Server, tmp_path: Path, name: str) -> None:
    """The stock model, given the decoded tokens, computes the same chunk; sliding windows keep all of their tokens."""
    folder = write(name, tmp_path / name)
    segment = Reader(LocalStore(folder)).manifest.segment("base.safetensors", "chunk-00003")
    url = serve(server, folder)
    data = bytearray(server.files["base.safetensors"])
    data[segment.offset] ^= 1
    server.files["base.safetensors"] = bytes(data)
    cache = CacheGenCache.stream(url, shared(name))
    assert isinstance(cache.report, StreamReport)
    assert [chunk.choice for chunk in cache.report.chunks][2:5] == ["level 3", "text", "level 3"]
    past = DynamicCache()
    for index, (keys, values) in enumerate(zip(cache.kv.keys, cache.kv.values, strict=True)):
        past.update(keys[:, :, :48].clone(), values[:, :, :48].clone(), index)
    with torch.no_grad():
        shared(name)(input_ids=CONTEXT[:, 48:64], **{CACHE_ARGUMENT: past}, use_cache=True)
    for layer, keys, values in zip(past.layers, cache.kv.keys, cache.kv.values, strict=True):
        torch.testing.assert_close(layer.keys[:, :, 48:64], keys[:, :, 48:64], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.values[:, :, 48:64], values[:, :, 48:64], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("ids", "mask"), [((100,), (100,)), ((0, 100), (0, 100)), ((1, 0), (1, 0)), ((1, 100), (1, 3))]
)
def test_invalid_prompts_are_refused(server: Server, folder: Path, ids: tuple[int, ...], mask: tuple[int, ...]) -> None:
    """The error is raised before anything is fetched."""
    with pytest.raises(TensorError):
        stream(serve(server, folder), prompt=(torch.zeros(ids, dtype=torch.long), torch.ones(mask, dtype=torch.long)))
    assert not server.requests


def test_the_artifact_of_another_model_is_reported_first(server: Server, tmp_path: Path) -> None:
    """Its missing level is not reported instead."""
    url = serve(server, write("llama", tmp_path / "artifact"))
    with pytest.raises(MismatchError):
        CacheGenCache.stream(url, shared("mistral"), level=9)
    with pytest.raises(LevelError):
        stream(url, level=9)
    assert threads_end()


def test_a_prompt_that_begins_with_the_context_needs_no_tokens(server: Server, folder: Path) -> None:
    """Their hash is in the manifest. Any other prompt is compared with the stored tokens."""
    url = serve(server, folder)
    asked = torch.cat([torch.zeros(1, 3, dtype=torch.long), CONTEXT, CONTEXT[:, :5]], 1)
    mask = torch.ones_like(asked)
    mask[:, :3] = 0
    cache = stream(url, prompt=(asked, mask))
    assert torch.equal(cache.input_ids, CONTEXT)
    assert same_kv(cache, at_level(folder))
    assert not any("tokens" in path for path, _ in server.requests)

    other = asked.clone()
    other[0, 50] += 1
    assert torch.equal(stream(url, prompt=(other, mask)).input_ids, CONTEXT)
    assert any("tokens" in path for path, _ in server.requests)


def test_a_process_may_end_while_a_decoder_is_created(folder: Path) -> None:
    """Everything was recomputed, so the stream does not wait for it. It is inside torch when the interpreter ends."""
    script = f"""if True:
        import threading, time, torch
        from hf_cachegen.cache import CacheGenCache
        from hf_cachegen.streaming import measure
        from hf_cachegen.streaming.sources import Source
        from tests.tiny_models import shared
        decoder, over = Source.decoder, threading.Event()

        def slow(self):
            over.wait(60)
            end, x = time.monotonic() + 0.4, torch.eye(200)
            while time.monotonic() < end:
                x = x @ x
            return decoder(self)

        Source.decoder = slow
        measure(shared("llama"))
        cache = CacheGenCache.stream({str(folder)!r}, shared("llama"), slo=0.5)
        print(sorted({{chunk.choice for chunk in cache.report.chunks}}), flush=True)
        over.set()"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, text=True, capture_output=True, timeout=120, cwd=ROOT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "['text']\n", "")
