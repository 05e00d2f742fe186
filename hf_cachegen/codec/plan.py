"""The matrices of klt's products on a device (`codec.products`), made once for a profile or predictor.

Products of groups with equal numbers of channels are one batched product: their left operands are filled up with zeros
to one width. A *part* is some adjacent groups whose operands fit a limit of memory.

In a chain (`codec.chain`) a summary depends on the summaries before it: with l = c U Q^T of all groups and N the maps
from summaries to summaries, s = l + s N. For a *block* of some groups N is strictly triangular, so

    s = (l + w M) (1 - N)^-1        w: the summaries before the block; M: their maps to those of the block

with matrices that are computed once. l (1 - N)^-1 of all blocks is one batched product, and w M (1 - N)^-1 one more
product of each block but the first. Blocks have one size: the last one is filled up with groups of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_cachegen.codec.basis import MEAN_TERMS, Narrow, slices_of
from hf_cachegen.codec.chain import sources
from hf_cachegen.codec.geometry import Geometry
from hf_cachegen.codec.group import Group
from hf_cachegen.codec.operands import Kind, listed
from hf_cachegen.codec.predictor import Predictor
from hf_cachegen.codec.profile import Profile
from hf_cachegen.codec.transfer import keep

PART_BYTES = 256 << 10
"""Size of a part's operands and rows for each token, in bytes: 512 MB for eight chunks of 256 tokens, which is what the
coefficients of an 8B model take.
"""
BLOCK_NUMBERS = 1024
"""Numbers of summaries of a block. Larger blocks are fewer launches, and more work: the inverse has no structure."""


class Part(NamedTuple):
    """Products of adjacent groups.

    Attributes:
        first: The first of them.
        listed: The sources of each operand, int32 [groups, width].
        matrices: [groups, width, columns], float32 or bfloat16.
        means: float32 [groups, columns], which are added to the rows afterwards. None: nothing is.
    """

    first: int
    listed: Tensor
    matrices: Tensor
    means: Tensor | None = None


class Before(NamedTuple):
    """What the summaries before a block add to it: numbers [first, last) of all summaries.

    Attributes:
        first: The first number.
        last: The last one, excluded.
        begin: The first number that they are predicted from.
        matrix: float32 [first - begin, last - first], the map from the summaries before, times the inverse.
    """

    first: int
    last: int
    begin: int
    matrix: Tensor


class Plan(NamedTuple):
    """The matrices of a profile or predictor on a device.

    Attributes:
        parts: The products that give keys and values.
        chained: The products that give l, for a chain.
        within: float32 [blocks, numbers, numbers], the inverse of each block. None without a chain.
        before: What the summaries before them add to blocks, in their order.
        scores: float32 [rank, numbers of all summaries]: what a predictor's scores add to l. None: nothing.
        rank: Number of scores.
        numbers: Number of summaries' numbers, of all groups.
        frequencies: float64 [pairs], of the rotation of keys.
    """

    parts: list[Part]
    chained: list[Part]
    within: Tensor | None
    before: list[Before]
    scores: Tensor | None
    rank: int
    numbers: int
    frequencies: Tensor


class _Product(NamedTuple):
    """The product of one group: its sources int32 [width], its matrix [width, columns], and the mean to add."""

    listed: Tensor
    matrix: Tensor
    mean: Tensor | None = None


def plan_of(
    geometry: Geometry, profile: Profile, learnt: Profile | Predictor, device: torch.device, *, narrow: bool
) -> Plan:
    """Make the matrices of a profile or predictor.

    Args:
        geometry: Of the cache.
        profile: Of the model.
        learnt: The profile, or its predictor.
        device: Of the products.
        narrow: Whether keys and values are multiplied in bfloat16.
    """
    groups, slices = learnt.groups, slices_of(geometry)
    rank = learnt.rank if isinstance(learnt, Predictor) else 0
    widths = [0 if group.summary is None else len(group.summary) for group in groups]
    width, order = max(widths, default=0), [(group.kind, group.first, group.count) for group in groups]
    read = [sources(order, index, learnt.reach) for index in range(len(groups))]
    made, chained, start = list[_Product](), list[_Product](), 0
    for group, mine, own_width in zip(groups, read, widths, strict=True):
        own = range(start, start := start + len(group.synthesis))
        numbers = [listed(Kind.NUMBER, 0, rank)]
        numbers += [listed(Kind.NUMBER, rank + i * width, widths[i]) for i in mine]
        layers = range(group.first, group.first + group.count)
        mean = torch.cat([profile.means[slices[2 * layer + group.kind]] for layer in layers])
        made.append(_product(group, mean, torch.cat(numbers), own, narrow))
        if group.summary is not None and width:
            summary = torch.zeros(len(own), width)
            summary[:, :own_width] = group.synthesis @ group.summary.mT
            chained.append(_Product(listed(Kind.COARSEST, own.start, len(own)), summary))
    within, before, known = None, list[Before](), None
    if chained:
        count = _groups_of_block(len(groups), width)
        absent = -len(groups) % count
        nothing = _Product(listed(Kind.ZERO, 0, 1), torch.zeros(1, width))
        chained += [nothing] * absent
        maps = [_map(group, rank, width) for group in groups]
        if rank:
            known = torch.cat([*(one[:rank] for one in maps), torch.zeros(rank, absent * width)], 1)
        blocks = list(_blocks([one[rank:] for one in maps], read, widths, width, count))
        within = keep(torch.stack([own for own, _ in blocks]), device)
        before = [part._replace(matrix=keep(part.matrix, device)) for _, part in blocks if part.begin < part.first]
    parts, summaries = (list(_parts(found, device)) for found in (made, chained))
    known = None if known is None else keep(known, device)
    frequencies = keep(profile.rotary.inv_freq, device)
    return Plan(parts, summaries, within, before, known, rank, len(chained) * width, frequencies)


def _product(group: Group, mean: Tensor, numbers: Tensor, own: range, narrow: bool) -> _Product:
    """Return the product of a group.

    Args:
        group: The group.
        mean: float32 [channels].
        numbers: The sources of what its prediction reads.
        own: Its components.
        narrow: Whether it is in bfloat16: the means are then part of the product (`basis.Narrow`).
    """
    coefficients = listed(Kind.COEFFICIENT, own.start, len(own))
    if not narrow:
        prediction = group.synthesis[:0] if group.prediction is None else group.prediction
        return _Product(torch.cat([numbers, coefficients]), torch.cat([prediction, group.synthesis]), mean)
    matrix = Narrow.of(group, mean).matrix
    leading = (len(matrix) - len(own) - MEAN_TERMS - len(numbers)) // 2
    found = [
        listed(Kind.ONE, 0, 1).expand(MEAN_TERMS), numbers, coefficients[:leading],
        listed(Kind.ROUNDING, own.start, leading), coefficients,
    ]  # fmt: skip
    return _Product(torch.cat(found), matrix)


def _map(group: Group, rank: int, width: int) -> Tensor:
    """Return the map from what a group's prediction reads to its summary, float32 [numbers, width]."""
    found = torch.zeros(rank if group.prediction is None else len(group.prediction), width)
    if group.prediction is not None and group.summary is not None:
        found[:, : len(group.summary)] = group.prediction @ group.summary.mT
    return found


