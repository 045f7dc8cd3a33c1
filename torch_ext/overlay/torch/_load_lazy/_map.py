"""Extents of a file as memory: the one place where bytes on disk become storages.

``Mapping`` maps a whole file once, privately: writes go to copies of the touched pages and
never reach the file. Nothing is read, and no memory is reserved, before a page is touched.
Law: the mapping ends with the last tensor over it, and no file descriptor stays open.

A lease (see ``_lease``) lets what is mapped outlive a change of the file. Limits: without one,
when someone else truncates the mapped file, touching what is gone ends the process with
SIGBUS, and what someone writes into it shows up in pages not touched so far. With
``torch.utils.serialization.config.load.lazy_mode = "read"`` the file is read instead.
"""

import os
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import torch
from torch._load_lazy import _live, _memory, _read_whole
from torch._load_lazy._zip import Extent
from torch.utils.serialization import config


class Mapping:
    """A private mapping of ``file``, made at the first use.

    Args:
        file: a regular file, open for reading; may be closed after the first use
        size: how many bytes of it to map
        mode: "map" or "read"; by default, what the config says
    """

    def __init__(self, file: BinaryIO, size: int, mode: str | None = None) -> None:
        self._file = file
        self._size = size
        self._make = _reader_of(mode or config.load.lazy_mode)
        self._buffer: Any = None
        self._parts = Parts()

    @property
    def buffer(self) -> Any:
        """The whole file, as a writable buffer whose end ends the mapping."""
        if self._buffer is None:
            self._buffer = self._make(self._file, self._size, self._parts)
        return self._buffer

    def storage(self, extent: Extent) -> torch.UntypedStorage:
        """Returns a storage of exactly the bytes of ``extent``, at their place."""
        start, size = extent
        if not size:
            # As torch's reader does it: not resizable.
            empty: torch.UntypedStorage = torch.UntypedStorage(0, device="cpu")[:0]
            return empty
        part = self.buffer[start : start + size]
        self.use([part])
        return torch.frombuffer(part, dtype=torch.uint8).untyped_storage()

    def use(self, parts: Iterable[memoryview]) -> None:
        """Notes slices of the buffer that storages lie in: those alone are moved when the file is changed."""
        self._parts.extend(map(weakref.ref, parts))
        if self._parts.are_moved:
            raise RuntimeError(
                f"Expected {self._file.name} to be as it was when it was opened, got one that is being changed. "
                "(Is it still being written?)"
            )


class Parts(list[weakref.ref[memoryview]]):
    """The slices of a buffer that storages lie in, as long as those live.

    Attributes:
        are_moved: whether they have been moved to memory of their own
        end_lease: ends the buffer's lease on the file
    """

    are_moved = False
    end_lease: Callable[[], Any] | None = None

    def move(self, pages: Any) -> None:
        """Lets the file be changed: moves the slices of ``pages`` that are in use."""
        self.are_moved = True
        parts = [ref() for ref in self]
        _memory.detach(pages, [part for part in parts if part is not None])
        if self.end_lease is not None:
            self.end_lease()


def _reader_of(mode: str) -> Callable[[BinaryIO, int, Parts], Any]:
    if mode == "map":
        return _map
    if mode == "read":
        return lambda file, size, _: _read_whole.read(file, size)
    raise ValueError(
        "Expected torch.utils.serialization.config.load.lazy_mode to be 'map' or 'read', "
        f"got {mode!r}."
    )


def _map(file: BinaryIO, size: int, parts: Parts) -> Any:
    buffer = _memory.of_file(file.fileno(), size, file.name)
    if sys.platform != "win32":  # which refuses to truncate a mapped file
        detach = parts.move if _memory.CAN_DETACH else None
        _live.add(buffer.obj, os.fstat(file.fileno()), detach=detach)
    if _memory.CAN_DETACH and config.load.lazy_leases:
        from torch._load_lazy import _lease

        parts.end_lease = _lease.protect(buffer.obj, file)
    return buffer
