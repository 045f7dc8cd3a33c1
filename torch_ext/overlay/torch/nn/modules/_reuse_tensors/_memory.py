"""Where the memory of tensors lies, who sees it, and who took it from a state dict.

Law: memory that something other than the module's tensor may see is never exchanged, and
memory that one tensor took from a state dict is not given to a second one while the first
may be alive (Note [Memory is handed over once]).

What this does not know: who else has an address (``ctypes``, a captured CUDA graph,
another storage over the same mapping or array). Loads at the same time: :mod:`._claims`.
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from operator import le
from typing import Any

import torch
from torch import Tensor
from torch.utils._swap_meta import unseen_tensor, users_of, USERS_OF_UNSHARED


# Note [Memory is handed over once]
# Two modules that load one state dict, say of one mapped file, must not see each other's
# writes; so the second one copies. Who took a storage is known by the storage's address:
# the id of the taker if that has all of it, else a sorted list of disjoint extents (start,
# end, and the id of the taker). As in torch.multiprocessing, a weak reference keeps the
# address from being used again, and those that expired are freed now and then. The taker
# itself must not be referred to: torch.utils.swap_tensors refuses tensors that have a
# weakref. Whether it may be alive is told by the number of tensors that hold the storage:
# if these are the state dict's own, it is gone.
_Parts = list[tuple[int, int, int]]
_taken: dict[int, int | _Parts] = {}
_expire_at = 1024


def note_taken(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Each of ``targets`` now has the memory of its source, which is dense."""
    _forget_expired()
    taken = _taken
    for target, source in zip(map(id, targets), sources, strict=True):
        storage = source.untyped_storage()
        address = storage._cdata
        if address not in taken:
            storage._weak_ref()
        if source.nbytes == storage.nbytes():
            taken[address] = target
        else:
            taken[address] = _with_part(_parts_of(storage), *extent(source), target)


def _with_part(parts: _Parts, start: int, end: int, taker: int) -> _Parts:
    j = i = bisect.bisect_left(parts, (end,))
    while i and parts[i - 1][1] > start:
        i -= 1
    if i < j:  # another one that is tied to it, or one that is gone
        start, end = min(start, parts[i][0]), max(end, parts[j - 1][1])
    parts[i:j] = [(start, end, taker)]
    return parts


def _parts_of(storage: torch.UntypedStorage) -> _Parts:
    taken = _taken.get(storage._cdata, [])
    if isinstance(taken, int):
        start = storage.data_ptr()
        return [(start, start + storage.nbytes(), taken)]
    return taken


def _forget_expired() -> None:
    """Free what is noted of memory that is gone, if that may be much."""
    global _expire_at
    if len(_taken) < _expire_at:
        return
    for address in list(_taken):
        if torch.UntypedStorage._expired(address) and _taken.pop(address, 0):
            torch.UntypedStorage._free_weak_ref(address)
    _expire_at = max(1024, 2 * len(_taken))


def may_be_taken(source: Tensor, holders: int) -> bool:
    """Whether a tensor that took memory of ``source`` may be alive.

    Args:
        holders: how many tensors are known to hold the storage, ``source`` included.
    """
    taken = _parts_of(source.untyped_storage())
    start, end = extent(source)
    i = bisect.bisect_left(taken, (end,))
    overlaps = i > 0 and taken[i - 1][1] > start
    return overlaps and users_of(source) - (USERS_OF_UNSHARED - 1) > holders


def _took(target: Tensor, storage: torch.UntypedStorage) -> bool:
    return (*extent(target), id(target)) in _parts_of(storage)


def _holders_of_storage(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage)


_HOLDERS_IF_UNSEEN = _holders_of_storage(unseen_tensor())


def is_unseen(tensor: Tensor) -> bool:
    """Whether nothing but ``tensor`` can see its memory.

    A view, ``detach()``, ``numpy()`` or a saved activation is another user of the storage.
    Memory that came from outside (``torch.from_numpy``, a mapped file) is not resizable,
    and who sees it cannot be known; unless ``tensor`` took it from a state dict, for
    after a copying load whoever that is would not see it change.
    """
    storage = tensor.untyped_storage()
    return (
        users_of(tensor) == USERS_OF_UNSHARED
        and sys.getrefcount(storage) == _HOLDERS_IF_UNSEEN
        and (storage.resizable() or _took(tensor, storage))
        and not (tensor.device.type == "cpu" and storage.is_shared())
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether each element has its own place and there are no gaps."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether some elements have one address, as ``expand`` makes them, so that ``copy_`` refuses to write to them."""
    steps = zip(tensor.size(), tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in steps)


def extent(tensor: Tensor) -> tuple[int, int]:
    """Address of the first byte of a dense tensor's memory, and of the one after it."""
    start = tensor.data_ptr()
    return start, start + tensor.nbytes


def are_disjoint(starts: list[int], ends: list[int]) -> bool:
    """Whether extents are; in doubt (an empty one within another) ``False``."""
    return all(map(le, sorted(ends), islice(sorted(starts), 1, None)))


def overlapping(extents: list[tuple[int, int]]) -> Iterator[list[int]]:
    """Indices of the extents, those that overlap each other in one list."""
    cluster: list[int] = []
    cluster_end = 0
    for i in sorted(range(len(extents)), key=extents.__getitem__):
        start, end = extents[i]
        if cluster and start >= cluster_end:
            yield cluster
            cluster = []
        cluster.append(i)
        cluster_end = max(cluster_end, end)
    if cluster:
        yield cluster


class Extents:
    """Disjoint ranges of addresses, sorted."""

    def __init__(self, extents: Iterable[tuple[int, int]]) -> None:
        listed = list(extents)
        clusters = [[listed[i] for i in c] for c in overlapping(listed)]
        self._starts = [min(start for start, _ in c) for c in clusters]
        self._ends = [max(end for _, end in c) for c in clusters]

    def is_free(self, start: int, end: int) -> bool:
        i = bisect.bisect_right(self._ends, start)
        return i == len(self._starts) or self._starts[i] >= end

    def add(self, starts: list[int], ends: list[int]) -> None:
        """Take ranges that are free and disjoint."""
        for known, more in ((self._starts, starts), (self._ends, ends)):
            if len(more) < 100:
                for address in more:
                    bisect.insort(known, address)
            else:
                known += more
                known.sort()

    def take(self, start: int, end: int) -> bool:
        """Take a range if all of it is free."""
        if not self.is_free(start, end):
            return False
        i = bisect.bisect_right(self._starts, start)
        self._starts.insert(i, start)
        self._ends.insert(i, end)
        return True


class PlainTypes(dict[type, bool]):
    """Which classes are those of tensors, and add no operation of their own."""

    def __missing__(self, cls: type) -> bool:
        self[cls] = issubclass(cls, Tensor) and _adds_no_operation(cls)
        return self[cls]


def _adds_no_operation(cls: type[Tensor]) -> bool:
    function: Any = cls.__torch_function__
    return cls.copy_ is Tensor.copy_ and (
        function is torch._C._disabled_torch_function_impl
        or getattr(function, "__func__", None) is Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
    )
