"""The options of a stream, checked before anything is fetched."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from hf_cachegen.artifact import Limits
from hf_cachegen.errors import ConfigError, TensorError
from hf_cachegen.models.identity import Verify
from hf_cachegen.models.prefix import require_prompts
from hf_cachegen.profiles.finding import ProfileLike
from hf_cachegen.stores import Access
from hf_cachegen.streaming.events import Event
from hf_cachegen.streaming.link import Link
from hf_cachegen.streaming.policy import Fixed, Policy, policy_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Refine = Literal["off", "before", "while_generating"]
PathLike = str | os.PathLike[str]
Fallback = PathLike | tuple[PathLike, Mapping[str, Any]]
"""Another location of the same artifact, alone or with those of its access options that differ from the first's."""
CONNECTIONS = 8
"""Default number of requests at a time. One connection seldom fills a link."""
STALL_SECONDS = 10.0
"""Default time limit on silence without an SLO."""
LEAST_STALL_SECONDS = 0.5
"""Lower bound on the default time limit with an SLO: less would mistake a slow round trip for a failure."""
DEFAULT_ACCESS = Access()


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """All keywords of `CacheGenCache.stream`.

    Args:
        slo: Bound on the time to first token, in seconds from the call. None: no bound.
        level: One level for all chunks, or "text" to recompute all of them, instead of a policy.
        policy: "adaptive", "paper", or an object with the methods of `hf_cachegen.streaming.Policy`.
        refine: When to fetch levels finer than the first that was fetched. "off": never. "before": while time is left
            before the SLO. "while_generating": also after the call has returned.
        prompt_tokens: Number of tokens that will follow the context. Their prefill is part of the SLO.
        prompt: The input_ids and the attention_mask of the prompt, int64 [rows, tokens] each, context included. It
            replaces `prompt_tokens`.
        fallback: Further locations of the same artifact, each a path or a pair (path, access options).
        profile: The profile, its location, None (the one beside the artifact alone) or "auto".
        tokenizer: Compared with the tokenizer of the artifact's fingerprint if given.
        verify: "probe" also runs the first tokens through the model and compares them (docs/identity.md). "weights"
            does not. "all" is "probe" and reads every byte of the weights again.
        limits: Bounds on the sizes that an artifact may claim.
        on_event: Called with each `hf_cachegen.streaming.Event`.
        stall_seconds: Silence after which a source has failed. Default: a quarter of the SLO, at least 0.5 s; 10 s
            without an SLO.
        connections: Number of requests at a time.
        link: The link that this stream shares with others. Default: one link for each host.
        cancel: Ends the stream with StreamCancelledError once it is set.
        access: How to reach the first location.

    Raises:
        ConfigError: An option is out of its range.
        TensorError: `prompt` is not a pair of integer tensors of one shape.
    """

    slo: float | None = None
    level: int | Literal["text"] | None = None
    policy: Policy | str = "adaptive"
    refine: Refine = "before"
    prompt_tokens: int = 0
    prompt: tuple[Tensor, Tensor] | None = None
    fallback: Sequence[Fallback] = ()
    profile: ProfileLike = "auto"
    tokenizer: PreTrainedTokenizerBase | None = None
    verify: Verify = "probe"
    limits: Limits | None = None
    on_event: Callable[[Event], None] | None = None
    stall_seconds: float | None = None
    connections: int = CONNECTIONS
    link: Link | None = None
    cancel: threading.Event | None = None
    access: Access = DEFAULT_ACCESS

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> StreamOptions:
        """Make options from the keywords of `CacheGenCache.stream`, which name the fields of `Access` side by side.

        Raises:
            TypeError: A keyword is neither an option of a stream nor a field of `Access`.
        """
        names = {field.name for field in fields(cls)} - {"access"}
        own = {name: value for name, value in keywords.items() if name in names}
        return cls(**own, access=Access.from_keywords({name: keywords[name] for name in keywords if name not in names}))

    def __post_init__(self) -> None:
        policy_of(self.policy, self.level)
        if self.slo is not None and not (isinstance(self.slo, int | float) and 0 < self.slo < math.inf):
            raise ConfigError(f"slo must be above 0 seconds and finite, got {self.slo!r:.40}")
        if self.refine not in get_args(Refine):
            raise ConfigError(f"refine must be one of {get_args(Refine)}, got {self.refine!r}")
        if not (isinstance(self.prompt_tokens, int) and self.prompt_tokens >= 0):
            raise ConfigError(f"prompt_tokens must be an integer of at least 0, got {self.prompt_tokens!r:.40}")
        stall = self.stall_seconds
        if stall is not None and not (isinstance(stall, int | float) and 0 < stall < math.inf):
            raise ConfigError(f"stall_seconds must be above 0 and finite, got {stall!r:.40}")
        if not (isinstance(self.connections, int) and self.connections >= 1):
            raise ConfigError(f"connections must be an integer of at least 1, got {self.connections!r:.40}")
        if self.link is not None and not isinstance(self.link, Link):
            raise ConfigError(f"link must be a hf_cachegen.streaming.Link, got {type(self.link).__name__}")
        if self.cancel is not None and not hasattr(self.cancel, "is_set"):
            raise ConfigError(f"cancel must be a threading.Event, got {type(self.cancel).__name__}")
        if self.on_event is not None and not callable(self.on_event):
            raise ConfigError(f"on_event must be a function of an event, got {type(self.on_event).__name__}")
        if self.prompt is not None:
            pair = self.prompt
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(x, Tensor) for x in pair)):
                raise TensorError(f"prompt must be (input_ids, attention_mask), got {type(pair).__name__}")
            require_prompts(*pair)
        found = self.fallback
        if isinstance(found, str) or not isinstance(found, Sequence) or not all(map(_is_fallback, found)):
            raise ConfigError(
                f"fallback must be a list of locations, each a path or (path, access options); got {found!r:.200}"
            )

    @property
    def planner(self) -> Policy:
        """The policy that `policy` and `level` name."""
        return policy_of(self.policy, self.level)

    @property
    def choice(self) -> int | Literal["text"] | None:
        """The one choice for all chunks; None where a policy decides, or where it is the finest level."""
        planner = self.planner
        return planner.choice if isinstance(planner, Fixed) else None

    @property
    def stall(self) -> float:
        """Seconds of silence after which a source has failed."""
        if self.stall_seconds is not None:
            return self.stall_seconds
        return STALL_SECONDS if self.slo is None else max(LEAST_STALL_SECONDS, self.slo / 4)


def _is_fallback(fallback: Any) -> bool:
    path, access = fallback if isinstance(fallback, tuple) and len(fallback) == 2 else (fallback, {})
    return isinstance(path, str | os.PathLike) and isinstance(access, Mapping)
