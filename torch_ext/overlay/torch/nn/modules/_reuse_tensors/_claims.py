"""Which memory loads that are under way are about to take, so that no two of them take the same.

Law: of loads in several threads, or within a hook of one another, at most one takes a piece of
memory. The check and the claim are one step under a lock, which is never held while code from
elsewhere runs, another rank is waited for, or data are copied: loads stay parallel, and a
hook may wait for another thread that loads.

What this does not know: what a second process does with the same memory.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.modules._reuse_tensors._memory import (
    extent,
    Extents,
    may_be_taken,
    note_taken,
)


if TYPE_CHECKING:
    from torch.nn.modules._reuse_tensors._plan import Move


class _Process:
    """What the loads of one process have in common; a forked child has another one."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.finished = 0
        # NB: weakly, so that a load that was interrupted claims nothing for ever.
        self.under_way: weakref.WeakSet[Claims] = weakref.WeakSet()


_processes: dict[int, _Process] = {}


def _this_process() -> _Process:
    pid = os.getpid()
    if pid not in _processes:
        _processes.setdefault(pid, _Process())
    return _processes[pid]


class Claims:
    """What one load is about to take from its state dict, or has taken."""

    def __init__(self) -> None:
        self._finished_before = _this_process().finished
        self._sources: list[Iterable[Tensor]] = []

    def take(self, sources: Iterable[Tensor]) -> bool:
        """Claim the memory of all ``sources``; false, and none is, if another load came in between.

        Then the caller has to ask for each by :meth:`take_if_free`.
        """
        process = _this_process()
        with process.lock:
            others = process.under_way - {self}
            if others or process.finished != self._finished_before:
                return False
            self._sources.append(sources)
            process.under_way.add(self)
            return True

    def take_if_free(self, moves: list[Move], holders: list[int]) -> list[Move]:
        """Claim what no other load has; what is left belongs to others.

        Args:
            holders: for each source, how many tensors are known to hold its storage.
        """
        process = _this_process()
        with process.lock:
            claimed = Extents(
                extent(source)
                for other in process.under_way - {self}
                for sources in other._sources
                for source in sources
            )
            taken, free = [], []
            for move, known in zip(moves, holders, strict=True):
                is_free = claimed.is_free(move.start, move.end)
                if is_free and not may_be_taken(move.source, known):
                    free.append(move.source)
                else:
                    taken.append(move)
            self._sources.append(free)
            process.under_way.add(self)
            return taken

    def finish(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """The load is done: each of ``targets`` has the memory of its source."""
        process = _this_process()
        with process.lock:
            note_taken(targets, sources)
            process.finished += 1
            process.under_way.discard(self)

    def drop(self) -> None:
        """The load has failed, and is undone."""
        process = _this_process()
        with process.lock:
            process.under_way.discard(self)
