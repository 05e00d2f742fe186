"""Make the shipped codebook: integrals of bell-shaped densities on a grid of scales.

    python -m hf_cachegen.codec.codebook        # writes codebook.safetensors beside this file

The densities are exp(-|x / s|^shape) of shapes 0.7 (heavy tails), 1 (Laplace), 1.4 and 2 (Gauss). Their standard
deviations lie on a grid of ratio 2^(1/4), in units of the step. The file holds the frequencies at each precision of the
coder: `values-11` [tables, 256], `digits-11` [3 x entries, 3] and so on. It is part of format version 1, since an
artifact's table ids refer to it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from hf_cachegen.codec.tables import normalise

WEIGHT_TOTAL = 1 << 24
VALUE_SHAPES, VALUE_SCALES = (0.7, 1.0, 1.4, 2.0), [0.125 * 2 ** (k / 4) for k in range(35)]
DIGIT_SHAPES, DIGIT_SCALES = (0.7, 1.0, 2.0), [0.125 * 2 ** (k / 4) for k in range(28)]
_GRID = 64
"""Points per step of the numerical integral."""


def density(shape: float, deviation: float, reach: int) -> np.ndarray:
    """Return the probabilities of the cells [v - 1/2, v + 1/2), v = -reach..reach, of a density of this standard
    deviation.
    """
    x = (np.arange((2 * reach + 1) * _GRID) + 0.5) / _GRID - reach - 0.5
    wide = np.linspace(-60, 60, 600001)
    unit = np.exp(-(np.abs(wide) ** shape))
    scale = deviation / np.sqrt((unit * wide**2).sum() / unit.sum())
    y = np.exp(-(np.abs(x / scale) ** shape))
    return (y / y.sum()).reshape(-1, _GRID).sum(1)


def weights(p: np.ndarray) -> list[int]:
    """Convert probabilities to integer weights."""
    return [int(v) for v in np.round(p / p.sum() * WEIGHT_TOTAL)]


def value_rows() -> list[list[int]]:
    """Return the weights of the value tables: always zero, uniform, then every density."""
    zero = [0] * 256
    zero[128] = WEIGHT_TOTAL
    rows = [zero, [WEIGHT_TOTAL // 256] * 256]
    for shape in VALUE_SHAPES:
        for deviation in VALUE_SCALES:
            rows.append(weights(density(shape, deviation, 128)[:256]))
    return rows


def digit_rows() -> list[list[int]]:
    """Return the weights of the digit tables, three per entry."""
    rows = [[0, WEIGHT_TOTAL, 0]] * 3
    for shape in DIGIT_SHAPES:
        for deviation in DIGIT_SCALES:
            cells = density(shape, deviation, 301).reshape(-1, 3)  # one row per coarser symbol, its three digits
            middle = cells.shape[0] // 2
            positive = cells[middle + 1 :].sum(0)
            rows += [weights(c + 1e-9) for c in (cells[middle], positive, positive[::-1])]
    return rows


def codebooks() -> dict[str, torch.Tensor]:
    """Return the int16 frequencies of every table at every precision."""
    rows = {"values": value_rows(), "digits": digit_rows()}
    return {
        f"{name}-{bits}": torch.tensor([normalise(row, bits) for row in table], dtype=torch.int16)
        for name, table in rows.items()
        for bits in (10, 11, 12)
    }


def main() -> None:
    """Write the file."""
    save_file(codebooks(), Path(__file__).with_name("codebook.safetensors"))


if __name__ == "__main__":
    main()
