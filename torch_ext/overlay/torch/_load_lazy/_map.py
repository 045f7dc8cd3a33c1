"""Extents of a file as memory: the one place where bytes on disk become storages.

``Mapping`` maps a whole file once, privately: writes go to copies of the touched pages and
never reach the file. Nothing is read, and no memory is reserved, before a page is touched.
Law: the mapping ends with the last tensor over it, and no file descriptor stays open.

Limits: when someone else truncates the mapped file, touching what is gone ends the process
with SIGBUS, and what someone writes into it shows up in pages not touched so far.
"""

import ctypes
import mmap
import os
import platform
import sys
import weakref
from typing import Any, BinaryIO

import torch
from torch._load_lazy._zip import Extent


# Not named by Python's mmap. Without it the kernel's accounting refuses a private
# writable mapping of a file larger than memory (pytorch #127001).
_MAP_NORESERVE = {"darwin": 0x40}.get(
    sys.platform, 0x40 if platform.machine().startswith("ppc") else 0x4000
)


class Mapping:
    """A private mapping of ``file``, made at the first use.

    Args:
        file: a regular file, open for reading; may be closed after the first use
        size: how many bytes of it to map
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._buffer: Any = None

    @property
    def buffer(self) -> Any:
        """The whole file, as a writable buffer whose end ends the mapping."""
        if self._buffer is None:
            make = _map_view if sys.platform == "win32" else _map_posix
            self._buffer = make(self._file, self._size)
        return self._buffer

    def storage(self, extent: Extent) -> torch.UntypedStorage:
        """Returns a storage of exactly the bytes of ``extent``, at their place."""
        start, size = extent
        storage: torch.UntypedStorage
        if size:
            storage = torch.frombuffer(
                self.buffer, dtype=torch.uint8, count=size, offset=start
            ).untyped_storage()
        else:  # as torch's reader does it: not resizable
            storage = torch.UntypedStorage(0, device="cpu")[:0]
        return storage


def _map_view(file: BinaryIO, size: int) -> Any:
    return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY))


def _map_posix(file: BinaryIO, size: int) -> Any:
    # NB: Python's mmap keeps a duplicate of the descriptor open for as long as it lives
    # (before trackfd=False in Python 3.13), so that 1,000 open checkpoints would meet the
    # limit on open files. libc's does not.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        *[ctypes.c_int] * 3,
        ctypes.c_int64,
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
    address = libc.mmap(None, size, protection, flags, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot map {size} bytes: {os.strerror(code)}", file.name)
    pages = (ctypes.c_char * size).from_address(address)
    # NB: not at exit, where tensors may still be in use by other threads.
    weakref.finalize(pages, libc.munmap, address, size).atexit = False
    return memoryview(pages)
