"""Where the bytes of a checkpoint come from.

A ``Source`` fills buffers with bytes of one file. Law: a read gives the bytes that the file had
when it was opened, all that were asked for, or raises an error that names file and
offset; reads from several threads, and in forked processes, do not disturb each other.

``FileSource`` reads a local file by its path: it keeps no descriptor open, and can be pickled.
``ObjectSource`` reads what has no path, and moves its position.

Limits: a change within the resolution of the file system's clock that keeps the size goes
unnoticed, as does a change of an object's content that does not shorten it.
"""

import io
import os
import stat
import threading
from contextlib import suppress
from os.path import samestat
from typing import Any, BinaryIO, NoReturn, Protocol

from torch._load_lazy import _live


class Source(Protocol):
    """The bytes of one file.

    Attributes:
        name: what errors call the file
        size: how many bytes it has
    """

    name: str
    size: int

    def read_into(self, start: int, out: memoryview) -> None:
        """Fills ``out`` with the bytes from offset ``start`` on.

        Args:
            start: offset in the file
            out: writable and flat, of bytes

        Raises:
            RuntimeError: if the file has changed, or is gone
        """


def read(source: Source, start: int, size: int) -> bytes:
    """Returns ``size`` bytes from offset ``start`` on."""
    out = bytearray(size)
    source.read_into(start, memoryview(out))
    return bytes(out)


class FileSource:
    """A local file from an offset on, opened for each read.

    Args:
        path: the file's path
        status: of the file, when its index was read; by default, as it is now
        base: offset in the file at which the source begins
    """

    def __init__(
        self, path: str, status: os.stat_result | None = None, base: int = 0
    ) -> None:
        self.name = path
        # NB: a process may change its folder between the load and a read.
        self._path = os.path.abspath(path)
        status = status or os.stat(path)
        self.size = status.st_size - base
        self._identity = _identity(status)
        self._base = base
        _live.add(self, status)

    def read_into(self, start: int, out: memoryview) -> None:
        """Fills ``out`` with the bytes from offset ``start`` on. See ``Source``."""
        try:
            file = open(self._path, "rb", buffering=0)
        except FileNotFoundError:
            _changed(self.name, "no file of that name", start)
        with file:
            self._check(file, start)
            file.seek(self._base + start)
            _fill(file, out, self.name, start)
            self._check(file, start)

    def _check(self, file: BinaryIO, start: int) -> None:
        now = _identity(os.fstat(file.fileno()))
        if now != self._identity:
            same_file = now[:2] == self._identity[:2]
            _changed(self.name, "a later one" if same_file else "another file", start)


class ObjectSource:
    """A seekable file object; offsets count from its position at the time.

    Args:
        file: has ``read``, ``seek`` and ``tell``; if it has ``readinto``, that is used
        name: what errors call it; by default, its own ``name``
    """

    def __init__(self, file: Any, name: str | None = None) -> None:
        self._file = file
        self._base: int = file.tell()
        # NB: seek need not return the position.
        file.seek(0, os.SEEK_END)
        self.size: int = file.tell() - self._base
        file.seek(self._base)
        self.name = name if name is not None else _name(file)
        self._lock = threading.Lock(), os.getpid()

    def read_into(self, start: int, out: memoryview) -> None:
        """Fills ``out`` with the bytes from offset ``start`` on. See ``Source``."""
        if getattr(self._file, "closed", False):
            _changed(self.name, "a closed file", start)
        lock, pid = self._lock
        if pid != os.getpid():  # a fork may have left it locked
            lock = threading.Lock()
            self._lock = lock, os.getpid()
        with lock:
            self._file.seek(self._base + start)
            _fill(self._file, out, self.name, start)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"Expected tensors of {self.name} to be read before they are pickled, got "
            "deferred ones of a file object. (Did you mean to load from a path?)"
        )


def object_source(file: Any) -> Source:
    """Returns the source of a file object from its position on.

    Of a local file that is to be found under its name, tensors can be read after the object is
    closed.
    """
    source = ObjectSource(file)
    # NB: exact types, since a subclass may give other bytes than the file has.
    if type(file) in (io.BufferedReader, io.BufferedRandom, io.FileIO):
        # It may be over no file, or one without a name.
        with suppress(OSError, AttributeError, TypeError):
            status, path = os.fstat(file.fileno()), os.fsdecode(file.name)
            if stat.S_ISREG(status.st_mode) and samestat(os.stat(path), status):
                return FileSource(path, status, file.tell())
    return source


def _fill(file: Any, out: memoryview, name: str, start: int) -> None:
    done, readinto = 0, getattr(file, "readinto", None)
    while done < len(out):
        if readinto is not None:
            count = readinto(out[done:])
        else:
            part = file.read(len(out) - done)
            count = len(part)
            out[done : done + count] = part
        if not count:
            _changed(name, "its end", start + done)
        done += count


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _name(file: Any) -> str:
    name = getattr(file, "name", None)
    if isinstance(name, (str, bytes)):
        return os.fsdecode(name)
    return f"<{type(file).__name__}>"


def _changed(name: str, got: str, offset: int) -> NoReturn:
    raise RuntimeError(
        f"Expected {name} to be as it was when it was opened, got {got} at offset "
        f"{offset}. (Was it changed, moved or closed while tensors of it were unread?)"
    )
