"""An error of one rank becomes an error of all, with its cause, before anyone acts on what has failed.

Law: of the ranks that meet in an agreement all go on, or all raise, and who raises says which rank failed, and why.
It takes the store of the default process group and no collective; so it works on any backend, for any ranks, and while
the rank that failed is somewhere else.

What this does not know: that a rank hangs, or was killed. The others wait for it as long as the timeout of the default
process group says, and then name it.
"""

from __future__ import annotations

import multiprocessing.util
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist


__all__ = ["RankError", "agree", "fail_together", "note"]

_PREFIX = "torch.distributed.errors"
_GO_ON = "all are here"
_MOST_CHARACTERS = 4000
_LONGEST_PAUSE = 0.2  # seconds between two looks at the store
_meetings: list[_Meeting] = []
_will_tell: list[Any] = []  # stores that are told when this process ends


class RankError(RuntimeError):
    """Another rank failed, or did not come."""


class fail_together:
    r"""Context manager that raises on all ranks if one of them raises in it.

    On the rank that failed that is the exception itself, on the others a :class:`RankError` with its text. They learn
    of it at the end of the context, or at the next ``load_state_dict(reuse_tensors=True)`` of a sharded module in it,
    which then loads nothing. All ranks of the group have to enter the context, and to load as many sharded modules in
    it. Without a process group, or in a group of one rank, it does nothing.

    Args:
        group (ProcessGroup, optional): whose ranks fail together. Default: the default group

    Raises:
        RankError: if another rank raises in the context, ends, or does not come to the end of it within the timeout of
            the default process group

    Example::

        >>> # xdoctest: +SKIP("several processes")
        >>> with fail_together():
        ...     state_dict = torch.load("model.pt", lazy=True)
        ...     model.load_state_dict(state_dict, reuse_tensors=True)
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    def __enter__(self) -> None:
        ranks = dist.get_process_group_ranks(self._group) if _is_initialized() else []
        meeting = _Meeting(ranks)
        meeting.begin()
        _meetings.append(meeting)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _meetings.pop().end(error)


def agree(ranks: Sequence[int], error: BaseException | None = None) -> None:
    """Return if none of ``ranks`` has an error; all of them have to call this.

    Args:
        ranks: of the default process group, in the same order on each of them
        error: what failed here, which the caller raises

    Raises:
        RankError: if ``error`` is ``None``, and another rank has one, ends, or does not come within the timeout of the
            default process group
    """
    # NB: who failed before it came here says so at the end of the context.
    _meeting_of(ranks).agree(error)


def _meeting_of(ranks: Sequence[int]) -> _Meeting:
    """Where ``ranks`` agree: the innermost context that all of them are in, or a meeting of their own."""
    around = [meeting for meeting in _meetings if meeting.ranks.issuperset(ranks)]
    return around[-1] if around else _Meeting(ranks)


def note(error: BaseException) -> None:
    """Should this process end, let those who wait for it in an agreement know why it does not come."""
    if not _is_initialized() or dist.get_world_size() == 1:
        return
    # NB: whatever the store says, what failed is what the caller has to see.
    with suppress(Exception):
        store, rank = _store(), dist.get_rank()
        _Log(store, "failures").append(f"{rank} {_describe(error)}")
        default = dist.distributed_c10d._get_default_store()
        if not any(told is default for told in _will_tell):
            _will_tell[:] = [default]
            # Runs at the end of any process, those of multiprocessing too.
            end = _Log(store, "ends").append
            multiprocessing.util.Finalize(None, end, (str(rank),), exitpriority=0)


class _Meeting:
    """Ranks that agree, again and again."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = frozenset(ranks)
        self._context: str | None = None
        self._count = 0

    def _counts(self) -> bool:
        """Whether this rank has a vote, and others too."""
        return (
            len(self.ranks) > 1 and _is_initialized() and dist.get_rank() in self.ranks
        )

    def begin(self) -> None:
        """Those that agree until :meth:`end` are in a context, which may fail as a whole."""
        if self._counts():
            self._context = _next_name(self.ranks)

    def end(self, error: BaseException | None) -> None:
        """Agree for the last time, whatever was agreed on before."""
        if self._context is not None and _is_initialized():
            _decide(_Ballot(self.ranks, self._context), error)

    def agree(self, error: BaseException | None) -> None:
        """See :func:`agree`."""
        if not self._counts():
            return
        if self._context is None:
            _decide(_Ballot(self.ranks, _next_name(self.ranks)), error)
        else:
            self._count += 1
            name = f"{self._context}/{self._count}"
            _decide(_Ballot(self.ranks, name, self._context), error)


