"""What functions of torch do with a deferred tensor without reading it.

Each takes what ``__torch_function__`` is given, and returns ``NotImplemented`` where the data are
needed after all. Law: the result is that of the function on the plain tensor, later or now.
"""

import weakref
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._load_lazy import _deferred_copies
from torch._load_lazy._deferred_copies import is_ordinary
from torch._load_lazy._deferred_ops import (
    CASTS,
    getters,
    is_basic,
    MAYBE_VIEWS,
    METADATA,
    OF_DEVICE,
    setters,
    SHARED,
    VIEWS,
)
from torch._load_lazy._deferred_storage import Storage
from torch._load_lazy._deferred_tensor import (
    check_reach,
    defer,
    Deferral,
    deferral_of,
    DeferredTensor,
    make_views,
    read,
    Recipe,
    undisturbed,
)


Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def table() -> dict[Any, Handler]:
    """Returns the handler of each function that has one."""
    groups: list[tuple[Iterable[Any], Callable[..., Any]]] = [
        (VIEWS, _view),
        (MAYBE_VIEWS, _maybe_view),
        (METADATA, _natively),
        (OF_DEVICE, _of_device),
        (SHARED, _on_real),
        (CASTS, _cast),
        (getters("_base"), _base),
        (getters("grad_fn"), _grad_fn),
        (setters("requires_grad"), _set_requires_grad),
    ]
    of_some = {
        Tensor.__deepcopy__: _as_itself,
        Tensor.__format__: _format,
        Tensor.__getitem__: _getitem,
        Tensor.__iter__: _iter,
        Tensor.__reduce_ex__: _as_itself,
        Tensor.__repr__: _repr,
        Tensor.as_strided: _as_strided,
        torch.as_strided: _as_strided,
        Tensor.clone: _clone,
        torch.clone: _clone,
        Tensor.requires_grad_: _set_requires_grad,
        Tensor.to: _to,
        Tensor.type: _type,
    }
    pairs = [(function, do) for group, do in groups for function in group]
    do_first = {function: _of_first(do) for function, do in [*pairs, *of_some.items()]}
    return {**do_first, Tensor.copy_: _copy_}


