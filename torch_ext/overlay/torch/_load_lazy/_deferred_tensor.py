"""Tensors that read their data at the first use. See ``_deferred.py`` for what they are.

Here: how one comes to its data and becomes plain. What is done without data is in
``_deferred_functions.py``.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._load_lazy._deferred_ops import STORAGE
from torch._load_lazy._deferred_storage import Storage
from torch._load_lazy._ranges import Range, ranges_of
from torch.utils._python_dispatch import _disable_current_modes


_META = torch.device("meta")

# What functions do by themselves, by function; NotImplemented if they need data after all.
handlers: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {}


# Note [Deferred, placed, plain]
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# A tensor is *deferred* while its TensorImpl is that of a meta tensor. That has shape,
# strides, autograd state and views, all by torch itself, and no memory that
# anyone could take for data. The rest is in ``_deferral``, an attribute.
#
# At the first use memory is made for the whole storage (pages that nobody touches cost
# nothing), and what the tensor needs is read into it. Then the tensor is *placed*: its
# TensorImpl is exchanged for one over the memory. A root gets a tensor over the storage. A view
# gets the same view of what its parent is or will be placed as, so that base, version
# counter and gradients are shared as ever; the parent itself may stay deferred.
#
# A placed tensor does its operations natively. But its storage may have bytes that are
# unread, which ``as_strided`` or ``untyped_storage`` would show; so it is a DeferredTensor
# still, and what sees more than the tensor's own bytes reads the rest first. When there is no
# rest the tensor is *plain*: its class becomes torch.Tensor, and it is as if it had never been
# anything else.


class Recipe(NamedTuple):
    """How a view came from another tensor."""

    parent: torch.Tensor
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    which: int | None  # where the function returns several
    grad_mode: bool


class Deferral:
    """What a tensor that is not plain knows of itself.

    Attributes:
        storage: what it lies in
        recipe: how it came from a parent that has no memory either
        views: in whose recipes it is, as long as they live
        base: as ``Tensor._base``
        real: what it will be placed as, if its family has memory
        placed: whether it lies over memory
        filled: whether its own bytes have been read
        becomes: its class, once it is plain
    """

    __slots__ = (
        *("base", "becomes", "filled", "placed"),
        *("real", "recipe", "storage", "views"),
    )

    def __init__(self, storage: Storage, placed: bool = False) -> None:
        self.storage = storage
        self.recipe: Recipe | None = None
        self.views: set[weakref.ref[torch.Tensor]] = set()
        self.base: torch.Tensor | None = None
        self.real: torch.Tensor | None = None
        self.placed = placed
        self.filled = False
        self.becomes: type[torch.Tensor] = torch.Tensor


class DeferredTensor(torch.Tensor):
    """A tensor whose data have not been read, or whose storage has not in full."""

    _deferral: Deferral

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        handler = handlers.get(func)
        if handler is not None:
            out = handler(func, args, kwargs)
            if out is not NotImplemented:
                return out
        # NB: who else handles this function may look at a tensor in ways that are not seen.
        whole = func in STORAGE or not all(issubclass(t, DeferredTensor) for t in types)
        storages = [
            read(tensor, whole=whole) for tensor in _deferred_in((args, kwargs))
        ]
        partial = [storage for storage in storages if storage is not None]
        if storages and not partial:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return _guard(func(*args, **kwargs), partial)

    # nn.Parameter() sets this on what it makes of a tensor that is no torch.Tensor.
    @property
    def _is_param(self) -> bool:
        return self._deferral.becomes is torch.nn.Parameter

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        self._deferral.becomes = torch.nn.Parameter if value else torch.Tensor


def defer(tensor: torch.Tensor, deferral: Deferral) -> torch.Tensor:
    """Makes of a tensor of torch's own class a deferred one."""
    tensor.__class__ = DeferredTensor
    tensor._deferral = deferral  # type: ignore[attr-defined]
    return tensor


def deferred(
    storage: Storage,
    dtype: torch.dtype,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool = False,
) -> torch.Tensor:
    """Returns a deferred tensor; offset, size and stride are in elements."""
    tensor = torch.empty((0,), dtype=dtype, device=_META)
    tensor.set_(storage.meta, offset, size, stride)
    if requires_grad:
        tensor.requires_grad_()
    return defer(tensor, Deferral(storage))


def deferral_of(value: Any) -> Deferral | None:
    """Returns what a tensor knows of itself, if it is not plain."""
    return value.__dict__.get("_deferral") if type(value) is DeferredTensor else None


def _deferred_in(value: Any) -> Iterator[torch.Tensor]:
    if type(value) is DeferredTensor:
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _deferred_in(item)
    elif isinstance(value, dict):
        yield from _deferred_in(list(value.values()))


# The first use


