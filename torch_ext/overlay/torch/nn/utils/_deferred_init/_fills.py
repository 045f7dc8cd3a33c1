"""Rules of what fills a tensor without reading it: ``t.uniform_(...)``, ``nn.init.constant_(t, 1)``.

Most of a model is filled once and whole, so that this is a mark on its storage and no op is run; on meta, filling is a
third of a construction's time. Law: what is recorded is the last fill of the whole, or every write since.
"""

from collections.abc import Callable
from typing import Any, TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils._deferred_init._factories import have_tensors
from torch.nn.utils._deferred_init._originals import INITS, methods
from torch.nn.utils._deferred_init._schema import is_plain, unknown
from torch.nn.utils._deferred_init._slot import (
    attach,
    FRESH,
    mark_of,
    META,
    Ref,
    Slot,
    slot_of,
    WRITE,
)
from torch.nn.utils._deferred_init._tape import Filled, Node


if TYPE_CHECKING:
    from torch.nn.utils._deferred_init._context import Recorder

Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

INIT_FUNCTIONS = frozenset(INITS.values())
CONSTANT_FILLS = frozenset((*methods("fill_ zero_"), INITS["constant_"]))


def fill(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> Any:
    """``t.uniform_(...)`` under deferred_init: what fills a tensor without reading it."""
    args, kwargs = _with_target(args, kwargs)
    target, *rest = args
    mark, tape = mark_of(target), recorder.tape
    if not (isinstance(mark, (Filled, Slot)) and mark.tape.random):
        return func(*args, **kwargs)
    if _is_refused(func, target) or have_tensors(args[1:], kwargs):
        return func(*args, **kwargs)
    draws = func not in CONSTANT_FILLS
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


def fill_on_meta(
    recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs
) -> Any:
    """The same in a meta block, where random values are not recorded."""
    args, kwargs = _with_target(args, kwargs)
    target = args[0]
    mark = mark_of(target)
    if mark is None and not (target.is_meta and is_plain(target)):
        return recorder.follow(func, args, kwargs)
    if _is_refused(func, target) or have_tensors(args[1:], kwargs):
        return recorder.follow(func, args, kwargs)
    kind = type(mark)
    if (kind is Filled or kind is Slot) and mark.tape.random:  # type: ignore[union-attr]
        return recorder.passed_on(func, args, kwargs)  # of a deferred_init around this
    if kind is not Slot and _is_whole(target):
        if func in CONSTANT_FILLS:
            mark = _mark_of_fill(recorder, func, args[1:], kwargs, target.dtype)
        else:
            mark = recorder.unknown(func.__name__)
        attach(target.untyped_storage(), mark)
    elif kind is Filled or kind is Slot:
        _record(recorder, func, args, kwargs)
    return target


def _record(recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs) -> None:
    target = args[0]
    slot = slot_of(target)
    assert slot is not None
    ref = Ref(slot, target)
    draws = func not in CONSTANT_FILLS
    if draws and ref.is_whole():
        attach(target.untyped_storage(), recorder.unknown(func.__name__))
        return
    node = Node(unknown(func.__name__) if draws else func)
    node.args = (ref,) if draws else (ref, *args[1:])
    node.kwargs, node.fills = {} if draws else kwargs, True
    node.touch((slot, FRESH if ref.is_whole() else WRITE))
    if not draws:
        recorder.ops.write_through(node)


def _mark_of_fill(
    recorder: "Recorder", func: Function, args: Args, kwargs: Kwargs, dtype: torch.dtype
) -> Filled:
    # NB: 0.0 equals -0.0.
    key = (func, args, dtype, *map(str, args if 0 in args else ()))
    filled = None if kwargs else recorder.marks.get(key)
    if filled is None:
        device = recorder.ops.computing_device(META)
        filled = Filled(recorder.tape, device, func, args, kwargs, dtype)
        if not kwargs:
            recorder.marks[key] = filled
    return filled


def _with_target(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    if args:
        return args, kwargs
    # So nn.init hands over.
    return (kwargs["tensor"],), {k: v for k, v in kwargs.items() if k != "tensor"}


def _is_refused(func: Function, target: Tensor) -> bool:
    """Whether ``func`` raises for ``target``: a leaf, or what has no fan."""
    if func in INIT_FUNCTIONS:
        return func is INITS["kaiming_uniform_"] and target.dim() < 2
    return target.requires_grad and torch.is_grad_enabled()


def _is_whole(tensor: Tensor) -> bool:
    """Whether it has every byte of its storage once."""
    nbytes: int = tensor.numel() * tensor.element_size()
    return tensor.is_contiguous() and nbytes == tensor.untyped_storage().nbytes()
