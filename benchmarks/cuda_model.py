"""The bound on the CUDA decoder's speed that its compiled code sets, by card and level: no GPU is needed.

    python -m benchmarks.cuda_model                       of the package's own library
    python -m benchmarks.cuda_model --library FILE --json FILE

Registers, spills and instructions are read from the library with cuobjdump and nvdisasm (of the CUDA toolkit, or of the
PyPI packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm). A bound is the least of five, in values per clock of a
multiprocessor, times the card's published figures:

- issue: 4 schedulers issue one instruction of 32 lanes each per clock;
- shared memory: one access of 32 lanes takes as many clocks as the lanes' words share a bank, 3.5 for a base table;
- counts: a multiprocessor counts the bits of 16 words per clock;
- latency: a warp's chain of states takes LATENCY clocks a step, and the warps that fit run side by side;
- memory: the values written and the coded bytes read.

A real kernel reaches perhaps two thirds of the least.
"""

from __future__ import annotations

import heapq
import json
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from hf_cachegen.codec import native

PACKAGES = "nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm"
WARPS_PER_BLOCK, LANE_VALUES = 8, 8
LATENCY = 130
"""Clocks of a step: shared memory 30, the word from the first-level cache 40, vote, count and arithmetic 60."""
BASE_CONFLICTS, PAIR_CONFLICTS = 3.5, 1.0
"""Expected accesses to the fullest of 32 banks by 32 lanes at random; pairs are laid out a lane a bank."""
PAIR_BYTES, TABLE_BYTES = 6 << 10, 8 << 10
TABLES_PER_TILE = 5
"""Of base tables, on synthetic 8B data: 4 to 7."""
BITS = {1: 1.5, 2: 3.0, 3: 4.6}
"""Coded bits per value, about."""


@dataclass(frozen=True)
class Card:
    """Published figures: multiprocessors, boost clock, memory bandwidth, shared memory, warps of a multiprocessor."""

    architecture: str
    processors: int
    ghz: float
    gb_per_s: float
    shared_bytes: int
    warps: int


CARDS = {
    "A100 SXM": Card("sm_80", 108, 1.41, 2039, 164 << 10, 64),
    "H100 SXM": Card("sm_90", 132, 1.83, 3350, 228 << 10, 64),
    "H200 SXM": Card("sm_90", 132, 1.83, 4800, 228 << 10, 64),
    "B200": Card("sm_100", 148, 1.85, 8000, 228 << 10, 64),
}


