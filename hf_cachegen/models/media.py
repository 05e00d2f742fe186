"""What belongs to a context besides its tokens: pictures, videos and audio.

A processor puts placeholder tokens into the text, and the media beside it as tensors: `pixel_values`,
`image_grid_thw`, `input_features`, ... The keys and values at the placeholders, and of all tokens after them, are
those of the media. So a context records a digest of each medium, and the tokens that it fills.

`KINDS` is the table of all inputs that are known. An input that is not in it is refused by name: it may change keys and
values. `MediaInputs` assigns the rows of the tensors to media, and media to the rows and tokens of a batch.

Note [Tokens of a medium]: the number of placeholders that a medium fills follows from its grid; else from the text,
where each run of placeholders is one medium; else all media have the same number of them, where nothing says that their
sizes differ. Where none of this fits, all media of a kind belong together: they are reused as a whole or not at all.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from hf_cachegen.errors import ManifestError, TensorError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Kind:
    """A kind of medium: the model inputs that hold it.

    Attributes:
        name: the kind.
        inputs: the inputs, the one with the values first. Their first axis counts media, or rows of media.
        grid: the input with (frames, height, width) in patches of each medium, whose product is its number of rows.
        rows: another input with the number of rows of each medium.
        sizes: inputs that show that media may differ in their number of tokens.
        token: attributes of the configuration with the placeholder's token id.
    """

    name: str
    inputs: tuple[str, ...]
    grid: str
    rows: str
    sizes: tuple[str, ...]
    token: tuple[str, ...]


KINDS = (
    Kind(
        "image",
        ("pixel_values", "image_grid_thw", "image_sizes", "image_position_ids", "pixel_attention_mask", "pixel_mask",
         "spatial_shapes"),
        "image_grid_thw", "", ("image_sizes", "image_position_ids", "spatial_shapes"),
        ("image_token_id", "image_token_index"),
    ),
    Kind(
        "video",
        ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "image_sizes_videos", "video_position_ids",
         "num_frames_per_video"),
        "video_grid_thw", "num_frames_per_video", ("image_sizes_videos", "num_frames_per_video"),
        ("video_token_id", "video_token_index"),
    ),
    Kind(
        "audio",
        ("input_features", "input_features_mask", "feature_attention_mask"),
        "", "", ("input_features_mask", "feature_attention_mask"),
        ("audio_token_id", "audio_token_index"),
    ),
)  # fmt: skip
"""All kinds of media that a context may hold."""
MEDIA_INPUTS = frozenset(name for kind in KINDS for name in kind.inputs)
"""Model inputs that hold media."""
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Model inputs [rows, tokens] that mark the placeholders, and are 0 elsewhere."""
PATCHES_AXES = 5
"""Axes of a tensor of pictures that are split into patches, [pictures, patches, channels, height, width]."""
WHOLE = slice(None)
MAX_MEDIA = 1 << 16
"""Largest number of media in the manifest of a context."""
DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Medium:
    """Media of a context that belong together, in most cases one.

    Attributes:
        kind: "image", "video" or "audio".
        items: number of media of this kind.
        first: the first token that they fill.
        end: the token after the last one.
        digest: XXH3-128 of all inputs that hold them, 32 hexadecimal digits.
    """

    kind: str
    items: int
    first: int
    end: int
    digest: str


@dataclass(frozen=True)
class Span:
    """Media of one row of a batch: `items` of their kind from number `start` on fill the positions [first, end)."""

    kind: Kind
    start: int
    items: int
    first: int
    end: int


