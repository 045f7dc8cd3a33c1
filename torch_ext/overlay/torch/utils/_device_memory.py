"""Memory on meta of which the values are known, for :mod:`torch.utils._device_constants`.

Law: :meth:`Memory.view` of a tensor is the real tensor that lies in the real memory as that one does in its own.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor


Recipe: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class UnknownError(Exception):
    """A value is needed that is not known."""


class Memory:
    """A storage on meta, and the real one that stock would have.

    Attributes:
        meta: a tensor that keeps the storage alive and counts the writes to it.
        recipe: how to make the real tensor, as long as that was not needed.
        shift: where in the real storage the other one begins, in bytes.
    """

    __slots__ = ("meta", "real", "recipe", "shift", "version")

    def __init__(self, meta: Tensor, recipe: Recipe | None):
        # NB: a tensor of our own, since the user's may be given other data, or swapped.
        with torch._C.DisableTorchFunction():
            self.meta = meta.detach()
        self.recipe = recipe
        self.real: torch.UntypedStorage | None = None
        self.shift = 0
        self.version = 0

    def make(self) -> torch.UntypedStorage:
        # NB: kept once made: an array that `numpy()` handed out shares this memory, so
        # that what is written to it shows in what is read later.
        if self.real is None:
            assert self.recipe is not None
            func, args, kwargs = self.recipe
            with torch.no_grad():
                self.take(func(*args, **kwargs))
            self.recipe = None
        assert self.real is not None
        return self.real

    def take(self, real: Any) -> None:
        """Let ``real`` be what :attr:`meta` would be."""
        meta = self.meta
        if not is_plain(real) or real.is_meta:
            raise UnknownError
        if (real.shape, real.dtype) != (meta.shape, meta.dtype):
            raise UnknownError
        if real.stride() != meta.stride():
            real = torch.empty_like(meta, device=real.device).copy_(real)
        self.real = real.untyped_storage()
        # NB: `as_tensor` may have returned a part of another tensor.
        self.shift = int(real.storage_offset()) * real.itemsize
        self.shift -= int(meta.storage_offset()) * meta.itemsize

    def view(self, like: Tensor) -> Tensor:
        """Return of the real storage the view that ``like`` is of the one on meta."""
        real = self.make()
        offset = like.storage_offset() + self.shift // like.itemsize
        view = torch.empty(0, dtype=like.dtype, device=real.device)
        return view.set_(real, offset, like.size(), like.stride())


is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def is_plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_conj() or value.is_neg() or value.is_inference())
        and not (value.is_quantized or value.is_nested or is_wrapped(value))
    )