def _of_first(do: Callable[..., Any]) -> Handler:
    """Makes a handler of what is done if the first argument is deferred."""

    @wraps(do)
    def handler(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        deferral = deferral_of(args[0]) if args else None
        if deferral is None:
            return NotImplemented
        with deferral.storage.lock, torch._C.DisableTorchFunction():
            if type(args[0]) is not DeferredTensor:  # another thread has read it
                return NotImplemented
            return do(deferral, func, args, kwargs)

    return handler


# About a tensor


def _natively(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _of_device(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    check_reach(deferral)
    there = torch.empty((0,), dtype=args[0].dtype, device=deferral.storage.device)
    return func(there, *args[1:], **kwargs)


def _on_real(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    # NB: as long as there is no memory, nobody has done anything.
    real = args[0] if deferral.real is None else deferral.real
    return func(real, *args[1:], **kwargs)


def _set_requires_grad(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    if deferral.real is not None:
        func(deferral.real, *args[1:], **kwargs)
    return func(*args, **kwargs)


def _base(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    if deferral.base is None and args[0]._is_view():
        read(args[0], whole=True)
        return NotImplemented
    return deferral.base


def _grad_fn(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    # NB: a node made before the tensor is placed is not in the graph of what it is placed as.
    return None if args[0].is_leaf else NotImplemented


def _repr(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    tensor, storage = args[0], deferral.storage
    # NB: Tensor.__repr__ names a default that others do not know.
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if deferral.filled or tensor.numel() <= torch._tensor_str.PRINT_OPTS.threshold:
        return _on_alias(deferral, func, args, kwargs)
    parts = ["...", f"size={tuple(tensor.size())}", f"dtype={tensor.dtype}"]
    parts += [f"device='{storage.device}'"] * (storage.device.type != "cpu")
    parts += ["requires_grad=True"] * tensor.requires_grad
    return f"{_containing(deferral)}tensor({', '.join(parts)}, deferred)"


def _format(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    if args[0].dim() and args[1:] == ("",):
        return _repr(deferral, Tensor.__repr__, args[:1], {})
    return _on_alias(deferral, func, args, kwargs)


def _containing(deferral: Deferral) -> str:
    is_param = deferral.becomes is torch.nn.Parameter
    return "Parameter containing:\n" if is_param else ""


def _on_alias(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    """Gives a function what is or looks like a plain tensor."""
    tensor, *rest = args
    if read(tensor, whole=not tensor.is_leaf) is None:
        return _as_itself(deferral, func, args, kwargs)
    alias = tensor.detach().requires_grad_(tensor.requires_grad)
    out = func(alias, *rest, **kwargs)
    return _containing(deferral) + out if func is Tensor.__repr__ else out


def _as_itself(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    """Calls a method that the class of the plain tensor may have of its own."""
    read(args[0], whole=True)
    return getattr(type(args[0]), func.__name__)(*args, **kwargs)


# Views


def _view(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    if not is_ordinary():
        return NotImplemented
    return _defer_views(func(*args, **kwargs), deferral, func, args, kwargs)


def _maybe_view(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    if deferral.placed or not is_ordinary():
        return NotImplemented
    out = func(*args, **kwargs)
    if out.untyped_storage()._cdata != args[0].untyped_storage()._cdata:
        return NotImplemented  # a copy, and one of a tensor without data
    return _defer_views(out, deferral, func, args, kwargs)


def _as_strided(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    # NB: on meta, torch does not look whether the storage is large enough.
    if not deferral.placed and is_ordinary():
        view = func(*args, **kwargs)
        steps = zip(view.size(), view.stride(), strict=True)
        last = view.storage_offset() + sum((n - 1) * step for n, step in steps)
        end = (last + 1) * view.itemsize if view.numel() else 0
        if end > deferral.storage.contents.nbytes:
            return NotImplemented
    return _view(deferral, func, args, kwargs)


def _getitem(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    if not is_basic(args[1]):
        return NotImplemented
    return _view(deferral, func, args, kwargs)


def _iter(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    if not args[0].dim() or not is_ordinary():
        return NotImplemented
    return iter(_view(deferral, Tensor.unbind, (args[0], 0), {}))


def _defer_views(
    out: Any, deferral: Deferral, func: Any, args: Any, kwargs: Any
) -> Any:
    single = isinstance(out, Tensor)
    base = args[0] if deferral.base is None else deferral.base
    for i, view in enumerate([out] if single else out):
        if type(view) is Tensor:
            child = Deferral(deferral.storage, placed=deferral.placed)
            child.base = base if view._is_view() else None
            defer(view, child)
            if not deferral.placed:
                keywords = {key: _frozen(value) for key, value in kwargs.items()}
                of, grad_mode = None if single else i, torch.is_grad_enabled()
                child.recipe = Recipe(
                    args[0], func, _frozen(args[1:]), keywords, of, grad_mode
                )
                deferral.views.add(weakref.ref(view, deferral.views.discard))
    if deferral.real is not None:
        with undisturbed():
            make_views(args[0])
    return out


def _frozen(value: Any) -> Any:
    # NB: the caller may change a list of sizes later.
    if type(value) in (tuple, list):
        return tuple(map(_frozen, value))
    return value


# Copies


def _to(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *wanted = args
    plain = {torch.dtype, torch.device, str}.issuperset(map(type, wanted))
    if not plain or not {"dtype", "device", "non_blocking"}.issuperset(kwargs):
        return NotImplemented
    device, dtype, _, _ = torch._C._nn._parse_to(*wanted, **kwargs)
    return _converted(deferral, tensor, dtype, device)


def _type(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) == 1 and not kwargs:
        return _of_device(deferral, func, args, kwargs)
    if len(args) != 2 or kwargs or type(args[1]) is not torch.dtype:
        return NotImplemented
    return _converted(deferral, args[0], args[1], None)


def _cast(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) > 1 or kwargs:
        return NotImplemented
    return _converted(deferral, args[0], CASTS[func], None)


def _converted(
    deferral: Deferral,
    tensor: Tensor,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> Any:
    storage, dtype = deferral.storage, dtype or tensor.dtype
    # NB: "cuda" names a device that only a tensor on it can tell.
    device = torch.empty((0,), device=device or storage.device).device
    if dtype is tensor.dtype and device == storage.device:
        return tensor
    if deferral.placed or device.type == "meta":
        return NotImplemented
    meta = tensor.to(dtype, copy=True)
    contents = _deferred_copies.conversion(storage, tensor, dtype, meta.stride())
    if contents is None:
        return NotImplemented
    torch.empty(1, dtype=tensor.dtype, device="cpu").to(dtype)  # raises if torch cannot
    return defer(meta, Deferral(Storage(contents, device)))


def _clone(deferral: Deferral, func: Any, args: Any, kwargs: Any) -> Any:
    if deferral.placed:
        return NotImplemented
    meta = func(*args, **kwargs)
    out = _deferred_copies.clone(deferral.storage, args[0], meta)
    return NotImplemented if out is None else out


def _copy_(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    deferral = deferral_of(args[1]) if len(args) > 1 else None
    if deferral is None:
        return NotImplemented
    with deferral.storage.lock, torch._C.DisableTorchFunction():
        if type(args[1]) is not DeferredTensor or deferral.placed:
            return NotImplemented
        copied = _deferred_copies.copy_into(args[0], deferral.storage, args[1])
    return args[0] if copied else NotImplemented