def _next_name(ranks: frozenset[int]) -> str:
    # NB: counted by who votes, since another one may be ahead by a failure.
    name = "_".join(map(str, sorted(ranks)))
    return f"{name}/{_store().add(f'{name}/turns of {dist.get_rank()}', 1)}"


def _decide(ballot: _Ballot, error: BaseException | None) -> None:
    if error is None:
        ballot.vote()
        return
    with suppress(Exception):
        ballot.veto(dist.get_rank(), f"failed: {_describe(error)}")


class _Ballot:
    """One decision: to go on, by the last rank that comes, or not to, by the first one that fails."""

    def __init__(
        self, ranks: frozenset[int], name: str, around: str | None = None
    ) -> None:
        self._store = _store()
        self._ranks = sorted(ranks)
        self._me = dist.get_rank()
        self._name = name
        self._around = around and f"{around}/decision"
        self._decision = f"{self._name}/decision"
        self._failures = _Log(self._store, "failures")
        self._ends = _Log(self._store, "ends")
        self._noted: dict[int, str] = {}

    def vote(self) -> None:
        """Wait for the decision, and raise if it is not to go on."""
        store = self._store
        try:
            store.set(f"{self._name}/{self._me}", "here")
            if store.add(f"{self._name}/votes", 1) == len(self._ranks):
                store.compare_set(self._decision, "", _GO_ON)
            try:
                self._wait()
            except dist.DistError:
                raise
            except BaseException as error:  # say, of a signal's handler
                with suppress(Exception):
                    self.veto(self._me, f"failed: {_describe(error)}")
                raise
            decision = store.get(self._decision).decode()
        except dist.DistError as lost:
            self._lost(lost)
        if decision != _GO_ON:
            raise RankError(decision)

    def veto(self, rank: int, text: str) -> None:
        """Unless it is decided, decide not to go on, for what ``rank`` has done."""
        self._store.compare_set(self._decision, "", f"Rank {rank} {text}")

    def _wait(self) -> None:
        seconds = self._store.timeout.total_seconds()
        deadline, pause = time.monotonic() + seconds, 0.001
        while not self._store.check([self._decision]):
            if self._around is not None and self._store.check([self._around]):
                text = self._store.get(self._around).decode()
                self._store.compare_set(self._decision, "", text)
                continue
            self._look_for_failures()
            if time.monotonic() > deadline:
                for rank in filter(self._is_missing, self._ranks):
                    before = self._before(rank)
                    self.veto(rank, f"did not come within {seconds:g} s{before}")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _look_for_failures(self) -> None:
        for entry in self._failures.news():
            rank, _, text = entry.partition(" ")
            self._noted[int(rank)] = text
        for ended in map(int, self._ends.news()):
            if ended in self._ranks and self._is_missing(ended):
                self.veto(ended, f"ended before it came{self._before(ended)}")

    def _is_missing(self, rank: int) -> bool:
        return not self._store.check([f"{self._name}/{rank}"])

    def _before(self, rank: int) -> str:
        return (
            f"; before, it failed: {self._noted[rank]}" if rank in self._noted else ""
        )

    def _lost(self, lost: Exception) -> NoReturn:
        known = [f"Rank {r} failed: {text}" for r, text in self._noted.items()]
        text = "; ".join(["The store of the process group is gone", *known])
        raise RankError(f"{text} ({_describe(lost)})") from lost


class _Log:
    """A list in the store."""

    def __init__(self, store: Any, name: str) -> None:
        self._store = store
        self._name = name
        self._read = 0

    def append(self, entry: str) -> None:
        """Also when the store may be gone."""
        with suppress(Exception):
            last = self._store.add(f"{self._name}/length", 1)
            self._store.set(f"{self._name}/{last}", entry)

    def news(self) -> list[str]:
        """What has come since the last call."""
        entries = []
        while self._store.check([f"{self._name}/{self._read + 1}"]):
            self._read += 1
            entry: bytes = self._store.get(f"{self._name}/{self._read}")
            entries.append(entry.decode())
        return entries


def _is_initialized() -> bool:
    """Whether there are other ranks to talk to."""
    return (
        dist.is_available()
        and dist.is_initialized()
        and dist.get_backend() not in ("fake", "mpi")
    )


def _store() -> Any:
    c10d = dist.distributed_c10d
    return c10d.PrefixStore(_PREFIX, c10d._get_default_store())


def _describe(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:_MOST_CHARACTERS]}..."
    return text
