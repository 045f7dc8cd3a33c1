"""What is known of the calls that constructors make most, or that the dispatcher does not see.

Each rule answers one kind of call as :meth:`Ops.call` would, and faster, or tells what only Python asks for: the values
and the device of a tensor. Law: a call without a rule may be made as if there were none.

Under ``deferred_init`` tensors say that they are where eager construction would have them, since constructors branch
on it; under ``meta_init`` they say that they are on meta, since libraries that know meta look.
"""

import functools
from collections.abc import Callable
from typing import Any, TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils._deferred_init._moves import deepcopy, move
from torch.nn.utils._deferred_init._random import reality
from torch.nn.utils._deferred_init._schema import (
    below_modes,
    call_below,
    is_plain,
    unknown,
    UnknownValue,
    where,
)
from torch.nn.utils._deferred_init._slot import (
    attach,
    FRESH,
    mark_of,
    META,
    Ref,
    slot_of,
    WRITE,
)
from torch.nn.utils._deferred_init._tape import Filled, has_tensors, Node, tensors_in


if TYPE_CHECKING:
    from torch.nn.utils._deferred_init._context import Recorder

Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Rule = Callable[["Recorder", Function, Args, Kwargs], Any]


# -- what makes tensors


def make(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """A factory: ``torch.zeros(...)``."""
    named = kwargs.get("device")
    device = recorder.device if named is None else torch.device(named)
    ops = recorder.ops
    if device.type == "meta" and ops.tape.random:  # the model's own
        return call_below(func, args, {**kwargs, "device": META})
    if kwargs.get("out") is not None or _have_tensors(args, kwargs):
        return func(*args, **_moved(kwargs))
    if recorder.report is not None and named is not None:
        recorder.overridden(func, device)
    made = call_below(func, args, _moved(kwargs))
    if made.layout is not torch.strided or made.is_quantized or made.is_nested:
        return make_unplain(recorder, func, args, kwargs)
    device = recorder.real_device(device)
    if func in _whole_fills() and not kwargs.get("pin_memory"):
        # NB: under meta_init only values matter, and nobody writes so much number by number to read it.
        if ops.tape.random or made.nbytes <= _SMALL:
            fill_with = _whole_fills()[func]
            ops.fill(made, Filled(ops.tape, device, fill_with, (), None, made.dtype))
        return made
    slot = ops.slot(made, device)
    node = Node(func)
    node.args = args
    node.kwargs = {**kwargs, "device": device, "dtype": made.dtype}
    node.kwargs.pop("requires_grad", None)
    ref = Ref(slot, made)
    node.outs = (ref,)
    node.fills = True
    if func in _random():
        ops.draw(node, func.__name__, ref)
    node.touch((slot, FRESH))
    return made


_SMALL = 1 << 20  # bytes


def _fill_with_ones(tensor: Tensor) -> Tensor:
    return tensor.fill_(1)


def _have_tensors(args: Args, kwargs: Kwargs) -> bool:
    return has_tensors(args) or bool(kwargs and has_tensors(kwargs.values()))


def make_plainly(
    recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs
) -> Any:
    """``torch.normal(mean, std, size)``: a factory, unless it is given tensors."""
    if _have_tensors(args, kwargs):
        return func(*args, **kwargs)
    return make(recorder, func, args, kwargs)


def _moved(kwargs: Kwargs) -> Kwargs:
    kwargs = {**kwargs, "device": META}
    kwargs.pop("pin_memory", None)
    return kwargs


def make_of_values(
    recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs
) -> Any:
    """``torch.tensor(data)`` and its like: the data is there, so this is made, and then stood for."""
    named = kwargs.get("device")
    device = recorder.device if named is None else torch.device(named)
    ops = recorder.ops
    if device.type == "meta" and ops.tape.random:
        with below_modes():
            return func(*args, **kwargs, **({} if named else {"device": device}))
    recorder.overridden(func, device if named is not None else None)
    if not ops.tape.random and any(
        slot_of(t) is None for t in tensors_in(args) if t.is_meta
    ):
        return func(*args, **_moved(kwargs))
    kwargs = {**kwargs, "device": recorder.real_device(device)}
    leaf = kwargs.pop("requires_grad", False)
    with reality():
        real = func(*map(ops.value, args), **kwargs)
    if not is_plain(real):
        return real
    # NB: as_tensor() and asarray() of an array share its memory.
    made = ops.adopt(real, shared=func not in (torch.tensor, torch.scalar_tensor))
    return made.requires_grad_() if leaf else made


def make_unplain(
    recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs
) -> Any:
    """``torch.sparse_coo_tensor(...)``: what has no plain memory is real, or on meta if there is such a thing."""
    ops = recorder.ops
    if not ops.tape.random and kwargs.get("device") is None:
        kwargs = {**kwargs, "device": recorder.device}
    with reality():
        args = tuple(map(ops.value, args))
        if any(t.is_meta for t in tensors_in(args)):
            return func(*args, **kwargs)
        named = kwargs.get("device")
        if named is not None:
            kwargs = {**kwargs, "device": recorder.real_device(torch.device(named))}
        return ops.unplain(func(*args, **kwargs))


def make_like(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """``torch.zeros_like(t)``, ``t.new_zeros(...)``: the dispatcher sees them, with the device that is named."""
    if kwargs.get("device") is not None:
        recorder.overridden(func, torch.device(kwargs["device"]))
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


# -- what writes


def fill(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """``t.uniform_(...)``: what fills a tensor without reading it."""
    if not args:  # so nn.init hands over
        args = (kwargs["tensor"],)
        kwargs = {k: v for k, v in kwargs.items() if k != "tensor"}
    target, *rest = args
    mark, tape = mark_of(target), recorder.ops.tape
    if mark is None and (tape.random or not target.is_meta or not is_plain(target)):
        return func(*args, **kwargs)
    if _have_tensors(args[1:], kwargs):
        return func(*args, **kwargs)
    if func in _inits():
        if func is torch.nn.init.kaiming_uniform_ and target.dim() < 2:
            return func(*args, **kwargs)  # an error
    elif target.requires_grad and torch.is_grad_enabled():
        return func(*args, **kwargs)  # an error, for a leaf
    if mark is None:  # nothing is known of it, nor will be
        return target
    draws = func not in _constant_fills()
    if draws and not tape.random:
        func, rest, kwargs = unknown(func.__name__), [], {}
    if type(mark) is Filled and not (draws and tape.random) and _is_whole(target):
        filled = Filled(tape, mark.device, func, tuple(rest), kwargs, target.dtype)
        attach(target.untyped_storage(), filled)
        return target
    slot = slot_of(target)
    assert slot is not None
    ref = Ref(slot, target)
    node = Node(func)
    node.args, node.kwargs, node.fills = (ref, *rest), kwargs, True
    if draws and tape.random:
        recorder.ops.draw(node, func.__name__, ref)
    node.touch((slot, FRESH if ref.is_whole() else WRITE))
    recorder.ops.write_through(node)
    return target


def _is_whole(tensor: Tensor) -> bool:
    """Whether it has every byte of its storage once."""
    nbytes: int = tensor.numel() * tensor.element_size()
    return tensor.is_contiguous() and nbytes == tensor.untyped_storage().nbytes()


def set_data(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """``t.data = real``: the two have to be on one device."""
    target, source = args
    if target.is_meta and is_plain(source) and not source.is_meta:
        args = (target, recorder.ops.adopt(source))
    return func(*args, **kwargs)


def set_storage(
    recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs
) -> Any:
    """``t.set_(storage, ...)``, as unpickling does: the storage carries the history."""
    return func(*recorder.ops.with_twin(args, kwargs), **kwargs)


# -- what tells


def tell(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """``t.item()``, ``t.tolist()``, ``t.numpy()`` ...: the truth."""
    ops = recorder.ops
    with reality():
        try:
            shares = func.__name__ in ("numpy", "__array__", "__dlpack__")
            args = tuple(ops.value(a, shares) for a in args)
            kwargs = {k: ops.value(v) for k, v in kwargs.items()}
        except UnknownValue as e:
            e.args = (f"{e} It is asked for by {func.__name__}, called at {where()}.",)
            raise
        return func(*args, **kwargs)


def tell_device(
    recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs
) -> Any:
    slot = slot_of(args[0])
    return func(*args, **kwargs) if slot is None else slot.device


def tell_whether(
    recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs
) -> Any:
    """``t.is_cpu``, ``t.is_cuda``, ``t.is_meta``."""
    slot = slot_of(args[0])
    if slot is None:
        return func(*args, **kwargs)
    return func.__self__.__name__ == f"is_{slot.device.type}"  # type: ignore[attr-defined]


def tell_address(
    recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs
) -> Any:
    """``t.data_ptr()``: a number to compare, as equal as addresses would be."""
    if slot_of(args[0]) is None:
        return func(*args, **kwargs)
    start: int = args[0].untyped_storage()._cdata
    return start + args[0].storage_offset() * args[0].element_size()


def tell_type(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """``t.type()``; ``t.type(dtype)`` is a conversion."""
    slot = slot_of(args[0])
    if slot is None or len(args) > 1 or kwargs:
        return func(*args, **kwargs)
    with reality():
        return torch.empty(0, dtype=args[0].dtype, device=slot.device).type()


# -- the tables


def _members(owner: object, names: str) -> list[Any]:
    return [getattr(owner, name) for name in names.split() if hasattr(owner, name)]


_DRAWS = """bernoulli_ cauchy_ exponential_ geometric_ log_normal_ normal_ random_ uniform_"""


@functools.lru_cache(1)
def _whole_fills() -> dict[Function, Function | None]:
    """What is done to the memory of what these make, if anything."""
    fills = dict.fromkeys(_members(torch, "empty empty_permuted empty_strided"))
    return {**fills, torch.zeros: Tensor.zero_, torch.ones: _fill_with_ones}


@functools.lru_cache(1)
def _random() -> frozenset[Function]:
    return frozenset(_members(torch, "normal rand randint randn randperm"))


@functools.lru_cache(1)
def _inits() -> frozenset[Function]:
    names = "constant_ kaiming_uniform_ normal_ uniform_ _no_grad_trunc_normal_"
    return frozenset(_members(torch.nn.init, names))


@functools.lru_cache(1)
def _constant_fills() -> frozenset[Function]:
    return frozenset((*_members(Tensor, "fill_ zero_"), torch.nn.init.constant_))


@functools.lru_cache(2)
def rules(random: bool) -> dict[Function, Rule]:
    """The rules of ``deferred_init`` (``random``) or of ``meta_init``."""
    from torch.utils._device import _device_constructors

    table: dict[Any, Rule] = dict.fromkeys(_device_constructors(), make)
    table.update(dict.fromkeys(_members(torch, "normal range"), make_plainly))
    values = _members(torch, "as_tensor asarray tensor scalar_tensor")
    table.update(dict.fromkeys(values, make_of_values))
    table.update(dict.fromkeys(_odd_factories(), make_unplain))
    likes = (
        "empty_like full_like ones_like rand_like randint_like randn_like zeros_like"
    )
    news = "new_empty new_empty_strided new_full new_ones new_zeros"
    table.update(dict.fromkeys(_members(torch, likes), make_like))
    table.update(dict.fromkeys(_members(Tensor, news), make_like))
    table[Tensor.new] = new
    table.update(dict.fromkeys(_members(Tensor, f"{_DRAWS} fill_ zero_"), fill))
    table.update(dict.fromkeys(_inits(), fill))
    data: Any = Tensor.data
    table[data.__set__] = set_data
    table[Tensor.set_] = set_storage
    table[Tensor.__deepcopy__] = deepcopy
    table.update(dict.fromkeys((Tensor.to, Tensor.cpu, Tensor.cuda), move))
    reads = """__array__ __bool__ __complex__ __contains__ __dlpack__ __float__ __format__
        __index__ __int__ allclose equal is_nonzero item numpy tolist"""
    table.update(dict.fromkeys(_members(Tensor, reads), tell))
    table.update(dict.fromkeys(_members(torch, "allclose equal is_nonzero"), tell))
    if random:
        _look_real(table)
    return table


def _look_real(table: dict[Any, Rule]) -> None:
    for name in ("is_cpu", "is_cuda", "is_meta"):
        table[getattr(Tensor, name).__get__] = tell_whether
    device: Any = Tensor.device
    table[device.__get__] = tell_device
    table[Tensor.data_ptr] = tell_address
    table[Tensor.type] = tell_type
    table.update(dict.fromkeys(_members(Tensor, "__repr__ __str__ get_device"), tell))


def _odd_factories() -> list[Any]:
    """Factories of what has no plain memory: sparse, quantized, nested tensors, or those of other tensors."""
    sparse = """sparse_bsc_tensor sparse_bsr_tensor sparse_compressed_tensor sparse_coo_tensor
        sparse_csc_tensor sparse_csr_tensor empty_quantized from_file"""
    return [*_members(torch, sparse), torch.nested.nested_tensor]
