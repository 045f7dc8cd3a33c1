"""What the rest of torch asks about deferred tensors: to copy them, to pickle them, and where the generator would be.

Law: a copy of a deferred tensor is deferred, with the values of the original; nothing is lost without an error.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.modules._to_empty import own
from torch.nn.utils._deferred_init._context import current
from torch.nn.utils._deferred_init._materialize import is_deferred, is_lost
from torch.nn.utils._deferred_init._moves import copy_of
from torch.nn.utils._deferred_init._ops import Ops
from torch.nn.utils._deferred_init._schema import (
    below_modes,
    called_by_library,
    is_plain,
)
from torch.nn.utils._deferred_init._slot import CPU, FRESH, READ, Ref, slot_of, slot_on
from torch.nn.utils._deferred_init._tape import Node
from torch.utils._sharded_meta import is_sharded


__all__ = [
    "answers",
    "deepcopy_parameter",
    "deepcopy_tensor",
    "is_deferred",
    "is_inside",
    "is_recorded",
    "naming_the_remedy",
    "parameter_data",
    "sync_default_generator",
    "to_pickle",
]


def is_inside() -> bool:
    """Whether this thread is in a context that records."""
    return current() is not None


def is_recorded(value: Any) -> bool:
    """Whether ``value`` is a deferred tensor, asked where nobody may notice.

    A read of an attribute is a call of its own to subclasses, tensor-likes and function modes. Each check of
    ``__torch_function__``, also below DisableTorchFunction, uses up the hop that
    :func:`torch.overrides.redispatch_function` skips; so the dispatch keys tell the device, and for a tensor on meta
    the hop is put back.
    """
    cls = type(value)
    # NB: issubclass(), since isinstance() believes the __class__ of an object that answers everything.
    if not issubclass(cls, Tensor):
        return False
    hop = _hop_is_pending()
    if (
        cls is not Tensor
        and cls.__torch_function__ is not torch._C._disabled_torch_function_impl
        and torch._C._is_torch_function_enabled()
        and not hop
    ):
        return False  # its own __torch_function__ comes first
    try:
        with torch._C.DisableTorchFunction():
            if cls.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
                return is_sharded(value) and is_deferred(value)
            return torch._C._dispatch_keys(value).has(_META_KEY) and is_deferred(value)
    finally:
        if hop:
            torch._C._set_skip_next_torch_function(True)  # type: ignore[attr-defined]


def answers(value: Tensor) -> bool:
    """Whether ``value`` is a deferred tensor that no subclass or mode answers for."""
    return is_recorded(value) and not torch.overrides.has_torch_function((value,))


_META_KEY = torch._C.DispatchKey.Meta
# NB: releases without redispatch_function() have no hop.
_hop_is_pending = getattr(torch._C, "_peek_should_skip_torch_function", bool)


def deepcopy_parameter(parameter: Parameter, memo: dict[int, Any]) -> Any:
    """As ``Parameter.__deepcopy__``: a clone of its data."""
    if id(parameter) in memo:
        return memo[id(parameter)]
    slot = slot_of(parameter)
    assert slot is not None
    with torch._C.DisableTorchFunction(), torch.no_grad(), below_modes():
        data = parameter.data.clone(memory_format=torch.preserve_format)
    new = slot_on(data.untyped_storage(), slot.tape, slot.device)
    node = Node(torch.clone)
    node.args, node.outs = (Ref(slot, parameter),), (Ref(new, data),)
    node.kwargs = {"memory_format": torch.preserve_format}
    node.touch((slot, READ), (new, FRESH))
    result = memo[id(parameter)] = type(parameter)(data, parameter.requires_grad)
    return result


def deepcopy_tensor(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """As ``Tensor.__deepcopy__``: tensors that share a storage share a copy of it."""
    if id(tensor) in memo:
        copied: Tensor = memo[id(tensor)]
        return copied
    if not tensor.is_leaf or type(tensor) is not Tensor:
        raise RuntimeError(
            "Expected a deferred tensor that is copied to be a leaf and a plain Tensor or Parameter, got "
            f"{type(tensor).__name__}. (Did you mean to materialize it first?)"
        )
    slot = slot_of(tensor)
    assert slot is not None
    copied = copy_of(Ops(slot.tape, CPU), tensor, slot, memo)
    copied.requires_grad_(tensor.requires_grad)
    copied.__dict__ = copy.deepcopy(tensor.__dict__, memo)
    memo[id(tensor)] = copied
    return copied


def parameter_data(data: Any) -> Any:
    """The tensor that a Parameter of ``data`` is made of."""
    # NB: asked for each parameter; unlike is_meta, this is no call that modes see.
    if not isinstance(data, Tensor) or torch._C._dispatch_keys(data).has(_META_KEY):
        return data
    recorder = current()
    if recorder is None:
        return data
    with torch._C.DisableTorchFunction():
        if data.is_meta or not is_plain(data):
            return data
        if not recorder.tape.random and called_by_library():  # unpickled
            return data
        return recorder.ops.adopt(data)


class _Applied:
    """A function for ``Module._apply`` whose error says what to do about a deferred tensor, which it cannot move."""

    __slots__ = ("_fn",)

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        self._fn = fn

    def __call__(self, tensor: Tensor) -> Tensor:
        try:
            return self._fn(tensor)
        except NotImplementedError as e:
            if not str(e).startswith(_NO_DATA) or not (
                is_deferred(tensor) or is_lost(tensor)
            ):
                raise
            raise NotImplementedError(
                f"{_NO_DATA} Use torch.nn.utils.materialize_module(module, device=...) instead, which computes what is "
                "recorded of the module there, after load_state_dict if it was built on the meta device. "
                "(to_empty() would lose it.)"
            ) from None


_NO_DATA = "Cannot copy out of meta tensor; no data!"


def naming_the_remedy(
    module: Module, fn: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """What ``module._apply`` calls with each tensor: ``fn`` itself, unless ``module`` has tensors on meta."""
    if type(fn) is _Applied or not any(map(_is_on_meta, own(module))):
        return fn
    return _Applied(fn)


def _is_on_meta(tensor: Any) -> bool:
    keys = issubclass(type(tensor), Tensor) and torch._C._dispatch_keys(tensor)
    return bool(keys and keys.has(_META_KEY))


def to_pickle(tensor: Tensor) -> Tensor:
    """What is pickled for ``tensor``: inside of a context its values if they are known, outside nothing has any."""
    if type(tensor) is not Tensor or not is_deferred(tensor):
        return tensor
    recorder = current()
    if recorder is None:
        raise RuntimeError(
            f"Expected a tensor with data to pickle, got a deferred one of shape {list(tensor.shape)}. "
            "(Did you mean to call torch.nn.utils.materialize_module first?)"
        )
    with torch._C.DisableTorchFunction():
        real: Tensor = recorder.ops.value(tensor, handed_over=True)
    return real


def sync_default_generator() -> None:
    """Inside of a deferred_init, put the CPU's generator where eager construction would have it now."""
    recorder = current()
    if recorder is not None and recorder.tape.random:
        recorder.tape.stream(CPU).sync()
