"""Rules of factories: ``torch.zeros(...)``, ``torch.tensor(data)``, ``torch.zeros_like(t)``, ``t.new(...)``.

A factory makes its tensor on meta; recorded is how to make it for real. Law: the values are those of the call as it
would have been made without the context. A rule that is in ``_calls.py``'s table of fast ones is called outside of
:meth:`Recorder.follow`, and what it cannot answer it hands over to that.
"""

from collections.abc import Callable
from typing import Any, TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils._deferred_init._moves import move
from torch.nn.utils._deferred_init._originals import builtins, METHODS
from torch.nn.utils._deferred_init._random import reality
from torch.nn.utils._deferred_init._schema import (
    as_device,
    below_modes,
    call_below,
    called_by_library,
    is_plain,
)
from torch.nn.utils._deferred_init._slot import (
    attach,
    FRESH,
    META,
    Ref,
    unknown_mark,
)
from torch.nn.utils._deferred_init._tape import Filled, has_tensors, Node, tensors_in


if TYPE_CHECKING:
    from torch.nn.utils._deferred_init._context import Recorder

Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Rule = Callable[["Recorder", Function, Args, Kwargs], Any]


_COPIES = frozenset(builtins("scalar_tensor tensor"))
_RANDOM = frozenset(builtins("normal rand randint randn randperm"))


def _fill_with_ones(tensor: Tensor) -> Tensor:
    return tensor.fill_(1)


# What is done to the memory of what these make, if anything.
_WHOLE_FILLS: dict[Function, Function | None] = {
    **dict.fromkeys(builtins("empty empty_permuted empty_strided")),
    **dict.fromkeys(builtins("zeros"), METHODS["zero_"]),
    **dict.fromkeys(builtins("ones"), _fill_with_ones),
}


