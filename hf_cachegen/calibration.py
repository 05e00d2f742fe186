"""Learns a Profile from a model and samples of what its caches are used for: contexts, and what follows them.

1. Sensitivity: the gradient g of the log-likelihood of a continuation (labels drawn from the model itself, so that E[g
g^T] is the
   Fisher information) with respect to the cached keys and values, through the Cache API, for every architecture alike.
   A floor keeps what the samples did not use from being thrown away: samples of one task alone would ruin every other.
2. Covariance of keys (rotation undone) and values, jointly over groups of layers; eigenvectors in the sensitivity's
metric.
3. The finest step, the largest whose divergence on held-out samples is within the target; then each coefficient's
tables.

Memory does not grow with the number of samples; each is run four times or so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from hf_cachegen.codec.chunk import Span
from hf_cachegen.codec.fit import Counts
from hf_cachegen.codec.klt import KltCodec
from hf_cachegen.codec.tables import shipped_codebooks
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.encoding import gather
from hf_cachegen.errors import ConfigError, ProfileError, TensorError
from hf_cachegen.fingerprint import Fingerprint, coarse_weights
from hf_cachegen.geometry import Geometry, LayerGeometry
from hf_cachegen.layout import capture, evaluation_mode, positions_change, require_model
from hf_cachegen.profile import Group, Profile, Rotary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sample = tuple[Tensor, Tensor]
"""(context_ids [1, tokens], continuation_ids [1, tokens]), int64."""
DEFAULT_GROUP_CHANNELS = 2048
"""Layers share a basis while their channels together are no more: the product and the profile grow with it."""
HELD_OUT_EVERY = 5
MAX_HELD_OUT = 12


def learn_profile(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    *,
    config: CacheGenConfig | None = None,
    target_kl: float = 0.001,
    floor: float = 0.5,
    group_layers: int | None = None,
    undo_rotation: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> Profile:
    """Learn `model`'s profile from samples that mix the uses its caches are meant for.

    target_kl: divergence of the finest level, in nats per token of a continuation; each coarser level has about nine
    times the next. floor: under the sensitivities, in units of their mean. group_layers: layers that share a basis
    (default: as many as have DEFAULT_GROUP_CHANNELS channels). Every fifth sample is held out and measured by. The
    model runs in eval mode, and comes back in its own. Raises ConfigError, TensorError, UnsupportedModelError.
    """
    require_model(model)
    if len(samples) < HELD_OUT_EVERY:
        raise ConfigError(f"learning a profile takes at least {HELD_OUT_EVERY} samples, got {len(samples)}")
    if not 0 < target_kl < 10 or not 0 < floor < 100:
        raise ConfigError(f"target_kl and floor must be positive, got {target_kl} and {floor}")
    if group_layers is not None and (not isinstance(group_layers, int) or group_layers < 1):
        raise ConfigError(f"group_layers must be a whole number of at least 1, got {group_layers!r}")
    for index, sample in enumerate(samples):
        _require_sample(index, sample)
    config = replace(config or CacheGenConfig(), transform="klt")
    with evaluation_mode(model):
        return _learn(model, samples, config, target_kl, floor, group_layers, undo_rotation, seed, progress)


def _require_sample(index: int, sample: Sample) -> None:
    """Raises TensorError unless it is a context of two tokens or more and a continuation of one or more."""
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise TensorError(f"sample {index}: expected (context_ids, continuation_ids), got {type(sample).__name__}")
    for name, ids, least in (("context", sample[0], 2), ("continuation", sample[1], 1)):
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            found = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TensorError(f"sample {index}: its {name} must be an int64 tensor [1, tokens], got {found}")
        if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < least:
            raise TensorError(
                f"sample {index}: its {name} must be [1, tokens] with at least {least} tokens, got {list(ids.shape)}"
            )


def _learn(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    config: CacheGenConfig,
    target_kl: float,
    floor: float,
    group_layers: int | None,
    undo_rotation: bool,
    seed: int,
    progress: bool,
) -> Profile:
    held_out = list(samples[::HELD_OUT_EVERY])[:MAX_HELD_OUT]
    training = [sample for index, sample in enumerate(samples) if index % HELD_OUT_EVERY]
    rotary = find_rotary(model) if undo_rotation else Rotary("none", torch.empty(0, dtype=torch.float64))
    moments = _Moments(model, training, rotary, group_layers, seed, progress)
    about = {
        "model": str(model.config.name_or_path),
        "fingerprint": Fingerprint.of(model, []).to_dict(),
        "weights": coarse_weights(model),
        "samples": len(samples),
        "floor": floor,
        "target_kl": target_kl,
        "group_layers": moments.group_layers,
        "seed": seed,
    }
    groups = moments.groups(floor)
    components = sum(len(group.synthesis) for group in groups)
    nothing = torch.zeros(components, dtype=torch.uint8)
    blank = Profile(
        moments.layers, rotary, moments.means.float(), groups, 0, nothing, nothing.expand(config.levels - 1, -1), about
    )
    step_code = _finest_step(model, blank, held_out, config, target_kl, progress)
    profile = _with_entries(model, replace(blank, step_code=step_code), training, config, progress)
    measured = measure(model, profile, held_out, config)
    return replace(profile, about={**about, "measured": measured})


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: Tensor) -> tuple[list[Tensor], list[Tensor], tuple[LayerGeometry, ...]]:
    """Exact (keys, values, layers) of a context [1, tokens]."""
    past = DynamicCache()
    model(input_ids=ids.to(model.device), past_key_values=past, use_cache=True)
    kv = capture(past, model.config)
    return list(kv.keys), list(kv.values), kv.geometry.layers


def continuation_logits(
    model: PreTrainedModel, keys: Sequence[Tensor], values: Sequence[Tensor], ids: Tensor
) -> Tensor:
    """Logits float32 [tokens, vocabulary] of what follows a context with these keys and values."""
    past = DynamicCache()
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        past.update(k, v, layer)
    logits: Tensor = model(input_ids=ids.to(model.device), past_key_values=past, use_cache=True).logits[0]
    return logits.float()


@torch.no_grad()
def find_rotary(model: PreTrainedModel) -> Rotary:
    """The rotation of the model's keys, from its own rotary module, if undoing it makes the first layer's keys of a
    repeated token equal, as they then must be (they depend on nothing else); otherwise style "none".
    """
    none = Rotary("none", torch.empty(0, dtype=torch.float64))
    modules = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    frequencies = {tuple(m.inv_freq.double().flatten().tolist()) for m in modules}
    if len(frequencies) != 1 or positions_change(model.config, 1, 16):
        return none
    inv_freq = torch.tensor(frequencies.pop(), dtype=torch.float64)
    scaling = float(getattr(modules[0], "attention_scaling", 1.0))
    token = torch.full((1, 16), 7 % model.config.get_text_config().vocab_size)
    keys, _, layers = prefill(model, token)
    if layers[0].kind == "mla" or 2 * len(inv_freq) > layers[0].k_dim:
        return none
    rows = keys[0][0].float().transpose(0, 1).cpu()
    spread = {"none": _spread(rows)}
    for style in ("half", "interleaved"):
        spread[style] = _spread(Rotary(style, inv_freq, scaling).apply(rows, torch.arange(16), -1))
    best = min(("half", "interleaved"), key=spread.__getitem__)
    return Rotary(best, inv_freq, scaling) if spread[best] < 0.2 * spread["none"] else none  # type: ignore[arg-type]


def _spread(rows: Tensor) -> float:
    return float((rows - rows.mean(0)).norm() / rows.norm().clamp_min(1e-9))


class _Moments:
    """Sums over the training samples: means, second moments by group, sensitivity by head."""

    def __init__(
        self,
        model: PreTrainedModel,
        samples: Sequence[Sample],
        rotary: Rotary,
        group_layers: int | None,
        seed: int,
        progress: bool,
    ):
        self.rotary = rotary
        keys, values, self.layers = prefill(model, samples[0][0])
        self.shapes = [[(x.shape[1], x.shape[3]) for x in side] for side in (keys, values)]
        widest = max(h * d for side in self.shapes for h, d in side)
        self.group_layers = group_layers or max(1, DEFAULT_GROUP_CHANNELS // widest)
        self.places = [place for kind in (0, 1) for place in self._group(kind)]
        self.count = 0
        self.sums = [[torch.zeros(h * d, dtype=torch.float64) for h, d in side] for side in self.shapes]
        self.squares = [
            torch.zeros(self._width(place), self._width(place), dtype=torch.float64) for place in self.places
        ]
        self.fisher = [[torch.zeros(h, d, d, dtype=torch.float64) for h, d in side] for side in self.shapes]
        generator = torch.Generator().manual_seed(seed)
        for context, continuation in tqdm(samples, "learn", unit="sample", disable=not progress):
            self._add(model, context, continuation, generator)

    def _group(self, kind: int) -> list[tuple[int, int, int]]:
        """(kind, first layer, layers) of each group: neighbours of equal head_dim."""
        found: list[tuple[int, int, int]] = []
        for layer, (_, dim) in enumerate(self.shapes[kind]):
            if found and found[-1][2] < self.group_layers and self.shapes[kind][layer - 1][1] == dim:
                found[-1] = (kind, found[-1][1], found[-1][2] + 1)
            else:
                found.append((kind, layer, 1))
        return found

    def _width(self, place: tuple[int, int, int]) -> int:
        kind, first, count = place
        return sum(h * d for h, d in self.shapes[kind][first : first + count])

    def _frame(self, x: Tensor, kind: int) -> Tensor:
        """[1, heads, tokens, dim] to float32 [tokens, heads, dim], keys with their rotation undone."""
        rows = x[0].detach().float().transpose(0, 1).cpu()
        return self.rotary.apply(rows, torch.arange(len(rows)), -1) if kind == 0 else rows

    def _add(self, model: PreTrainedModel, context: Tensor, continuation: Tensor, generator: torch.Generator) -> None:
        keys, values, _ = prefill(model, context)
        framed = [[self._frame(x, kind).flatten(1).double() for x in side] for kind, side in enumerate((keys, values))]
        self.count += len(framed[0][0])
        for kind, side in enumerate(framed):
            for layer, rows in enumerate(side):
                self.sums[kind][layer] += rows.sum(0)
        for square, (kind, first, count) in zip(self.squares, self.places, strict=True):
            rows = torch.cat(framed[kind][first : first + count], 1).float()
            square += (rows.mT @ rows).double()
        leaves = [[x.detach().requires_grad_() for x in side] for side in (keys, values)]
        with torch.enable_grad():
            logits = continuation_logits(model, leaves[0], leaves[1], continuation)
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            loss = torch.nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
            gradients = torch.autograd.grad(loss, leaves[0] + leaves[1])
        for index, gradient in enumerate(gradients):
            kind, layer = divmod(index, len(keys))
            g = self._frame(gradient, kind) * (self.rotary.scaling**2 if kind == 0 else 1.0)
            self.fisher[kind][layer] += torch.einsum("thd,the->hde", g, g).double() / (len(g) * continuation.shape[1])

    @property
    def means(self) -> Tensor:
        """float64 [columns], in the order of a chunk's columns."""
        pairs = (self.sums[kind][layer] for layer in range(len(self.layers)) for kind in (0, 1))
        return torch.cat(list(pairs)) / self.count

    def groups(self, floor: float) -> tuple[Group, ...]:
        """The bases, all components kept."""
        diagonal = [f.diagonal(dim1=1, dim2=2).mean() for side in self.fisher for f in side]
        unit = max(
            float(sum(diagonal)) / len(diagonal), 1e-30
        )  # sensitivities in units of their mean: the basis is of order 1
        found = []
        for (kind, first, count), square in zip(self.places, self.squares, strict=True):
            layers = range(first, first + count)
            sensitivity = torch.cat([self.fisher[kind][layer] for layer in layers])
            dim = sensitivity.shape[1]
            sensitivity = sensitivity / unit + floor * torch.eye(dim, dtype=torch.float64)
            values, vectors = torch.linalg.eigh(sensitivity)
            root = torch.block_diag(*(vectors * values.sqrt()[:, None]) @ vectors.mT)
            inverse = torch.block_diag(*(vectors * values.rsqrt()[:, None]) @ vectors.mT)
            mean = torch.cat([self.sums[kind][layer] for layer in layers]) / self.count
            covariance = square / self.count - torch.outer(mean, mean)
            _, basis = torch.linalg.eigh(root @ covariance @ root)
            synthesis = (basis.flip(1).mT @ inverse).half().float()  # as the file will have it
            found.append(Group(kind, first, count, sensitivity.float(), synthesis))
        return tuple(found)


