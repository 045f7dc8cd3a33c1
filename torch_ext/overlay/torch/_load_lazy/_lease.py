"""Leases on mapped files: what is mapped moves to memory of its own before somebody else changes the file.

A process that holds a read lease on a file (``fcntl``, ``F_SETLEASE``) is told by a signal when anybody opens the file
for writing or truncates it, and that call waits until the lease is given back. One thread waits for the signals of all
leases, moves the mapped parts that are in use, and gives the lease back. Law: the values of mapped tensors outlive
every change of the file, as long as a lease is held.

There is no lease, and the file is as unsafe as any mapped one, where the system gives none (not Linux; a network file
system; a file of another owner, without the capability CAP_LEASE; a file that is open for writing), and for files
beyond ``torch.utils.serialization.config.load.lazy_leases``.

Limits: Who opens the file with ``O_NONBLOCK`` gets ``EWOULDBLOCK`` and has to try again. The system waits for
``/proc/sys/fs/lease-break-time`` seconds (45), and goes on: if a thread keeps the GIL for longer, or while it opens the
file for writing, the file is not protected. A forked process takes leases of its own as it starts; in the moment
before that it has none.
"""

import atexit
import fcntl
import itertools
import os
import signal
import struct
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, TypeAlias

from torch._load_lazy import _live, _memory
from torch.utils.serialization import config


_F_SETOWN_EX, _F_OWNER_TID = 15, 0  # fcntl names neither

_File: TypeAlias = tuple[int, int]  # device, inode


class _Lease:
    """A lease on one file.

    Attributes:
        descriptor: its own; the lease ends with it
        owners: tickets of the mappings that need it
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.owners: set[int] = set()
        self._before = self._contents()

    def take(self, thread: int) -> None:
        """Takes the lease, and lets its signals go to a thread."""
        fcntl.fcntl(self.descriptor, fcntl.F_SETSIG, _signal())
        owner = struct.pack("ii", _F_OWNER_TID, thread)
        fcntl.fcntl(self.descriptor, _F_SETOWN_EX, owner)
        fcntl.fcntl(self.descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)

    def is_wanted_back(self) -> bool:
        """Whether somebody waits to change the file."""
        # NB: while the lease is being broken, this is what it has to become.
        return fcntl.fcntl(self.descriptor, fcntl.F_GETLEASE) != fcntl.F_RDLCK

    def is_broken(self) -> bool:
        """Whether the system no longer waited, and the file is another one by now."""
        return self._contents() != self._before

    def _contents(self) -> tuple[int, int]:
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns

    def give_back(self) -> None:
        with suppress(OSError):
            fcntl.fcntl(self.descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        with suppress(OSError):
            os.close(self.descriptor)


# NB: reentrant, since the last tensor of a mapping may die at any moment of any thread.
_lock = threading.RLock()
_leases: dict[_File, _Lease] = {}
_tickets = itertools.count()
_watcher: "_Watcher | None" = None


def protect(pages: Any, file: BinaryIO) -> Callable[[], Any] | None:
    """Takes a lease on a file for as long as ``pages``, which are mapped from it, live; returns what ends it earlier.

    Args:
        pages: can be weakly referenced; :mod:`torch._load_lazy._live` knows how to detach them
        file: open for reading
    """
    status = os.fstat(file.fileno())
    key, ticket = (status.st_dev, status.st_ino), next(_tickets)
    with _lock:
        if not _join(key, ticket) and not _lease(key, file.fileno(), ticket):
            return None
    end = weakref.finalize(pages, _leave, key, ticket)
    end.atexit = False
    return end


def _join(key: _File, ticket: int) -> bool:
    lease = _leases.get(key)
    if lease is None:
        return False
    lease.owners.add(ticket)
    return _leases.get(key) is lease  # NB: else it ended meanwhile, see _lock


def _lease(key: _File, fileno: int, ticket: int) -> bool:
    """Takes a lease on an open file; ``False`` if there is none to be had."""
    if len(_leases) >= config.load.lazy_leases:
        return False
    lease = _Lease(os.dup(fileno))
    lease.owners.add(ticket)
    _leases[key] = lease
    try:
        lease.take(_watching())
    except OSError:
        _leases.pop(key).give_back()
        _end_if_idle()
        return False
    return True


def _leave(key: _File, ticket: int) -> None:
    with _lock:
        lease = _leases.get(key)
        if lease is None or ticket not in lease.owners:
            return
        lease.owners.discard(ticket)
        if not lease.owners:
            _leases.pop(key).give_back()
            _end_if_idle()


# The thread


class _Watcher(threading.Thread):
    """Waits for the signals of leases, as long as there are any."""

    def __init__(self) -> None:
        super().__init__(name="torch.load(lazy=True) leases", daemon=True)
        self.ready = threading.Event()

    def run(self) -> None:
        # NB: signals of the process are for its other threads.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self.ready.set()
        while True:
            # SIGIO comes where too many signals are queued.
            signal.sigwaitinfo({_signal(), signal.SIGIO})
            with _lock:
                if _watcher is not self:
                    return
                leases = list(_leases.items())
            for key, lease in leases:
                _give_back_if_wanted(key, lease)


def _give_back_if_wanted(key: _File, lease: _Lease) -> None:
    try:
        if not lease.is_wanted_back():
            return
    except OSError:  # ended meanwhile
        return
    try:
        if not lease.is_broken():  # NB: else there is nothing to read any more
            _live.move(key)
    except (MemoryError, OSError) as error:
        warnings.warn(
            f"A mapped file is changed, and its tensors cannot be moved to memory: {error}",
            RuntimeWarning,
            stacklevel=1,
        )
    with _lock:
        if _leases.get(key) is lease:
            del _leases[key]
            lease.give_back()
            _end_if_idle()


def _watching() -> int:
    """Returns the system's number of the thread that waits for signals, which runs from now on."""
    global _watcher
    if _watcher is None:
        _watcher = _Watcher()
        _watcher.start()
        _watcher.ready.wait()
        atexit.register(_at_disable)
    assert _watcher.native_id is not None
    return _watcher.native_id


