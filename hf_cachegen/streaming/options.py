"""What a stream may be asked for, checked before anything is fetched."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from hf_cachegen.errors import ConfigError
from hf_cachegen.models.identity import Verify
from hf_cachegen.prefix import require_prompts
from hf_cachegen.streaming.events import Event
from hf_cachegen.streaming.link import Link
from hf_cachegen.streaming.policy import Policy

Refine = Literal["off", "before", "while_generating"]
Place = str | os.PathLike[str]
Fallback = Place | tuple[Place, Mapping[str, Any]]
"""A place with the same artifact, and the `access` to it where that is not the first place's."""
CONNECTIONS = 8
"""Requests at a time of one stream: one connection seldom fills a link."""
STALL_SECONDS = 10.0
LEAST_STALL_SECONDS = 0.5


@dataclass(frozen=True)
class StreamOptions:
    """The options of `CacheGenCache.stream` under their names. Raises ConfigError for one that is out of range, and
    TensorError for a prompt that is none.
    """

    slo: float | None
    policy: Policy
    refine: Refine
    prompt_tokens: int
    fallback: Sequence[Fallback]
    on_event: Callable[[Event], None] | None
    stall_seconds: float | None
    connections: int
    link: Link | None
    cancel: threading.Event | None = None
    prompt: tuple[Tensor, Tensor] | None = None
    verify: Verify = "probe"

    def __post_init__(self) -> None:
        if self.slo is not None and not 0 < self.slo < math.inf:
            raise ConfigError(f"slo must be above 0 seconds and finite, got {self.slo}")
        if self.refine not in get_args(Refine):
            raise ConfigError(f"refine must be one of {get_args(Refine)}, got {self.refine!r}")
        if self.prompt_tokens < 0:
            raise ConfigError(f"prompt_tokens must not be negative, got {self.prompt_tokens}")
        if self.stall_seconds is not None and not 0 < self.stall_seconds < math.inf:
            raise ConfigError(f"stall_seconds must be above 0 and finite, got {self.stall_seconds}")
        if self.connections < 1:
            raise ConfigError(f"connections must be at least 1, got {self.connections}")
        if self.prompt is not None:
            require_prompts(*self.prompt)
        places = self.fallback
        if isinstance(places, str) or not isinstance(places, Sequence) or not all(map(_is_fallback, places)):
            raise ConfigError(f"fallback must be a list of places, or of (place, access), got {places!r:.200}")

    @property
    def stall(self) -> float:
        """Seconds of silence after which a source has failed."""
        if self.stall_seconds is not None:
            return self.stall_seconds
        return STALL_SECONDS if self.slo is None else max(LEAST_STALL_SECONDS, self.slo / 4)


def _is_fallback(fallback: Any) -> bool:
    place, access = fallback if isinstance(fallback, tuple) and len(fallback) == 2 else (fallback, {})
    return isinstance(place, str | os.PathLike) and isinstance(access, Mapping)
