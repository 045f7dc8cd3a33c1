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
from torch.nn.utils._deferred_init._factories import (
    make,
    make_like,
    make_of_values,
    make_on_meta,
    make_plainly,
    make_seen,
    make_unplain,
    new,
)
from torch.nn.utils._deferred_init._fills import fill, fill_on_meta, INIT_FUNCTIONS
from torch.nn.utils._deferred_init._moves import deepcopy, move
from torch.nn.utils._deferred_init._originals import (
    builtins,
    FREQUENCIES,
    METHODS,
    methods,
)
from torch.nn.utils._deferred_init._random import reality
from torch.nn.utils._deferred_init._schema import (
    is_plain,
    op_of,
    UnknownValue,
    where,
)
from torch.nn.utils._deferred_init._tape import tensors_in


if TYPE_CHECKING:
    from torch.nn.utils._deferred_init._context import Recorder

Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Rule = Callable[["Recorder", Function, Args, Kwargs], Any]


def as_it_is(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """What neither makes a tensor nor reads one, such as ``t.shape``; :meth:`Recorder.call` knows it by this."""
    return func(*args, **kwargs)


# -- what is exchanged


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


def execute(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """What reads memory without asking the dispatcher: it is called now, on real tensors."""
    op = op_of(getattr(torch.ops.aten, func.__name__).default)
    return recorder.ops.execute(op, func, args, kwargs)


# -- what tells


def tell(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """``t.item()``, ``t.tolist()``, ``t.numpy()`` ...: the truth."""
    ops, grad = recorder.ops, torch.is_grad_enabled()
    shares = func.__name__ in ("numpy", "__array__", "__dlpack__")
    with reality():
        try:
            args = tuple(ops.value(a, shares) for a in args)
            kwargs = {k: ops.value(v) for k, v in kwargs.items()}
        except UnknownValue as e:
            e.args = (f"{e} It is asked for by {func.__name__}, called at {where()}.",)
            raise
        try:
            with torch.set_grad_enabled(grad):  # numpy() refuses what needs a gradient
                return func(*args, **kwargs)
        except RuntimeError as e:
            if recorder.tape.random or not any(t.is_meta for t in tensors_in(args)):
                raise
            error = UnknownValue("an op on unknown values")
            error.args = (
                f"{error} It is asked for by {func.__name__}, called at {where()}.",
            )
            raise error from e


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
# Factories of what has no plain memory: sparse, quantized, nested tensors, or those of other tensors.
_UNPLAIN = builtins(
    """sparse_bsc_tensor sparse_bsr_tensor sparse_compressed_tensor sparse_coo_tensor sparse_csc_tensor
    sparse_csr_tensor empty_quantized from_file"""
)
# What a block of a real device gives its device to. NB: torch.utils._device fills its table at first use, with wrappers
# if factories are wrapped then.
DEVICE_CONSTRUCTORS = frozenset(
    (*_FACTORIES, *_OF_VALUES, *_UNPLAIN, *builtins("range"))
) - frozenset(builtins("from_file"))
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


_SHAPES: list[Any] = [
    *methods(
        """dim element_size is_complex is_conj is_contiguous is_floating_point is_inference is_neg is_signed ndimension
        nelement numel requires_grad_ size storage_offset stride"""
    ),
    *builtins(
        "is_complex is_conj is_floating_point is_inference is_neg is_signed numel"
    ),
    *(
        getattr(Tensor, name).__get__
        for name in (
            *("dtype", "grad_fn", "is_leaf", "is_nested", "is_quantized", "is_sparse"),
            *("layout", "ndim", "requires_grad", "shape", "_version"),
        )
    ),
    torch._C._set_grad_enabled,
]


def _rules(factory: Rule, fill: Rule) -> dict[Function, Rule]:
    """The rules of a context in which these are the rules of factories and fills."""
    data: Any = Tensor.data
    return {
        **dict.fromkeys(_SHAPES, as_it_is),
        **dict.fromkeys(_FACTORIES, factory),
        **dict.fromkeys(builtins("normal range"), make_plainly),
        **dict.fromkeys(_OF_VALUES, make_of_values),
        **dict.fromkeys(_UNPLAIN, make_unplain),
        **dict.fromkeys(_LIKE, make_like),
        METHODS["new"]: new,
        **dict.fromkeys((*_DRAWS, *methods("fill_ zero_"), *INIT_FUNCTIONS), fill),
        data.__set__: set_data,
        METHODS["set_"]: set_storage,
        **dict.fromkeys(builtins("fused_moving_avg_obs_fake_quant"), execute),
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
    True: {**_rules(make, fill), **_look_real()},
    False: _rules(make_on_meta, fill_on_meta),
}
# Those that hand over to Recorder.follow themselves.
FAST_RULES = frozenset((make_on_meta, fill_on_meta))
# Those of a meta block where other dispatch modes see the ops.
SEEN_RULES: dict[Function, Rule] = {
    **dict.fromkeys((*_FACTORIES, *_OF_VALUES, *_UNPLAIN), make_seen),
    **dict.fromkeys(_LIKE, make_like),
    **dict.fromkeys(_READS, tell),
}
