"""Decide for each tensor of a module how it takes what the state dict has.

The law: nobody can tell the outcome from ``target.copy_(source)`` but by the address of
the target's memory. So memory is exchanged only where no one else sees the old one, and
shared with the state dict only where no other tensor of the module lies in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules._reuse_tensors._claims import Claims
from torch.nn.modules._reuse_tensors._memory import (
    are_disjoint,
    extent,
    Extents,
    is_dense,
    is_unseen,
    may_be_taken,
    overlaps_itself,
    PlainTypes,
)
from torch.nn.modules._reuse_tensors._sharding import Shard, Sharding
from torch.utils._swap_meta import (
    has_plain_keys,
    is_unshared,
    meta_ties,
    PLAIN_KEYS,
    PLAIN_KEYS_ON_META,
)


_dispatch_keys = torch._C._dispatch_keys
_use_count = torch._C._storage_Use_Count
_storage = torch._C._storage_id  # type: ignore[attr-defined]


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
    """One target, its source, and how the one takes the other.

    ``start`` is the address of the source if that is plain, and ``end`` the one after it.
    ``shard`` is what target and source are parts of, if they are.
    """

    __slots__ = ("end", "how", "key", "shard", "source", "start", "target")

    def __init__(
        self,
        key: str,
        target: Tensor,
        source: Tensor,
        how: How,
        start: int,
        end: int,
        shard: Shard | None = None,
    ) -> None:
        self.key = key
        self.target = target
        self.source = source
        self.how = how
        self.start = start
        self.end = end
        self.shard = shard

    @property
    def device(self) -> torch.device:
        """Where a copy of the source is to be, if the target is on meta."""
        return self.source.device if self.shard is None else self.shard.device

    def do_not_share(self) -> None:
        if self.how is SHARE:
            self.how = BUILD if self.target.is_meta else WRITE


class Rows:
    """Tensors of modules, in the order in which they are loaded; those that have a source in columns.

    ``moves`` has ``None`` for a target on meta that takes its source as it is. That is
    most of them, and an object for each would keep the garbage collector busy. ``left``
    has what may stay on meta, and whether it is persistent.
    """

    __slots__ = ("has_moves", "keys", "left", "missing", "moves", "sources", "targets")

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.targets: list[Tensor] = []
        self.sources: list[Any] = []
        self.moves: list[Move | None] = []
        self.has_moves = False
        self.missing: list[str] = []
        self.left: list[tuple[str, Tensor, bool]] = []


class Plan:
    """What is to be done for one load. Of two moves that have the same target the later one wins.

    ``keys``, ``targets``, ``sources`` and ``left`` are those of all :class:`Rows`.
    ``moves``, by the ``id`` of their targets, and ``alike``, the rows of targets that take
    their sources as they are, wait for a commit. ``all_alike`` says that these were all,
    ``outcome`` by ``id`` how tensors were loaded if not.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        state_dict: Mapping[str, Any],
        sharding: Sharding | None = None,
    ) -> None:
        self.sharding = sharding
        # By ``id`` of a sharded tensor, its memory here, and what that is loaded from.
        self.parts: dict[int, tuple[Tensor, Tensor]] = {}
        self.keys: list[str] = []
        self.targets: list[Tensor] = []
        self.sources: list[Any] = []
        self.left: list[tuple[str, Tensor, bool]] = []
        self.outcome: dict[int, How] = {}
        self.claims = Claims()
        self.moves: dict[int, Move] = {}
        self.alike: dict[int, int] = {}
        self._module = module
        self._state_dict = state_dict
        self.all_alike = False
        self._has_memory = False
        self._is_plain_type = PlainTypes()
        self._can_copy: dict[tuple[object, ...], bool] = {}
        self._ties: dict[int, list[Tensor]] | None = None
        self._owned: Extents | None = None
        self._holders: dict[int, int] | None = None

    def propose_all(self, rows: Rows) -> bool:
        """Fill in the moves of ``rows``; false if there is one that only ``copy_`` can tell."""
        rows.moves = [None] * len(rows.keys)
        alike = self._are_alike(rows.targets, rows.sources)
        if all(alike):
            return True
        rows.has_moves = True
        for i, key in enumerate(rows.keys):
            if not alike[i]:
                target = rows.targets[i]
                move = rows.moves[i] = self.propose(key, target, rows.sources[i])
                if move is None:
                    return False
                if move.how is NOTHING:
                    rows.left.append((key, target, True))
                rows.targets[i], rows.sources[i] = move.target, move.source
        return True

    def _are_alike(self, targets: list[Tensor], sources: list[Any]) -> list[bool]:
        """Which targets are on meta, and sure to share what :meth:`propose` may let them share."""
        for column in (targets, sources):
            # NB: so that the keys of this device are known.
            if not all(map(self.is_plain, column[:1])):
                return [False] * len(targets)
            if not all(map(self._is_plain_type.__getitem__, set(map(type, column)))):
                return [False] * len(targets)
        # This is asked for each tensor; so it takes one expression. Who asks for more
        # than how many hold a storage makes a Python object of that.
        return [
            _dispatch_keys(target).raw_repr() in PLAIN_KEYS_ON_META
            and _dispatch_keys(source).raw_repr() in PLAIN_KEYS
            and target.dtype is source.dtype
            and target.shape == source.shape
            and target.stride() == source.stride()
            and target.is_contiguous()
            and target.is_leaf
            and (_use_count(_storage(target)) == 1 or is_unshared(target))
            and (_use_count(_storage(source)) == 1 or is_unshared(source))
            for target, source in zip(targets, sources, strict=True)
        ]

    def propose(self, key: str, target: Tensor, source: Any) -> Move | None:
        """A move that is sure not to raise; ``None`` where only a real ``copy_`` can tell."""
        if self.sharding is not None:
            shard = self.sharding.shard_of(target, source)
            if shard is not None:
                return self._propose_part(key, shard)
        if not (self.is_plain(target) and self.is_plain(source)):
            return None
        if target.shape != source.shape:
            return None
        alike = target.dtype is source.dtype and target.stride() == source.stride()
        if not target.is_meta:
            if source.is_meta:
                return None
            alike = alike and target.device == source.device
            how = self._how_in_memory(target, source, alike)
        elif source.is_meta:
            how = NOTHING
        elif not target.is_leaf or overlaps_itself(target):
            return None
        elif not is_unshared(target) and id(target) in self.meta_ties():
            how = TIED
        else:
            contiguous = target.is_contiguous()
            how = SHARE if alike and (contiguous or is_dense(target)) else BUILD
        device = source.device if target.is_meta else target.device
        if how is None or not (alike or self._converts(target, source, device)):
            return None
        if (
            how is SHARE
            and not is_unshared(source)
            and may_be_taken(source, self.holders_of(source))
        ):
            how = BUILD if target.is_meta else WRITE
        start = source.data_ptr()
        return Move(key, target, source, how, start, start + source.nbytes)

    def _propose_part(self, key: str, shard: Shard) -> Move | None:
        """A move that puts a part of the source where this rank's memory is, or is to be."""
        whole, target, source, device = shard
        # NB: what is not plain, say deferred, is read before anything is changed.
        is_plain = self.is_plain(source)
        if not self.is_plain(target) or (source.is_meta and not target.is_meta):
            return None
        if overlaps_itself(target):
            return None
        alike = (
            is_plain
            and target.dtype is source.dtype
            and target.stride() == source.stride()
            and source.device == device
        )
        if not target.is_meta:
            how = self._how_in_memory(target, source, alike) if is_plain else WRITE
            how = WRITE if how is None else how
        elif source.is_meta:
            how = NOTHING
        else:
            how = SHARE if alike and is_dense(target) else BUILD
        if how is not NOTHING and not (alike or self._converts(target, source, device)):
            return None
        # NB: the part is a holder, too.
        if how is SHARE and may_be_taken(source, self.holders_of(source) + 1):
            how = BUILD if target.is_meta else WRITE
        self.parts[id(whole)] = target, source
        start = source.data_ptr() if is_plain else 0
        return Move(key, target, source, how, start, start + source.nbytes, shard)

    def local_of(self, tensor: Tensor) -> Tensor:
        """The memory of a tensor of the module, or of this rank's part of it."""
        return tensor if self.sharding is None else self.sharding.local_of(tensor)

    def _how_in_memory(self, target: Tensor, source: Tensor, alike: bool) -> How | None:
        self._has_memory = True
        if not is_dense(target):
            return None
        if not alike:
            return WRITE
        if target.data_ptr() == source.data_ptr():
            return SAME
        shared_before = self.outcome.get(id(target)) is SHARE
        return SHARE if shared_before or is_unseen(target) else WRITE

    def is_plain(self, tensor: Any) -> bool:
        """Strided, neither wrapped nor lazily conjugated, of a class that adds no operation."""
        return self._is_plain_type[type(tensor)] and has_plain_keys(tensor)

    def _converts(self, target: Tensor, source: Tensor, device: torch.device) -> bool:
        """Whether ``copy_`` knows this pair of dtypes and devices."""
        pair = (target.dtype, device, source.dtype, source.device)
        if pair not in self._can_copy:
            try:
                one = torch.empty(1, dtype=source.dtype, device=source.device)
                torch.empty(1, dtype=target.dtype, device=device).copy_(one)
                self._can_copy[pair] = True
            except RuntimeError:
                self._can_copy[pair] = False
        return self._can_copy[pair]

    def holders_of(self, source: Tensor) -> int:
        """How many tensors of the state dict, and bases of such, lie in the storage of ``source``."""
        if self._holders is None:
            self._holders = {}
            values = [v for v in self._state_dict.values() if isinstance(v, Tensor)]
            bases = [v._base for v in values if v._base is not None]
            for tensor in {id(v): v for v in values + bases}.values():
                if torch._C._has_storage(tensor):
                    storage = tensor.untyped_storage()._cdata
                    self._holders[storage] = self._holders.get(storage, 0) + 1
        return self._holders.get(source.untyped_storage()._cdata, 0)

    def meta_ties(self) -> dict[int, list[Tensor]]:
        if self._ties is None:
            tensors = tensors_of(self._module)
            self._ties = meta_ties(t for t in tensors if t.is_meta and self.is_plain(t))
        return self._ties

    def add(self, rows: Rows) -> None:
        """Do these at the next commit."""
        first = len(self.keys)
        self.keys += rows.keys
        self.targets += rows.targets
        self.sources += rows.sources
        self.left += [(key, self.local_of(t), stays) for key, t, stays in rows.left]
        if not (self.moves or rows.has_moves):
            self.alike.update(zip(map(id, rows.targets), count(first)))
            return
        for i, target in enumerate(map(id, rows.targets)):
            move = rows.moves[i]
            if move is None:
                self.moves.pop(target, None)
                self.alike[target] = first + i
            else:
                self.add_move(move)

    def add_move(self, move: Move) -> None:
        """Do this one at the next commit, in place of an earlier one of its target."""
        target = id(move.target)
        waits = target in self.moves or target in self.alike
        # NB: the module's own memory has by then what the earlier one wrote to it.
        if move.how is SAME and waits and self.outcome.get(target) is not SHARE:
            return
        self.alike.pop(target, None)
        # NB: to be the last one, too.
        self.moves.pop(target, None)
        self.moves[target] = move

    def gets_memory(self) -> set[int]:
        """By ``id``, what is on meta and will not be after the commit."""
        moves = [m for m in self.moves.values() if m.how is not NOTHING]
        tied = (self.meta_ties()[id(m.target)] for m in moves if m.how is TIED)
        shared = {id(m.target) for m in moves} | self.alike.keys()
        return shared | {id(t) for group in tied for t in group}

    def settle(self) -> None:
        """Let no two tensors of the module share memory unless they did before."""
        shares = [move for move in self.moves.values() if move.how is SHARE]
        starts = [move.start for move in shares]
        ends = [move.end for move in shares]
        for i in self.alike.values():
            source = self.sources[i]
            start = source.data_ptr()
            starts.append(start)
            ends.append(start + source.nbytes)
        # NB: the common case, a module all on meta, owns nothing; don't search it.
        owns = (
            self._has_memory
            or self._owned is not None
            or any(not tensor.is_meta for _, tensor, _ in self.left)
        )
        self._has_memory = True
        if are_disjoint(starts, ends):
            if not owns:
                return
            owned = self.extents()
            if all(map(owned.is_free, starts, ends)):
                owned.add(starts, ends)
                return
        # Who is not the first one has to copy.
        self.make_moves_of_alike()
        owned = self.extents() if owns else Extents([])
        for move in self.moves.values():
            if move.how is SHARE and not owned.take(move.start, move.end):
                move.do_not_share()

    def make_moves_of_alike(self) -> None:
        moves = {}
        for target, i in self.alike.items():
            source = self.sources[i]
            at = extent(source)
            moves[target] = Move(self.keys[i], self.targets[i], source, SHARE, *at)
        self.alike = {}
        self.moves = {**moves, **self.moves}

    def extents(self) -> Extents:
        """Where the module's tensors are, or were when this was first asked for."""
        if self._owned is None:
            tensors = map(self.local_of, tensors_of(self._module))
            plain = (t for t in tensors if not t.is_meta and self.is_plain(t))
            self._owned = Extents(extent(t) for t in plain)
        return self._owned


def tensors_of(module: torch.nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers, those that are tied more than once."""
    for child in torch.nn.Module.modules(module):
        for tensors in (child._parameters, child._buffers):
            yield from (tensor for tensor in tensors.values() if tensor is not None)
