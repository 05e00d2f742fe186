"""Check the options of a learning run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_cachegen.codec.predictor import MAX_PREDICTORS
from hf_cachegen.errors import ConfigError
from hf_cachegen.models.requirements import layer_kinds

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def ranks_of(model: PreTrainedModel, layers: Sequence[int], rank: int) -> dict[int, int]:
    """Return the rank of each predictor, by its layer. Raises ConfigError."""
    last = len(layer_kinds(model.config)) - 2
    wrong = [m for m in layers if not isinstance(m, int) or isinstance(m, bool) or not 0 <= m <= last]
    if wrong or len(set(layers)) != len(layers) or len(layers) > MAX_PREDICTORS:
        raise ConfigError(
            f"predict_layers must be at most {MAX_PREDICTORS} different whole numbers from 0 to {last} for this model, "
            f"got {list(layers)}"
        )
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"predict_rank must be a whole number of at least 1, got {rank!r}")
    return dict.fromkeys(sorted(layers), rank)


def targets_of(target_kl: float | Sequence[float], levels: int) -> tuple[float, ...]:
    """Return one target per level, coarse to fine. Raises ConfigError."""
    found = (target_kl,) if isinstance(target_kl, int | float) else tuple(target_kl)
    if not found or not all(0 < target < 10 for target in found):
        raise ConfigError(f"target_kl must be positive numbers below 10, got {target_kl}")
    return (10.0,) * (levels - len(found)) + found[-levels:]
