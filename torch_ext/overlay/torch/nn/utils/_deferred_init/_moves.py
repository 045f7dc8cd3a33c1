"""Rules of the calls that move or copy a tensor; see ``_calls.py``.

Law: a tensor that is where it is asked to go to is returned itself, as in eager construction, and tensors that share a
storage share the copy of it that one ``copy.deepcopy`` makes.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils._deferred_init._ops import encode, Ops
from torch.nn.utils._deferred_init._schema import (
    below_modes,
    called_by_library,
    is_plain,
)
from torch.nn.utils._deferred_init._slot import FRESH, META, READ, Ref, Slot, slot_of
from torch.nn.utils._deferred_init._tape import Node


if TYPE_CHECKING:
    from torch.nn.utils._deferred_init._context import Recorder

Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def move(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """``t.to(...)``, ``t.cpu()``, ``t.cuda()``: a tensor is where it would be, or stays on meta."""
    tensor, *rest = args
    target, options = _parse_to(func, rest, kwargs)
    if target is None or not is_plain(tensor):
        return func(*args, **kwargs)
    ops = recorder.ops
    if not ops.tape.random:
        if not tensor.is_meta:
            if target.type == tensor.device.type:
                return func(*args, **kwargs)
            if called_by_library():
                return recorder.passed_on(func, args, kwargs)
            tensor = ops.adopt(tensor, shared=True)
        recorder.overridden(func, target)
        return tensor.to(**{"dtype": tensor.dtype, **options})
    slot = ops.slot_of(tensor)
    if slot is None or target == META:
        return tensor.to(target, **options)
    if not _same(target, slot.device):
        return recorder.copied(tensor, target, options)
    return tensor.to(**{"dtype": tensor.dtype, **options})


def _parse_to(
    func: Function, args: Sequence[Any], kwargs: Kwargs
) -> tuple[torch.device | None, Kwargs]:
    """The device that is named, and the other arguments by their names."""
    kwargs = dict(kwargs)
    if func is not Tensor.to:
        names = ["device", "non_blocking"] if func is Tensor.cuda else []
        kwargs.update(zip(names, args, strict=False))
        named = kwargs.pop("device", None) or func.__name__
        return torch.device(f"cuda:{named}" if type(named) is int else named), kwargs
    first = args[0] if args else kwargs.pop("other", kwargs.get("device"))
    if isinstance(first, Tensor):
        kwargs.update(zip(("non_blocking", "copy"), args[1:], strict=False))
        slot = slot_of(first)
        return first.device if slot is None else slot.device, {
            **kwargs,
            "dtype": first.dtype,
        }
    if not isinstance(first, (str, torch.device, int)):
        return None, kwargs
    kwargs.update(zip(("dtype", "non_blocking", "copy"), args[1:], strict=False))
    kwargs.pop("device", None)
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    return torch.device(first), kwargs


def _same(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index or 0) == (other.index or 0)


def deepcopy(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """``copy.deepcopy(t)``: tensors that share a storage share a copy of it."""
    tensor, memo = args
    slot = recorder.ops.slot_of(tensor)
    if slot is None or not tensor.is_leaf or type(tensor) is not Tensor:
        return func(*args, **kwargs)
    if id(tensor) in memo:
        return memo[id(tensor)]
    copied = copy_of(recorder.ops, tensor, slot, memo)
    copied.requires_grad_(tensor.requires_grad)
    copied.__dict__ = copy.deepcopy(tensor.__dict__, memo)
    memo[id(tensor)] = copied
    return copied


def copy_of(ops: Ops, tensor: Tensor, slot: Slot, memo: dict[int, Any]) -> Tensor:
    """``tensor``, in a copy of its storage; ``memo`` has the storages that were copied before."""
    storage = tensor.untyped_storage()
    twin = memo.get(storage._cdata)
    if twin is None:
        twin = memo[storage._cdata] = torch.UntypedStorage(slot.nbytes, device=META)
        memo.setdefault(id(memo), []).append(
            storage
        )  # keeps the address from being given away
        with below_modes():
            whole = torch.empty(0, dtype=torch.uint8, device=META).set_(storage)
            made = torch.empty(0, dtype=torch.uint8, device=META).set_(twin)
        new = ops.slot(made, slot.device)
        node = Node(torch.clone)
        node.args, node.outs = (encode(whole),), (Ref(new, made),)
        node.touch((slot, READ), (new, FRESH))
    with below_modes():
        result = torch.empty(0, dtype=tensor.dtype, device=META)
        return result.set_(
            twin, tensor.storage_offset(), tensor.size(), tensor.stride()
        )