def _end_if_idle() -> None:
    global _watcher
    if not _leases and _watcher is not None:
        ended, _watcher = _watcher, None
        atexit.unregister(_at_disable)
        if ended.ident is not None and ended.is_alive():
            signal.pthread_kill(ended.ident, _signal())


def _at_disable() -> None:
    """Give back all leases, also at exit: others wait for no lease of a process that ends."""
    with _lock:
        while _leases:
            _leases.popitem()[1].give_back()
        _end_if_idle()


def _signal() -> int:
    # NB: a real-time signal, which is queued. It goes to one thread, where it is blocked, and never to a handler.
    return signal.SIGRTMAX - 3


# In a forked process, which has the parent's mappings, descriptors and tables, and no other thread


def _after_fork() -> None:
    global _lock, _watcher
    _lock, _watcher = threading.RLock(), None
    inherited = list(_leases.items())
    _leases.clear()
    for key, lease in inherited:
        own = None
        with suppress(OSError):
            own = os.open(f"/proc/self/fd/{lease.descriptor}", os.O_RDONLY)
        os.close(lease.descriptor)  # NB: the lease itself stays the parent's
        if own is None:
            continue
        renewed = _Lease(own)
        renewed.owners = lease.owners
        _leases[key] = renewed
        try:
            renewed.take(_watching())
        except OSError:
            _leases.pop(key).give_back()


# NB: no process is forked with a piece of memory that is being moved.
os.register_at_fork(
    before=_memory.detaching.acquire,
    after_in_parent=_memory.detaching.release,
    after_in_child=_memory.detaching.release,
)
os.register_at_fork(after_in_child=_after_fork)
