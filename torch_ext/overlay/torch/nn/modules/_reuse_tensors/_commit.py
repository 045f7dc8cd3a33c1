"""Do what the plan says: get all memory that is needed, then change the module.

Old memory is given back tensor by tensor as it is replaced, unless it may yet be needed
for undoing (``back_up``, and whatever was done ahead of the commit). A signal is handled
before or after the irrevocable part, which is one call into C, never within.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules._reuse_tensors._memory import may_be_taken
from torch.nn.modules._reuse_tensors._plan import (
    BUILD,
    Move,
    Plan,
    SAME,
    SHARE,
    TIED,
    WRITE,
)
from torch.nn.modules._reuse_tensors._ties import find_cover, views_like
from torch.utils._swap_meta import (
    impls_for,
    storage_like,
    swap_all,
    swap_back_all,
    undisturbed,
)


Undo = list[tuple[Callable[..., object], tuple[Any, ...]]]


def commit(plan: Plan, undo: Undo, *, back_up: bool) -> None:
    """Do all that waits in ``plan``, undoably if ``back_up``."""
    if not (plan.moves or plan.alike):
        _agree(plan, back_up)
        return
    with undisturbed():
        # NB: code that runs after this may write, which ends sharing tensor by tensor.
        ties = [] if back_up else _cover_ties(plan)
        plan.settle()
        if not plan.claims.take([plan.sources[i] for i in plan.alike.values()]):
            plan.make_moves_of_alike()
        _claim(plan, plan.moves.values())
        swaps = _Pairs()
        plan.all_alike = len(plan.alike) == len(plan.keys) and not back_up
        if plan.all_alike:
            swaps.targets += plan.targets
            swaps.data += plan.sources
        else:
            swaps.targets += [plan.targets[i] for i in plan.alike.values()]
            swaps.data += [plan.sources[i] for i in plan.alike.values()]
            plan.outcome.update(zip(plan.alike, repeat(SHARE)))
        for cover, group, tied in ties:
            if cover.how is SHARE:
                _follow(cover, group, tied, swaps)
            else:
                cover.how = TIED
        moves = list(plan.moves.values())
        plan.moves.clear()
        plan.alike.clear()
        _do(plan, moves, swaps, undo, back_up)


def do_now(plan: Plan, move: Move, undo: Undo) -> None:
    """Do a move ahead of the commit, for code that looks at the outcome."""
    with undisturbed():
        if move.how is SHARE and not plan.extents().take(move.start, move.end):
            move.do_not_share()
        _claim(plan, (move,))
        _do(plan, (move,), _Pairs(), undo, back_up=True)


def materialize(plan: Plan, target: Tensor, device: torch.device, undo: Undo) -> None:
    """Give ``target``, which is on meta, and those that are tied to it memory."""
    with undisturbed():
        new = _Pairs()
        new.give_memory(plan.meta_ties().get(id(target), [target]), device)
        _exchange_impls(new, undo)


def unshare(plan: Plan, target: Tensor, undo: Undo) -> None:
    """Before ``target`` is written to: have the state dict's memory no more."""
    if plan.outcome.get(id(target)) is SHARE:
        undo.append((_set_all, ([target], [target.data])))
        _set_all([target], [target.detach().clone()])
        plan.outcome[id(target)] = WRITE


def roll_back(undo: Undo) -> None:
    """Leave everything as it was before the first change."""
    while undo:
        func, args = undo.pop()
        try:
            with undisturbed():
                func(*args)
        except Exception as error:
            warnings.warn(
                f"load_state_dict failed, and so did {func} to undo it: {error}",
                stacklevel=2,
            )


def _claim(plan: Plan, moves: Iterable[Move]) -> None:
    """Let no other load take what ``moves`` share; copy what another one has taken since this one was planned."""
    shares = [move for move in moves if move.how is SHARE]
    if plan.claims.take([move.source for move in shares]):
        return
    # NB: the part of a tensor is a holder, too.
    holders = [plan.holders_of(m.source) + (m.shard is not None) for m in shares]
    for move in plan.claims.take_if_free(shares, holders):
        move.do_not_share()


def _cover_ties(plan: Plan) -> list[tuple[Move, list[Tensor], list[Move]]]:
    """Let one of those tied by their storage take the source's memory for them all."""
    tied: dict[int, tuple[list[Tensor], list[Move]]] = {}
    for move in plan.moves.values():
        if move.how is TIED and move.target.is_meta:
            group = plan.meta_ties()[id(move.target)]
            tied.setdefault(id(group), (group, []))[1].append(move)
    covers = []
    for group, moves in tied.values():
        cover = find_cover(group, moves)
        if cover is not None and not may_be_taken(
            cover.source, plan.holders_of(cover.source)
        ):
            cover.how = SHARE
            covers.append((cover, group, moves))
    return covers