@dataclass(frozen=True)
class Kernel:
    """What was compiled. instructions and counts (POPC, and integers to floats): of the fast path, per value;
    generic_accesses: loads and stores of no known memory, anywhere.
    """

    name: str
    registers: int
    stack_bytes: int
    local_accesses: int
    generic_accesses: int
    instructions: float
    counts: float

    def warps(self, card: Card, tables: int = TABLES_PER_TILE) -> int:
        """Warps of this kernel that a multiprocessor holds."""
        registers = -(-self.registers // 8) * 8 * 32 * WARPS_PER_BLOCK
        shared = PAIR_BYTES + tables * TABLE_BYTES + (1 << 10)  # what the system keeps of every block
        blocks = min((64 << 10) // registers, card.shared_bytes // shared, card.warps // WARPS_PER_BLOCK)
        return blocks * WARPS_PER_BLOCK


def tool(name: str) -> str | None:
    """The path of a CUDA tool: on the path, or in an installed package."""
    places = [os.path.join(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin"), "/usr/local/cuda/bin"]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def _run(*arguments: str) -> str:
    found = tool(arguments[0])
    disassembler = tool("nvdisasm")
    if found is None or disassembler is None:
        raise click.ClickException(f"{arguments[0]} or nvdisasm is missing: install {PACKAGES}")
    variables = {**os.environ, "PATH": os.pathsep.join([str(Path(disassembler).parent), os.environ.get("PATH", "")])}
    done = subprocess.run([found, *arguments[1:]], check=True, capture_output=True, text=True, env=variables)
    return done.stdout


def kernels(library: Path, architecture: str) -> dict[str, Kernel]:
    """The kernels of cg_decode_chunks for an architecture, by "dtype level"; "ends" stands for the general kernel."""
    usage = _run("cuobjdump", "--gpu-architecture", architecture, "--dump-resource-usage", str(library))
    sass = _run("cuobjdump", "--gpu-architecture", architecture, "--dump-sass", str(library))
    code: dict[str, list[tuple[int, str]]] = {}
    for part in re.split(r"\n\s*Function : ", sass)[1:]:
        name, _, body = part.partition("\n")
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", body)
        code[name.strip()] = [(int(at, 16), text) for at, text in found]
    result = {}
    for name, registers, stack in re.findall(r"Function (\S*chunks_kernel\S*):\s+REG:(\d+) STACK:(\d+)", usage):
        dtype, digits, ends = re.search(r"cachegen\d+(\w+?)ELj(\d)ELb(\d)", name).groups()  # type: ignore[union-attr]
        label = f"{dtype.lower()} {'ends' if ends == '1' else f'level {int(digits) + 1}'}"
        result[label] = _kernel(label, int(registers), int(stack), code[name])
    return result


def _operation(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def _kernel(name: str, registers: int, stack: int, code: list[tuple[int, str]]) -> Kernel:
    operations = [_operation(text).split(".")[0] for _, text in code]
    local, generic = (sum(operations.count(each) for each in names) for names in (("LDL", "STL"), ("LD", "ST", "ATOM")))
    path = _fast_path(code)
    counts = sum(_operation(code[i][1]).startswith(("POPC", "I2F")) for i in path)
    return Kernel(name, registers, stack, local, generic, len(path) / LANE_VALUES, counts / LANE_VALUES)


def _fast_path(code: list[tuple[int, str]]) -> list[int]:
    """The instructions, by number, of the shortest way around the loop over fast tokens, which alone prefetches."""
    index = {at: i for i, (at, _) in enumerate(code)}
    following: list[list[int]] = []
    for i, (_, text) in enumerate(code):
        operation, target = _operation(text), re.search(r"(0x[0-9a-f]+)$", text)
        after = [i + 1] if i + 1 < len(code) else []
        if operation in ("EXIT", "RET") or operation.startswith("RET."):
            after = after if text.startswith("@") else []
        elif operation in ("BRA", "BRA.U") and target:
            there = index[int(target[1], 16)]
            after = [*after, there] if text.startswith("@") or re.search(r"\s!?U?P\d,", text) else [there]
        following.append(after)
    starts = [i for i, (_, text) in enumerate(code) if _operation(text).startswith("CCTL")]
    best: list[int] = []
    for start in starts:  # a kernel of several loops has several
        known, before, queue = {start: 0}, {}, [(0, start)]
        while queue:
            steps, at = heapq.heappop(queue)
            if steps and at == start:
                path = [before[start]]
                while path[-1] != start:
                    path.append(before[path[-1]])
                best = path if not best or len(path) < len(best) else best
                break
            for to in following[at]:
                if (to == start and start not in before) or steps + 1 < known.get(to, 1 << 30):
                    known[to], before[to] = steps + 1, at
                    heapq.heappush(queue, (steps + 1, to))
    return best


def bounds(kernel: Kernel, card: Card, level: int) -> dict[str, float]:
    """GB/s of bf16 values that each limit allows."""
    warps, scale = kernel.warps(card), 2 * card.processors * card.ghz
    conflicts = BASE_CONFLICTS + (level - 1) * PAIR_CONFLICTS
    return {
        "issue": 4 * 32 / kernel.instructions * scale,
        "counts": 16 / kernel.counts * scale,
        "shared memory": 32 / conflicts * scale,
        "latency": warps * 32 / LATENCY * scale,
        "memory": card.gb_per_s * 16 / (16 + BITS[level]),
    }


def model(library: Path, dtype: str = "bfloat16") -> dict[str, object]:
    """For each card and level: what was compiled, how many warps fit, and the bounds in GB/s."""
    result: dict[str, object] = {}
    for name, card in CARDS.items():
        found = kernels(library, card.architecture)
        for level in (1, 2, 3):
            if (kernel := found.get(f"{dtype} level {level}")) is None:
                continue
            limits = {limit: round(rate) for limit, rate in bounds(kernel, card, level).items()}
            least = min(limits, key=limits.__getitem__)
            result[f"{name}, level {level}"] = {
                **asdict(kernel), "warps": kernel.warps(card), "GB/s": limits, "bound": least,
                "of a copy": round(limits[least] / (card.gb_per_s / 2), 2),
            }  # fmt: skip
    return result


@click.command()
@click.option("--library", type=click.Path(path_type=Path, exists=True), default=native.CUDA_LIBRARY,
              help="CUDA library.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="File for the figures.")
def main(library: Path, out: Path | None) -> None:
    """Bound the CUDA decoder's speed from its compiled code."""
    found = model(library)
    for name, figures in found.items():
        click.echo(f"{name}: {json.dumps(figures)}")
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
