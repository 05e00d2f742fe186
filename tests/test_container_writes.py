"""Writing an artifact: the directory holds a complete one or none at every moment, and the user's files are kept."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_cachegen.artifact import ArtifactWriter, Reader, write_artifact
from hf_cachegen.errors import ArtifactExistsError, ArtifactNotFoundError, ConfigError, ManifestError
from hf_cachegen.stores import LocalStore, open_store
from tests.small_artifact import FILES, MANIFEST, SEGMENTS, contents, killed_between_renames, read_all, write

# Existing files are safe.


def test_an_existing_artifact_is_kept_without_overwrite(tmp_path: Path) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ArtifactExistsError, match="overwrite=True"):
        write_artifact(tmp_path, replace(MANIFEST, codec={}), SEGMENTS)
    assert contents(tmp_path) == before


def test_a_lone_data_file_is_kept_without_overwrite(tmp_path: Path) -> None:
    (tmp_path / "tokens.safetensors").write_bytes(b"somebody's")
    with pytest.raises(ArtifactExistsError, match=r"tokens.safetensors"):
        write(tmp_path)
    assert contents(tmp_path) == {"tokens.safetensors": b"somebody's"}


def test_overwriting_removes_the_old_artifact_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path)
    others = {
        "README.md": b"mine",
        "model.safetensors": b"mine too",
        ".hidden.partial": b"x",
        "refine-9.safetensors": b"y",
    }
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
    only_base = [row for row in SEGMENTS if row[0] == "base.safetensors"]
    write_artifact(tmp_path, MANIFEST, only_base, overwrite=True)
    assert set(contents(tmp_path)) == {"cachegen.json", "base.safetensors", *others}
    assert others.items() <= contents(tmp_path).items()
    assert Reader(LocalStore(tmp_path)).verify()


def test_overwriting_a_damaged_artifact_removes_only_what_it_replaces(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "cachegen.json").write_bytes(b"{}")
    only_base = [row for row in SEGMENTS if row[0] == "base.safetensors"]
    write_artifact(tmp_path, MANIFEST, only_base, overwrite=True)
    assert set(contents(tmp_path)) == FILES
    assert Reader(LocalStore(tmp_path)).manifest.levels == 1


def test_a_location_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArtifactExistsError, match="must be a directory"):
            write(place, overwrite=True)


@pytest.mark.parametrize("place", ["", "a\0b", None, b"bytes", "https://user:secret@host/x", "hf://user/x"], ids=repr)
def test_what_is_no_folder_is_refused(place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="expected a") as caught:
        write(place)
    assert "secret" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cachegen.json", "base.safetensors"])
def test_a_directory_with_the_name_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ArtifactExistsError, match="is a directory"):
        write(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]


# Completely, or not at all.


class Interruption(Exception):
    pass


def interrupted(after: int) -> Iterator[tuple[str, str, bytes]]:
    yield from SEGMENTS[:after]
    raise Interruption


@pytest.mark.parametrize("after", range(len(SEGMENTS) + 1))
def test_an_interrupted_write_leaves_no_trace(tmp_path: Path, after: int) -> None:
    with pytest.raises(Interruption):
        write_artifact(tmp_path / "a" / "b", MANIFEST, interrupted(after))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("after", range(len(SEGMENTS) + 1))
def test_an_interrupted_overwrite_leaves_the_old_artifact(tmp_path: Path, after: int) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(Interruption):
        write_artifact(tmp_path, replace(MANIFEST, codec={}), interrupted(after), overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("call", ["fsync", "rename", "unlink"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_a_failing_system_call_never_leaves_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, overwrite: bool
) -> None:
    """Whichever call fails, a reader then opens the old artifact, the new one, or none."""
    changed = [(file, name, data[::-1] if name != "input_ids" else data) for file, name, data in SEGMENTS]
    real, calls, failing = getattr(os, call), 0, 0

    def flaky(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError("no more")
        return real(*args, **kwargs)

    while calls >= failing:  # until there is no such call to fail
        calls, failing = 0, failing + 1
        place = tmp_path / str(failing)
        if overwrite:
            write(place)
        calls = 0
        with monkeypatch.context() as patch, contextlib.suppress(OSError):
            patch.setattr(os, call, flaky)
            write_artifact(place, MANIFEST, changed, overwrite=overwrite)
        with contextlib.suppress(ArtifactNotFoundError):
            assert sorted(read_all(place)) in (sorted(SEGMENTS), sorted(changed))
    assert failing > 3
    assert sorted(read_all(place)) == sorted(changed)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[4])
from tests.small_artifact import MANIFEST, SEGMENTS
from hf_cachegen.artifact import write_artifact
call, number = sys.argv[2], int(sys.argv[3])
real, calls = getattr(os, call), 0
def killing(*args, **kwargs):
    global calls
    calls += 1
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(os, call, killing)
changed = [(f, n, d[::-1] if n != "input_ids" else d) for f, n, d in SEGMENTS]
write_artifact(sys.argv[1], MANIFEST, changed, overwrite=True)
"""


