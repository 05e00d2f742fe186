"""klt, the sensitivity-weighted transform: rows -> coefficients of a profile's basis -> nested symbols, and back.

Keys are rotated back to position zero where the model's rotation is known (a third fewer bits), the means are
subtracted, and each group of layers is multiplied by one matrix. The coefficients are coded like the values of the
identity transform, with one step for all, no means, and the profile's table entries.

In a context unlike those that the profile was learnt from, some coefficients are outside the support of their tables.
Each is an exception of eight bytes: a task that the profile was not learnt from took three times the bits that it takes
with its own tables. So the side information, which is the profile's digest alone where that serves, can list the
entries that differ:

    digest[16]; for each part: u8 bitmap[ceil(components / 8)], u8 entry[ones in the bitmap]

with bit i % 8 (1, 2, 4, ...) of byte i / 8 set where component i has its own entry. In a context with sinks (`sinks`)
their positions follow, u32 each: the coefficients of a sink are in units of a finer step.

Where the profile has a predictor (`codec.predictor`), the first layers are not coded, and the mean of the others
depends on the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hf_cachegen.codec import basis, quantize
from hf_cachegen.codec.chunk import Channels, LossyCodec, Side, Span
from hf_cachegen.codec.fit import Counts, repeated, require_finite
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.predictor import Known, Predictor
from hf_cachegen.codec.profile import Profile, require_layers
from hf_cachegen.codec.rows import ContextRows, gather
from hf_cachegen.codec.section import Cursor
from hf_cachegen.codec.sinks import FINER
from hf_cachegen.codec.tables import shipped_codebooks
from hf_cachegen.codec.transforms.protocol import Fitted, Transform
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import ConfigError, CorruptError, ProfileError, TensorError

DIGEST_BYTES = 16
STEP_CODES = 256
ENTRY_BITS = 8
"""The cost of an entry in the side information."""


class Klt(Transform):
    """Code coefficients in the basis of the model's profile.

    Args:
        geometry: Of the cache; a batch of 1.
        config: Its number of levels is that of the profile.
        profile: Of the model.
        entries: uint8 [parts, components]: the table entries of the base and of each refinement. None: the profile's.
        sinks: int64 [n], ascending: the positions of tokens with finer steps. None: there are none.
        known: What the context's prediction takes, where `config.predict_layers` is set. None: given later (`knowing`).

    Raises:
        ProfileError: The profile is of another model, is damaged, or has no such predictor.
        ConfigError: The transform does not support the geometry or the configuration.
    """

    name = "klt"
    needs_profile = True

    def __init__(
        self, geometry: Geometry, config: CacheGenConfig, profile: Profile, entries: Tensor | None = None,
        sinks: Tensor | None = None, known: Known | None = None,
    ):  # fmt: skip
        require_layers(profile, geometry.layers)
        if geometry.batch != 1:
            raise ConfigError(f"the klt transform needs a batch of 1, got {geometry.batch}")
        if config.levels != profile.levels:
            raise ConfigError(f"the profile has {profile.levels} levels, config.levels is {config.levels}")
        values, digits = shipped_codebooks(config.prob_bits)
        self.layer = profile.usable(config.predicted)
        learnt = self.learnt = profile.at(self.layer)
        if bool((learnt.entries[0] >= values.entries).any()) or bool((learnt.entries[1:] >= digits.entries).any()):
            raise ProfileError("a table entry of the profile is outside the codebook: the profile is damaged")
        self.geometry, self.config, self.profile, self.channels = geometry, config, profile, geometry.channels
        self.entries = learnt.entries if entries is None else entries
        self.sinks = torch.empty(0, dtype=torch.int64) if sinks is None else sinks
        components = self.entries.shape[1]
        nothing = torch.zeros(components, dtype=torch.uint8)
        codes = torch.full((components,), step_code(config, learnt), dtype=torch.uint8)
        side = Side(codes, nothing.to(torch.int16), nothing, self.entries[0], self.entries[1:])
        channels = Channels(torch.zeros(components, dtype=torch.int64), torch.zeros(components, dtype=torch.int64))
        self.inner = LossyCodec(channels, config, side)
        self.basis = basis.Basis(geometry, profile, learnt)
        self.known = known
        if known is not None and isinstance(learnt, Predictor):
            expected = geometry.tokens, learnt.rank
            if known.layer != learnt.layer or tuple(known.scores.shape) != expected:
                raise TensorError(
                    f"expected scores {list(expected)} of the hidden state that enters layer {learnt.layer}, got "
                    f"{list(known.scores.shape)} of layer {known.layer}: compute them with this profile and context"
                )

    @classmethod
    def fit(cls, context: ContextRows, config: CacheGenConfig, profile: Profile | None) -> Fitted:
        """Fit to a context. Own table entries are used where they save more than they cost.

        Raises:
            TensorError: A value is not finite, or so large that the profile's step cannot express it.
            ConfigError: A profile is missing, or the transform does not support the configuration.
            ProfileError: The profile is of another model.
        """
        profile = _required(profile)
        codec = cls(context.geometry, config, profile, sinks=context.sinks, known=context.known)
        counts = Counts(codec.entries.shape[1], config.levels)
        for rows, span in context.chunks():
            counts.add(codec.inner.symbols(codec.checked(rows, span))[0])
        entries, saved = [], 0.0
        books = repeated(codec.inner.values, codec.inner.digits)
        for histograms, given, book in zip(counts.parts, codec.entries, books, strict=False):
            own = book.choose(histograms)[0]
            # A component that is zero in this context alone stays coded: adjacent coded components decode faster.
            own = own.where((own > 0) | (given == 0), own.new_tensor(book.narrowest))
            gain = book.bits(histograms, given) - book.bits(histograms, own) - ENTRY_BITS
            entries.append(torch.where(gain > 0, own, given))
            saved += float(gain.clamp_min(0).sum())
        bitmaps = 8 * config.levels * -(-codec.entries.shape[1] // 8)
        if saved > bitmaps or len(codec.sinks):  # the sinks follow the bitmaps
            codec = cls(context.geometry, config, profile, torch.stack(entries), context.sinks, context.known)
        return Fitted(codec, None)

    @classmethod
    def from_side(cls, side: bytes, geometry: Geometry, config: CacheGenConfig, profile: Profile | None) -> Klt:
        profile = _required(profile)
        profile.at(config.predicted)  # an artifact names the predictor that it was made with
        codec = cls(geometry, config, profile)
        if side[:DIGEST_BYTES] != codec.side_bytes():
            raise ProfileError("the side information needs another profile than the one given")
        if len(side) == DIGEST_BYTES:
            return codec
        cursor, entries = Cursor(side[DIGEST_BYTES:]), codec.learnt.entries.clone()
        components = entries.shape[1]
        for part, row in enumerate(entries):
            bits = np.unpackbits(np.frombuffer(cursor.take(-(-components // 8)), np.uint8), bitorder="little")
            if bits[components:].any():
                raise CorruptError("the side information has entries for components that the profile does not have")
            own = torch.from_numpy(bits[:components]).bool()
            row[own] = cursor.tensor(int(own.sum()), torch.uint8)
            if bool((row >= (codec.inner.digits if part else codec.inner.values).entries).any()):
                raise CorruptError("a table entry of the side information is outside the codebook")
        found = cursor.tensor(len(cursor.rest()) // 4, torch.int32).long()
        cursor.finish()
        if bool((found[1:] <= found[:-1]).any()) or bool(((found < 0) | (found >= geometry.tokens)).any()):
            raise CorruptError("the positions of sinks in the side information must ascend and be within the context")
        return cls(geometry, config, profile, entries, found)

    @classmethod
    def side_lengths(cls, geometry: Geometry, config: CacheGenConfig) -> range:
        most = config.levels * (-(-geometry.channels // 8) + geometry.channels) + 4 * geometry.tokens
        return range(DIGEST_BYTES, DIGEST_BYTES + most + 1)

    @classmethod
    def features(
        cls, side: bytes, geometry: Geometry, config: CacheGenConfig, profile: Profile | None
    ) -> tuple[str, ...]:
        found = ("klt", *(["predict"] if config.predict_layers is not None else []))
        found += ("klt-step",) if config.step_offset else ()
        if len(side) == DIGEST_BYTES:
            return found
        learnt = _required(profile).at(config.predicted)
        return (*found, "klt-tables", "sinks") if has_sinks(side, learnt) else (*found, "klt-tables")

    @classmethod
    def stepped(cls, config: CacheGenConfig, offset: int, profile: Profile | None) -> CacheGenConfig:
        found, profile = replace(config, step_offset=config.step_offset + offset), _required(profile)
        step_code(found, profile.at(profile.usable(config.predicted)))
        return found

    def side_bytes(self) -> bytes:
        found = [bytes.fromhex(self.profile.digest)]
        own = self.entries != self.learnt.entries
        if bool(own.any()) or len(self.sinks):
            for row, mine in zip(self.entries, own, strict=True):
                found += [np.packbits(mine.numpy(), bitorder="little").tobytes(), row[mine].numpy().tobytes()]
        return b"".join([*found, self.sinks.to(torch.int32).numpy().tobytes()])

    def coefficients(self, rows: Tensor, span: Span) -> Tensor:
        """Return the coefficients to code: float32 [tokens, components], on the device of rows."""
        return self._scaled(self.basis.coefficients(rows, span, self._scores(span)), span, FINER)

    def knowing(self, known: Known | None) -> Klt:
        if known is None or self.layer is None:
            return self
        return Klt(self.geometry, self.config, self.profile, self.entries, self.sinks, known)

    def _scores(self, span: Span) -> Tensor | None:
        """Return the scores of a chunk; None where nothing is predicted. Raises ConfigError if they are missing."""
        if self.layer is None:
            return None
        if self.known is None:
            raise ConfigError(
                f"this cache is stored as the difference to a prediction from layer {self.layer} of its model: pass "
                "model= to load it, or encode with predict_layers=None"
            )
        return self.known.scores[span.first : span.first + span.tokens]

    def _restored(
        self, y: Tensor, span: Span, dtype: torch.dtype = torch.float32, idle: Tensor | None = None
    ) -> Tensor:
        """Convert coefficients to rows. Layers that the loader has computed itself are copied."""
        rows = self.basis.rows(y, span, dtype, idle, self._scores(span))
        if self.known is not None and self.known.keys:
            exact = gather(self.known.keys, self.known.values, span)
            rows[:, : exact.shape[1]] = exact
        return rows

    def _scaled(self, y: Tensor, span: Span, factor: float) -> Tensor:
        """Multiply the coefficients of the chunk's sinks by `factor`, in place."""
        here = self.sinks[(self.sinks >= span.first) & (self.sinks < span.first + span.tokens)] - span.first
        if len(here):
            y[here.to(y.device)] *= factor
        return y

    def checked(self, rows: Tensor, span: Span) -> Tensor:
        """Return `coefficients`. Raises TensorError where they cannot be coded."""
        y = self.coefficients(rows, span)
        if y.numel() and not float(y.abs().max()) < quantize.LARGEST_SYMBOL * float(self.inner.steps[0]):
            require_finite(rows, Channels.of(self.geometry).vectors)
            raise TensorError("a value is too large for the profile's step; only lossless=True keeps such values")
        return y

    def encode(self, rows: Tensor, span: Span) -> list[bytes]:
        return self.inner.encode(self.checked(rows, span), span)

    def decode(self, parts: Sequence[bytes | memoryview], span: Span, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._decode(parts, span, dtype, torch.device("cpu"))

    def decode_into(self, parts: Sequence[bytes | memoryview], span: Span, target: Target, row: int = 0) -> None:
        target.put(self._decode(parts, span, target.dtype, target.device), row)

    def _decode(
        self, parts: Sequence[bytes | memoryview], span: Span, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        y = torch.empty(span.tokens, self.entries.shape[1], device=device)
        self.inner.decode_into(parts, span, Target.matrix(y))
        self._scaled(y, span, 1 / FINER)
        ordinary = span.ordinary(self.config)
        coded = self.entries[: len(parts)] if ordinary == slice(0, span.tokens) else self.entries
        return self._restored(y, span, dtype, ~coded.any(0))

    def approximations(self, rows: Tensor, span: Span) -> list[Tensor]:
        levels = self.inner.approximations(self.coefficients(rows, span), span)
        found = [self._restored(self._scaled(level, span, 1 / FINER), span) for level in levels]
        if isinstance(self.learnt, Predictor):  # a loader computes the first layers itself
            exact = self.basis.slices[2 * self.learnt.layer + 1].stop
            for level in found:
                level[:, :exact] = rows[:, :exact]
        return found


def step_code(config: CacheGenConfig, learnt: Profile | Predictor) -> int:
    """Return the code of the finest step. Raises ConfigError."""
    code = learnt.step_code + config.step_offset
    if not 0 <= code < STEP_CODES:
        raise ConfigError(
            f"step_offset must be from {-learnt.step_code} to {STEP_CODES - 1 - learnt.step_code} with this profile, "
            f"got {config.step_offset}"
        )
    return code


def has_sinks(side: bytes, profile: Profile | Predictor) -> bool:
    """Return whether this side information, which an encoder wrote, lists sinks."""
    at, width = DIGEST_BYTES, -(-profile.entries.shape[1] // 8)
    for _ in range(len(profile.entries)):
        at += width + int.from_bytes(side[at : at + width], "little").bit_count()
    return at < len(side)


def _required(profile: Profile | None) -> Profile:
    if profile is None:
        raise ConfigError(
            "transform='klt' needs a profile of the model: pass profile=, or learn one with learn_profile"
        )
    return profile
