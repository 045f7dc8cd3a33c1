"""Deferred tensors: they know all about themselves but their data, and read these when needed.

A view of a deferred tensor is deferred, and so is a conversion. The first real use
reads the bytes that the tensor needs, and from then on it is a plain tensor, the same object.

Law: a program computes from deferred tensors what it computes from plain ones. Tensors of one
storage share memory, of which each byte is read once, before anyone sees it.

See Note [Deferred, placed, plain]. What follows from it:

- What comes not by ``__torch_function__`` (an extension in C++, ``vmap``, ``param.data = t``,
  ``torch.tensor(t)``) meets a tensor without data before the first use, as if on the meta device.
- While some bytes of a storage are unread, its tensors stay of this class: a Python call slower.
- A module reads what is registered with it. A Parameter over a part of a storage
  reads all of that; over a ``clone`` of the part it does not.
"""

import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch._load_lazy import _deferred_functions
from torch._load_lazy._deferred_bytes import FileBytes
from torch._load_lazy._deferred_storage import Storage
from torch._load_lazy._deferred_tensor import (
    deferral_of,
    deferred,
    DeferredTensor,
    handlers,
    read,
    undisturbed,
)
from torch._load_lazy._source import Source
from torch._load_lazy._zip import Extent
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils.hooks import RemovableHandle


__all__ = ["DeferredStorage", "DeferredTensor", "place_of", "read"]


class DeferredStorage(Storage):
    """A storage whose bytes are read when a tensor over it needs them.

    Args:
        source: the file
        extent: where its bytes lie in the file
        device: where its tensors are
        swap: size of the elements whose bytes are in the other order; 1 for none
    """

    def __init__(
        self, source: Source, extent: Extent, *, device: torch.device, swap: int = 1
    ) -> None:
        _watch_modules()
        super().__init__(FileBytes(source, extent, swap), device)

    def tensor(
        self,
        dtype: torch.dtype,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool = False,
    ) -> torch.Tensor:
        """Returns a deferred tensor; offset, size and stride are in elements."""
        return deferred(self, dtype, offset, size, stride, requires_grad)


handlers.update(_deferred_functions.table())


def place_of(tensor: torch.Tensor) -> tuple[str, int] | None:
    """Returns the file, and the offset in it, of the first element of a deferred tensor."""
    deferral = deferral_of(tensor)
    if deferral is None or not isinstance(deferral.storage.contents, FileBytes):
        return None
    bytes_of = deferral.storage.contents
    first = int(tensor.storage_offset()) * tensor.itemsize
    return bytes_of.source.name, bytes_of.start + first


# Modules


def _read_registered(module: Any, name: str, tensor: Any) -> None:
    read(tensor, whole=True)


def _watch_modules() -> None:
    """Modules read what is registered with them, from the first deferred tensor until the patch is switched off."""
    if not _hooks:
        _hooks.append(register_module_buffer_registration_hook(_read_registered))
        _hooks.append(register_module_parameter_registration_hook(_read_registered))


def _at_disable() -> None:
    while _hooks:
        _hooks.pop().remove()


_hooks: list[RemovableHandle] = []


# Other processes


def _reduce(tensor: torch.Tensor) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Tells another process where to read, or shares what has been read here."""
    deferral = deferral_of(tensor)
    if deferral is not None and not deferral.storage.has_memory:
        with undisturbed():
            ordinary = tensor.is_leaf and not tensor.is_conj() and not tensor.is_neg()
            place = tensor.storage_offset(), tuple(tensor.size()), tensor.stride()
        if ordinary and _is_picklable(deferral.storage):
            state = tensor.requires_grad, deferral.becomes is torch.nn.Parameter
            return _rebuild, (deferral.storage, tensor.dtype, *place, *state)
    read(tensor, whole=True)
    reduced: tuple[Callable[..., Any], tuple[Any, ...]]
    reduced = torch.multiprocessing.reductions.reduce_tensor(tensor)
    return reduced


def _rebuild(
    storage: Storage,
    dtype: torch.dtype,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    is_param: bool,
) -> torch.Tensor:
    _watch_modules()
    tensor = deferred(storage, dtype, offset, size, stride, requires_grad)
    tensor._is_param = is_param
    return tensor


def _is_picklable(storage: Storage) -> bool:
    try:
        pickle.dumps(storage)
    except Exception:  # whatever a file object raises
        return False
    return True


ForkingPickler.register(DeferredTensor, _reduce)
