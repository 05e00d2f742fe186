"""GPUs that cannot run the CUDA library: one probe, one warning with CUDA's own message, and the CPU codes."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_cachegen import CacheGenConfig, decode_kv, encode_kv
from hf_cachegen.codec import abi, batch, native, transfer
from hf_cachegen.errors import NativeError
from tests.klt_support import CONFIG, make_profile
from tests.kv_samples import sample_kv
from tests.lockstep import COMPILER, ROOT, needs_compiler

REASON = "CUDA driver version is insufficient for CUDA runtime version"
STUB = r"""
#include <string.h>
#include "{root}/cuda_ext/core/build.h"
int32_t cg_probe(char* reason, uint64_t bytes, uint64_t* shared_bytes) noexcept {{
  static int calls = 0;
  if (calls++) __builtin_trap();  // a device is probed once
  strncpy(reason, "{reason}", bytes - 1);
  *shared_bytes = {shared};
  return {status};
}}
"""
OWN = ("cg_abi_version", "cg_tables_bytes", "cg_tables_build", "cg_slot_bytes", "cg_probe")
pytestmark = needs_compiler


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str, int], None]]:
    """Install a CUDA library that only answers to a probe: install(status, reason, shared bytes)."""

    def made(status: int, reason: str, shared: int) -> None:
        names = [name for name in abi.PROTOTYPES if name not in OWN]
        probe, rest, library = (tmp_path / name for name in ("probe.cpp", "rest.cpp", "_cuda.so"))
        probe.write_text(STUB.format(root=ROOT, reason=reason, shared=shared, status=int(status)))
        rest.write_text('extern "C" {\n' + "\n".join(f"void {name}() {{}}" for name in names) + "\n}\n")
        command = [str(COMPILER), "-std=c++17", "-fPIC", "-shared", str(probe), str(rest), "-o", str(library)]
        subprocess.run(command, check=True)
        monkeypatch.setattr(native, "CUDA_LIBRARY", library)

    def forget() -> None:
        native._cuda_library.cache_clear()
        native._cuda_probe.cache_clear()

    forget()
    yield made
    monkeypatch.undo()
    forget()


def test_a_gpu_is_probed_once_and_the_warning_holds_its_message(
    install: Callable[[int, str, int], None], caplog: pytest.LogCaptureFixture
) -> None:
    install(native.TileStatus.FAILED, REASON, 0)
    with caplog.at_level(logging.WARNING, logger="hf_cachegen"):
        for _ in range(3):
            assert not native.available("cuda")
            assert not native.offers(abi.BATCH, torch.device("cuda"))
            assert native.batch_shared_bytes(torch.device("cuda")) == 0
    [record] = caplog.records
    assert REASON in record.getMessage()
    assert "The CPU codes instead" in record.getMessage()
    with pytest.raises(NativeError, match=REASON):
        native._need_library("cuda")


@pytest.mark.parametrize(("shared", "tables"), [(65536, 7), (101376, 11), (48 << 10, 5)], ids=["T4", "sm_120", "least"])
def test_a_block_does_not_copy_tables_that_exceed_shared_memory(
    install: Callable[[int, str, int], None], shared: int, tables: int
) -> None:
    install(native.TileStatus.OK, "", shared)
    device = torch.device("cuda")
    assert native.batch_shared_bytes(device) == shared
    for used, copied in ((tables, tables), (tables + 1, 0)):
        assignment = SimpleNamespace(tables_per_tile=used)
        assert batch._tables_per_tile(assignment, device) == copied  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"transform": "identity"}, {"transform": "delta"}, {"lossless": True}, {}])
def test_a_device_without_a_coder_gets_the_values_of_the_cpu(options: dict[str, object]) -> None:
    """The meta device has no values, but shapes, dtypes and errors."""
    if options:
        keys, values = sample_kv(tokens=100, dim=64)
        encoded = encode_kv(keys, values, CacheGenConfig(chunk_tokens=32, **options))  # type: ignore[arg-type]
    else:
        keys, values = ([torch.randn(1, 2, 100, 8) for _ in range(3)] for _ in range(2))
        encoded = encode_kv(keys, values, CONFIG, make_profile())
    found = decode_kv(encoded, device="meta")
    for here, there in zip((*keys, *values), (*found[0], *found[1]), strict=True):
        assert (there.device.type, there.shape, there.dtype) == ("meta", here.shape, here.dtype)


@pytest.mark.parametrize(
    ("reason", "message"),
    [("an illegal memory access was encountered", "failed before or in cg_decode: an illegal memory"), ("", "FAILED")],
)
def test_a_launch_that_fails_gives_the_message_of_cuda(
    reason: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = SimpleNamespace(cg_decode=lambda *_: native.TileStatus.FAILED)
    monkeypatch.setattr(native, "_need_library", lambda _: library)
    monkeypatch.setattr(native, "_guard", lambda _: nullcontext())
    monkeypatch.setattr(native, "_run", lambda *_: abi.Run())
    monkeypatch.setattr(native, "probe", lambda _: native.Probe(reason, 0))
    with pytest.raises(NativeError, match=message):
        native.call("cg_decode", device=torch.device("cuda", 0))


def test_a_device_that_fails_later_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def synchronize(self) -> None:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    found = transfer.Download(torch.ones(1))
    monkeypatch.setattr(found, "_event", Event())
    with pytest.raises(NativeError, match="unspecified launch failure"):
        found.wait()
