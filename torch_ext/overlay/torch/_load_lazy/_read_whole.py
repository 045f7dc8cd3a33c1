"""Reads a whole file into memory of its own, instead of mapping it.

Several threads read pieces at the offsets that these have in the file, so that every record
lies as it would in a mapping. Law: the bytes are those of one moment, as far as size and
time of change can tell, or there is an error.

All tensors of a file share this memory: it ends with the last one of them.
"""

import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO, NoReturn

from torch._load_lazy import _memory


_PIECE = 8 << 20
_THREADS = 4  # more do not pay, with memory as the limit
_LARGE = 64 << 20  # from so many bytes on it is worth to try huge pages
_PROBES = 16


def read(file: BinaryIO, size: int) -> Any:
    """Returns a writable buffer of the first ``size`` bytes of an open file.

    Raises:
        RuntimeError: if the file changes while it is read, or has fewer bytes
    """
    before = os.fstat(file.fileno())
    buffer = _memory.own(_round_up(size))
    if hasattr(os, "preadv"):
        _read_pieces(file, size, buffer)
    else:
        _read_in_order(file, size, buffer.cast("B"))
    after = os.fstat(file.fileno())
    if (size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        _changed(file, f"a change, to {after.st_size} bytes,", 0)
    return buffer


def _read_pieces(file: BinaryIO, size: int, buffer: Any) -> None:
    fileno, view = file.fileno(), buffer.cast("B")
    direct = -1 if _is_cached(fileno, size) else _open_direct(fileno)
    pages = _Pages(buffer, size >= _LARGE and _has_room_for_huge_pages(size))

    def read_piece(start: int) -> None:
        end = min(start + _PIECE, size)
        with pages.of(start, _round_up(end)):
            read_range(start, end)

    def read_range(start: int, end: int) -> None:
        fd = direct if direct >= 0 else fileno
        while start < end:
            # NB: past a page cache, sizes are whole pages, the last one too.
            out = view[start : end if fd == fileno else _round_up(end)]
            try:
                count = os.preadv(fd, [out], start)
            except OSError:
                if fd == fileno:
                    raise
                fd = fileno  # the file system wants other alignments
                continue
            if not count:
                _changed(file, "the end of the file", start)
            start += count

    starts = range(0, size, _PIECE)
    try:
        if len(starts) == 1:
            read_piece(0)
            return
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
            list(threads.map(read_piece, starts))
    finally:
        if direct >= 0:
            os.close(direct)


def _read_in_order(file: BinaryIO, size: int, view: memoryview) -> None:
    file.seek(0)
    start = 0
    while start < size:
        count = file.readinto(view[start : min(start + _PIECE, size)])  # type: ignore[attr-defined]
        if not count:
            _changed(file, "the end of the file", start)
        start += count


def _round_up(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


# Note [Huge pages]
# ~~~~~~~~~~~~~~~~~
# To make a page costs as much as to copy it, so that memory in huge pages is filled several
# times as fast; but not on a virtual machine that hands free memory back to its host, in
# blocks that are just the size of a huge page: there it is several times as slow, for
# those blocks that have been handed back. So each piece is read into pages of the size that
# took less time the last time.
class _Pages:
    """Asks for huge pages for a piece of ``buffer`` if these are the faster ones."""

    def __init__(self, buffer: Any, is_large: bool) -> None:
        self._buffer = buffer
        self._is_large = is_large
        # Of the last piece in huge pages, and of the last one in small ones.
        self._seconds = {True: 0.0, False: 0.0}

    @contextmanager
    def of(self, start: int, end: int) -> Iterator[None]:
        """Context in which the piece is read, for the first time."""
        huge = self._is_large and self._seconds[True] <= self._seconds[False]
        if huge:
            _memory.ask_for_huge_pages(self._buffer, start, end)
        before = time.perf_counter()
        yield
        self._seconds[huge] = time.perf_counter() - before


def _has_room_for_huge_pages(size: int) -> bool:
    # NB: where free memory is short or in pieces, the system moves pages about to make
    # large ones: seconds instead of tenths. Twice the size, since the file may be cached
    # in the meantime.
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
    except (AttributeError, OSError, ValueError):
        return False
    return free >= 2 * size


# Note [Direct reads]
# ~~~~~~~~~~~~~~~~~~~
# A file that is in the page cache is best copied from there. One that is not would be
# read into the cache first, and both copies compete for memory; reading past the
# cache is faster. Reads that may not wait tell which it is, by a few pages of the file.
def _is_cached(fileno: int, size: int) -> bool:
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    cached = 0
    for i in range(_PROBES):
        try:
            cached += os.preadv(
                fileno, [bytearray(1)], size * i // _PROBES, os.RWF_NOWAIT
            )
        except BlockingIOError:
            pass
        except OSError:  # the file system cannot tell
            return True
    return cached > _PROBES // 2


def _open_direct(fileno: int) -> int:
    """Returns a descriptor of the same file that reads past the page cache, or -1."""
    if not hasattr(os, "O_DIRECT"):
        return -1
    try:
        return os.open(f"/proc/self/fd/{fileno}", os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return -1


def _changed(file: BinaryIO, got: str, offset: int) -> NoReturn:
    raise RuntimeError(
        f"Expected {file.name} to stay as it is while it is read, got {got} at offset "
        f"{offset}. (Is the file damaged, or still being written?)"
    )
