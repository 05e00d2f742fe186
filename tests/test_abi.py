"""The ctypes view of the C ABI against its header, field by field and argument by argument."""

from __future__ import annotations

import ctypes
import re

import pytest

from hf_cachegen.codec import abi
from tests.lockstep import ROOT

HEADERS = [ROOT / "cuda_ext" / "include" / name for name in ("cachegen.h", "cachegen_parts.h", "cachegen_source.h")]
HEADER = re.sub(r"/\*.*?\*/", "", "".join(path.read_text() for path in HEADERS), flags=re.DOTALL)
INTEGERS = {
    "uint8_t": ctypes.c_uint8,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "int32_t": ctypes.c_int32,
    "float": ctypes.c_float,
}
STRUCTURES = {
    "cg_run": abi.Run,
    "cg_section": abi.Section,
    "cg_chunk": abi.Chunk,
    "cg_output": abi.Output,
    "cg_streams": abi.Streams,
    "cg_batch": abi.Batch,
    "cg_job": abi.Job,
    "cg_sparse": abi.Sparse,
    "cg_heads": abi.Heads,
    "cg_operands": abi.Operands,
    "cg_parts": abi.Parts,
    "cg_staged": abi.Staged,
}


def type_of(declared: str) -> type:
    """The ctypes type of a C type; any pointer is an address."""
    if "*" in declared:
        return ctypes.c_void_p
    name = declared.replace("const", "").strip()
    return STRUCTURES.get(name) or INTEGERS[name]


def fields_of(body: str) -> list[tuple[str, type]]:
    """(name, type) of each field in a struct's body."""
    found = []
    for declaration in filter(None, (line.strip() for line in body.split(";"))):
        [(kind, names)] = re.findall(r"^((?:const )?\w+\s*\**)\s*(.*)$", declaration, re.DOTALL)
        for plain, count in re.findall(r"(\w+)(?:\[(\d+)\])?", names):
            found.append((plain, type_of(kind) * int(count) if count else type_of(kind)))
    return found


def same_type(own: type, declared: type) -> bool:
    """Pointers to structures are addresses too, and arrays compare by element and length."""
    if issubclass(own, ctypes.Array) and issubclass(declared, ctypes.Array):
        return own._length_ == declared._length_ and same_type(own._type_, declared._type_)
    if declared is ctypes.c_void_p:
        return own is ctypes.c_void_p or issubclass(own, ctypes._Pointer)
    return own is declared


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_is_that_of_the_header(name: str) -> None:
    body = re.search(rf"typedef struct {name} {{(.*?)}} {name};", HEADER, re.DOTALL)
    assert body, f"cachegen.h has no {name}"
    declared, own = fields_of(body[1]), STRUCTURES[name]._fields_
    assert [field for field, _ in declared] == [field[0] for field in own]
    for (field, kind), mine in zip(declared, own, strict=True):
        assert same_type(mine[1], kind), field


def test_functions_are_those_of_the_header() -> None:
    declared = {}
    for result, name, arguments in re.findall(r"CG_API (\w+) (\w+)\((.*?)\) CG_NOEXCEPT;", HEADER, re.DOTALL):
        each = [] if arguments.strip() == "void" else arguments.split(",")
        declared[name] = (type_of(result), [type_of(re.sub(r"\w+$", "", one.strip())) for one in each])
    assert declared == {**abi.PROTOTYPES, **abi.CPU_PROTOTYPES}
