"""Threads that are started inside a context are inside it, too."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeAlias


class _Inherited(Protocol):
    def entered(self) -> AbstractContextManager[object]: ...


_Current: TypeAlias = Callable[[], _Inherited | None]

_open = 0  # contexts in this process
_lock = threading.Lock()
_stock: Callable[[threading.Thread], None]
_ours: Callable[[threading.Thread], None]


@contextmanager
def inherit(current: _Current) -> Iterator[None]:
    """Until it is left, a thread enters what is ``current()`` where it is started."""
    global _open, _stock, _ours
    with _lock:
        if not _open:
            # NB: whoever has replaced it before is called, and is put back afterwards.
            _stock = threading.Thread.start
            _ours = _starts_inside(_stock, current)
            threading.Thread.start = _ours  # type: ignore[assignment,method-assign]
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if not _open and threading.Thread.start is _ours:
                threading.Thread.start = _stock  # type: ignore[assignment,method-assign]


def _starts_inside(
    stock: Callable[[threading.Thread], None], current: _Current
) -> Callable[[threading.Thread], None]:
    def start(thread: threading.Thread) -> None:
        context = current()
        if context is not None:
            _run_inside(thread, context)
        stock(thread)

    return start


def _run_inside(thread: threading.Thread, context: _Inherited) -> None:
    before, run = vars(thread).get("run"), thread.run

    def run_inside() -> None:
        if before is None:
            del thread.run
        else:
            thread.run = before  # type: ignore[method-assign]
        with context.entered():
            run()

    thread.run = run_inside  # type: ignore[method-assign]