def _codec(profile: Profile, config: CacheGenConfig, tokens: int) -> KltCodec:
    return KltCodec(Geometry(profile.layers, tokens=tokens, batch=1, dtype="float32"), config, profile)


def _rows(keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    tokens = keys[0].shape[2]
    return gather(keys, values, Span(0, tokens, tokens)).float().cpu()


def _unrows(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    widths = [x.shape[1] * x.shape[3] for x in like]
    parts = zip(rows.split(widths, 1), like, strict=True)
    return [p.reshape(-1, x.shape[1], x.shape[3]).transpose(0, 1)[None].to(x.device, x.dtype) for p, x in parts]


@torch.no_grad()
def divergence(
    model: PreTrainedModel, profile: Profile, samples: Sequence[Sample], config: CacheGenConfig
) -> list[float]:
    """Mean KL of each level, nats per token of the continuations: exact cache against decoded."""
    totals = [0.0] * config.levels
    for context, continuation in samples:
        keys, values, _ = prefill(model, context)
        exact = continuation_logits(model, keys, values, continuation).log_softmax(-1)
        span = Span(0, keys[0].shape[2], keys[0].shape[2])
        like = [x for pair in zip(keys, values, strict=True) for x in pair]
        for level, rows in enumerate(_codec(profile, config, span.tokens).approximations(_rows(keys, values), span)):
            decoded = _unrows(rows, like)
            lossy = continuation_logits(model, decoded[::2], decoded[1::2], continuation).log_softmax(-1)
            totals[level] += float((exact.exp() * (exact - lossy)).sum(-1).mean())
    return [total / len(samples) for total in totals]


def _finest_step(
    model: PreTrainedModel,
    profile: Profile,
    samples: Sequence[Sample],
    config: CacheGenConfig,
    target: float,
    progress: bool,
) -> int:
    """Bisects for the largest step code whose finest level is within the target."""
    low, high = 0, 256
    with tqdm(total=8, desc="step", disable=not progress) as bar:
        while high - low > 1:
            middle = (low + high) // 2
            alone = replace(profile, step_code=middle, refine_entries=profile.refine_entries[:0])
            found = divergence(model, alone, samples, replace(config, levels=1))[0]
            low, high = (middle, high) if found <= target else (low, middle)
            bar.update()
    if low == 0:
        raise ProfileError(
            f"no step brings the divergence within {target} nats: load the model in float32 (rounding alone may "
            "diverge as much), or ask for less"
        )
    return low


def _with_entries(
    model: PreTrainedModel, profile: Profile, samples: Sequence[Sample], config: CacheGenConfig, progress: bool
) -> Profile:
    """The profile with each coefficient's cheapest tables, and without coefficients that are zero at every level."""
    components = len(profile.base_entries)
    counts = Counts(components, config.levels)
    for context, _ in tqdm(samples, "tables", unit="sample", disable=not progress):
        keys, values, _ = prefill(model, context)
        span = Span(0, keys[0].shape[2], keys[0].shape[2])
        codec = _codec(profile, config, span.tokens)
        symbols, _ = codec.inner.symbols(codec.coefficients(_rows(keys, values), span))
        counts.add(symbols)
    base_entries, entries, _ = counts.choose(*shipped_codebooks(config.prob_bits))
    kept = (base_entries > 0) | (entries > 0).any(0)
    groups, at = [], 0
    for group in profile.groups:
        groups.append(replace(group, synthesis=group.synthesis[kept[at : at + len(group.synthesis)]]))
        at += len(group.synthesis)
    return replace(profile, groups=tuple(groups), base_entries=base_entries[kept], refine_entries=entries[:, kept])


def measure(
    model: PreTrainedModel, profile: Profile, samples: Sequence[Sample], config: CacheGenConfig
) -> list[dict[str, float]]:
    """For each level: its divergence on these samples, and bits per element of the chunks (no headers)."""
    sizes, elements = [0] * config.levels, 0
    for context, _ in samples:
        keys, values, _ = prefill(model, context)
        rows = _rows(keys, values)
        span = Span(0, len(rows), len(rows))
        for part, data in enumerate(_codec(profile, config, len(rows)).encode(rows, span)):
            sizes[part] += len(data)
        elements += rows.numel()
    bits = torch.tensor(sizes).cumsum(0).mul(8).div(elements).tolist()
    found = divergence(model, profile, samples, config)
    return [{"kl": round(kl, 6), "bits_per_element": round(b, 4)} for kl, b in zip(found, bits, strict=True)]