class MediaInputs:
    """The media of a batch of prompts.

    Args:
        config: the configuration of the model.
        ids: int64 [rows, length], with placeholders.
        inputs: model inputs by name; those of `KINDS` and `TOKEN_TYPES` are used.

    Raises:
        TensorError: the media do not fit the placeholders.
        UnsupportedModelError: the model's placeholders are not known, or token types mark other tokens.
    """

    def __init__(self, config: PreTrainedConfig, ids: Tensor, inputs: Mapping[str, Any]):
        self.ids = ids.cpu()
        self.tensors = {name: _tensor(name, inputs[name]) for name in sorted(MEDIA_INPUTS & inputs.keys())
                        if inputs[name] is not None}  # fmt: skip
        self.types = {name: inputs[name] for name in TOKEN_TYPES if inputs.get(name) is not None}
        self._config = config
        self.placeholders = torch.zeros_like(self.ids, dtype=torch.bool)
        for kind in self.kinds:
            self.placeholders |= self._placed(kind)
        for name, types in self.types.items():
            if types.shape != ids.shape:
                raise TensorError(f"expected {name} {list(ids.shape)} as input_ids, got {list(types.shape)}")
            if bool((types.cpu()[~self.placeholders] != 0).any()):
                raise UnsupportedModelError(f"generating from a cache does not support {name} other than 0 in a text")

    @property
    def kinds(self) -> list[Kind]:
        """Return the kinds of which there are media."""
        return [kind for kind in KINDS if any(name in self.tensors for name in kind.inputs)]

    @cached_property
    def spans(self) -> list[list[Span]]:
        """Return the media of each row, in the order of their tokens. Raises TensorError."""
        rows: list[list[Span]] = [[] for _ in self.ids]
        for kind in self.kinds:
            for row, found in enumerate(self._spans(kind)):
                rows[row] += found
        for spans in rows:
            spans.sort(key=lambda span: span.first)
            for before, after in itertools.pairwise(spans):
                if after.first < before.end:
                    raise UnsupportedModelError(
                        f"the {before.kind.name} at token {before.first} and the {after.kind.name} at token "
                        f"{after.first} overlap, so a context cannot end between them"
                    )
        return rows

    def may_cut(self, spans: Sequence[Sequence[Span]], position: int) -> bool:
        """Report whether the cached part of all rows may end before a position.

        It may not end within a medium: some models attend in both directions there, and every model takes its media
        whole. Media that touch count as one, because such models cannot tell them apart.

        Args:
            spans: the media of each row.
            position: a position of the prompts.
        """
        if any(span.first < position < span.end for row in spans for span in row):
            return False
        around = self.placeholders[:, max(0, position - 1) : position + 1]
        return around.shape[1] < 2 or not bool(around.all(1).any())

    def digest(self, span: Span, row: int) -> str:
        """Return the XXH3-128 of all inputs that hold the media of a span."""
        types = {name: types[row, span.first : span.end] for name, types in sorted(self.types.items())}
        return digest_of({**self.select([span]), **types})

    def media(self) -> tuple[Medium, ...]:
        """Return the media of the first row, a context."""
        return tuple(
            Medium(span.kind.name, span.items, span.first, span.end, self.digest(span, 0)) for span in self.spans[0]
        )

    def select(self, spans: Sequence[Span]) -> dict[str, Tensor]:
        """Return the model inputs that hold the media of these spans alone, in this order."""
        found: dict[str, Tensor] = {}
        for kind in self.kinds:
            rows = self._rows(kind)
            numbers = [n for span in spans if span.kind is kind for n in range(span.start, span.start + span.items)]
            for name in kind.inputs if numbers else ():
                if (tensor := self.tensors.get(name)) is not None:
                    found[name] = torch.cat([tensor[rows[number][name]] for number in numbers])
        return found

    def _placed(self, kind: Kind) -> Tensor:
        token = next((value for name in kind.token if (value := getattr(self._config, name, None)) is not None), None)
        if token is None:
            raise UnsupportedModelError(
                f"{self._config.model_type!r} has none of {list(kind.token)} in its configuration, so the tokens of "
                f"its {kind.name}s are not known: keep a context without them"
            )
        return self.ids == token

    def _rows(self, kind: Kind) -> list[dict[str, slice]]:
        """Return for each medium of a kind its rows of every tensor."""
        tensors = {name: self.tensors[name] for name in kind.inputs if name in self.tensors}
        values = next(iter(tensors.values()))
        counts: list[int] | None = None
        if kind.grid in tensors:
            counts = tensors[kind.grid].prod(-1).tolist()
        elif kind.rows in tensors:
            counts = tensors[kind.rows].tolist()
        number = len(values) if counts is None else len(counts)
        split: dict[str, list[slice]] = {}
        for name, tensor in tensors.items():
            if len(tensor) == number:
                split[name] = [slice(index, index + 1) for index in range(number)]
            elif counts is not None and len(tensor) == sum(counts):
                ends = torch.tensor(counts).cumsum(0).tolist()
                split[name] = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
            else:  # a layout of the model's own: all of them are one
                return [dict.fromkeys(tensors, WHOLE)]
        return [{name: slices[index] for name, slices in split.items()} for index in range(number)]

    def _spans(self, kind: Kind) -> Iterator[list[Span]]:
        """Yield the media of a kind in each row. See Note [Tokens of a medium]."""
        placed, number = self._placed(kind), len(self._rows(kind))
        total = int(placed.sum())
        positions = [row.nonzero()[:, 0].tolist() for row in placed]
        counts = self._counts(kind, number, total, positions)
        start = 0
        for row, found in enumerate(positions):
            if counts is None and found:
                if start:
                    raise UnsupportedModelError(
                        f"the {number} {kind.name}s cannot be assigned to rows: generate for one row at a time"
                    )
                yield [Span(kind, 0, number, found[0], found[-1] + 1)]
                start = number
                continue
            spans, used = [], 0
            while used < len(found):
                count = 0 if counts is None or start >= number else counts[start]
                if count < 1 or used + count > len(found):
                    raise _misfit(kind, number, total, f"row {row} ends within one of them")
                spans.append(Span(kind, start, 1, found[used], found[used + count - 1] + 1))
                used, start = used + count, start + 1
            yield spans
        if start != number:
            raise _misfit(kind, number, total, f"{number - start} of them have none")

    def _counts(self, kind: Kind, number: int, total: int, positions: list[list[int]]) -> list[int] | None:
        """Return the number of placeholders of each medium; None where they are not known."""
        if kind.grid in self.tensors and number == len(self.tensors[kind.grid]):
            merge = _merge_size(self._config)
            counts: list[int] = (self.tensors[kind.grid].prod(-1) // merge**2).tolist()
            if sum(counts) != total:
                raise _misfit(kind, number, total, f"their grids need {sum(counts)}")
            return counts
        runs = [len(run) for row in positions for run in _runs(row)]
        if len(runs) == number:
            return runs
        alike = not any(name in self.tensors for name in kind.sizes)
        return [total // number] * number if alike and number and total and total % number == 0 else None


def parse_media(config: PreTrainedConfig, ids: Tensor, inputs: Mapping[str, Any]) -> MediaInputs | None:
    """Return the media among model inputs, None where there are none. Arguments and errors: see `MediaInputs`."""
    if any(inputs.get(name) is not None for name in MEDIA_INPUTS):
        return MediaInputs(config, ids, inputs)
    return None


def media_from_list(values: Any) -> tuple[Medium, ...]:
    """Read the media of a context from untrusted JSON.

    Raises:
        ManifestError: they are not media, in order and apart.
    """
    rows = [] if values is None else values
    if not isinstance(rows, list) or len(rows) > MAX_MEDIA:
        raise ManifestError(f"fingerprint.media: expected a list of at most {MAX_MEDIA} media, got {rows!r:.80}")
    found: list[Medium] = []
    for row in rows:
        known = row if isinstance(row, dict) else {}
        kind, items, first, end, digest = (known.get(name) for name in ("kind", "items", "first", "end", "digest"))
        if (
            any(type(number) is not int for number in (items, first, end))
            or kind not in [kind.name for kind in KINDS]
            or not isinstance(digest, str)
            or not DIGEST.fullmatch(digest)
        ):
            raise ManifestError(f"fingerprint.media: expected kind, items, first, end and digest, got {row!r:.80}")
        medium = Medium(str(kind), items, first, end, digest)  # type: ignore[arg-type]
        if medium.items < 1 or not (found[-1].end if found else 0) <= medium.first < medium.end:
            raise ManifestError(f"fingerprint.media: the {medium.kind} at token {medium.first} is out of order")
        found.append(medium)
    return tuple(found)


def digest_of(inputs: Mapping[str, Tensor]) -> str:
    """Return the XXH3-128 of name, dtype, shape and bytes of model inputs, in their order."""
    state = xxhash.xxh3_128()
    for name, tensor in inputs.items():
        data = tensor.detach().cpu().contiguous()
        if data.ndim == PATCHES_AXES:
            # Pictures of fewer patches are filled up with zeros to the number of the largest one in the call.
            used = data.flatten(2).ne(0).any(-1).any(0).nonzero()
            data = data[:, : int(used.max()) + 1 if len(used) else 0].contiguous()
        state.update(f"{name} {data.dtype} {list(data.shape)}\n".encode())
        state.update(data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b"")
    return state.hexdigest()


def outside(ids: Sequence[int], media: Sequence[Medium]) -> list[int]:
    """Return the token ids of a context that belong to its text, and not to a medium."""
    inside = {position for medium in media for position in range(medium.first, medium.end)}
    return [token for position, token in enumerate(ids) if position not in inside]


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) == 0:
        raise TensorError(
            f"expected {name} as a tensor with one row or more, got a {type(value).__name__} "
            f'{list(getattr(value, "shape", []))}: call the processor with return_tensors="pt"'
        )
    return value


def _misfit(kind: Kind, number: int, total: int, why: str) -> TensorError:
    return TensorError(
        f"{number} {kind.name}s do not fit the {total} {kind.name} tokens of input_ids ({why}): pass the whole output "
        "of the processor, without truncation"
    )


def _merge_size(config: PreTrainedConfig) -> int:
    """Return the number of patches, in height and in width, that one token stands for."""
    return int(getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1) or 1)


def _runs(positions: list[int]) -> Iterator[list[int]]:
    """Yield the runs of adjacent positions."""
    run: list[int] = []
    for position in positions:
        if run and position != run[-1] + 1:
            yield run
            run = []
        run.append(position)
    if run:
        yield run


