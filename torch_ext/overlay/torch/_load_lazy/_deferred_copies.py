"""Copies of deferred tensors, read straight from the file to where they go.

Law: a copy has the values that the tensor has at the time of the call. So these
functions return ``None``, and leave it to torch, once bytes that the tensor needs have been
read into its storage, where they may have been written to since; and wherever
autograd or a mode wants to know.

Limits: a ``copy_`` whose read fails may have overwritten a part of its target.
"""

from math import prod
from typing import Any

import torch
from torch._load_lazy._deferred_bytes import ConvertedBytes, Layout
from torch._load_lazy._deferred_storage import Storage
from torch._load_lazy._modes import has_dispatch_modes
from torch._load_lazy._ranges import ranges_of


def is_ordinary() -> bool:
    """Whether no mode or transform looks at what torch is doing."""
    if has_dispatch_modes():
        return False
    return torch._C._functorch.maybe_current_level() is None


def conversion(
    storage: Storage,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    stride: tuple[int, ...],
) -> ConvertedBytes | None:
    """Returns the contents of a copy of ``tensor``.

    Args:
        storage: of the tensor
        tensor: deferred
        dtype: of the copy
        stride: of the copy, which has no gaps
    """
    layout = _layout(tensor)
    if not is_ordinary() or tensor.is_conj() or tensor.is_neg():
        return None
    if torch.is_grad_enabled() and tensor.requires_grad:
        return None
    if not _is_defined(layout.dtype, dtype):
        return None
    if not storage.is_untouched(ranges_of(*layout[1:], layout.dtype.itemsize)):
        return None
    return ConvertedBytes(storage.contents, layout, dtype, stride)


def clone(storage: Storage, tensor: torch.Tensor, meta: torch.Tensor) -> Any:
    """Returns a plain copy of ``tensor`` that is laid out as ``meta``."""
    contents = conversion(storage, tensor, tensor.dtype, meta.stride())
    if contents is None:
        return None
    out = torch.empty_strided(
        meta.size(), meta.stride(), dtype=meta.dtype, device=storage.device
    )
    contents.read(0, _bytes(out))
    return out


def copy_into(target: torch.Tensor, storage: Storage, tensor: torch.Tensor) -> bool:
    """Does ``target.copy_(tensor)``, if it can."""
    if type(target) not in (torch.Tensor, torch.nn.Parameter) or not is_ordinary():
        return False
    layout = _layout(target)
    if target.is_meta or target.layout is not torch.strided or target.is_quantized:
        return False
    if target.is_conj() or target.is_neg() or target.is_inference():
        return False
    if layout.size != tuple(tensor.size()):
        return False
    if torch.is_grad_enabled() and (target.requires_grad or target._is_view()):
        return False
    if not _is_dense(layout):
        return False
    contents = conversion(storage, tensor, target.dtype, layout.stride)
    if contents is None:
        return False
    contents.read(0, _bytes(target))
    torch.autograd.graph.increment_version(target)
    return True


def _layout(tensor: torch.Tensor) -> Layout:
    offset = int(tensor.storage_offset())
    return Layout(tensor.dtype, offset, tuple(tensor.size()), tensor.stride())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of a tensor without gaps, in the order of its memory."""
    start = tensor.storage_offset() * tensor.itemsize
    flat = torch.empty((0,), dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage(), start, (tensor.nbytes,), (1,))


def _is_dense(layout: Layout) -> bool:
    """Whether each element has its own place, and there are no gaps."""
    span = 1 + sum(
        (n - 1) * step for n, step in zip(layout.size, layout.stride, strict=True)
    )
    if span != prod(layout.size):
        return False
    return len(ranges_of(*layout[1:], layout.dtype.itemsize, gap=0)) == 1


def _is_defined(old: torch.dtype, new: torch.dtype) -> bool:
    """Whether torch converts all values alike wherever they stand in a tensor."""
    if old is new:
        return True
    if old.is_complex or new.is_complex:
        return old.is_complex and new.is_complex
    return new.is_floating_point or not old.is_floating_point