def _groups_of_block(groups: int, width: int) -> int:
    """Return how many groups each block has: within BLOCK_NUMBERS, and so that few are left out of the last one."""
    most = max(BLOCK_NUMBERS // width, 1)
    return -(-groups // -(-groups // most))


def _blocks(
    maps: Sequence[Tensor], read: Sequence[Sequence[int]], widths: Sequence[int], width: int, count: int
) -> Iterator[tuple[Tensor, Before]]:
    """Cut a chain into blocks, and yield the inverse of each, and what is added to it.

    Args:
        maps: From the summaries that each group reads to its own, float32 [numbers, width].
        read: The groups that each group reads.
        widths: Of each group's summary.
        width: To which they are filled up.
        count: Groups of a block, to which the last one is filled up.
    """
    size = count * width
    unit = torch.eye(size, dtype=torch.float64)
    for first in range(0, len(maps), count):
        last = min(first + count, len(maps))
        begin = min([first, *(i for own in read[first:last] for i in own)])
        n = torch.zeros((first - begin) * width + size, size, dtype=torch.float64)
        for index in range(first, last):
            at, to = 0, slice((index - first) * width, (index - first + 1) * width)
            for i in read[index]:
                n[(i - begin) * width : (i - begin) * width + widths[i], to] = maps[index][at : at + widths[i]].double()
                at += widths[i]
        before, within = n.split([(first - begin) * width, size])
        inverse = torch.linalg.solve_triangular(unit - within, unit, upper=True, unitriangular=True)
        matrix = (before @ inverse).float()
        yield inverse.float(), Before(first * width, first * width + size, begin * width, matrix)


def _parts(products: Sequence[_Product], device: torch.device) -> Iterator[Part]:
    """Join adjacent products of equal numbers of columns, within PART_BYTES."""
    first = 0
    while first < len(products):
        columns, itemsize = products[first].matrix.shape[1], products[first].matrix.element_size()
        last, width = first, 0
        while last < len(products) and products[last].matrix.shape[1] == columns:
            width = max(width, len(products[last].listed))
            if last > first and (last + 1 - first) * (width + columns) * itemsize > PART_BYTES:
                break
            last += 1
        mine = products[first:last]
        width = max(len(product.listed) for product in mine)
        listed_, matrices = (
            keep(torch.stack([torch.cat([x, x.new_zeros(width - len(x), *x.shape[1:])]) for x in found]), device)
            for found in ([product.listed for product in mine], [product.matrix for product in mine])
        )
        means = [product.mean for product in mine if product.mean is not None]
        yield Part(first, listed_, matrices, keep(torch.stack(means), device) if means else None)
        first = last
