"""Hostile artifacts: manifests with a valid checksum and wrong content, each with its own error."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import xxhash

from hf_cachegen.artifact import Limits, Reader
from hf_cachegen.artifact.manifest import DEFAULT_LIMITS, loads
from hf_cachegen.errors import ArtifactError, CorruptError, LimitError, ManifestError, UnsupportedFormatError
from hf_cachegen.stores import LocalStore
from tests.small_artifact import MemoryStore, contents, write

VALID = b"""{
"chunks":[[0,2],[2,1]],
"codec":{"step":0.5},
"extra":{},
"files":{"base.safetensors":{"header_xxh3":"HEADER","segments":[["chunk-00000",136,3,"DIGEST"],["chunk-00001",139,4,"DIGEST"]],"size":143}},
"fingerprint":null,
"format_version":1,
"geometry":{},
"report":{},
"required":[],
"writer":"",
"""
HEADER = (
    b"\x80\0\0\0\0\0\0\0"
    b'{"chunk-00000":{"data_offsets":[0,3],"dtype":"U8","shape":[3]},'
    b'"chunk-00001":{"data_offsets":[3,7],"dtype":"U8","shape":[4]}}   '
)
VALID = VALID.replace(b"HEADER", xxhash.xxh3_128_hexdigest(HEADER).encode()).replace(b"DIGEST", b"0123456789abcdef" * 2)


def sealed(body: bytes) -> bytes:
    """Append the checksum of the bytes."""
    return body + b'"xxh3":"' + xxhash.xxh3_128_hexdigest(body).encode() + b'"\n}\n'


def hostile(old: bytes, new: bytes) -> bytes:
    assert VALID.count(old) == 1, old
    return sealed(VALID.replace(old, new))


def refused(data: bytes, error: type[ArtifactError], match: str, limits: Limits = DEFAULT_LIMITS) -> None:
    with pytest.raises(error, match=match) as caught:
        loads(data, limits)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 400


def test_the_valid_manifest_is_valid() -> None:
    manifest = loads(sealed(VALID))
    assert (manifest.tokens, manifest.levels) == (3, 1)


def test_a_wrong_checksum() -> None:
    refused(VALID + b'"xxh3":"00000000000000000000000000000000"\n}\n', ManifestError, "damaged or cut short")


def test_a_checksum_in_capitals() -> None:
    data = sealed(VALID)
    refused(data[:-36] + data[-36:-4].upper() + data[-4:], ManifestError, "damaged or cut short")


def test_the_empty_manifest() -> None:
    refused(b"", ManifestError, "damaged or cut short")


def test_a_manifest_that_is_only_a_checksum() -> None:
    refused(sealed(b""), ManifestError, "not strict JSON")


def test_a_manifest_above_the_limit() -> None:
    refused(sealed(VALID), LimitError, "the limit is 100", Limits(max_header_bytes=100))


def test_a_manifest_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "cachegen.json").open("wb") as file:
        file.truncate(1 << 40)  # a sparse terabyte
    with pytest.raises(LimitError):
        Reader(LocalStore(tmp_path))


def test_a_duplicate_member() -> None:
    refused(hostile(b'"geometry":{},', b'"geometry":{},"geometry":{},'), ManifestError, "'geometry' occurs twice")


def test_a_duplicate_key_deep_inside() -> None:
    refused(hostile(b'"step":0.5', b'"step":[{"a":1,"a":2}]'), ManifestError, "'a' occurs twice")


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999"])
def test_a_value_that_is_not_a_number(number: bytes) -> None:
    refused(hostile(b"0.5", number), ManifestError, "not strict JSON")


@pytest.mark.parametrize("digits", [20, 5_000, 900_000])
def test_a_giant_integer(digits: int) -> None:
    refused(hostile(b"0.5", b"9" * digits), ManifestError, f"an integer has {digits} digits")


@pytest.mark.parametrize("depth", [40, 1_000, 400_000])
def test_deep_nesting(depth: int) -> None:
    refused(hostile(b"0.5", b"[" * depth + b"]" * depth), ManifestError, "nested")


def test_deep_nesting_without_an_end() -> None:
    refused(hostile(b"0.5", b'{"a":' * 150_000), ManifestError, "not strict JSON")


@pytest.mark.parametrize("text", [rb"\ud800", rb"\udfff", rb"\uD83D."])
def test_half_a_surrogate_pair(text: bytes) -> None:
    refused(hostile(b'"writer":""', b'"writer":"' + text + b'"'), ManifestError, "not strict JSON")


def test_a_surrogate_pair() -> None:
    assert loads(hostile(b'"writer":""', rb'"writer":"\ud83d\ude00"')).writer == "\U0001f600"


@pytest.mark.parametrize("encode", ["utf-16", "utf-32", "utf-8-sig"])
def test_another_encoding(encode: str) -> None:
    refused(sealed(VALID.decode().encode(encode)), ManifestError, "not strict JSON")


def test_bytes_that_are_not_utf8() -> None:
    refused(hostile(b'"writer":""', b'"writer":"\xff"'), ManifestError, "not strict JSON")


@pytest.mark.parametrize("other", [b"[1,\n", b"1,\n", b'{"format_version":1},\n', b"{} {\n"])
def test_another_kind_of_document(other: bytes) -> None:
    refused(sealed(other), ManifestError, "not strict JSON")


def test_a_later_format_version() -> None:
    refused(hostile(b'"format_version":1', b'"format_version":2'), UnsupportedFormatError, "format version 2")


def test_a_later_format_version_is_reported_before_other_errors() -> None:
    refused(sealed(b'{"format_version":7,\n'), UnsupportedFormatError, "format version 7")


@pytest.mark.parametrize("version", [b"0", b"-1", b"true", b"1.0", b'"1"', b"null", b"[]"])
def test_an_invalid_format_version(version: bytes) -> None:
    refused(hostile(b'"format_version":1', b'"format_version":' + version), ManifestError, "format_version")


@pytest.mark.parametrize(
    "feature",
    [b'"teleport"', b"1", b"null", b'["teleport"]', b'{"a":1}', b'"' + b"x" * 9999 + b'"'],
    ids=["unknown", "number", "null", "list", "object", "long"],
)
def test_an_unknown_required_feature(feature: bytes) -> None:
    refused(hostile(b'"required":[]', b'"required":[' + feature + b"]"), UnsupportedFormatError, "cannot read")


def test_a_known_required_feature() -> None:
    data = hostile(b'"required":[]', b'"required":["teleport"]')
    assert loads(data, features={"teleport"}).required == ("teleport",)


def test_unknown_members_are_ignored() -> None:
    data = hostile(b'"writer":"",', b'"writer":"","new":{"a":[1]},')
    assert loads(data) == loads(sealed(VALID))
    inner = hostile(b'"size":143', b'"size":143,"new":1')
    assert loads(inner) == loads(sealed(VALID))


@pytest.mark.parametrize("name", [b"chunks", b"codec", b"files", b"format_version", b"geometry"])
def test_a_missing_member(name: bytes) -> None:
    refused(hostile(b'"' + name + b'":', b'"other":'), ManifestError, name.decode())


@pytest.mark.parametrize("name", [b"fingerprint", b"report", b"required", b"writer", b"extra"])
def test_a_missing_optional_member(name: bytes) -> None:
    assert loads(hostile(b'"' + name + b'":', b'"other":')) == loads(sealed(VALID))


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"geometry":{}', b'"geometry":[]'), (b'"codec":{', b'"codec":"x","other":{'), (b'"report":{}', b'"report":1'),
     (b'"fingerprint":null', b'"fingerprint":false'), (b'"writer":""', b'"writer":1'),
     (b'"required":[]', b'"required":{}'),
     (b'"extra":{}', b'"extra":null'), (b'"chunks":[', b'"chunks":{},"other":['),
     (b'"files":{', b'"files":[],"other":{')],
)  # fmt: skip
def test_a_member_of_another_type(old: bytes, new: bytes) -> None:
    refused(hostile(old, new), ManifestError, "expected")


@pytest.mark.parametrize(
    "chunks",
    [b"[]", b"[[1,2],[3,1]]", b"[[0,2],[3,1]]", b"[[0,2],[1,1]]", b"[[0,0],[0,3]]", b"[[0,-2],[-2,1]]", b"[[0,2]]",
     b"[[0,2],[2,1],[3,1]]", b"[[0,2],[2]]", b"[[0,2],[2,1,1]]", b"[[0,2],2]", b"[[0,true],[1,1]]", b"[[0,2.0],[2,1]]",
     b'[["0",2],[2,1]]', b"[[0,null],[0,1]]", b"[null,null]"],
)  # fmt: skip
def test_an_invalid_chunk_table(chunks: bytes) -> None:
    refused(hostile(b"[[0,2],[2,1]]", chunks), ManifestError, "chunk")


def test_more_tokens_than_the_limit() -> None:
    refused(hostile(b"[[0,2],[2,1]]", b"[[0,2],[2,9000000000000000000]]"), LimitError, "tokens")


def test_more_chunks_than_the_limit() -> None:
    refused(sealed(VALID), LimitError, "2 chunks", Limits(max_segments=1))


def test_more_segments_than_the_limit() -> None:
    second = b'["extra-0",143,0,"' + b"0" * 32 + b'"]'
    refused(hostile(b']],"size"', b"]," + second + b'],"size"'), LimitError, "segments", Limits(max_segments=2))


def test_a_segment_above_the_limit() -> None:
    refused(hostile(b"139,4,", b"139,9000000000000000000,"), LimitError, "9000000000000000000 bytes")


@pytest.mark.parametrize(
    "name",
    [b"../base.safetensors", b"/etc/passwd", b"a/b.safetensors", b"Base.safetensors", b"", b".safetensors", b"base",
     b"cachegen.json", b"base..safetensors", b"base.safetensors\\u0000", b"base.safetensors\\n",
     b"b\\u0430se.safetensors",
     b"-base.safetensors", b"c:base.safetensors", b"..\\\\base.safetensors",
     pytest.param(b"x" * 200 + b".safetensors", id="200 letters")],
)  # fmt: skip
def test_an_invalid_file_name(name: bytes) -> None:
    refused(hostile(b"base.safetensors", name), ManifestError, "files")


@pytest.mark.parametrize("name", [b"", b"../chunk", b"Chunk", b"a b", b"__metadata__", b'\\"', b"chunk\\n", b"x" * 99])
def test_an_invalid_segment_name(name: bytes) -> None:
    refused(hostile(b'["chunk-00001"', b'["' + name + b'"'), ManifestError, "segments")


def test_two_segments_of_one_name() -> None:
    refused(hostile(b"chunk-00001", b"chunk-00000"), ManifestError, "one name")


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"136,3", b"136,2"), (b"136,3", b"136,4"), (b"136,3", b"135,3"), (b"136,3", b"137,3"), (b"136,3", b"0,3"),
     (b"139,4", b"140,4"), (b"139,4", b"138,4"), (b"139,4", b"136,4"), (b"139,4", b"139,3"), (b"139,4", b"139,5"),
     (b":143", b":142"), (b":143", b":144"), (b":143", b":9000000000000000000"), (b":143", b":0"),
     (b'"header_xxh3":"', b'"header_xxh3":"00000000000000000000000000000000","other":"')],
)  # fmt: skip
def test_segments_that_do_not_tile_their_file(old: bytes, new: bytes) -> None:
    refused(hostile(old, new), ManifestError, "do not tile")


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"136,3", b"-136,3"), (b"136,3", b"136,-3"), (b"136,3", b"136.0,3"), (b"136,3", b"true,3"), (b"136,3", b"null,3"),
     (b":143", b":-143"), (b":143", b":null"), (b":143", b":143.0"), (b"139,4,", b""), (b"139,4,", b"139,4,4,"),
     (b'139,4,"0', b'139,4,"'), (b'139,4,"0', b'139,4,"A'), (b'139,4,"0', b'139,4,"00'), (b'139,4,"0', b'139,4,"g'),
     (b'"header_xxh3":"', b'"header_xxh3":"0'), (b'"header_xxh3"', b'"other"'), (b'"segments"', b'"other"'),
     (b'["chunk-00001",139', b'[1,139')],
)  # fmt: skip
def test_a_file_entry_with_a_wrong_value(old: bytes, new: bytes) -> None:
    refused(hostile(old, new), ManifestError, "expected")


def test_no_base() -> None:
    refused(hostile(b"base.safetensors", b"other.safetensors"), ManifestError, "base.safetensors is not among")


def test_no_files() -> None:
    refused(hostile(b'"files":{', b'"files":{},"other":{'), ManifestError, "base.safetensors is not among")


def with_file(name: str, *segments: tuple[str, int]) -> bytes:
    """Add one file, which is tiled correctly, to the valid manifest."""
    tensors, rows, position = [], [], 0
    for tensor, length in segments:
        shape = f'"I64","shape":[1,{length // 8}]' if name.startswith("tokens") else f'"U8","shape":[{length}]'
        tensors.append(f'"{tensor}":{{"data_offsets":[{position},{position + length}],"dtype":{shape}}}')
        rows.append((tensor, position, length))
        position += length
    text = "{" + ",".join(tensors) + "}"
    text += " " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text.encode()
    listed = ",".join(f'["{n}",{len(head) + o},{length},"{"0" * 32}"]' for n, o, length in rows)
    entry = f'{{"header_xxh3":"{xxhash.xxh3_128_hexdigest(head)}","segments":[{listed}],"size":{len(head) + position}}}'
    return hostile(b'"files":{', f'"files":{{"{name}":{entry},'.encode())


def test_a_header_above_the_limit() -> None:
    data = with_file("profile.safetensors", *((f"p{i}", 10**9) for i in range(100)))
    refused(data, LimitError, r"profile.safetensors: a header of", Limits(max_header_bytes=len(data)))


def test_an_additional_file_is_valid() -> None:
    assert loads(with_file("profile.safetensors", ("basis", 7))).files["profile.safetensors"].size
    assert loads(with_file("profile.safetensors")).files["profile.safetensors"].size == 16
    assert loads(with_file("refine-1.safetensors", ("chunk-00000", 7), ("chunk-00001", 0))).levels == 2
    assert loads(with_file("tokens.safetensors", ("input_ids", 24))).files["tokens.safetensors"].size


@pytest.mark.parametrize(
    "segments",
    [(), (("chunk-00000", 1),), (("chunk-00001", 1), ("chunk-00000", 1)), (("chunk-0", 1), ("chunk-1", 1)),
     (("chunk-00000", 1), ("chunk-00001", 1), ("chunk-00002", 1))],
    ids=["none", "one missing", "reversed", "other names", "one more"],
)  # fmt: skip
def test_a_refinement_of_other_chunks(segments: tuple[tuple[str, int], ...]) -> None:
    refused(with_file("refine-1.safetensors", *segments), ManifestError, "must hold chunk-00000 to chunk-00001")


@pytest.mark.parametrize("number", [2, 9])
def test_a_refinement_without_the_previous_one(number: int) -> None:
    data = with_file(f"refine-{number}.safetensors", ("chunk-00000", 1), ("chunk-00001", 1))
    refused(data, ManifestError, "refine-1.safetensors is not among")


@pytest.mark.parametrize(
    "segments",
    [(), (("input_ids", 12),), (("ids", 24),), (("input_ids", 24), ("more", 8))],
    ids=["none", "12 bytes", "another name", "one more"],
)
def test_an_invalid_tokens_file(segments: tuple[tuple[str, int], ...]) -> None:
    refused(with_file("tokens.safetensors", *segments), ManifestError, "must hold 'input_ids'")


def test_a_negative_token_id(tmp_path: Path) -> None:
    """All checksums are valid, but the token id is not."""
    write(tmp_path)
    artifact = contents(tmp_path)
    wrong = b"\xff" * 8 + artifact["tokens.safetensors"][-32:]
    right = artifact["tokens.safetensors"][-40:]
    manifest = artifact["cachegen.json"].replace(
        xxhash.xxh3_128_hexdigest(right).encode(), xxhash.xxh3_128_hexdigest(wrong).encode()
    )
    manifest = sealed(manifest[: manifest.index(b'"xxh3"')])
    tokens = artifact["tokens.safetensors"][:-40] + wrong
    reader = Reader(MemoryStore({**artifact, "cachegen.json": manifest, "tokens.safetensors": tokens}))
    with pytest.raises(CorruptError, match="at least 0"):
        reader.input_ids()


def test_random_edits_of_a_sealed_manifest_end_in_an_artifact_error_or_in_an_equal_tiling() -> None:
    """Change random bytes under a valid checksum: no other exception, and every manifest that loads is consistent."""
    choose, loaded = random.Random(7), 0
    alphabet = b'0123456789-.,:[]{}"\\eEntfu ax\x00\xff'
    for _ in range(20_000):
        body = bytearray(VALID)
        for _ in range(choose.randint(1, 4)):
            body[choose.randrange(len(body))] = choose.choice(alphabet)
        try:
            manifest = loads(sealed(bytes(body)))
        except ArtifactError:
            continue
        loaded += 1
        for entry in manifest.files.values():
            assert entry.header_bytes + sum(s.length for s in entry.segments) == entry.size
    assert loaded
