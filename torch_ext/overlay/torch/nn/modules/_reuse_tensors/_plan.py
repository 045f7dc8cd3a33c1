"""Decide for each tensor of a module how it takes what the state dict has, then do it.

The law: nobody can tell the outcome from ``target.copy_(source)`` but by the address of
the target's memory. So memory is exchanged only where no one else sees the old one, and
shared with the state dict only where no other tensor of the module lies in it.
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils._swap_meta import (
    has_plain_keys,
    meta_ties,
    storage_like,
    swap_back,
    swap_meta,
    undisturbed,
    users_of,
    USERS_OF_UNSHARED,
)


Undo = list[tuple[Callable[..., object], tuple[Any, ...]]]


class How(Enum):
    """How a target takes its source."""

    SHARE = "its memory becomes the source's"
    BUILD = "on meta: it gets memory of its own with a converted copy"
    WRITE = "the source is copied into the memory that it has"
    TIED = "on meta: it gets memory with those that share its storage, then WRITE"
    SAME = "its memory is the source's already"
    NOTHING = "both are on meta"


# An attribute of an Enum is slow to get in Python 3.10 and 3.11.
SHARE, BUILD, WRITE, TIED, SAME, NOTHING = How


class Move:
    """One target, its source, and how the one takes the other."""

    __slots__ = ("built", "how", "key", "source", "target")

    def __init__(self, key: str, target: Tensor, source: Tensor, how: How) -> None:
        self.key = key
        self.target = target
        self.source = source
        self.how = how
        self.built: Tensor | None = None

    def do_not_share(self) -> None:
        if self.how is SHARE:
            self.how = BUILD if self.target.is_meta else WRITE


class Plan:
    """The moves of one load. Of two that have the same target the later one wins.

    ``loaded`` has each key with its target and source, ``not_loaded`` those that stay on
    meta all the same, ``left`` what has no source or is loaded by its module. ``outcome``
    says by ``id`` how tensors were loaded.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.loaded: list[tuple[str, Tensor, Tensor]] = []
        self.not_loaded: list[str] = []
        self.left: list[tuple[str, Tensor]] = []
        self.outcome: dict[int, How] = {}
        self._module = module
        self._moves: dict[int, Move] = {}
        self._has_memory = False
        self._is_plain_type: dict[type, bool] = {}
        self._can_copy: dict[tuple[object, ...], bool] = {}
        self._ties: dict[int, list[Tensor]] | None = None
        self._owned: _Extents | None = None

    def propose(self, key: str, target: Tensor, source: object) -> Move | None:
        """A move that is sure not to raise; ``None`` where only a real ``copy_`` can tell."""
        if not (isinstance(source, Tensor) and self.is_plain(target)):
            return None
        if not self.is_plain(source) or target.shape != source.shape:
            return None
        alike = target.dtype is source.dtype and target.stride() == source.stride()
        if source.is_meta:
            how = NOTHING if target.is_meta else None
        elif target.is_meta:
            how = self._how_on_meta(target, alike)
        else:
            alike = alike and target.device == source.device
            how = self._how_in_memory(target, source, alike)
        if how is None or not (alike or self._converts(target, source)):
            return None
        return Move(key, target, source, how)

    def _how_on_meta(self, target: Tensor, alike: bool) -> How | None:
        if not target.is_leaf:
            return None
        if users_of(target) > USERS_OF_UNSHARED and id(target) in self._meta_ties():
            return TIED
        return SHARE if alike and _is_dense(target) else BUILD

    def _how_in_memory(self, target: Tensor, source: Tensor, alike: bool) -> How | None:
        self._has_memory = True
        if not _is_dense(target):
            return None
        if not alike:
            return WRITE
        if target.data_ptr() == source.data_ptr():
            return SAME
        shared_before = self.outcome.get(id(target)) is SHARE
        return SHARE if shared_before or _is_unseen(target) else WRITE

    def is_plain(self, tensor: Tensor) -> bool:
        """Strided, neither wrapped nor lazily conjugated, of a class that adds no operation."""
        cls = type(tensor)
        if cls not in self._is_plain_type:
            self._is_plain_type[cls] = _adds_no_operation(cls)
        return self._is_plain_type[cls] and has_plain_keys(tensor)

    def _converts(self, target: Tensor, source: Tensor) -> bool:
        """Whether ``copy_`` knows this pair of dtypes and devices."""
        device = source.device if target.is_meta else target.device
        pair = (target.dtype, device, source.dtype, source.device)
        if pair not in self._can_copy:
            try:
                one = torch.empty(1, dtype=source.dtype, device=source.device)
                torch.empty(1, dtype=target.dtype, device=device).copy_(one)
                self._can_copy[pair] = True
            except RuntimeError:
                self._can_copy[pair] = False
        return self._can_copy[pair]

    def _meta_ties(self) -> dict[int, list[Tensor]]:
        if self._ties is None:
            tensors = tensors_of(self._module)
            self._ties = meta_ties(t for t in tensors if t.is_meta and self.is_plain(t))
        return self._ties

    def add(self, moves: Iterable[Move]) -> None:
        """Do these at the commit."""
        for move in moves:
            self.loaded.append((move.key, move.target, move.source))
            if move.how is NOTHING:
                self.not_loaded.append(move.key)
            if self._supersedes(move):
                self._moves[id(move.target)] = move

    def _supersedes(self, move: Move) -> bool:
        """Take out an earlier move of the same target, if this one changes anything."""
        if id(move.target) in self._moves:
            if move.how is SAME:
                return False
            del self._moves[id(move.target)]
        return True

    def leave(self, key: str, tensor: Tensor) -> None:
        """Nothing is planned for this one."""
        self.left.append((key, tensor))
        self._has_memory = self._has_memory or not tensor.is_meta

    def do_now(self, move: Move, undo: Undo) -> None:
        """Do a move ahead of the commit, for code that looks at the outcome."""
        if not self._supersedes(move):
            return
        with undisturbed():
            share = move.how is SHARE
            if share and not self._extents().take(*_extent(move.source)):
                move.do_not_share()
            if move.how is BUILD:
                _build(move)
            self._do(move, undo, back_up=True)

    def commit(self, undo: Undo, *, back_up: bool) -> None:
        """Do all moves; what may fail, getting memory, comes before any change.

        An exchange of memory can always be undone; what is written in place only if
        ``back_up`` asks for copies of it.
        """
        with undisturbed():
            self._settle()
            writes: list[Move] = []
            exchanges: list[Move] = []
            for move in self._moves.values():
                if move.how is WRITE or move.how is TIED:
                    writes.append(move)
                    continue
                exchanges.append(move)
                if move.how is BUILD:
                    _build(move)
            for move in exchanges + writes:
                self._do(move, undo, back_up)

    def _settle(self) -> None:
        """Let no two tensors of the module share memory unless they did before."""
        shares = [move for move in self._moves.values() if move.how is SHARE]
        extents = [_extent(move.source) for move in shares]
        # NB: the common case, a module all on meta, owns nothing; don't search it.
        known = self._has_memory or self._owned is not None
        owned = self._extents() if known else _Extents([])
        for cluster in _overlapping(extents):
            if len(cluster) == 1 and owned.is_free(*extents[cluster[0]]):
                continue
            for i in sorted(cluster):
                if not owned.take(*extents[i]):
                    shares[i].do_not_share()

    def _extents(self) -> _Extents:
        if self._owned is None:
            tensors = tensors_of(self._module)
            plain = (t for t in tensors if not t.is_meta and self.is_plain(t))
            self._owned = _Extents(_extent(t) for t in plain)
        return self._owned

    def _do(self, move: Move, undo: Undo, back_up: bool) -> None:
        target, source, how = move.target, move.source, move.how
        if how is SHARE or how is BUILD:
            _exchange(target, source if move.built is None else move.built, undo)
        elif how is WRITE or how is TIED:
            if how is TIED and target.is_meta:
                group = self._meta_ties()[id(target)]
                for tensor, data in zip(
                    group, storage_like(group, source.device), strict=True
                ):
                    _exchange(tensor, data, undo)
            self.unshare(target, undo)
            if back_up:
                undo.append((target.copy_, (target.clone(),)))
            target.copy_(source)
        self.outcome[id(target)] = how

    def unshare(self, target: Tensor, undo: Undo) -> None:
        """Before ``target`` is written to: have the state dict's memory no more."""
        if self.outcome.get(id(target)) is SHARE:
            _exchange(target, target.detach().clone(), undo)
            self.outcome[id(target)] = WRITE


