"""Learns a Profile from a model and samples of what its caches are used for: contexts, and what follows them.

1. Sensitivity (`moments.py`): the gradient g of the log-likelihood of a continuation (labels drawn from the model
   itself, so that E[g g^T] is the Fisher information) with respect to the cached keys and values, through the Cache
   API, for every architecture alike. A floor keeps what the samples did not use from being thrown away.
2. Covariance of keys (rotation undone) and values, jointly over groups of layers; eigenvectors in the sensitivity's
   metric.
3. The step (`learning.py`), the largest whose divergence on held-out samples is within the targets; then each
   coefficient's tables.

Memory does not grow with the number of samples; each is run three times, held-out ones about ten. What has been done is
kept in a file, if asked for, and a learning that was killed goes on from there (`journal.py`).
"""

from __future__ import annotations

from hf_cachegen.profiles.learning.learning import DEFAULT_TARGETS, divergence, learn_profile, measure
from hf_cachegen.profiles.learning.running import Sample, continuation_logits, find_rotary, prefill

__all__ = [
    "DEFAULT_TARGETS",
    "Sample",
    "continuation_logits",
    "divergence",
    "find_rotary",
    "learn_profile",
    "measure",
    "prefill",
]
