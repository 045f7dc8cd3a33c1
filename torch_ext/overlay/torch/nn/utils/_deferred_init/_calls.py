"""What is known of the calls that constructors make most, or that the dispatcher does not see.

Each rule answers one kind of call as :meth:`Ops.call` would, and faster, or tells what only Python asks for: the values
and the device of a tensor. Law: a call without a rule may be made as if there were none.

Under ``deferred_init`` tensors say that they are where eager construction would have them, since constructors branch
on it; under ``meta_init`` they say that they are on meta, since libraries that know meta look.
"""

from collections.abc import Callable
from typing import Any, TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils._deferred_init._moves import deepcopy, move
from torch.nn.utils._deferred_init._originals import (
    builtins,
    FREQUENCIES,
    INITS,
    METHODS,
    methods,
    NESTED_TENSOR,
)
from torch.nn.utils._deferred_init._random import reality
from torch.nn.utils._deferred_init._schema import (
    as_device,
    below_modes,
    call_below,
    called_by_library,
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
    Slot,
    slot_of,
    Unknown,
    unknown_mark,
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
    """A factory: ``torch.zeros(...)``, under ``deferred_init``."""
    named = kwargs.get("device")
    device = recorder.device if named is None else as_device(named)
    if device.type == "meta":  # the model's own
        made = call_below(func, args, {**kwargs, "device": META})
        if is_plain(made):
            attach(made.untyped_storage(), unknown_mark(func.__name__, is_lost=False))
        return made
    if kwargs.get("out") is not None or _have_tensors(args, kwargs):
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
    named = kwargs.get("device")
    if kwargs.get("out") is not None:
        return func(*args, **kwargs)
    if not recorder.makes() or (named is not None and called_by_library()):
        return as_stock(recorder, func, args, kwargs)
    if _have_tensors(args, kwargs):
        return func(*args, **_moved(kwargs))
    if recorder.report is not None and named is not None:
        recorder.overridden(func, as_device(named))
    made = call_below(func, args, _moved(kwargs))
    if "layout" in kwargs and made.layout is not torch.strided:
        return made
    if func in _RANDOM:
        attach(made.untyped_storage(), recorder.unknown(func.__name__))
        return made
    key = (func, named, made.dtype)
    filled = recorder.fills.get(key)
    if filled is None:
        device = as_device(named) if named is not None else META
        device = recorder.ops.computing_device(device)
        if func not in _WHOLE_FILLS:
            return _record(recorder, func, args, kwargs, made, device)
        # NB: one for all storages, since a model has many.
        filled = recorder.fills[key] = Filled(
            recorder.tape, device, _WHOLE_FILLS[func], (), None, made.dtype
        )
    attach(made.untyped_storage(), filled)
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
    if _have_tensors(args, kwargs):
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
        not recorder.makes() or (named is not None and called_by_library())
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
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


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


# -- what writes


def fill(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """``t.uniform_(...)``: what fills a tensor without reading it."""
    if not args:  # so nn.init hands over
        args = (kwargs["tensor"],)
        kwargs = {k: v for k, v in kwargs.items() if k != "tensor"}
    target, *rest = args
    mark, tape = mark_of(target), recorder.tape
    if mark is None and (tape.random or not target.is_meta or not is_plain(target)):
        return func(*args, **kwargs)
    if _have_tensors(args[1:], kwargs):
        return func(*args, **kwargs)
    if func in _INITS:
        if func is INITS["kaiming_uniform_"] and target.dim() < 2:
            return func(*args, **kwargs)  # an error
    elif target.requires_grad and torch.is_grad_enabled():
        return func(*args, **kwargs)  # an error, for a leaf
    draws = func not in _CONSTANT_FILLS
    if not tape.random and (draws or not isinstance(mark, (Filled, Slot))):
        return _fill_on_meta(recorder, func, target, tuple(rest), kwargs, mark)
    if isinstance(mark, Unknown):  # on meta on purpose
        return func(*args, **kwargs)
    if type(mark) is Filled and not draws and _is_whole(target):
        filled = Filled(tape, mark.device, func, tuple(rest), kwargs, target.dtype)
        attach(target.untyped_storage(), filled)
        return target
    slot = slot_of(target)
    assert slot is not None
    ref = Ref(slot, target)
    node = Node(func)
    node.args, node.kwargs, node.fills = (ref, *rest), kwargs, True
    if draws:
        recorder.ops.draw(node, func.__name__, ref)
    node.touch((slot, FRESH if ref.is_whole() else WRITE))
    recorder.ops.write_through(node)
    return target


def _fill_on_meta(
    recorder: "Recorder",
    func: Function,
    target: Tensor,
    args: Args,
    kwargs: Kwargs,
    mark: Any,
) -> Tensor:
    """In a meta block, a random fill, or a constant one of memory that nothing is known of."""
    storage = target.untyped_storage()
    if _is_whole(target):
        if func in _CONSTANT_FILLS:
            filled = Filled(
                recorder.tape,
                recorder.ops.computing_device(META),
                func,
                args,
                kwargs,
                target.dtype,
            )
            attach(storage, filled)
        else:
            attach(storage, recorder.unknown(func.__name__))
    elif isinstance(mark, (Filled, Slot)):
        slot = slot_of(target)
        assert slot is not None
        node = Node(unknown(func.__name__))
        node.args = (Ref(slot, target),)
        node.touch((slot, WRITE))
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
    ops, grad = recorder.ops, torch.is_grad_enabled()
    with reality():
        try:
            shares = func.__name__ in ("numpy", "__array__", "__dlpack__")
            args = tuple(ops.value(a, shares) for a in args)
            kwargs = {k: ops.value(v) for k, v in kwargs.items()}
        except UnknownValue as e:
            e.args = (f"{e} It is asked for by {func.__name__}, called at {where()}.",)
            raise
        with torch.set_grad_enabled(grad):  # numpy() refuses what requires a gradient
            return func(*args, **kwargs)


def tell_device(
    recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs
) -> Any:
    slot = recorder.ops.slot_of(args[0])
    return func(*args, **kwargs) if slot is None else slot.device


def tell_whether(
    recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs
) -> Any:
    """``t.is_cpu``, ``t.is_cuda``, ``t.is_meta``."""
    slot = recorder.ops.slot_of(args[0])
    if slot is None:
        return func(*args, **kwargs)
    return func.__self__.__name__ == f"is_{slot.device.type}"  # type: ignore[attr-defined]


def tell_address(
    recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs
) -> Any:
    """``t.data_ptr()``: a number to compare, as equal as addresses would be."""
    if recorder.ops.slot_of(args[0]) is None:
        return func(*args, **kwargs)
    start: int = args[0].untyped_storage()._cdata
    return start + args[0].storage_offset() * args[0].element_size()


def tell_type(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """``t.type()``; ``t.type(dtype)`` is a conversion."""
    slot = recorder.ops.slot_of(args[0])
    if slot is None or len(args) > 1 or kwargs:
        return func(*args, **kwargs)
    with reality():
        return torch.empty(0, dtype=args[0].dtype, device=slot.device).type()


# -- the tables

_FACTORIES = [
    *builtins(
        """arange bartlett_window blackman_window empty empty_permuted empty_strided eye full hamming_window
        hann_window kaiser_window linspace logspace ones rand randint randn randperm tril_indices triu_indices zeros"""
    ),
    *FREQUENCIES,
]
_OF_VALUES = builtins("as_tensor asarray scalar_tensor tensor")
_COPIES = frozenset(builtins("scalar_tensor tensor"))
# Factories of what has no plain memory: sparse, quantized, nested tensors, or those of other tensors.
_UNPLAIN = [
    *builtins(
        """sparse_bsc_tensor sparse_bsr_tensor sparse_compressed_tensor sparse_coo_tensor sparse_csc_tensor
        sparse_csr_tensor empty_quantized from_file"""
    ),
    NESTED_TENSOR,
]
_LIKE = [
    *builtins(
        "empty_like full_like ones_like rand_like randint_like randn_like zeros_like"
    ),
    *methods("new_empty new_empty_strided new_full new_ones new_tensor new_zeros"),
]
_READS = [
    *methods(
        """__array__ __bool__ __complex__ __contains__ __dlpack__ __float__ __format__ __index__ __int__ allclose
        equal is_nonzero item numpy tolist"""
    ),
    *builtins("allclose equal is_nonzero"),
]
_DRAWS = methods(
    "bernoulli_ cauchy_ exponential_ geometric_ log_normal_ normal_ random_ uniform_"
)
_INITS = frozenset(INITS.values())
_CONSTANT_FILLS = frozenset((*methods("fill_ zero_"), INITS["constant_"]))
_RANDOM = frozenset(builtins("normal rand randint randn randperm"))
# What is done to the memory of what these make, if anything.
_WHOLE_FILLS: dict[Function, Function | None] = {
    **dict.fromkeys(builtins("empty empty_permuted empty_strided")),
    **dict.fromkeys(builtins("zeros"), METHODS["zero_"]),
    **dict.fromkeys(builtins("ones"), _fill_with_ones),
}


def _rules(factory: Rule) -> dict[Function, Rule]:
    """The rules of a context in which ``factory`` is that of factories."""
    data: Any = Tensor.data
    return {
        **dict.fromkeys(_FACTORIES, factory),
        **dict.fromkeys(builtins("normal range"), make_plainly),
        **dict.fromkeys(_OF_VALUES, make_of_values),
        **dict.fromkeys(_UNPLAIN, make_unplain),
        **dict.fromkeys(_LIKE, make_like),
        METHODS["new"]: new,
        **dict.fromkeys((*_DRAWS, *methods("fill_ zero_"), *_INITS), fill),
        data.__set__: set_data,
        METHODS["set_"]: set_storage,
        METHODS["__deepcopy__"]: deepcopy,
        **dict.fromkeys(methods("to cpu cuda"), move),
        **dict.fromkeys(_READS, tell),
    }


def _look_real() -> dict[Function, Rule]:
    looks: Any = (Tensor.is_cpu, Tensor.is_cuda, Tensor.is_meta)
    device: Any = Tensor.device
    return {
        **{look.__get__: tell_whether for look in looks},
        device.__get__: tell_device,
        METHODS["data_ptr"]: tell_address,
        METHODS["type"]: tell_type,
        **dict.fromkeys(methods("__repr__ __str__ get_device"), tell),
    }


# By whether random numbers are recorded: those of deferred_init, and of a meta block.
RULES: dict[bool, dict[Function, Rule]] = {
    True: {**_rules(make), **_look_real()},
    False: _rules(make_on_meta),
}
# Those of a meta block where other dispatch modes see the ops.
SEEN_RULES: dict[Function, Rule] = {
    **dict.fromkeys((*_FACTORIES, *_OF_VALUES, *_UNPLAIN), make_seen),
    **dict.fromkeys(_LIKE, make_like),
    **dict.fromkeys(_READS, tell),
}
