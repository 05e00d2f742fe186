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
depends on the token. In a chain (`codec.chain`) it depends on the base of the layers before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hf_cachegen.codec import abi, basis, heads, quantize, transfer
from hf_cachegen.codec.chunk import Channels, LossyCodec, Placed, Span
from hf_cachegen.codec.fit import Counts, repeated, require_finite
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.into import Target
from hf_cachegen.codec.kept import Kept
from hf_cachegen.codec.launching import Launches
from hf_cachegen.codec.predictor import Known, Predictor
from hf_cachegen.codec.products import Products
from hf_cachegen.codec.profile import Profile, require_layers
from hf_cachegen.codec.rows import ContextRows
from hf_cachegen.codec.scaling import Scaling
from hf_cachegen.codec.section import Cursor
from hf_cachegen.codec.side import Side
from hf_cachegen.codec.sinks import FINER
from hf_cachegen.codec.tables import shipped_codebooks
from hf_cachegen.codec.transforms.protocol import Fitted, Transform
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import ConfigError, CorruptError, ProfileError, TensorError

HOST_CHUNKS = 2
"""Most chunks that the CPU decodes with one matrix product. Each product begins with arranging the matrix."""
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
        kept: The symbols of the context that it was fitted to, for `encode_chunk`.

    Raises:
        ProfileError: The profile is of another model, is damaged, or has no such predictor.
        ConfigError: The transform does not support the geometry or the configuration.
    """

    name = "klt"
    needs_profile = True

    def __init__(
        self, geometry: Geometry, config: CacheGenConfig, profile: Profile, entries: Tensor | None = None,
        sinks: Tensor | None = None, known: Known | None = None, kept: Kept | None = None,
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
        self.known, self._kept = known, kept
        self._rooms: dict[tuple[torch.device, int], tuple[Tensor, Target]] = {}
        """Memory of launches on each stream, where new memory costs as much as decoding into it. One launch has it at a
        time; the next one on its stream follows.
        """
        self.scaling = Scaling(config, learnt, self.inner.steps, self.sinks)
        self.products = Products(geometry, profile, learnt, self.scaling)
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
        kept = codec._keep(context)
        entries, saved = [], 0.0
        for given, (own, gain) in zip(codec.entries, codec._choices(context, kept), strict=True):
            entries.append(torch.where(gain > ENTRY_BITS, own, given))
            saved += float((gain - ENTRY_BITS).clamp_min(0).sum())
        bitmaps = 8 * config.levels * -(-codec.entries.shape[1] // 8)
        chosen = None
        if saved > bitmaps or len(codec.sinks):  # the sinks follow the bitmaps
            chosen = torch.stack(entries)
        return Fitted(cls(context.geometry, config, profile, chosen, context.sinks, context.known, kept), None)

    def _keep(self, context: ContextRows) -> Kept | None:
        """Return the symbols of a context; None where it must be multiplied again for each use."""
        if context.source is None:
            return None
        weights = torch.ones(self.geometry.tokens)
        weights[self.sinks] = FINER**-2

        def analyse(span: Span, code: basis.Code) -> None:
            def in_units(components: slice, y: Tensor) -> Tensor:
                return self.scaling.to_basis(code(components, self.scaling.to_coder(y, span)), span)

            self.basis.analyse(context.vectors(span), span, self._scores(span), in_units)

        return Kept.of(self.inner, context.spans, analyse, weights)

    def _choices(self, context: ContextRows, kept: Kept | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the cheapest entries uint8 [components] of each part, and the bits float64 that they save."""
        if kept is not None:
            entries, bits, before = kept.choose(context.spans, self.inner, self.entries[None])
        else:
            counts = Counts(self.entries.shape[1], self.config.levels)
            for rows, span in context.chunks():
                counts.add(self.inner.symbols(self.checked(rows, span))[0])
            entries, bits = counts.choose(self.inner.values, self.inner.digits)
            books = repeated(self.inner.values, self.inner.digits)
            parts = zip(books, counts.parts, self.entries, strict=False)
            before = torch.stack([book.bits(found, own) for book, found, own in parts])[None]
        yield from zip(entries, before[0] - bits, strict=True)

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
        found = ("klt", *(["klt-chain"] if profile is not None and profile.reach else []))
        found += ("predict",) if config.predict_layers is not None else ()
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

        def base(y: Tensor) -> Tensor:
            return self.scaling.base(y, span)

        found = self.basis.coefficients(self.basis.split(rows), span, self._scores(span), base)
        return self.scaling.to_coder(found, span)

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

    def _restore(self, y: Tensor, span: Span, level: int, vectors: Sequence[Tensor]) -> None:
        """Convert decoded coefficients of a level to values. Layers that the loader has computed itself are copied.

        Args:
            y: float32 [tokens, components], which are changed.
            span: The position of the chunk.
            level: Of the coefficients.
            vectors: Receive the values, as in `Basis.restore`.
        """
        y, coarse = self.scaling.to_basis(y, span), self.scaling.coarse(span, level)
        self.basis.restore(y, span, vectors, self._scores(span), coarse, self.inner.shares[level - 1])
        self._put_known(span, vectors)

    def _put_known(self, span: Span, vectors: Sequence[Tensor]) -> None:
        """Copy the layers of a chunk that the loader has computed itself."""
        if self.known is not None and self.known.keys:
            pairs = (x for pair in zip(self.known.keys, self.known.values, strict=True) for x in pair)
            for own, exact in zip(vectors, pairs, strict=False):
                part = exact[0, :, span.first : span.first + span.tokens].transpose(0, 1)
                own.copy_(transfer.send(part, own.device))

    def checked(self, rows: Tensor, span: Span) -> Tensor:
        """Return `coefficients`. Raises TensorError where they cannot be coded."""
        y = self.coefficients(rows, span)
        if y.numel() and not float(y.abs().max()) < quantize.LARGEST_SYMBOL * float(self.inner.steps[0]):
            require_finite(rows, Channels.of(self.geometry).vectors)
            raise TensorError("a value is too large for the profile's step; only lossless=True keeps such values")
        return y

    def encode(self, rows: Tensor, span: Span) -> list[bytes]:
        return self.inner.encode(self.checked(rows, span), span)

    def encode_chunk(self, context: ContextRows, span: Span) -> list[bytes]:
        return super().encode_chunk(context, span) if self._kept is None else self._kept.encode(span, self.inner)

    def squares(self, context: ContextRows, span: Span) -> tuple[Tensor, Tensor]:
        if self._kept is None or context.source is None:
            return super().squares(context, span)
        return self._kept.squares[span.first] @ self.basis.energies(), context.energy(span)

    def decode_into(self, parts: Sequence[bytes | memoryview], span: Span, target: Target, row: int = 0) -> None:
        self.launch([(parts, span, row)], target)()

    def launch(self, chunks: Iterable[Placed], target: Target) -> transfer.Check:
        device, host = target.device, transfer.is_host(target.device)
        launches, checks = None, list[transfer.Check]()
        key = device, transfer.stream_number(device)
        kept = self._rooms.pop(key, None)
        y, rows = kept or self._room(0, device)
        for group in adjacent(chunks, HOST_CHUNKS if host else abi.MAX_BATCH):
            (parts, first, row), (_, last, _) = group[0], group[-1]
            whole = Span(first.first, last.first + last.tokens - first.first, first.total)
            if len(y) < whole.tokens:
                (y, rows), launches = self._room(whole.tokens, device), None
            if launches is None:
                launches = Launches(self.inner, rows)
                checks.append(launches.finish)
            for own, span, at in group:
                launches.add(own, span, at - row)
            launches.flush()
            # The matrix products of all chunks of the group together.
            if host:
                self._restore(y[: whole.tokens], whole, len(parts), self._vectors(target, whole, row))
            else:
                self.products.restore(y[: whole.tokens], whole, len(parts), target, row, self._scores(whole))
                self._put_known(whole, self._vectors(target, whole, row))
        self._rooms[key] = y, rows
        return transfer.all_of(checks)

    def release(self) -> None:
        self._rooms.clear()

    def _room(self, tokens: int, device: torch.device) -> tuple[Tensor, Target]:
        """Return memory for the coefficients of that many tokens, and its target."""
        with torch.inference_mode(False):  # else a launch outside that mode could not write into it
            y = Target.memory(tokens, self.entries.shape[1], device)
        return y, Target.matrix(y)

    def _vectors(self, target: Target, span: Span, row: int) -> list[Tensor]:
        """Return views [tokens, heads, dim] of the target's rows of a chunk: K and V of each layer in turn."""
        return [x[row : row + span.tokens] for x in heads.by_token(target, self.geometry)]

    def approximations(self, rows: Tensor, span: Span) -> list[Tensor]:
        return self.approximated(rows, self.coefficients(rows, span), span)

    def approximated(self, rows: Tensor, y: Tensor, span: Span) -> list[Tensor]:
        """Return `approximations` of rows whose coefficients are y."""
        levels = self.inner.approximations(y, span)
        found = [torch.empty(len(rows), rows.shape[1]) for _ in levels]
        for level, (decoded, own) in enumerate(zip(levels, found, strict=True), 1):
            self._restore(decoded, span, level, self.basis.split(own))
        if isinstance(self.learnt, Predictor):  # a loader computes the first layers itself
            exact = self.basis.slices[2 * self.learnt.layer + 1].stop
            for own in found:
                own[:, :exact] = rows[:, :exact]
        return found


def adjacent(chunks: Iterable[Placed], most: int) -> Iterator[list[Placed]]:
    """Group chunks of one level that follow one another, in the context and in their target, by up to `most`."""
    group: list[Placed] = []
    for parts, span, row in chunks:
        if group:
            before, last, at = group[-1]
            follows = span.first - last.first == row - at == last.tokens and len(parts) == len(before)
            if len(group) == most or not follows:
                yield group
                group = []
        group.append((parts, span, row))
    if group:
        yield group


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
