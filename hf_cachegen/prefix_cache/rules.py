"""What a prefix cache stores, how it is encoded, and when it is loaded: the options that a call depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_cachegen.config import CacheGenConfig, require_config
from hf_cachegen.errors import ConfigError
from hf_cachegen.prefix_cache.sizes import parse_size

if TYPE_CHECKING:
    from hf_cachegen.profiles.finding import ProfileLike

MAX_TOKENS = 1 << 15
"""Largest value of the options in tokens."""


@dataclass(frozen=True)
class Rules:
    """Options of `PrefixCache`, checked; the names are those of its arguments.

    Raises:
        ConfigError: an option is out of its range.
    """

    config: CacheGenConfig
    level: int | None
    profile: ProfileLike
    block_tokens: int
    min_tokens: int
    reuse: Literal["auto", "always"]
    state_every: int
    state_budget: int

    def __post_init__(self) -> None:
        for name in ("block_tokens", "min_tokens", "state_every"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MAX_TOKENS:
                raise ConfigError(f"{name} must be a whole number from 1 to {MAX_TOKENS}, got {value!r}")
        if self.reuse not in ("auto", "always"):
            raise ConfigError(f"reuse must be 'auto' or 'always', got {self.reuse!r}")
        if self.config.target_kl is not None:
            raise ConfigError("the blocks of a prefix cache serve many contexts: pass steps or a profile, no target_kl")

    @classmethod
    def of(cls, *, config: CacheGenConfig | None, state_budget: int | str, **options: Any) -> Rules:
        """Return the rules of the arguments of a prefix cache."""
        require_config(config)
        # A block is decoded without its model's first layers, so nothing is predicted.
        chosen = (CacheGenConfig(lossless=True) if config is None else config).predicting(None)
        return cls(config=chosen, state_budget=parse_size(state_budget, "state_budget"), **options)
