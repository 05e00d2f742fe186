"""Products on CUDA do not depend on the user's settings, and leave them alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from hf_cachegen import decode_kv, encode_kv
from hf_cachegen.codec import native
from hf_cachegen.codec.precision import full_precision
from tests.klt_support import CONFIG, make_profile
from tests.lockstep import needs_compiler
from tests.separate_device import separate_device

CUDA = torch.device("cuda")
SETTINGS = torch.backends.cuda.matmul


def reduced() -> bool:
    return bool(SETTINGS.allow_bf16_reduced_precision_reduction)


@pytest.fixture(autouse=True)
def careless_user() -> Iterator[None]:
    """The process allows reduced precision everywhere."""
    names = [name for name in ("allow_bf16_reduced_precision_reduction", "fp32_precision") if hasattr(SETTINGS, name)]
    before = [getattr(SETTINGS, name) for name in names]
    for name, value in zip(names, (True, "tf32"), strict=False):
        setattr(SETTINGS, name, value)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(SETTINGS, name, value)


def test_settings_are_exact_meanwhile_and_come_back() -> None:
    with full_precision(CUDA):
        assert not reduced()
        assert getattr(SETTINGS, "fp32_precision", "ieee") == "ieee"
    assert reduced()
    assert getattr(SETTINGS, "fp32_precision", "tf32") == "tf32"


def test_the_cpu_needs_no_settings() -> None:
    with full_precision(torch.device("cpu")):
        assert reduced()


def test_the_last_thread_puts_them_back() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with full_precision(CUDA):
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with full_precision(CUDA):
        thread.start()
        assert inside.wait(30)
    assert not reduced()  # the other is still at it
    leave.set()
    thread.join()
    assert reduced()


@pytest.mark.parametrize("name", ["medium", "high", "highest"])
def test_the_old_setting_can_be_read_meanwhile_and_comes_back(name: str) -> None:
    """Torch refuses to read the old setting while the new one contradicts it, in every thread."""
    if hasattr(SETTINGS, "fp32_precision"):
        SETTINGS.fp32_precision = "ieee"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        known = SETTINGS.allow_tf32
        with full_precision(CUDA):
            assert not SETTINGS.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"
        assert (torch.get_float32_matmul_precision(), SETTINGS.allow_tf32) == (name, known)
    finally:
        torch.set_float32_matmul_precision(before)


@needs_compiler
@pytest.mark.skipif(not native.available(), reason="the package was installed without a C++ compiler")
@pytest.mark.parametrize("device", ["host", "separate"])
def test_autocast_changes_neither_bytes_nor_values(device: str) -> None:
    generator = torch.Generator().manual_seed(5)
    keys, values = ([torch.randn(1, 2, 100, 8, generator=generator) for _ in range(3)] for _ in range(2))

    def where() -> AbstractContextManager[object]:
        return separate_device() if device == "separate" else nullcontext()

    expected = encode_kv(keys, values, CONFIG, make_profile())
    with where():
        plain = decode_kv(expected, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = encode_kv(keys, values, CONFIG, make_profile())
        with where():
            decoded = decode_kv(found, 3)
        assert torch.is_autocast_enabled("cpu")
    assert found.parts == expected.parts
    assert all(torch.equal(x, y) for x, y in zip((*plain[0], *plain[1]), (*decoded[0], *decoded[1]), strict=True))
