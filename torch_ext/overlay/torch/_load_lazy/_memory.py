"""Pages from the system as buffers: those of a file, mapped privately, and a process' own.

A buffer's pages go back to the system with its last use; no file descriptor stays open.
Law: writes never reach a file.
"""

import ctypes
import mmap
import os
import platform
import signal
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


# Not named by Python's mmap. Without it the kernel's accounting refuses a private
# writable mapping of a file larger than memory (pytorch #127001).
_MAP_NORESERVE = {"darwin": 0x40}.get(
    sys.platform, 0x40 if platform.machine().startswith("ppc") else 0x4000
)
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_PIECE = 2 << 20  # how much is moved at a time
_SIGACTION = 256  # bytes that are enough for struct sigaction
_FAILED = ctypes.c_void_p(-1).value

# Whether `detach` can be.
CAN_DETACH = sys.platform == "linux"


def of_file(fileno: int, size: int, name: str) -> Any:
    """Returns a buffer over the first ``size`` bytes of an open file."""
    if sys.platform == "win32":
        return memoryview(mmap.mmap(fileno, size, access=mmap.ACCESS_COPY))
    return memoryview(_pages(_map(mmap.MAP_PRIVATE, fileno, size, name), size))


def own(size: int) -> Any:
    """Returns a buffer of ``size`` bytes over zeroed pages."""
    if sys.platform == "win32":
        return memoryview(mmap.mmap(-1, size))
    address = _map(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, size, "memory")
    return memoryview(_pages(address, size))


def ask_for_huge_pages(buffer: Any, start: int, end: int) -> None:
    """Asks for large pages for a part, not used yet, of a buffer from :func:`own`."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        _libc().madvise(ctypes.addressof(buffer.obj) + start, end - start, advice)


def detach(pages: Any, parts: Iterable[memoryview]) -> None:
    """Puts memory of its own, of the same contents, in the place of the file's pages that ``parts`` lie in.

    Other threads go on: one that reads sees the same bytes at any moment, and one that writes waits for less than a
    millisecond. See Note [Moving memory that is in use].
    """
    with detaching, _writers_wait():
        for start, end in _page_runs(pages, parts):
            size = end - start
            copy = _map(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, size, "memory")
            # NB: in order, so that the system joins the pieces to one mapping again.
            for done in range(0, size, _PIECE):
                _move(copy + done, start + done, min(_PIECE, size - done))


# Note [Moving memory that is in use]
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# What another thread writes between the copy of a piece and its exchange would be lost. So a piece is read-only
# meanwhile, and SIGSEGV, which a write then raises, is handled by libc's usleep: called with the number of the signal,
# it sleeps for 11 microseconds and returns, and the thread tries to write again, until the piece is exchanged. No
# function of our own could be called there, since a thread that writes may not have the GIL. A real fault, meanwhile,
# is repeated until the former handler is back. A system call that writes to a piece fails with EFAULT.
detaching = threading.Lock()


@contextmanager
def _writers_wait() -> Iterator[None]:
    # NB: of struct sigaction, which differs between systems, only its first field is used.
    former, handler = (ctypes.create_string_buffer(_SIGACTION) for _ in range(2))
    usleep = ctypes.cast(_libc().usleep, ctypes.c_void_p)
    ctypes.memmove(handler, ctypes.byref(usleep), ctypes.sizeof(usleep))
    _libc().sigaction(signal.SIGSEGV, handler, former)
    try:
        yield
    finally:
        _libc().sigaction(signal.SIGSEGV, former, None)


def _move(copy: int, address: int, size: int) -> None:
    _libc().mprotect(address, size, mmap.PROT_READ)
    ctypes.memmove(copy, address, size)
    flags = _MREMAP_MAYMOVE | _MREMAP_FIXED
    if _libc().mremap(copy, size, size, flags, address) == _FAILED:
        error = ctypes.get_errno()
        _libc().mprotect(address, size, mmap.PROT_READ | mmap.PROT_WRITE)
        raise OSError(error, f"cannot move {size} bytes: {os.strerror(error)}")


def _page_runs(pages: Any, parts: Iterable[memoryview]) -> list[tuple[int, int]]:
    """Returns the addresses of the pages that ``parts`` lie in, in runs."""
    first, page = ctypes.addressof(pages), mmap.PAGESIZE
    last = first + -(-ctypes.sizeof(pages) // page) * page
    runs: list[tuple[int, int]] = []
    for start, size in sorted(map(_extent, parts)):
        start, end = start // page * page, -(-(start + size) // page) * page
        if runs and start <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(end, runs[-1][1])
        else:
            runs.append((start, end))
    return [(max(start, first), min(end, last)) for start, end in runs]


def _extent(part: memoryview) -> tuple[int, int]:
    return ctypes.addressof(ctypes.c_char.from_buffer(part)), part.nbytes


@cache
def _libc() -> Any:
    # NB: Python's mmap keeps a duplicate of the descriptor open for as long as it lives
    # (before trackfd=False in Python 3.13), so that 1,000 open checkpoints would meet the
    # limit on open files. libc's does not.
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = pointer
    libc.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_int64]
    libc.munmap.argtypes = [pointer, size]
    libc.madvise.argtypes = [pointer, size, number]
    if CAN_DETACH:
        libc.mremap.restype = pointer
        libc.mremap.argtypes = [pointer, size, size, number, pointer]
        libc.mprotect.argtypes = [pointer, size, number]
        libc.sigaction.argtypes = [number, pointer, pointer]
    return libc


def _map(flags: int, fileno: int, size: int, name: str) -> int:
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    flags |= _MAP_NORESERVE
    address = _libc().mmap(None, size, protection, flags, fileno, 0)
    if address == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, f"cannot map {size} bytes: {os.strerror(error)}", name)
    return int(address)


def _pages(address: int, size: int) -> Any:
    pages = (ctypes.c_char * size).from_address(address)
    # NB: not at exit, where tensors may still be in use by other threads.
    weakref.finalize(pages, _libc().munmap, address, size).atexit = False
    return pages
