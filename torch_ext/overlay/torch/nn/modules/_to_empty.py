"""``Module.to_empty(..., skip_materialized=True)``: give memory to what is on meta, only.

A tensor that has memory stays the very tensor that it was. One on meta gets memory and
also stays the object that it is, so that optimizers, ties (the same Parameter, a shared
storage, views of one storage), attributes and hooks outlive it. Float memory is not
initialized; integers and booleans, such as ``num_batches_tracked``, are zero. A lazy
parameter stays uninitialized and moves to the device.

What this does not do: storages shared across several calls (``recurse=False``, module by
module) are shared no more. A subclass with ``__torch_dispatch__`` (DTensor) and, in a
module that overrides ``_apply``, everything if
``torch.__future__.set_swap_module_params_on_conversion(True)`` is on, goes the way of
the default ``to_empty``.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.types import Device
from torch.utils._swap_meta import (
    has_plain_keys,
    meta_ties,
    storage_like,
    swap_meta,
    undisturbed,
)


def to_empty(module: Module, *, device: Device, recurse: bool = True) -> Module:
    """See :meth:`torch.nn.Module.to_empty` for ``skip_materialized=True``."""
    if device is not None:  # None is the device that a tensor is on
        _Fill(module, torch.device(device), recurse).visit(module)
    return module


class _Fill:
    """Called with a tensor on meta, gives it memory; returns the tensor it was called with."""

    def __init__(self, module: Module, device: torch.device, recurse: bool) -> None:
        self._device = device
        self._recurse = recurse
        modules = Module.modules(module) if recurse else iter((module,))
        self._ties = meta_ties(t for m in modules for t in _own(m) if _is_plain_meta(t))

    def visit(self, module: Module) -> None:
        if type(module)._apply is not Module._apply:
            # NB: some overrides know no `recurse`.
            how_deep = {} if self._recurse else {"recurse": False}
            module._apply(self, **how_deep)
            return
        if self._recurse:
            for child in module.children():
                self.visit(child)
        if not all(_is_plain_meta(t) for t in _own(module) if t.is_meta):
            Module._apply(module, self, recurse=False)
            return
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None and tensor.is_meta:
                    # NB: the same object, but a ScriptModule has to be told.
                    tensors[name] = self(tensor)  # type: ignore[assignment]

    def __call__(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if not (_is_plain_meta(tensor) and tensor.is_leaf):
            return torch.empty_like(tensor, device=self._device)
        group = self._ties.get(id(tensor))
        with undisturbed():
            if group is None:
                swap_meta(tensor, self._memory_for(tensor))
            else:
                for tied, data in zip(
                    group, storage_like(group, self._device), strict=True
                ):
                    swap_meta(tied, data)
        return tensor

    def _memory_for(self, tensor: Tensor) -> Tensor:
        if is_lazy(tensor):
            return torch.empty(0, dtype=tensor.dtype, device=self._device)
        data = torch.empty_like(tensor, device=self._device)
        if not (data.is_floating_point() or data.is_complex()):
            data.zero_()
        return data


def _own(module: Module) -> Iterator[Tensor]:
    for tensors in (module._parameters, module._buffers):
        yield from (tensor for tensor in tensors.values() if tensor is not None)


def _is_plain_meta(tensor: Tensor) -> bool:
    return tensor.is_meta and has_plain_keys(tensor)