@pytest.mark.parametrize(
    ("call", "number", "left"),
    [("unlink", 2, "old"), ("fsync", 1, "old"), ("fsync", 4, "old"),
     ("rename", 1, "new"), ("rename", 3, "new"), ("rename", 5, "new"),
     ("fsync", 7, "new"), ("fsync", 8, "new")],
)  # fmt: skip
def test_a_killed_writer_leaves_the_old_artifact_or_the_new_one_and_the_next_one_cleans_up(
    tmp_path: Path, call: str, number: int, left: str
) -> None:
    write(tmp_path)
    root = str(Path(__file__).parents[1])
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), call, str(number), root], check=False)
    assert killed.returncode == -signal.SIGKILL
    before = contents(tmp_path)
    with ArtifactWriter(tmp_path, overwrite=True):  # a writer that gives up
        pass
    assert (sorted(read_all(tmp_path)) == sorted(SEGMENTS)) == (left == "old")
    for path in tmp_path.iterdir():
        path.unlink()
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    assert Reader(open_store(tmp_path)).verify()  # a reader
    assert (sorted(read_all(tmp_path)) == sorted(SEGMENTS)) == (left == "old")
    write(tmp_path, overwrite=True)
    assert set(contents(tmp_path)) == FILES
    assert sorted(read_all(tmp_path)) == sorted(SEGMENTS)


@pytest.mark.parametrize("lost", ["base", "size", "manifest", "writer"])
def test_an_artifact_of_a_killed_writer_is_not_completed(tmp_path: Path, lost: str) -> None:
    write(tmp_path)
    killed_between_renames(tmp_path)
    with contextlib.ExitStack() as stack:
        if lost == "base":
            (tmp_path / ".base.safetensors.partial").unlink()
        elif lost == "size":
            (tmp_path / ".base.safetensors.partial").write_bytes(b"short")
        elif lost == "manifest":
            (tmp_path / ".cachegen.json.partial").write_bytes(b"{")
        else:
            folder = os.open(tmp_path, os.O_RDONLY)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)
        before = contents(tmp_path)
        with pytest.raises(ArtifactNotFoundError):
            Reader(open_store(tmp_path))
        assert contents(tmp_path) == before


def test_a_manifest_is_not_replaced_by_that_of_a_killed_writer(tmp_path: Path) -> None:
    write(tmp_path)
    killed_between_renames(tmp_path)
    (tmp_path / "cachegen.json").write_bytes(b"{}")
    before = contents(tmp_path)
    with pytest.raises(ManifestError):
        Reader(open_store(tmp_path))
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_the_old_artifact(tmp_path: Path) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # Python ignores SIGXFSZ, so writing fails with EFBIG
    try:
        with pytest.raises(OSError, match=f"too large: '{re.escape(str(tmp_path))}'"):
            write_artifact(
                tmp_path, MANIFEST, [("base.safetensors", "side", bytes(300_000)), *SEGMENTS], overwrite=True
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with (
        ArtifactWriter(tmp_path),
        pytest.raises(ArtifactExistsError, match="another writer"),
        ArtifactWriter(tmp_path),
    ):
        pass
    write(tmp_path)


def test_a_file_system_without_locks_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    write(tmp_path)
    assert Reader(LocalStore(tmp_path)).verify()


def test_a_read_only_directory_is_refused_and_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "artifact")
    monkeypatch.chdir(tmp_path)  # another user may not pass through the directories above
    tmp_path.chmod(0o555)
    (tmp_path / "artifact").chmod(0o555)
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)  # root may write anywhere
    try:
        for place in ("artifact", "other"):
            with pytest.raises(PermissionError, match=place):
                write(Path(place), overwrite=True)
    finally:
        os.seteuid(user)
    try:
        assert Reader(LocalStore("artifact")).verify()
    finally:
        tmp_path.chmod(0o755)
        (tmp_path / "artifact").chmod(0o755)
    assert set(contents(tmp_path / "artifact")) == FILES
