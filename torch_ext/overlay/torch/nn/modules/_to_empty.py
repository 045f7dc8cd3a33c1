"""``Module.to_empty(..., skip_materialized=True)``: give memory to what is on meta, only.

A tensor that has memory stays the very tensor that it was. One on meta gets memory and
also stays the object that it is, so that optimizers, ties (the same Parameter, a shared
storage, views of one storage), attributes and hooks outlive it; so does a DTensor, whose
local tensor gets it. Float memory is not initialized; integers and booleans, such as
``num_batches_tracked``, are zero. A lazy parameter stays uninitialized and moves to the
device. Modules that override ``_apply`` do what they do around it.

What this does not do: storages shared across several calls (``recurse=False``, module by
module) are shared no more. Other subclasses with ``__torch_dispatch__``, and what is
sparse or quantized, go the way of the default ``to_empty``.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.types import Device
from torch.utils._sharded_meta import follow_local, is_sharded, local_of
from torch.utils._swap_meta import (
    has_plain_keys,
    meta_ties,
    storage_like,
    swap_all,
    swap_meta,
    undisturbed,
)


# Give what they know the values of its memory, before the rest gets memory that is not initialized.
fillers: list[Callable[[Iterable[Module], torch.device], None]] = []
_always: ContextVar[bool] = ContextVar("to_empty_always_skips", default=False)


def to_empty(module: Module, *, device: Device, recurse: bool = True) -> Module:
    """See :meth:`torch.nn.Module.to_empty` for ``skip_materialized=True``."""
    if device is not None:  # None is the device that a tensor is on
        modules = list(module.modules()) if recurse else [module]
        # NB: what calls a `param_init_fn` leaves the values to that.
        for fill_known in () if skips() else fillers:
            fill_known(modules, torch.device(device))
        fill = Fill(modules, device)
        # NB: some overrides know no `recurse`.
        module._apply(fill, **({} if recurse else {"recurse": False}))
    return module


def skips() -> bool:
    """Whether each ``to_empty`` is one with ``skip_materialized=True`` here."""
    return _always.get()


@contextmanager
def always_skip() -> Iterator[None]:
    """For calling who empties more than is theirs: a ``param_init_fn`` in nested wrappers."""
    token = _always.set(True)
    try:
        yield
    finally:
        _always.reset(token)


class Fill:
    """Called with a tensor on meta, gives it memory; returns the tensor it was called with.

    Passed to ``_apply``, it does so for the tensors of the module, in place.

    Args:
        modules: whose tensors are tied to each other.
        device: where the memory is to be.
    """

    def __init__(self, modules: Iterable[Module], device: Device) -> None:
        self._device = torch.device(device)  # type: ignore[arg-type]
        self._ties = meta_ties(
            local_of(t) for m in modules for t in own(m) if _is_fillable(t)
        )
        self._swapped: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def _apply_to_module(self, module: Module, recurse: bool) -> Module:
        """What ``Module._apply`` does with this."""
        if recurse:
            for child in module.children():
                child._apply(self)
        others = Module()  # what goes the default way
        pairs = list(zip(own_dicts(module), own_dicts(others), strict=True))
        for tensors, rest in pairs:
            for key, tensor in list(tensors.items()):
                if tensor is None or not tensor.is_meta:
                    continue
                if _is_fillable(tensor):
                    # NB: the same object, but a ScriptModule has to be told.
                    tensors[key] = self(tensor)
                else:
                    rest[key] = tensor
        others._apply(lambda t: torch.empty_like(t, device=self._device))
        for tensors, rest in pairs:
            for key, tensor in rest.items():
                tensors[key] = tensor
        return module

    def __call__(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if not _is_fillable(tensor):
            return torch.empty_like(tensor, device=self._device)
        local = local_of(tensor)
        with undisturbed():
            if local.is_meta:
                self._fill(local)
            if is_sharded(tensor):
                self._swapped.append((tensor, follow_local(tensor), local))
        return tensor

    def undo(self) -> None:
        """Put everything that this gave memory back to meta."""
        while self._swapped:
            tensor, impl, local = self._swapped.pop()
            swap_all([tensor], [impl])
            if local is not None:
                tensor._local_tensor = local  # type: ignore[attr-defined]

    def _fill(self, tensor: Tensor) -> None:
        group = self._ties.get(id(tensor))
        if group is None:
            pairs = [(tensor, self._memory_for(tensor))]
        else:
            pairs = list(zip(group, storage_like(group, self._device), strict=True))
        for tied, data in pairs:
            self._swapped.append((tied, swap_meta(tied, data), None))

    def _memory_for(self, tensor: Tensor) -> Tensor:
        if is_lazy(tensor):
            return torch.empty(0, dtype=tensor.dtype, device=self._device)
        data = torch.empty_like(tensor, device=self._device)
        if not (data.is_floating_point() or data.is_complex()):
            data.zero_()
        return data


def own(module: Module) -> Iterator[Tensor]:
    """The parameters and buffers that ``module`` itself has."""
    for tensors in own_dicts(module):
        yield from (tensor for tensor in tensors.values() if tensor is not None)


def own_dicts(module: Module) -> tuple[dict[str, Tensor | None], ...]:
    """Where ``module`` itself has its parameters and buffers."""
    return module._parameters, module._buffers  # type: ignore[return-value]


def _is_fillable(tensor: Tensor) -> bool:
    local = local_of(tensor)
    return tensor.is_meta and tensor.is_leaf and has_plain_keys(local)
