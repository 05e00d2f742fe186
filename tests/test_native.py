"""The compiled library: building, loading, its C ABI, its torch ops, and hostile bytes under the sanitizers."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hf_cachegen.codec import abi, native, ops, passes, rans, rans_reference, tables
from hf_cachegen.codec.native import TileStatus
from hf_cachegen.errors import CorruptError, NativeError, TensorError, TruncatedError
from tests.coder_support import Section, draw_section, laplace_tables
from tests.lockstep import COMPILER, CPU_SOURCES, KERNEL_SOURCES, ROOT, STRICT, needs_compiler
from tests.sanitized import fuzz, sanitized

HOSTILE_STREAMS = 100_000
"""Every back-end."""

needs_native = pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler")


@pytest.fixture
def library_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Let a test point the package at another library; load the package's own one again afterwards."""
    native._library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native._library.cache_clear()


def sample(contexts: int = 1) -> Section:
    return draw_section(11, 20, 300, laplace_tables([0.7, 2.0], 11), contexts)


# Loading.


def test_without_a_library_the_reference_runs_and_warns_once(
    library_at: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library_at.setattr(native, "LIBRARY", tmp_path / "_cpu.so")
    section = sample()
    with caplog.at_level(logging.WARNING, logger="hf_cachegen"):
        assert torch.equal(section.decode(section.encode()), section.symbols)
    assert len([r for r in caplog.records if "reference coder stands in" in r.getMessage()]) == 1
    with pytest.raises(NativeError, match="missing"):
        section.encode(backend="native")


def test_a_damaged_library_is_an_error(library_at: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "_cpu.so"
    library.write_bytes(b"not a library")
    library_at.setattr(native, "LIBRARY", library)
    with pytest.raises(NativeError, match="cannot be loaded"):
        sample().encode()


@needs_native
def test_a_library_of_another_abi_is_an_error(library_at: pytest.MonkeyPatch) -> None:
    library_at.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    with pytest.raises(NativeError, match="ABI version"):
        native.available()


# Building.


@needs_compiler
@pytest.mark.parametrize("sources", [CPU_SOURCES, KERNEL_SOURCES], ids=["cpu", "kernels in lockstep"])
def test_the_sources_compile_without_warnings(sources: list[str], tmp_path: Path) -> None:
    command = [str(COMPILER), *STRICT, "-O1", "-fPIC", "-shared", *sources, "-o", str(tmp_path / "strict.so")]
    subprocess.run(command, check=True)
    native.load(tmp_path / "strict.so")


@needs_compiler
def test_the_header_is_plain_c(tmp_path: Path) -> None:
    header = str(ROOT / "cuda_ext" / "include" / "cachegen.h")
    command = [
        str(COMPILER),
        "-x",
        "c",
        "-std=c99",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        "-fsyntax-only",
        header,
    ]
    subprocess.run(command, check=True)


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    variables = {**os.environ, "CACHEGEN_BUILD_CUDA": "0", **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, check=False, text=True, capture_output=True)


@pytest.mark.slow
@needs_compiler
def test_setup_builds_a_library_again_only_when_it_is_stale(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    library = tmp_path / "hf_cachegen" / "_cpu.so"
    assert build(tmp_path).returncode == 0
    native.load(library)
    built = library.stat().st_mtime_ns
    assert build(tmp_path).returncode == 0
    assert library.stat().st_mtime_ns == built
    os.utime(library, (0, 0))
    assert build(tmp_path).returncode == 0
    assert library.stat().st_mtime_ns >= built


def test_setup_without_a_compiler_succeeds_with_a_notice(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    done = build(tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    assert done.returncode == 0
    assert "reference coder stands in" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
def test_cuda_is_built_on_request_or_the_reason_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    forced = build(tmp_path, CACHEGEN_BUILD_CUDA="1", NVCC=str(tmp_path / "no-nvcc"), CUDA_HOME=str(tmp_path))
    assert forced.returncode != 0
    assert "there is no nvcc" in forced.stderr
    without = build(tmp_path, CACHEGEN_BUILD_CUDA="auto", NVCC=str(tmp_path / "no-nvcc"), CUDA_HOME=str(tmp_path))
    assert without.returncode == 0
    assert not list(tmp_path.rglob("_cuda.so"))
    assert "must be auto, 0 or 1" in build(tmp_path, CACHEGEN_BUILD_CUDA="maybe").stderr
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 3\n")
    nvcc.chmod(0o755)
    wrong = build(tmp_path, CACHEGEN_BUILD_CUDA="1", NVCC=str(nvcc), TORCH_CUDA_ARCH_LIST="Hopper")
    assert wrong.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST names 'Hopper'" in wrong.stderr
    broken = build(tmp_path, CACHEGEN_BUILD_CUDA="auto", NVCC=str(nvcc), TORCH_CUDA_ARCH_LIST="9.0a 8.0+PTX")
    assert broken.returncode == 0
    assert "the CPU's coder stands in" in broken.stderr
    assert "-gencode=arch=compute_90a,code=sm_90a" in broken.stdout
    assert "code=[sm_80,compute_80]" in broken.stdout


ARCHITECTURES = (75, 80, 90, 100, 120)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: the CUDA kernels are not compiled here")


@needs_nvcc
def test_the_cuda_library_was_built_for_all_architectures() -> None:
    """The package's own build makes it, with warnings as errors. It loads without a GPU."""
    assert native.CUDA_LIBRARY.exists(), "run: python setup.py build_ext --inplace"
    native.load(native.CUDA_LIBRARY)
    elf = native.CUDA_LIBRARY.read_bytes()
    for architecture in ARCHITECTURES:
        assert f"sm_{architecture}".encode() in elf


# Running it.


@pytest.mark.skipif(torch.cuda.is_available() or not native.CUDA_LIBRARY.exists(), reason="a GPU, or no CUDA library")
def test_a_machine_that_cannot_run_the_cuda_library_says_why() -> None:
    found = native.probe(native.load(native.CUDA_LIBRARY))
    assert "CUDA" in found.reason  # cudaGetErrorString: of the driver, or of devices
    assert found.shared_bytes == 0


# The C ABI.


@needs_native
def test_constants_equal_those_of_the_header() -> None:
    header = (ROOT / "cuda_ext" / "include" / "cachegen.h").read_text()
    assert f"#define CG_ABI_VERSION {native.ABI_VERSION}\n" in header
    assert f"#define CG_TILE_COLUMNS {rans.TILE_COLUMNS} " in header
    assert rans_reference.TILE_COLUMNS == rans.TILE_COLUMNS
    assert f"#define CG_BLOCK_COLUMNS {passes._BLOCK_COLUMNS}\n" in header
    assert f"#define CG_DIGIT_BINS {tables.DIGIT_CONTEXTS * tables.DIGIT_SYMBOLS}\n" in header
    for dtype, number in passes.DTYPES.items():
        assert f"CG_{str(dtype).removeprefix('torch.').upper()} = {number}" in header
    for name in (*TileStatus, *native.Isa):
        assert f"CG_{name.name} = {name.value}" in header


@needs_native
def test_tables_memory_is_position_independent() -> None:
    section = sample()
    streams = section.encode()
    copied = torch.empty(len(section.tables.native) + 64, dtype=torch.uint8)[64:]
    copied.copy_(section.tables.native)
    packed = torch.frombuffer(bytearray(b"".join(streams)), dtype=torch.uint8)
    sizes = torch.tensor([len(stream) for stream in streams])
    assert torch.equal(torch.ops.cachegen.decode(packed, sizes, copied, section.table_ids, None, 20), section.symbols)


@needs_native
@pytest.mark.parametrize(
    "sizes", [(0, 1, 11), (257, 1, 11), (1, 0, 11), (1, 257, 11), (1, 1, 9), (1, 1, 13), (2**32 - 1, 1, 11)]
)
def test_impossible_tables_have_no_size(sizes: tuple[int, int, int]) -> None:
    assert native._need_library().cg_tables_bytes(*sizes) == 0


@needs_native
def test_the_library_checks_frequencies() -> None:
    for row in ([1000, 23], [1025, 0], [65535, 1], [4096, 0]):
        with pytest.raises(NativeError, match="BAD_FREQUENCIES"):
            native.build_tables(torch.tensor([row]), 12 if row[0] == 4096 else 10)


@needs_native
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", 2**31 + 1),
        ("columns", 2**31 + 1),
        ("tokens", 19),
        ("ids_per_column", 2),
        ("ids_per_column", 3),
        ("table_ids", None),
        ("tables", None),
        ("tables_bytes", 16),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(field: str, value: int | None) -> None:
    library, section = native._need_library(), sample()
    side = ops.Section(section.tables.native, section.table_ids, None, 20)
    view = side.view
    slot_bytes = library.cg_slot_bytes(20)
    slots = torch.empty(2 * slot_bytes, dtype=torch.uint8)
    sizes, statuses = torch.empty(2, dtype=torch.int64), torch.empty(2, dtype=torch.int32)

    def encode(queue: int | None = None, isa: int = 0) -> int:
        outputs = (slots.data_ptr(), len(slots), sizes.data_ptr(), statuses.data_ptr())
        run = abi.Run(1, isa, queue)
        return library.cg_encode(ctypes.byref(view), section.symbols.data_ptr(), *outputs, ctypes.byref(run))

    assert encode() == TileStatus.OK
    assert encode(queue=1) == TileStatus.BAD_ARGUMENT
    assert encode(isa=4) == TileStatus.BAD_ARGUMENT
    setattr(view, field, value)
    assert encode() in (TileStatus.BAD_ARGUMENT, TileStatus.BAD_TABLES)


@needs_native
def test_offsets_are_checked() -> None:
    library, section = native._need_library(), sample()
    data = torch.frombuffer(bytearray(b"".join(section.encode())), dtype=torch.uint8)
    side = ops.Section(section.tables.native, section.table_ids, None, 20)
    view = side.view
    out, statuses = torch.empty(20, 300, dtype=torch.uint8), torch.empty(2, dtype=torch.int32)
    for offsets in ([0, 200, len(data) + 1], [0, 200, 100], [-1, 0, 0]):
        where = torch.tensor(offsets)
        arguments = (data.data_ptr(), len(data), where.data_ptr(), out.data_ptr(), statuses.data_ptr())
        run = abi.Run(1, 0, None)
        assert library.cg_decode(ctypes.byref(view), *arguments, ctypes.byref(run)) == TileStatus.BAD_ARGUMENT


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("driver", "count", "shared"),
    [("fuzz_decode", HOSTILE_STREAMS, 5000), ("fuzz_passes", 1000, 200), ("fuzz_into", 1500, 400)],
)
def test_hostile_input_under_the_sanitizers(driver: str, count: int, shared: int, tmp_path: Path) -> None:
    cpu, kernels = (sanitized(driver, sources, tmp_path) for sources in (CPU_SOURCES, KERNEL_SOURCES))
    assert int(fuzz(cpu, count, 1)[2]) == len(native.available_isas())
    # The kernels, lane by lane, give the same results for the same cases.
    assert fuzz(kernels, shared, 2)[3] == fuzz(cpu, shared, 2)[3]


@needs_compiler
@pytest.mark.timeout(1200)
def test_hostile_batches_under_the_sanitizers(tmp_path: Path) -> None:
    fuzz(sanitized("fuzz_batch", KERNEL_SOURCES, tmp_path), 300, 1)
    fuzz(sanitized("fuzz_parts", KERNEL_SOURCES, tmp_path), 5000, 1)


# Instruction sets.


@needs_native
def test_the_environment_names_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.available_isas()[0] == native.Isa.SCALAR
    section = sample()
    streams = section.encode()
    for isa in native.available_isas():
        monkeypatch.setenv("CACHEGEN_CPU", isa.name.lower())
        assert native._run().isa == isa
        assert section.encode() == streams
    for isa in {*native.Isa} - {native.Isa.BEST, *native.available_isas()}:
        monkeypatch.setenv("CACHEGEN_CPU", isa.name.lower())
        with pytest.raises(NativeError, match="has no"):
            section.encode()
    monkeypatch.setenv("CACHEGEN_CPU", "mmx")
    with pytest.raises(NativeError, match="CACHEGEN_CPU must be"):
        section.encode()


# Threads and torch.


@needs_native
def test_the_number_of_threads_does_not_change_the_bytes() -> None:
    section = draw_section(4, 200, 3000, laplace_tables([0.7, 2.0], 11), 3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        streams = section.encode()
        torch.set_num_threads(4)
        assert section.encode() == streams
        assert torch.equal(section.decode(streams), section.symbols)
    finally:
        torch.set_num_threads(threads)


@needs_native
@pytest.mark.parametrize("contexts", [1, 3])
def test_ops_pass_opcheck(contexts: int) -> None:
    section = sample(contexts)
    book = section.tables.native
    torch.library.opcheck(torch.ops.cachegen.encode, (section.symbols, book, section.table_ids, section.contexts))
    packed, sizes = torch.ops.cachegen.encode(section.symbols, book, section.table_ids, section.contexts)
    torch.library.opcheck(torch.ops.cachegen.decode, (packed, sizes, book, section.table_ids, section.contexts, 20))


@needs_native
def test_decode_compiles_without_a_graph_break() -> None:
    section = sample()
    book = section.tables.native
    packed, sizes = torch.ops.cachegen.encode(section.symbols, book, section.table_ids, None)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def values(packed: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        symbols = torch.ops.cachegen.decode(packed, sizes, book, section.table_ids, None, 20)
        return symbols.to(torch.float32) - 16

    assert torch.equal(values(packed, sizes), section.symbols.float() - 16)


@needs_native
def test_ops_check_their_arguments() -> None:
    section = sample()
    book, ids = section.tables.native, section.table_ids
    packed, sizes = torch.ops.cachegen.encode(section.symbols, book, ids, None)
    decode, encode = torch.ops.cachegen.decode, torch.ops.cachegen.encode
    for wrong in (section.symbols.int(), section.symbols[:, 1:], section.symbols[0]):
        with pytest.raises(TensorError):
            encode(wrong, book, ids, None)
    for wrong_sizes in (sizes[:1], -sizes, sizes + packed.numel()):
        with pytest.raises(CorruptError):
            decode(packed, wrong_sizes, book, ids, None, 20)
    with pytest.raises(TruncatedError):
        decode(packed[:-2], sizes, book, ids, None, 20)
    with pytest.raises(TensorError):
        decode(packed, sizes, book, ids[:, 0], None, 20)
    with pytest.raises(TensorError):
        decode(packed, sizes, book, ids, None, -1)
    with pytest.raises(TensorError):
        decode(packed, sizes, book, ids, section.symbols[1:], 20)
    with pytest.raises(NativeError, match="BAD_TABLES"):
        decode(packed, sizes, book[16:], ids, None, 20)
