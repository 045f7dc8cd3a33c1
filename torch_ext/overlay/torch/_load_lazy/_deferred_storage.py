"""The memory of a storage that is read in parts.

Law: each byte is read at most once, before anyone sees it, so that what was written stays. A
read that fails leaves what it was to fill as unread as before.
"""

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch._load_lazy import _memory
from torch._load_lazy._deferred_bytes import Bytes
from torch._load_lazy._locks import Pool
from torch._load_lazy._ranges import Range, Ranges


_OWN_PAGES = 1 << 20  # from so many bytes on memory comes from the system, page by page

_locks = Pool()


class Storage:
    """Memory for ``contents`` on ``device``, made at the first use.

    Attributes:
        contents: what is read into it
        device: where it is
        meta: stands for it where there is none yet
    """

    def __init__(self, contents: Bytes, device: torch.device) -> None:
        self.contents = contents
        self.device = device
        self.meta = torch.UntypedStorage(contents.nbytes, device="meta")
        self._ticket = _locks.ticket()
        self._memory: torch.Tensor | None = None
        self._filled = Ranges()

    @property
    def lock(self) -> threading.RLock:
        """Held while bytes are read, and while a tensor of this storage changes its state."""
        return _locks[self._ticket]

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.contents, self.device)

    @property
    def has_memory(self) -> bool:
        """Whether anything may have been read."""
        return self._memory is not None

    @property
    def is_complete(self) -> bool:
        """Whether all bytes have been read."""
        return not self._filled.missing(0, self.contents.nbytes)

    def is_untouched(self, ranges: Iterable[Range]) -> bool:
        """Whether none of these bytes have been read, and so none written."""
        return all(self._filled.missing(*part) == [part] for part in ranges)

    def fill(self, ranges: Iterable[Range]) -> None:
        """Reads what has not been read of these bytes."""
        contents = self.contents
        for start, end in ranges:
            start = start // contents.unit * contents.unit
            end = min(-(-end // contents.unit) * contents.unit, contents.nbytes)
            for first, last in self._filled.missing(start, end):
                contents.read(first, self.memory[first:last])
                self._filled.add(first, last)

    @property
    def memory(self) -> torch.Tensor:
        """All bytes, those that have not been read undefined."""
        if self._memory is None:
            self._memory = _allocate(self.contents.nbytes, self.device)
        return self._memory

    def tensor_like(self, like: torch.Tensor) -> torch.Tensor:
        """Returns a plain tensor over the memory, of the layout of ``like``, data or no data."""
        with torch.inference_mode(like.is_inference()):
            tensor = torch.empty((0,), dtype=like.dtype, device=self.device)
            place = like.storage_offset(), like.size(), like.stride()
            tensor.set_(self.memory.untyped_storage(), *place)
            torch._C._set_conj(tensor, like.is_conj())
            torch._C._set_neg(tensor, like.is_neg())
        # NB: set_() counts as a write, which torch.load does and a conversion does not.
        uncounted = not like.is_inference() and not like._version
        return tensor.data if uncounted else tensor

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` lies in this memory."""
        if self._memory is None or not torch._C._has_storage(tensor):
            return False
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
        mine = self._memory.untyped_storage()._cdata
        return bool(tensor.untyped_storage()._cdata == mine)


def _allocate(size: int, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    if size >= _OWN_PAGES:
        return torch.frombuffer(_memory.own(size), dtype=torch.uint8)
    # NB: a slice of a storage is not resizable, as is what torch.load makes.
    storage = torch.UntypedStorage(max(size, 1), device="cpu")[:size]
    return torch.empty((0,), dtype=torch.uint8, device="cpu").set_(storage)