def tensors_of(module: torch.nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers, those that are tied more than once."""
    for child in torch.nn.Module.modules(module):
        for tensors in (child._parameters, child._buffers):
            yield from (tensor for tensor in tensors.values() if tensor is not None)


def _build(move: Move) -> None:
    move.built = torch.empty_like(move.target, device=move.source.device)
    move.built.copy_(move.source)


def _exchange(target: Tensor, data: Tensor, undo: Undo) -> None:
    if target.is_meta:
        undo.append((swap_back, (target, swap_meta(target, data))))
    else:
        undo.append((_set_data, (target, target.data)))
        _set_data(target, data)


def _set_data(target: Tensor, data: Tensor) -> None:
    target.data = data
    # As copy_ does, so that backward through an older graph says what is wrong.
    torch.autograd.graph.increment_version(target)


def _is_dense(tensor: Tensor) -> bool:
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


def _adds_no_operation(cls: type) -> bool:
    function = cls.__torch_function__  # type: ignore[attr-defined]
    return cls.copy_ is Tensor.copy_ and (  # type: ignore[attr-defined]
        function is torch._C._disabled_torch_function_impl
        or getattr(function, "__func__", None) is Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
    )


def _holders_of_storage(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage)


_HOLDERS_IF_UNSEEN = _holders_of_storage(torch.empty(1))


def _is_unseen(tensor: Tensor) -> bool:
    """Whether nothing but ``tensor`` can see its memory.

    A view, ``detach()``, ``numpy()`` or a saved activation is another user of the storage.
    Memory that came from outside (``torch.from_numpy``, a mapped file) is not resizable,
    and who sees it cannot be known.
    """
    storage = tensor.untyped_storage()
    return (
        users_of(tensor) == USERS_OF_UNSHARED
        and _holders_of_storage(tensor) == _HOLDERS_IF_UNSEEN + 1  # and `storage`
        and storage.resizable()
        and not (tensor.device.type == "cpu" and storage.is_shared())
    )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Address of the first byte of a dense tensor's memory, and of the one after it."""
    start = tensor.data_ptr()
    return start, start + tensor.nbytes


def _overlapping(extents: list[tuple[int, int]]) -> Iterator[list[int]]:
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


class _Extents:
    """Disjoint ranges of addresses, sorted."""

    def __init__(self, extents: Iterable[tuple[int, int]]) -> None:
        listed = list(extents)
        clusters = [[listed[i] for i in c] for c in _overlapping(listed)]
        self._starts = [min(start for start, _ in c) for c in clusters]
        self._ends = [max(end for _, end in c) for c in clusters]

    def is_free(self, start: int, end: int) -> bool:
        i = bisect.bisect_right(self._ends, start)
        return i == len(self._starts) or self._starts[i] >= end

    def take(self, start: int, end: int) -> bool:
        """Take a range if all of it is free."""
        if not self.is_free(start, end):
            return False
        i = bisect.bisect_right(self._starts, start)
        self._starts.insert(i, start)
        self._ends.insert(i, end)
        return True