def _follow(cover: Move, group: list[Tensor], moves: list[Move], swaps: _Pairs) -> None:
    """Let all of ``group`` lie in the memory that the cover takes."""
    for move in moves:
        if move is not cover:
            move.how = SAME
    for tensor, view in zip(group, views_like(group, cover), strict=True):
        if tensor is not cover.target:
            swaps.add(tensor, view)


def _do(
    plan: Plan, moves: Iterable[Move], new: _Pairs, undo: Undo, back_up: bool
) -> None:
    """Do ``moves``, and give what is on meta memory as ``new`` says."""
    old, written = _Pairs(), _Pairs()
    built: set[int] = set()
    for move in moves:
        target, source, how = move.target, move.source, move.how
        if how is SHARE or how is BUILD:
            data = source if how is SHARE else _copy(source, target, move.device)
            (new if target.is_meta else old).add(target, data)
            if move.shard is not None:
                _let_follow(
                    plan, move.shard.whole, data, new if target.is_meta else old
                )
        elif how is WRITE or how is TIED:
            unshare(plan, target, undo)
            if move.shard is not None:
                old.wholes.append(move.shard.whole)
                # NB: reading may fail, so it comes before anything is changed.
                if not plan.is_plain(source):
                    source = _copy(source, target, target.device)
            written.add(target, source)
            if target.is_meta and id(target) not in built:
                group = plan.meta_ties()[id(target)]
                new.give_memory(group, source.device)
                built.update(map(id, group))
        # NB: what has the state dict's memory already may have it from an earlier move.
        if how is not SAME or id(target) not in plan.outcome:
            plan.outcome[id(target)] = how
    _exchange_impls(new, undo)
    _agree(plan, back_up)
    _write_and_exchange(written, old, undo, back_up)


def _agree(plan: Plan, back_up: bool) -> None:
    """Before what cannot be undone: raise if another rank cannot do it."""
    if plan.sharding is not None and not back_up:
        plan.sharding.agree()


def _copy(source: Tensor, like: Tensor, device: torch.device) -> Tensor:
    # NB: empty_like would close the gaps that the strides of a part may leave.
    data = torch.empty_strided(
        like.size(), like.stride(), dtype=like.dtype, device=device
    )
    with torch._C._EnableTorchFunction():
        return data.copy_(source)


def _let_follow(plan: Plan, whole: Tensor, data: Tensor, pairs: _Pairs) -> None:
    """Let a sharded tensor, too, be where its part is."""
    pairs.wholes.append(whole)
    if plan.sharding is not None and pairs.targets[-1].is_meta:
        like = plan.sharding.over(whole, data)
        if like is None:
            pairs.wholes.pop()
        else:
            pairs.likes.append(like)


class _Pairs:
    """Targets, and the data for each.

    ``wholes`` are the sharded tensors of which some targets are parts, ``likes`` what they
    become if these were on meta.
    """

    def __init__(self) -> None:
        self.targets: list[Tensor] = []
        self.data: list[Tensor] = []
        self.wholes: list[Tensor] = []
        self.likes: list[Tensor] = []

    def add(self, target: Tensor, data: Tensor) -> None:
        self.targets.append(target)
        self.data.append(data)

    def give_memory(self, group: list[Tensor], device: torch.device) -> None:
        """Zeros for tensors that share a storage on meta."""
        self.targets += group
        self.data += storage_like(group, device)


def _exchange_impls(new: _Pairs, undo: Undo) -> None:
    if new.targets:
        targets = new.targets + new.wholes
        impls = impls_for(new.targets, new.data) + new.likes
        undo.append((swap_back_all, (targets, impls)))
        swap_all(targets, impls)


def _write_and_exchange(
    written: _Pairs, exchanged: _Pairs, undo: Undo, back_up: bool
) -> None:
    targets = exchanged.targets
    if back_up:
        undo += [(target.copy_, (target.clone(),)) for target in written.targets]
        undo.append((_set_all, (targets, [target.data for target in targets])))
    steps = chain(
        map(Tensor.copy_, written.targets, written.data),
        # NB: from here on nothing can fail, and the old memory goes.
        () if back_up else map(list.clear, [undo]),
        map(_set_data, targets, exchanged.data),
        map(_increment_versions, [targets + exchanged.wholes]),
    )
    deque(steps, maxlen=0)


def _set_all(targets: list[Tensor], data: list[Tensor]) -> None:
    deque(map(_set_data, targets, data), maxlen=0)
    _increment_versions(targets)


_set_data = Tensor.data.__set__  # type: ignore[attr-defined]
# As copy_ does, so that backward through an older graph says what is wrong.
_increment_versions = torch._C._increment_version