def make(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """A factory: ``torch.zeros(...)``, under ``deferred_init``."""
    named = kwargs.get("device")
    device = recorder.device if named is None else as_device(named)
    if device.type == "meta":  # the model's own
        made = call_below(func, args, {**kwargs, "device": META})
        if is_plain(made):
            attach(made.untyped_storage(), unknown_mark(func.__name__, is_lost=False))
        return made
    if kwargs.get("out") is not None or have_tensors(args, kwargs):
        return func(*args, **_moved(kwargs))
    made = call_below(func, args, _moved(kwargs))
    if made.layout is not torch.strided or made.is_quantized or made.is_nested:
        return make_unplain(recorder, func, args, kwargs)
    if func in _WHOLE_FILLS and not kwargs.get("pin_memory"):
        filled = Filled(recorder.tape, device, _WHOLE_FILLS[func], (), None, made.dtype)
        attach(made.untyped_storage(), filled)
        return made
    return _record(recorder, func, args, kwargs, made, device)


def make_on_meta(
    recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs
) -> Any:
    """A factory in a meta block."""
    # NB: construction is mostly this. The first three lines are for kwargs that are rare.
    named = kwargs.get("device") if kwargs else None
    if kwargs and kwargs.get("out") is not None:
        return recorder.follow(func, args, kwargs)
    if not recorder.makes() or (named is not None and called_by_library()):
        return as_stock(recorder, func, args, kwargs)
    if have_tensors(args, kwargs):
        return recorder.follow(func, args, _moved(kwargs))
    if recorder.report is not None and named is not None:
        recorder.overridden(func, as_device(named))
    made = call_below(func, args, _moved(kwargs) if kwargs else {"device": META})
    if "layout" in kwargs and made.layout is not torch.strided:
        return made
    key = (func, named, made.dtype)
    mark = recorder.marks.get(key)
    if mark is None:
        device = as_device(named) if named is not None else META
        device = recorder.ops.computing_device(device)
        if func in _RANDOM:
            mark = recorder.unknown(func.__name__)
        elif func in _WHOLE_FILLS:
            fill = _WHOLE_FILLS[func]
            mark = Filled(recorder.tape, device, fill, (), None, made.dtype)
        else:
            return _record(recorder, func, args, kwargs, made, device)
        recorder.marks[key] = mark  # one for all storages, since a model has many
    attach(made.untyped_storage(), mark)
    return made


def _record(
    recorder: "Recorder",
    func: Function,
    args: Args,
    kwargs: Kwargs,
    made: Tensor,
    device: torch.device,
) -> Tensor:
    """Record that ``made``, on meta, is what ``func`` makes on ``device``."""
    slot = recorder.ops.slot(made, device)
    node = Node(func)
    node.args = args
    node.kwargs = {**kwargs, "device": device, "dtype": made.dtype}
    node.kwargs.pop("requires_grad", None)
    ref = Ref(slot, made)
    node.outs = (ref,)
    node.fills = True
    if func in _RANDOM:
        recorder.ops.draw(node, func.__name__, ref)
    node.touch((slot, FRESH))
    return made


def as_stock(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """A factory that is not this context's to decide about, such as one in a block of a real device."""
    if have_tensors(args, kwargs):
        with reality():
            args = tuple(map(recorder.ops.value, args))
            kwargs = {k: recorder.ops.value(v) for k, v in kwargs.items()}
    return recorder.passed_on(func, args, kwargs)


def make_seen(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """A factory in a meta block, where another dispatch mode sees what is made."""
    named = kwargs.get("device")
    if kwargs.get("out") is not None:
        return func(*args, **kwargs)
    if not recorder.makes() or (named is not None and called_by_library()):
        return as_stock(recorder, func, args, kwargs)
    return func(*args, **_moved(kwargs))


def have_tensors(args: Args, kwargs: Kwargs) -> bool:
    return has_tensors(args) or bool(kwargs and has_tensors(kwargs.values()))


def make_plainly(
    recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs
) -> Any:
    """``torch.normal(mean, std, size)``: a factory, unless it is given tensors."""
    if have_tensors(args, kwargs):
        return func(*args, **kwargs)
    factory = make if recorder.tape.random else make_on_meta
    return factory(recorder, func, args, kwargs)


def _moved(kwargs: Kwargs) -> Kwargs:
    kwargs = {**kwargs, "device": META}
    kwargs.pop("pin_memory", None)
    return kwargs


def make_of_values(
    recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs
) -> Any:
    """``torch.tensor(data)`` and its like: the data is there, so this is made, and then stood for."""
    named = kwargs.get("device")
    ops, is_meta = recorder.ops, not recorder.tape.random
    if is_meta and (
        not recorder.makes()
        or (named is not None and (called_by_library() or _is_memory(args)))
    ):
        return as_stock(recorder, func, args, kwargs)
    if args and isinstance(args[0], Tensor):
        return _make_of_tensor(recorder, func, args, kwargs)
    device = recorder.device if named is None else as_device(named)
    if device.type == "meta" and not is_meta:
        with below_modes():
            return func(*args, **kwargs, **({} if named else {"device": device}))
    recorder.overridden(func, device if named is not None else None)
    if is_meta and any(ops.slot_of(t) is None for t in tensors_in(args) if t.is_meta):
        return func(*args, **_moved(kwargs))
    kwargs = {**kwargs, "device": ops.computing_device(device)}
    leaf = kwargs.pop("requires_grad", False)
    with reality():
        real = func(*map(ops.value, args), **kwargs)
    if not is_plain(real) or kwargs.get("copy") is False:
        return real
    # NB: as_tensor() and asarray() of an array share its memory.
    made = ops.adopt(real, shared=func not in _COPIES)
    return made.requires_grad_() if leaf else made


def _is_memory(args: Args) -> bool:
    """Whether a tensor is made of memory that comes from outside, such as that of a file."""
    return bool(args) and isinstance(args[0], (torch.UntypedStorage, memoryview))


def _make_of_tensor(
    recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs
) -> Any:
    """``torch.as_tensor(t)``: a tensor is converted, and not read."""
    data = args[0]
    dtype = args[1] if len(args) > 1 else kwargs.get("dtype")
    device = kwargs.get("device")
    if not is_plain(data):
        return func(*args, **kwargs)
    made = data
    if device is not None or not recorder.tape.random:
        made = move(recorder, METHODS["to"], (made, device or META), {})
    if dtype is not None:
        made = made.to(dtype)
    if func in _COPIES:
        made = made.detach()
    if (func in _COPIES or kwargs.get("copy")) and made is not data:
        made = made.clone() if _shares(made, data) else made
    elif kwargs.get("copy"):
        made = made.clone()
    return made.requires_grad_() if kwargs.get("requires_grad") else made


def _shares(one: Tensor, other: Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def make_unplain(
    recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs
) -> Any:
    """``torch.sparse_coo_tensor(...)``: what has no plain memory is real, or on meta if there is such a thing."""
    ops = recorder.ops
    if not ops.tape.random:
        named = kwargs.get("device")
        if not recorder.makes() or (named is not None and called_by_library()):
            return as_stock(recorder, func, args, kwargs)
        if named is None:
            kwargs = {**kwargs, "device": recorder.device}
    with reality():
        args = tuple(map(ops.value, args))
        if any(t.is_meta for t in tensors_in(args)):
            return func(*args, **kwargs)
        named = kwargs.get("device")
        if named is not None:
            kwargs = {**kwargs, "device": ops.computing_device(as_device(named))}
        return ops.unplain(func(*args, **kwargs))


def make_like(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """``torch.zeros_like(t)``, ``t.new_zeros(...)``: the dispatcher sees them, with the device that is named."""
    named = kwargs.get("device")
    if named is not None and not recorder.tape.random:
        if not recorder.makes() or called_by_library():
            return as_stock(recorder, func, args, kwargs)
        recorder.overridden(func, as_device(named))
        kwargs = _moved(kwargs)
    return func(*args, **kwargs)


def new(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """``t.new(...)``, which looks at the device of ``t``."""
    source, *rest = args
    if not is_plain(source):
        return func(*args, **kwargs)
    if len(rest) == 1 and isinstance(rest[0], Tensor):
        return rest[0].detach().to(source.dtype)
    if len(rest) == 1 and type(rest[0]) in (list, tuple):
        data = recorder.ops.value(rest[0])
    elif rest and not all(isinstance(n, (int, torch.Size)) for n in rest):
        return func(*args, **kwargs)  # of a storage
    else:
        return source.new_empty(*(rest or (0,)), **kwargs)
    with reality():
        return recorder.ops.adopt(torch.tensor(data, dtype=source.dtype))
