"""Run lm-evaluation-harness tasks from decoded caches (`pip install lm-eval`).

    python -m eval.harness run --model cachegen --model_args pretrained=MODEL,codec=klt,level=1 --tasks TASK

The harness gives whole prompts. All of a prompt but its last `question_tokens` tokens is the context: its cache is
computed, stored and decoded by the codec, and the rest is computed from it. For log-likelihoods everything before the
continuation but the last token is the context. Prompts with the same context share one cache.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from eval.codecs import EXACT, Kit, keep
from eval.divergence import log_probabilities
from eval.models import find_profile
from hf_cachegen import CacheGenCache
from hf_cachegen.errors import ConfigError

QUESTION_TOKENS = 32
LEAST_CONTEXT = 16
"""Shorter contexts are computed: there is nothing to gain from a cache of them."""

Request = tuple[tuple[str, str], list[int], list[int]]
"""(texts, tokens of the context, tokens of the continuation)"""


@register_model("cachegen")
class CacheGenLM(HFLM):
    """A causal language model that reads the context of every prompt from a decoded cache.

    Args:
        pretrained: folder or Hub id of the model.
        codec: a codec of `python -m eval run`.
        level: its level, 1 the coarsest; 0 for a codec without levels.
        question_tokens: the last tokens of a prompt to generate from, which are not cached.
        profile: for klt: a location, "auto" or "none".
        chunk_tokens: tokens per chunk of an artifact.
        **options: options of HFLM.

    Raises:
        ConfigError: the codec or an option is not valid.
    """

    def __init__(
        self,
        pretrained: str,
        codec: str = "identity",
        level: int = 1,
        question_tokens: int = QUESTION_TOKENS,
        profile: str = "auto",
        chunk_tokens: int = 512,
        **options: Any,
    ) -> None:
        if question_tokens < 1:
            raise ConfigError(f"question_tokens must be at least 1, got {question_tokens}")
        super().__init__(pretrained=pretrained, **options)
        self.codec, self.question_tokens = codec, int(question_tokens)
        found = find_profile(profile, pretrained) if codec == "klt" else None
        if codec == "klt" and found is None:
            raise ConfigError(f"codec klt needs a profile of {pretrained!r}: give profile=")
        levels = (int(level),) if int(level) else None
        self.kit = Kit(self.model, self.tokenizer, found, int(chunk_tokens), levels)
        self._last: tuple[tuple[int, ...], CacheGenCache] | None = None

    def decoded(self, context: list[int]) -> CacheGenCache:
        """Return the cache of a context as the codec restores it.

        Args:
            context: token ids.
        """
        key = tuple(context)
        if self._last is None or self._last[0] != key:
            exact = CacheGenCache.from_context(self.model, context, profile=self.kit.profile, tokenizer=self.tokenizer)
            found = exact if self.codec == EXACT else next(iter(keep(self.codec, self.kit, exact, ""))).cache
            self._last = key, found
        return self._last[1]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        mask = options.pop("attention_mask", None)
        pads = [0] * len(context) if mask is None else (1 - mask).sum(1).tolist()
        rows = []
        for row, pad in zip(context, pads, strict=True):
            ids, given = row[pad:], dict(options)
            if len(ids) - self.question_tokens >= LEAST_CONTEXT:
                given["cache"] = self.decoded(ids[: -self.question_tokens].tolist())
            rows.append(super()._model_generate(ids[None], max_length - pad, stop, **given)[0][len(ids) :])
        new = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return torch.cat([context, new.to(context.device)], 1)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda index: requests[index][1])  # equal contexts share a cache
        for index in tqdm(order, "log-likelihoods", disable=disable_tqdm):
            _, context, continuation = requests[index]
            most = max(1, self.max_length - len(continuation))
            found[index] = self._likelihood(context[-most:], continuation)
        return [found[index] for index in range(len(requests))]

    def _likelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        target = torch.tensor(continuation)
        kv: tuple[list[Tensor], list[Tensor]] = ([], [])
        after = torch.tensor([context + continuation[:-1]])
        if len(context) > LEAST_CONTEXT:
            cache = self.decoded(context[:-1])
            kv = (list(cache.kv.keys), list(cache.kv.values))
            after = torch.tensor([context[-1:] + continuation[:-1]])
        logs = log_probabilities(self.model, *kv, after)[-len(continuation) :].cpu()
        chosen = logs.gather(1, target[:, None]).sum().item()
        return chosen, bool((logs.argmax(-1) == target).all())


def main() -> None:
    """Run the harness's own command line, which now knows the model `cachegen`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
