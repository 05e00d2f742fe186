"""The C ABI of the compiled code (cuda_ext/include/cachegen.h) for ctypes: constants, structures, functions."""

from __future__ import annotations

import ctypes


class Section(ctypes.Structure):
    """struct cg_section."""

    _fields_ = [
        ("tokens", ctypes.c_uint64),
        ("columns", ctypes.c_uint64),
        ("ids_per_column", ctypes.c_uint64),
        ("table_ids", ctypes.c_void_p),
        ("contexts", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("tables_bytes", ctypes.c_uint64),
        ("tables_per_tile", ctypes.c_uint32),
    ]


class Run(ctypes.Structure):
    """struct cg_run."""

    _fields_ = [("threads", ctypes.c_uint32), ("isa", ctypes.c_uint32), ("queue", ctypes.c_void_p)]


class Chunk(ctypes.Structure):
    """struct cg_chunk. Here and below, the addresses are those of tensors that must outlive the structure."""

    _fields_ = [
        ("tokens", ctypes.c_uint64),
        ("columns", ctypes.c_uint64),
        ("group_tokens", ctypes.c_uint64),
        ("anchors", ctypes.c_void_p),
        ("means", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("dtype", ctypes.c_uint32),
    ]


class Output(ctypes.Structure):
    """struct cg_output."""

    _fields_ = [
        ("chunk", ctypes.POINTER(Chunk)),
        ("first", ctypes.c_uint64),
        ("gap_at", ctypes.c_uint64),
        ("gap", ctypes.c_uint64),
        ("row", ctypes.c_uint64),
        ("places", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("coarser", ctypes.c_void_p * 2),
        ("n_coarser", ctypes.c_uint32),
    ]


MAX_BATCH = 8
"""CG_MAX_BATCH: the largest number of chunks that one call decodes."""
MAX_BATCH_TOKENS = 1 << 20
"""CG_MAX_BATCH_TOKENS."""
BATCH_PROB_BITS = 11
"""CG_BATCH_PROB_BITS."""
VECTOR_COLUMNS = 8
"""CG_VECTOR_COLUMNS."""
BATCH_ALIGNMENT = 16
"""Alignment of the addresses and strides that a batch is written to, in bytes."""


class Streams(ctypes.Structure):
    """struct cg_streams."""

    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64), ("offsets", ctypes.c_void_p)]


class Batch(ctypes.Structure):
    """struct cg_batch."""

    _fields_ = [
        ("columns", ctypes.c_uint64),
        ("group_tokens", ctypes.c_uint64),
        ("base_ids", ctypes.c_void_p),
        ("digit_ids", ctypes.c_void_p * 2),
        ("base_tables", ctypes.c_void_p),
        ("base_tables_bytes", ctypes.c_uint64),
        ("digit_tables", ctypes.c_void_p),
        ("digit_tables_bytes", ctypes.c_uint64),
        ("means", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("end_steps", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("tables_per_tile", ctypes.c_uint32),
        ("n_digits", ctypes.c_uint32),
        ("n_end_digits", ctypes.c_uint32),
        ("dtype", ctypes.c_uint32),
    ]


class Job(ctypes.Structure):
    """struct cg_job."""

    _fields_ = [
        ("tokens", ctypes.c_uint64),
        ("first", ctypes.c_uint64),
        ("last", ctypes.c_uint64),
        ("row", ctypes.c_uint64),
        ("anchors", ctypes.c_void_p),
        ("base", Streams),
        ("digits", Streams * 2),
        ("end_digits", Streams * 2),
        ("patches", ctypes.c_void_p),
        ("patch_offsets", ctypes.c_void_p),
        ("n_patches", ctypes.c_uint32),
        ("tile_status", ctypes.c_void_p),
    ]


PARTS_SECTIONS = 6
"""CG_PARTS_SECTIONS: the largest number of sections of a chunk."""


class Parts(ctypes.Structure):
    """struct cg_parts."""

    _fields_ = [
        ("columns", ctypes.c_uint64),
        ("anchor_bytes", ctypes.c_uint64),
        ("chunks", ctypes.c_uint64),
        ("n_digits", ctypes.c_uint32),
        ("n_end_digits", ctypes.c_uint32),
        ("segments", ctypes.c_void_p),
    ]


class Staged(ctypes.Structure):
    """struct cg_staged."""

    _fields_ = [
        ("used", ctypes.c_uint64),
        ("scales", ctypes.c_uint64),
        ("pieces", ctypes.c_uint64),
        ("status", ctypes.c_int32),
        ("wide", ctypes.c_uint32 * MAX_BATCH),
    ]


class Span(ctypes.Structure):
    """struct cg_span."""

    _fields_ = [
        ("first", ctypes.c_uint64),
        ("tokens", ctypes.c_uint64),
        ("ordinary_first", ctypes.c_uint64),
        ("ordinary_last", ctypes.c_uint64),
        ("anchor", ctypes.c_uint64),
    ]


class Source(ctypes.Structure):
    """struct cg_source."""

    _fields_ = [
        ("places", ctypes.c_void_p),
        ("columns", ctypes.c_uint64),
        ("group_tokens", ctypes.c_uint64),
        ("vectors", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("n_vectors", ctypes.c_uint64),
        ("means", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("dtype", ctypes.c_uint32),
        ("blank", ctypes.c_uint32),
    ]


class Costs(ctypes.Structure):
    """struct cg_costs."""

    _fields_ = [("costs", ctypes.c_void_p), ("entries", ctypes.c_uint32), ("first", ctypes.c_uint32)]


class Part(ctypes.Structure):
    """struct cg_part."""

    _fields_ = [
        ("columns", ctypes.c_void_p),
        ("n_columns", ctypes.c_uint64),
        ("table_ids", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("tables_bytes", ctypes.c_uint64),
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
    ]


BASE_STREAM, ANCHOR_STREAM, DIGIT_STREAM, MAX_STREAMS = 0, 1, 2, 6
"""CG_BASE_STREAM, CG_ANCHOR_STREAM, CG_DIGIT_STREAM, CG_MAX_STREAMS."""


class Sparse(ctypes.Structure):
    """struct cg_sparse."""

    _fields_ = [
        ("coefficients", ctypes.c_void_p),
        ("coefficient_stride", ctypes.c_uint64),
        ("tokens", ctypes.c_uint64),
        ("components", ctypes.c_uint64),
        ("steps", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("matrix", ctypes.c_void_p),
        ("matrix_stride", ctypes.c_uint64),
        ("channels", ctypes.c_uint64),
        ("start", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("start_dtype", ctypes.c_uint32),
    ]


class Heads(ctypes.Structure):
    """struct cg_heads."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("row_stride", ctypes.c_uint64),
        ("tokens", ctypes.c_uint64),
        ("means", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("address", ctypes.c_uint64),
        ("token_stride", ctypes.c_uint64),
        ("head_stride", ctypes.c_uint64),
        ("heads", ctypes.c_uint32),
        ("dim", ctypes.c_uint32),
        ("pairs", ctypes.c_uint32),
        ("interleaved", ctypes.c_uint32),
        ("from_dtype", ctypes.c_uint32),
        ("to_dtype", ctypes.c_uint32),
    ]


class Operands(ctypes.Structure):
    """struct cg_operands."""

    _fields_ = [
        ("coefficients", ctypes.c_void_p),
        ("row_stride", ctypes.c_uint64),
        ("tokens", ctypes.c_uint64),
        ("columns", ctypes.c_uint64),
        ("factors", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p),
        ("n_numbers", ctypes.c_uint64),
        ("first", ctypes.c_uint64),
        ("last", ctypes.c_uint64),
        ("sources", ctypes.c_void_p),
        ("products", ctypes.c_uint64),
        ("width", ctypes.c_uint64),
        ("operands", ctypes.c_uint64),
        ("step", ctypes.c_float),
        ("dtype", ctypes.c_uint32),
    ]


class StreamsOut(ctypes.Structure):
    """struct cg_streams_out."""

    _fields_ = [
        ("memory", ctypes.c_void_p),
        ("memory_bytes", ctypes.c_uint64),
        ("offsets", ctypes.c_void_p),
        ("bytes", ctypes.c_void_p),
        ("statuses", ctypes.c_void_p),
        ("exceptions", ctypes.c_void_p),
        ("max_exceptions", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        ("n_exceptions", ctypes.c_uint64),
    ]


_POINTER, _U32, _U64, _STATUS = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32
PROTOTYPES = {
    "cg_abi_version": (_U32, []),
    "cg_probe": (_STATUS, [_POINTER, _U64, _POINTER]),
    "cg_tables_bytes": (_U64, [_U32, _U32, _U32]),
    "cg_tables_build": (_STATUS, [_POINTER, _U32, _U32, _U32, _POINTER, _U64]),
    "cg_slot_bytes": (_U64, [_U64]),
    "cg_isa_available": (_STATUS, [_U32]),
    "cg_encode": (_STATUS, [_POINTER, _POINTER, _POINTER, _U64, _POINTER, _POINTER, _POINTER]),
    "cg_pack": (_STATUS, [_POINTER, _U64, _POINTER, _U64, _POINTER, _U64, _POINTER]),
    "cg_decode": (_STATUS, [_POINTER, _POINTER, _U64, _POINTER, _POINTER, _POINTER, _POINTER]),
    "cg_decode_into": (_STATUS, [_POINTER, _POINTER, _U64, _POINTER, _POINTER, _POINTER, _POINTER]),
    "cg_decode_chunks": (_STATUS, [_POINTER, _POINTER, _U32, _POINTER]),
    "cg_fill_into": (_STATUS, [_U64, _U64, _POINTER, _POINTER]),
    "cg_patch_into": (_STATUS, [_U64, _POINTER, _POINTER, _U64, _POINTER, _POINTER]),
    "cg_rows_into": (_STATUS, [_POINTER, _U64, _U64, _U64, _POINTER, _POINTER]),
    "cg_moments": (_STATUS, [_POINTER, _POINTER, _U64, _U64, _POINTER, _POINTER, _POINTER]),
    "cg_quantise": (_STATUS, [_POINTER, _POINTER, _U32, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER]),
    "cg_restore": (_STATUS, [_POINTER, _U64, _U64, _POINTER, _POINTER, _U32, _POINTER, _POINTER]),
    "cg_contexts": (_STATUS, [_POINTER, ctypes.c_uint8, _POINTER, _U64, _POINTER, _POINTER]),
    "cg_clamp": (_STATUS, [_POINTER, _POINTER, _U64, _U64, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER]),
    "cg_count": (_STATUS, [_POINTER, _POINTER, _U64, _U64, _U32, _POINTER, _POINTER]),
}
"""The functions of a library: (type of the result, types of the arguments)."""
CPU_PROTOTYPES = {
    "cg_peaks": (_STATUS, [_POINTER, _POINTER, _U64, _POINTER, _POINTER]),
    "cg_spread": (_STATUS, [_POINTER, _POINTER, _U64, _POINTER, _POINTER]),
    "cg_choose": (_STATUS, [_POINTER, _POINTER, _U64, _U32, *[_POINTER] * 6, _U32, _POINTER, _POINTER]),
    "cg_fine": (_STATUS, [*[_POINTER] * 2, _U32, *[_POINTER] * 2, _U64, *[_POINTER] * 4]),
    "cg_choose_planes": (_STATUS, [_POINTER, _POINTER, _U64, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER]),
    "cg_code_planes": (_STATUS, [_POINTER, _POINTER, _POINTER, _POINTER, _POINTER]),
    "cg_decode_planes": (_STATUS, [_POINTER, _POINTER, _U64, _POINTER, _POINTER, _POINTER, _POINTER]),
    "cg_patch_planes": (_STATUS, [_POINTER, _POINTER, _U64, _POINTER, _POINTER]),
    "cg_code": (_STATUS, [_POINTER, _POINTER, _U32, _POINTER, _POINTER, _POINTER]),
    "cg_write_heads": (_STATUS, [_POINTER, _U64, _POINTER]),
    "cg_gather_operands": (_STATUS, [_POINTER, _POINTER]),
    "cg_multiply_sparse": (_STATUS, [_POINTER, _POINTER]),
    "cg_read_parts": (_STATUS, [_POINTER, _POINTER, _POINTER, _U64, _U64, _POINTER, _POINTER, _POINTER]),
    "cg_gather": (_STATUS, [_POINTER, _U64, _POINTER, _U64, _POINTER]),
    "cg_block_sums": (_STATUS, [_POINTER, _U64, _POINTER, _U64, _POINTER, _POINTER]),
    "cg_use_team": (_STATUS, [_POINTER]),
}
"""Functions that a library may lack: the CUDA library has cg_write_heads, cg_gather_operands, cg_read_parts and
cg_block_sums alone of them, and the CPU library has all but cg_gather_operands.
"""
BATCH = "cg_decode_chunks"
"""A function that a library may lack: chunks are then decoded section by section."""
