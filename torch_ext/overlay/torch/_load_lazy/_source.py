"""Where the bytes of a checkpoint come from.

A ``Source`` fills buffers with bytes of one file. Law: a read gives the bytes that the file had
when it was opened, all that were asked for, or raises an error that names file and
offset; reads from several threads, and in forked processes, do not disturb each other.

``FileSource`` reads a local file by its path: it keeps no descriptor open, and can be pickled,
until torch.save gives its path to another file.
``ObjectSource`` reads what has no path, and moves its position.

Limits: a change within the resolution of the file system's clock that keeps the size goes
unnoticed, as does a change of an object's content that does not shorten it. A file object that
is not one of Python's own, and shares its position with a forked process, is not safe there.
"""

import io
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from os.path import samestat
from typing import Any, BinaryIO, NoReturn, Protocol, TypeAlias

from torch._load_lazy import _live
from torch._load_lazy._locks import Pool


_locks = Pool()


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
        self._kept: BinaryIO | None = None
        _live.add(self, status, keep=FileSource._keep)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # NB: the file is open in another process, too, and torch.save has to know of it.
        with suppress(OSError):
            _live.add(self, os.stat(self._path), keep=FileSource._keep)

    def read_into(self, start: int, out: memoryview) -> None:
        """Fills ``out`` with the bytes from offset ``start`` on. See ``Source``."""
        with self._opened(start) as file:
            self._check(file, start)
            _fill(_reader_of_file(file, self._base + start), out, self.name, start)
            self._check(file, start)

    def _opened(self, start: int) -> AbstractContextManager[BinaryIO]:
        if self._kept is not None:
            return nullcontext(self._kept)
        try:
            file = open(self._path, "rb", buffering=0)
        except FileNotFoundError:
            _changed(self.name, "no file of that name", start)
        if hasattr(os, "posix_fadvise"):
            # NB: read-ahead may be more than what is asked for, and nobody asked for it.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        return file

    def _keep(self) -> None:
        """Reads on from the same file, whatever its path leads to from now on."""
        with suppress(FileNotFoundError):  # it was moved, and can't be read anyway
            self._kept = self._kept or open(self._path, "rb", buffering=0)

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
        self._is_local = _is_local(file)
        self._ticket = _locks.ticket()

    def read_into(self, start: int, out: memoryview) -> None:
        """Fills ``out`` with the bytes from offset ``start`` on. See ``Source``."""
        if getattr(self._file, "closed", False):
            _changed(self.name, "a closed file", start)
        with _locks[self._ticket]:
            _fill(self._reader(self._base + start), out, self.name, start)

    def _reader(self, at: int) -> "_Reader":
        if self._is_local:
            return _reader_of_file(self._file, at)
        self._file.seek(at)
        return _reader_of_object(self._file)

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
    if _is_local(file):
        # It may be of no name.
        with suppress(OSError, AttributeError, TypeError):
            status, path = os.fstat(file.fileno()), os.fsdecode(file.name)
            if samestat(os.stat(path), status):
                return FileSource(path, status, file.tell())
    return source


def _is_local(file: Any) -> bool:
    """Whether a file object is one of Python's own over a local file, as it is."""
    # NB: exact types, since another one may give other bytes than the file has.
    if type(file) in (io.BufferedReader, io.BufferedRandom):
        file = file.raw
    return type(file) is io.FileIO and stat.S_ISREG(os.fstat(file.fileno()).st_mode)


# Fills a buffer, of which so many bytes have been read before, or the beginning of it.
_Reader: TypeAlias = Callable[[int, memoryview], int]


def _reader_of_file(file: BinaryIO, start: int) -> _Reader:
    if hasattr(os, "preadv"):  # which leaves the position to other threads
        return lambda done, out: os.preadv(file.fileno(), [out], start + done)
    file.seek(start)
    return _reader_of_object(file)


def _reader_of_object(file: Any) -> _Reader:
    readinto = getattr(file, "readinto", None)
    if readinto is not None:
        return lambda _, out: readinto(out)

    def read_to(_: int, out: memoryview) -> int:
        part = file.read(len(out))
        out[: len(part)] = part
        return len(part)

    return read_to


def _fill(reader: _Reader, out: memoryview, name: str, start: int) -> None:
    done = 0
    while done < len(out):
        count = reader(done, out[done:])
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
