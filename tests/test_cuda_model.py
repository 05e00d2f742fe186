"""What nvcc makes of the decoding kernels, read from the built library: these figures may get better, not worse."""

from __future__ import annotations

import pytest

from benchmarks import cuda_model
from hf_cachegen.codec import native

MISSING = [name for name in ("cuobjdump", "nvdisasm") if cuda_model.tool(name) is None]
pytestmark = [
    pytest.mark.skipif(not native.CUDA_LIBRARY.exists(), reason="no nvcc: there is no CUDA library"),
    pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} are missing: install {cuda_model.PACKAGES}"),
]
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
LIMITS = {1: (80, 31), 2: (104, 64), 3: (120, 95)}
"""By level: registers of a thread, instructions of a value; sm_75 converts values one by one: SLACK more."""
SLACK = 12
MORE_REGISTERS = {"sm_120": 24}
"""Where level 1 has two blocks on a multiprocessor instead of three."""
WANTED = {1: 0.35, 2: 0.25, 3: 0.2}
"""Of a copy on an H100: two thirds of what the model allows must be above that."""
MIN_WARPS = 12


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, cuda_model.Kernel]]:
    return {name: cuda_model.kernels(native.CUDA_LIBRARY, name) for name in ARCHITECTURES}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_spilled_and_every_access_knows_its_memory(
    architecture: str, compiled: dict[str, dict[str, cuda_model.Kernel]]
) -> None:
    assert len(compiled[architecture]) == 12, "three dtypes, of three levels and the general kernel"
    for kernel in compiled[architecture].values():
        assert (kernel.stack_bytes, kernel.local_accesses, kernel.generic_accesses) == (0, 0, 0), kernel


@pytest.mark.parametrize("level", LIMITS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_and_instructions_stay_within_their_limits(
    architecture: str, level: int, compiled: dict[str, dict[str, cuda_model.Kernel]]
) -> None:
    registers, instructions = LIMITS[level]
    kernel = compiled[architecture][f"bfloat16 level {level}"]
    assert kernel.registers <= registers + (MORE_REGISTERS.get(architecture, 0) if level == 1 else 0)
    assert 0 < kernel.instructions <= instructions + (SLACK if architecture == "sm_75" else 0)


@pytest.mark.parametrize("level", LIMITS)
@pytest.mark.parametrize("card", cuda_model.CARDS)
def test_a_multiprocessor_holds_warps_enough(
    card: str, level: int, compiled: dict[str, dict[str, cuda_model.Kernel]]
) -> None:
    figures = cuda_model.CARDS[card]
    kernel = compiled[figures.architecture][f"bfloat16 level {level}"]
    assert kernel.warps(figures) >= MIN_WARPS
    bound = min(cuda_model.bounds(kernel, figures, level).values())
    if card.startswith("H100"):
        assert bound * 2 / 3 >= WANTED[level] * figures.gb_per_s / 2