def read(tensor: torch.Tensor, *, whole: bool = False) -> Storage | None:
    """Reads what ``tensor`` needs, unless it has been read.

    Args:
        tensor: any; nothing is done to one that is not deferred
        whole: read all of its storage, so that the tensor is plain

    Returns:
        ``None`` if the tensor is plain, else its storage, which has unread bytes still.

    Raises:
        RuntimeError: if the file has changed; the tensor is as it was, and may be read later
    """
    deferral = deferral_of(tensor)
    if deferral is None:
        return None
    storage = deferral.storage
    if deferral.filled and not whole and not storage.is_complete:
        return storage
    check_reach(deferral)
    with storage.lock, undisturbed():
        if type(tensor) is not DeferredTensor:  # another thread has read it
            return None
        covers = tensor.is_contiguous() and tensor.nbytes == storage.contents.nbytes
        whole = whole or covers
        real = real_of(tensor)
        if whole:
            storage.fill([(0, storage.contents.nbytes)])
        elif not deferral.filled:
            storage.fill(_ranges(real))
        deferral.filled = True
        if not deferral.placed:
            _place(tensor, deferral, real)
        if not storage.is_complete:
            return storage
        # NB: in this order, for threads that look at the tensor meanwhile.
        tensor.__class__ = deferral.becomes  # type: ignore[assignment]
        del tensor._deferral
        return None


def _place(tensor: torch.Tensor, deferral: Deferral, real: torch.Tensor) -> None:
    torch._C._swap_tensor_impl(tensor, real)
    deferral.placed, deferral.real = True, None
    if tensor._backward_hooks:  # a TensorImpl has to be told
        tensor._backward_hooks = tensor._backward_hooks


def real_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what a tensor is or will be placed as, whether it has its data or not."""
    deferral = deferral_of(tensor)
    if deferral is None or deferral.placed:
        return tensor
    if deferral.real is None:
        _make_family(tensor)
    assert deferral.real is not None
    return deferral.real


def _make_family(tensor: torch.Tensor) -> None:
    """Makes what a tensor, all that it is a view of, and all views of these are placed as.

    NB: all at once, since what is done to one of them, in place, is to be seen by the others.
    """
    deferral = deferral_of(tensor)
    while deferral is not None and deferral.recipe is not None:
        tensor = deferral.recipe.parent
        deferral = deferral_of(tensor)
    make_views(tensor)


def make_views(tensor: torch.Tensor) -> None:
    """Makes what a tensor and its views, and theirs, are placed as, as far as that is not known."""
    waiting = [tensor]
    while waiting:
        tensor = waiting.pop()
        deferral = deferral_of(tensor)
        if deferral is not None and not deferral.placed:
            if deferral.real is None:
                deferral.real = _make(tensor, deferral)
            refs = list(deferral.views)  # which go out of the set as views die
            waiting += [view for ref in refs if (view := ref()) is not None]
            deferral.recipe, deferral.views = None, set()


def _make(tensor: torch.Tensor, deferral: Deferral) -> torch.Tensor:
    recipe = deferral.recipe
    if recipe is None:
        real = deferral.storage.tensor_like(tensor)
    else:
        parent = real_of(recipe.parent)
        # NB: a leaf that has come to require gradients since does not pass that on.
        grad_mode = tensor.requires_grad or not parent.requires_grad
        with torch.set_grad_enabled(recipe.grad_mode and grad_mode):
            out = recipe.function(parent, *recipe.arguments, **recipe.keywords)
        real = out if recipe.which is None else out[recipe.which]
    if tensor.requires_grad and tensor.is_leaf:
        real.requires_grad_()
    return real


def _ranges(tensor: torch.Tensor) -> list[Range]:
    offset = int(tensor.storage_offset())
    return ranges_of(offset, tensor.size(), tensor.stride(), tensor.itemsize)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No mode or transform of the caller's interferes."""
    modes = torch._C._len_torch_dispatch_stack()
    levels = torch._C._functorch.maybe_current_level() is not None
    with (
        torch.inference_mode(False),
        torch._C.DisableTorchFunction(),
        _disable_current_modes() if modes else nullcontext(),
        temporarily_clear_interpreter_stack() if levels else nullcontext(),
    ):
        yield


def check_reach(deferral: Deferral) -> None:
    """Raises if a tensor that has no memory got past ``__torch_function__``.

    NB: TorchScript, for one, takes it for the meta tensor that it is, and some of the kernels
    of these, which are written in Python, ask for its device and then allocate memory there.
    """
    key = torch._C.DispatchKey.ADInplaceOrView
    if torch._C._dispatch_tls_is_dispatch_key_excluded(key) and not deferral.placed:
        raise RuntimeError(
            f"Expected a tensor of {deferral.storage.contents.name} that has not been read "
            "to be given to functions of torch only, got it inside of an operator. (Did you "
            "mean to clone() it first?)"
        )


def _guard(out: Any, partial: list[Storage]) -> Any:
    """Lets no tensor out that has unread bytes in its storage and doesn't know."""
    for tensor in out if isinstance(out, (tuple, list)) else (out,):
        if type(tensor) is torch.Tensor:
            for storage in partial:
                if storage.has(tensor):
                    defer(tensor, Deferral(storage, placed=True))
                    break
    return out
