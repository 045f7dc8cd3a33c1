"""Which bytes a strided tensor needs, and sets of byte ranges.

Law: the ranges of a layout are sorted, disjoint, and hold each byte of each of its elements.
What lies between two of them is left out if it is more than ``GAP`` bytes; so a block of
rows is one range without a byte too many, and of a column at most ``GAP`` bytes a row are read
in vain.

Limits: a layout of more than ``_MAX_RANGES`` such ranges is taken whole where it is densest.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from math import prod


Range = tuple[int, int]  # of bytes: the first one, and the one after the last

# Reading as many bytes takes about as long as making another request of the system.
GAP = 16 << 10
_MAX_RANGES = 1 << 20


def ranges_of(
    offset: int,
    size: Sequence[int],
    stride: Sequence[int],
    itemsize: int,
    gap: int = GAP,
) -> list[Range]:
    """Returns the byte ranges that a strided tensor needs of its storage.

    Args:
        offset: of its first element, in elements
        size: its size
        stride: its strides, in elements
        itemsize: bytes of an element
        gap: ranges that are no farther apart become one

    Example:
        >>> ranges_of(8, (2, 4), (4, 1), itemsize=2)
        [(16, 32)]
        >>> ranges_of(0, (3,), (100_000,), itemsize=4)
        [(0, 4), (400000, 400004), (800000, 800004)]
    """
    if 0 in size:
        return []
    steps = zip(size, stride, strict=True)
    dims = sorted((step * itemsize, n) for n, step in steps if n > 1 and step)
    run = itemsize
    while dims and (dims[0][0] - run <= gap or prod(n for _, n in dims) > _MAX_RANGES):
        step, n = dims.pop(0)
        run += (n - 1) * step
    starts = [offset * itemsize]
    for step, n in dims:
        starts = [start + i * step for i in range(n) for start in starts]
    starts.sort()
    ranges: list[Range] = []
    for start in starts:
        if ranges and start - ranges[-1][1] <= gap:
            ranges[-1] = ranges[-1][0], max(ranges[-1][1], start + run)
        else:
            ranges.append((start, start + run))
    return ranges


class Ranges:
    """A set of bytes, as disjoint ranges that do not touch."""

    def __init__(self) -> None:
        # Where each range starts and ends, in order: a byte after an even number of these is
        # outside. One list, so that a forked process never has half of a change.
        self._edges: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Adds the bytes of a range that is not empty."""
        i, j = bisect_left(self._edges, start), bisect_right(self._edges, end)
        self._edges[i:j] = [start] * (i % 2 == 0) + [end] * (j % 2 == 0)

    def missing(self, start: int, end: int) -> list[Range]:
        """Returns the parts of a range that are not in the set."""
        if start >= end:
            return []
        i, j = bisect_right(self._edges, start), bisect_left(self._edges, end)
        edges = [start] * (i % 2 == 0) + self._edges[i:j] + [end] * (j % 2 == 0)
        return list(zip(edges[::2], edges[1::2], strict=True))
