"""Learn a Profile from a model and samples of its use: contexts, and the text that follows them.

1. Sensitivity (`moments.py`): the gradient g of the log-likelihood of a continuation with respect to the cached keys
   and values. The labels are drawn from the model itself, so E[g g^T] is the Fisher information. The gradient is taken
   through the Cache API, for every architecture. A floor keeps directions that the samples did not use.
2. Covariance of keys (rotation undone) and values, jointly over groups of layers; eigenvectors in the metric of the
   sensitivity.
3. The step (`models/stepping.py`): the largest one whose divergence on held-out samples is within the targets. Then the
   tables of each coefficient.

Memory does not grow with the number of samples. Each sample is prefilled once where memory allows (`exact.py`).
Progress is logged (`progress.py`). It can be stored in a file, from which an interrupted run resumes (`journal.py`).
"""

from __future__ import annotations

from hf_cachegen.models.continuation import continuation_logits
from hf_cachegen.profiles.learning.learning import DEFAULT_TARGETS, learn_profile
from hf_cachegen.profiles.learning.measuring import divergence
from hf_cachegen.profiles.learning.running import Sample, find_rotary, prefill

__all__ = [
    "DEFAULT_TARGETS",
    "Sample",
    "continuation_logits",
    "divergence",
    "find_rotary",
    "learn_profile",
    "prefill",
]
