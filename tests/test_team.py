"""The compiled coder takes its threads from the pool that torch runs its own in."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hf_cachegen import CacheGenConfig, EncodedContext, decode_kv, encode_kv
from hf_cachegen.codec import native

WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
TEAM = ctypes.CFUNCTYPE(None, WORK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
pytestmark = pytest.mark.skipif(not native.available(), reason="there is no compiled coder")


def context() -> EncodedContext:
    """Encode a context that is worth several threads."""
    torch.manual_seed(0)
    keys, values = ([torch.randn(1, 8, 300, 128) for _ in range(2)] for _ in range(2))
    return encode_kv(keys, values, CacheGenConfig(transform="identity"))


@pytest.fixture
def library() -> Iterator[ctypes.CDLL]:
    """The library with two threads; afterwards its team is torch's again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    found = native._need_library()
    yield found
    found.cg_use_team(native.torch_team())
    torch.set_num_threads(threads)


def flat(encoded: EncodedContext) -> Tensor:
    keys, values = decode_kv(encoded)[:2]
    return torch.cat([x.flatten() for x in (*keys, *values)])


def test_work_goes_to_the_named_team(library: ctypes.CDLL) -> None:
    encoded, sizes = context(), list[int]()

    def team(work: object, data: object, threads: int, flags: int) -> None:
        sizes.append(threads)
        work(data)  # type: ignore[operator]

    library.cg_use_team(None)
    expected = flat(encoded)
    named = TEAM(team)
    library.cg_use_team(ctypes.cast(named, ctypes.c_void_p))
    found = flat(encoded)
    assert set(sizes) == {2}
    library.cg_use_team(None)
    before = len(sizes)
    assert torch.equal(found, expected)
    assert torch.equal(flat(encoded), expected)
    assert len(sizes) == before


def test_torchs_team_gives_the_same_values(library: ctypes.CDLL) -> None:
    if native.torch_team() is None:
        pytest.skip("torch does not run its threads in a libgomp of its own")
    encoded = context()
    library.cg_use_team(None)
    expected = flat(encoded)
    library.cg_use_team(native.torch_team())
    assert torch.equal(flat(encoded), expected)


def test_a_torch_with_other_threads_names_no_team(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.__config__, "parallel_info", lambda: "ATen parallel backend: native thread pool")
    assert native.torch_team() is None


FORK = """
import os, sys, torch
torch.set_num_threads(2)
from tests.test_team import context, flat
encoded = context()
torch.ones(1 << 22).add_(1)  # begin torch's own threads
expected = flat(encoded)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # torch's own threads do not survive either
    torch.get_num_threads = lambda: 2
    os._exit(0 if torch.equal(flat(encoded), expected) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="fork after threads is safe on Linux alone")
def test_a_child_process_after_fork_decodes() -> None:
    """No pool survives fork(), which data loaders use."""
    done = subprocess.run([sys.executable, "-c", FORK], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
