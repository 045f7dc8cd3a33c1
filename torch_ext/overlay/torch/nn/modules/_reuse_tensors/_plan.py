"""Decide for each tensor of a module how it takes what the state dict has.

The law: nobody can tell the outcome from ``target.copy_(source)`` but by the address of
the target's memory. So memory is exchanged only where no one else sees the old one, and
shared with the state dict only where no other tensor of the module lies in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any, TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.modules._reuse_tensors._memory import (
    are_disjoint,
    extent,
    Extents,
    is_dense,
    is_unseen,
    may_be_taken,
    overlapping,
)
from torch.utils._swap_meta import (
    has_plain_keys,
    meta_ties,
    PLAIN_KEYS,
    USERS_OF_UNSHARED,
)


if TYPE_CHECKING:
    from typing_extensions import TypeIs

_dispatch_keys = torch._C._dispatch_keys
_use_count = torch._C._storage_Use_Count


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

    __slots__ = ("how", "key", "source", "target")

    def __init__(self, key: str, target: Tensor, source: Tensor, how: How) -> None:
        self.key = key
        self.target = target
        self.source = source
        self.how = how

    def do_not_share(self) -> None:
        if self.how is SHARE:
            self.how = BUILD if self.target.is_meta else WRITE


class Plan:
    """The moves of one load. Of two that have the same target the later one wins.

    ``loaded`` has all that have a source, ``not_loaded`` those that stay on
    meta all the same, ``left`` what has no source or is loaded by its module, and whether
    it is persistent. ``outcome`` says by ``id`` how tensors were loaded.
    """

    def __init__(self, module: torch.nn.Module, state_dict: Mapping[str, Any]) -> None:
        self.loaded: list[Move] = []
        self.not_loaded: list[str] = []
        self.left: list[tuple[str, Tensor, bool]] = []
        self.outcome: dict[int, How] = {}
        self.moves: dict[int, Move] = {}
        self._module = module
        self._state_dict = state_dict
        self._has_memory = False
        self._is_plain_type: dict[type, bool] = {}
        self._can_copy: dict[tuple[object, ...], bool] = {}
        self._ties: dict[int, list[Tensor]] | None = None
        self._owned: Extents | None = None
        self._holders: dict[int, int] | None = None

    def propose(self, key: str, target: Tensor, source: object) -> Move | None:
        """A move that is sure not to raise; ``None`` where only a real ``copy_`` can tell."""
        # NB: is called for each tensor, so what can be seen without a call is.
        is_plain_type = self._is_plain_type
        if not (
            (
                is_plain_type.get(type(target))
                and is_plain_type.get(type(source))
                and _dispatch_keys(target).raw_repr() in PLAIN_KEYS
                and _dispatch_keys(source).raw_repr() in PLAIN_KEYS
            )
            or (self.is_plain(target) and self.is_plain(source))
        ):
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
        elif not target.is_leaf:
            return None
        elif (
            _use_count(target.untyped_storage()._cdata) > USERS_OF_UNSHARED
            and id(target) in self.meta_ties()
        ):
            how = TIED
        else:
            contiguous = target.is_contiguous()
            how = SHARE if alike and (contiguous or is_dense(target)) else BUILD
        if how is None or not (alike or self._converts(target, source)):
            return None
        if (
            how is SHARE
            and _use_count(source.untyped_storage()._cdata) > USERS_OF_UNSHARED
            and may_be_taken(source, self.holders_of(source))
        ):
            how = BUILD if target.is_meta else WRITE
        return Move(key, target, source, how)

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

    def is_plain(self, tensor: object) -> TypeIs[Tensor]:
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

    def holders_of(self, source: Tensor) -> int:
        """How many tensors of the state dict lie in the storage of ``source``."""
        if self._holders is None:
            self._holders = {}
            distinct = {id(v): v for v in self._state_dict.values()}
            for tensor in distinct.values():
                if isinstance(tensor, Tensor) and torch._C._has_storage(tensor):
                    storage = tensor.untyped_storage()._cdata
                    self._holders[storage] = self._holders.get(storage, 0) + 1
        return self._holders.get(source.untyped_storage()._cdata, 0)

    def meta_ties(self) -> dict[int, list[Tensor]]:
        if self._ties is None:
            tensors = tensors_of(self._module)
            self._ties = meta_ties(t for t in tensors if t.is_meta and self.is_plain(t))
        return self._ties

    def add(self, moves: Iterable[Move]) -> None:
        """Do these at the commit."""
        for move in moves:
            self.loaded.append(move)
            if move.how is NOTHING:
                self.not_loaded.append(move.key)
            if self.supersedes(move):
                self.moves[id(move.target)] = move

    def supersedes(self, move: Move) -> bool:
        """Take out an earlier move of the same target, if this one changes anything."""
        if id(move.target) in self.moves:
            if move.how is SAME:
                return False
            del self.moves[id(move.target)]
        return True

    def gets_memory(self) -> set[int]:
        """By ``id``, what is on meta and will not be after the commit."""
        moves = [m for m in self.moves.values() if m.how is not NOTHING]
        tied = (self.meta_ties()[id(m.target)] for m in moves if m.how is TIED)
        return {id(m.target) for m in moves} | {id(t) for g in tied for t in g}

    def settle(self) -> None:
        """Let no two tensors of the module share memory unless they did before."""
        shares = [move for move in self.moves.values() if move.how is SHARE]
        starts = [move.source.data_ptr() for move in shares]
        ends = [i + move.source.nbytes for i, move in zip(starts, shares, strict=True)]
        # NB: the common case, a module all on meta, owns nothing; don't search it.
        known = (
            self._has_memory
            or self._owned is not None
            or any(not tensor.is_meta for _, tensor, _ in self.left)
        )
        if not known and are_disjoint(starts, ends):
            return
        extents = list(zip(starts, ends, strict=True))
        owned = self.extents() if known else Extents([])
        for cluster in overlapping(extents):
            if len(cluster) == 1 and owned.is_free(*extents[cluster[0]]):
                continue
            for i in sorted(cluster):
                if not owned.take(*extents[i]):
                    shares[i].do_not_share()

    def extents(self) -> Extents:
        """Where the module's tensors are, or were when this was first asked for."""
        if self._owned is None:
            tensors = tensors_of(self._module)
            plain = (t for t in tensors if not t.is_meta and self.is_plain(t))
            self._owned = Extents(extent(t) for t in plain)
        return self._owned


def tensors_of(module: torch.nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers, those that are tied more than once."""
    for child in torch.nn.Module.modules(module):
        for tensors in (child._parameters, child._buffers):
            yield from (tensor for tensor in tensors.values() if tensor is not None)


def _adds_no_operation(cls: type) -> bool:
    if not issubclass(cls, Tensor):
        return False
    function = cls.__torch_function__
    return cls.copy_ is Tensor.copy_ and (
        function is torch._C._disabled_torch_function_impl
        or getattr(function, "__func__", None) is Tensor.__torch_function__.__func__
    )
