"""A file that is being loaded: its bytes, now and later, and the call that asks for it."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import _utils
from torch._load_lazy import _invariants
from torch._load_lazy._map import Mapping
from torch._load_lazy._request import NotLazy, Request
from torch._load_lazy._screen import Refused, screen
from torch._load_lazy._source import ObjectSource, read, Source
from torch.serialization import _serialization_tls


# Of the format of torch.save before zip files.
_PICKLES = 5
_MAX_PICKLES = 64 << 20

# What torch's own unpickler raises, besides UnpicklingError, if a pickle makes no sense.
SIGNS_OF_DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError),
    *(RuntimeError, TypeError, ValueError, struct.error),
)


@contextmanager
def forgotten_if_failed() -> Iterator[None]:
    """Context after which torch keeps nothing of a load that raised in it.

    NB: else the next load would have its ``map_location``, and check its sparse tensors.
    """
    before, count = _serialization_tls.map_location, len(_sparse_tensors())
    try:
        yield
    except BaseException:
        del _sparse_tensors()[count:]
        raise
    finally:
        _serialization_tls.map_location = before


def _sparse_tensors() -> list[torch.Tensor]:
    """Those that torch has rebuilt and will check at the end of a load."""
    # torch 2.15 on keeps them by thread.
    get = getattr(_utils, "_get_sparse_tensors_to_validate", None)
    found: list[torch.Tensor] = get() if get else _utils._sparse_tensors_to_validate
    return found


@dataclass
class OpenFile:
    """One open file.

    Attributes:
        request: what asks for it
        file: a seekable file object, at the start of what is to be loaded
        source: the same bytes, for reads after the load
        mapping: the same bytes as memory; ``None`` if they can't be mapped
    """

    request: Request
    file: Any
    source: Source
    mapping: Mapping | None

    def __post_init__(self) -> None:
        self._index = ObjectSource(self.file, self.source.name)
        self._base = self.file.tell()
        self.name = self.source.name
        self.size = self._index.size

    def read(self, start: int, size: int) -> bytes:
        """Returns ``size`` bytes from offset ``start`` on, now."""
        if not 0 <= start <= start + size <= self.size:
            self.bad(f"{size} bytes", f"a file of {self.size} bytes", start)
        return read(self._index, start, size)

    def rewound(self) -> Any:
        """Returns the file object, at the start again."""
        self.file.seek(self._base)
        return self.file

    def leave_at(self, end: int) -> None:
        """Puts the file object where torch.load, too, leaves it: after what was loaded."""
        if not self.request.is_path:
            self.file.seek(self._base + end)

    def eager(self) -> Any:
        """Returns what torch.load makes of the file, all of it read."""
        if self.request.lazy_only:
            raise NotLazy
        if self.request.weights_only and self.read(0, min(1, self.size)) == b"\x80":
            self._screen()
        if not self.request.is_path:
            self.rewound()
        with forgotten_if_failed():
            try:
                result = self.request.eager()
            except SIGNS_OF_DAMAGE as error:
                is_torchs = isinstance(error, RuntimeError)
                is_known = self.request.weights_only and not is_torchs
                if not (is_known or _invariants.is_of_rebuild(error)):
                    raise
                got = f"one on which torch.load raised {type(error).__name__}: {error}"
                self.bad("a state dict", got, 0)
        _invariants.check(result, lambda expected, got: self.bad(expected, got, 0))
        return result

    def _screen(self) -> None:
        try:
            screen(self.read(0, min(self.size, _MAX_PICKLES)), self.size, _PICKLES)
        except Refused as refusal:
            self.bad("pickles of a state dict", str(refusal), 0)

    def bad(self, expected: str, got: str, offset: int, remedy: str = "") -> NoReturn:
        """Raises the error that says what is wrong with the file at ``offset``."""
        raise RuntimeError(
            f"Expected {self.name} to have {expected}, got {got} at offset {offset}. "
            f"({remedy or 'Is the file damaged, or still being written?'})"
        )
