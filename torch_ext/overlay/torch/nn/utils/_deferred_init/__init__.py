"""Construct modules without memory: :func:`meta_init`, :func:`deferred_init` and what materializes the latter.

``torch.device("meta")`` is a default for a missing ``device``, and what a constructor does otherwise escapes it. In
these contexts nothing does, and ``deferred_init`` also records what the constructor did, so that it can be done later.
Law: ``materialize_module(deferred_init(f))`` is ``f()``, bit for bit.

This file has what users call; it is imported with torch, and the rest with the first call.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, overload, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.module import Module
from torch.nn.utils._deferred_init import (
    _originals as _originals,  # before others replace names
)
from torch.types import Device


__all__ = [
    "deferred_init",
    "is_deferred",
    "materialize_module",
    "materialize_tensor",
    "meta_init",
]

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M", bound=Module)


@contextmanager
def meta_init(*, report: bool = False) -> Iterator[list[str]]:
    """Context in which everything that is constructed is on the meta device, whatever the constructor says.

    Where ``with torch.device("meta")`` fills in a missing ``device``, this also overrides an explicit one, and puts on
    meta what legacy constructors, ``Tensor.new``, ATen ops, ``torch.from_numpy``, ``torch.load``, unpickling and
    ``.to()`` make, real tensors that are registered as parameters or buffers, and what threads make that are started
    inside. No memory is filled and nothing is drawn from a generator. A constant that the constructor computes and
    reads (``.item()``, ``.tolist()``, ``bool()``, NumPy) has its true value until the context ends.

    Sparse, nested and quantized tensors that meta has no form of stay as they are, and so does a tensor that is made
    without the dispatcher (``torch.frombuffer``, ``torch.from_dlpack``, ``torch.from_file``) until a module or an op
    gets it.

    Args:
        report (bool): note what was overridden. Default: ``False``

    Yields:
        list[str]: with ``report=True``, a line ``"file:line: call, device named"`` for each call that would have made
        a real tensor under ``torch.device("meta")``; else empty.

    Raises:
        RuntimeError: the constructor reads a value that is random, or that nothing is known of.

    Example::

        >>> with torch.nn.utils.meta_init():
        ...     m = torch.nn.Linear(2, 3, device="cpu")
        >>> m.weight.device
        device(type='meta')
    """
    from torch.nn.utils._deferred_init import _context, _loading, _tape  # noqa: F401

    lines: list[str] = []
    recorder = _context.Recorder(_tape.Tape(random=False), lines if report else None)
    with recorder.recording():
        yield lines


@overload
def deferred_init() -> AbstractContextManager[None]: ...


@overload
def deferred_init(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...


def deferred_init(fn: Any = None, /, *args: Any, **kwargs: Any) -> Any:
    """Construct a module now, and give it memory and values later.

    ``fn(*args, **kwargs)`` is called as in :func:`meta_init`, but for the constructor everything looks as it will be:
    tensors say that they are where they will be, and values that it reads are the true ones. What is done to each
    storage is recorded. :func:`materialize_module` does it, so that ``materialize_module(deferred_init(fn))`` equals
    ``fn()``: bit-equal values, the same ties, aliases, strides, classes, attributes and hooks, and the same state of
    the default generator afterwards, in whatever order modules are materialized.

    Nothing is drawn meanwhile: the default generator is left as it was found, and the first materialization that
    draws puts it where ``fn()`` would have left it, unless it has been moved since. A generator that the constructor
    passes to an op is moved at once.

    Without arguments this is a context manager that does the same for its block.

    A deferred tensor is on meta, to all who look from outside. What is done to it there (``.half()``, ``.add_()``) is
    not recorded. It can be copied by :func:`copy.deepcopy`, but not pickled.

    Args:
        fn (Callable, optional): what constructs, usually a class of modules.
        *args: what to call it with.
        **kwargs: what to call it with.

    Returns:
        what ``fn`` returns.

    Example::

        >>> m = torch.nn.utils.deferred_init(torch.nn.Linear, 2, 3)
        >>> m.weight.device
        device(type='meta')
        >>> torch.nn.utils.materialize_module(m).weight.device
        device(type='cpu')

    The names are those of torchdistX.
    """
    if fn is None:
        return _recording()
    with _recording():
        return fn(*args, **kwargs)


@contextmanager
def _recording() -> Iterator[None]:
    from torch.nn.utils._deferred_init import _context, _loading, _tape  # noqa: F401

    around = _context.current()
    if around is not None and around.tape.random:
        yield  # a part of what is deferred anyway
        return
    with _context.Recorder(_tape.Tape(random=True)).recording():
        yield


def is_deferred(value: Tensor | Module) -> bool:
    """Whether :func:`materialize_tensor` or :func:`materialize_module` has something to do.

    Args:
        value (Tensor or Module): a module is deferred if a tensor of it or of its submodules is.

    Returns:
        bool: ``False`` for what has memory, and for what is on meta otherwise.
    """
    from torch.nn.utils._deferred_init import _materialize

    return _materialize.is_deferred(value)


def materialize_tensor(
    tensor: Tensor,
    *,
    device: Device = None,
    dtype: torch.dtype | None = None,
    index: Any = None,
) -> Tensor:
    """Give a deferred tensor its memory and values.

    It stays the same object, and shares memory with what it shares its storage with, once that is materialized.

    Args:
        tensor (Tensor): one that is not deferred is returned as it is.
        device (torch.device, optional): where it is to be. Values are computed where the constructor would have
            computed them, and moved. Default: where the constructor would have put it.
        dtype (torch.dtype, optional): what floating-point tensors are cast to.
        index (optional): with ``index``, ``tensor`` stays deferred, and a new tensor is returned that has the values
            of ``tensor[index]``, such as a rank's shard, in memory of its own. The storage of ``tensor`` is held
            meanwhile.

    Returns:
        Tensor: ``tensor``, or what ``index`` picks of it.

    Raises:
        RuntimeError: a real tensor that the recorded calls read was written to since.
    """
    from torch.nn.utils._deferred_init import _materialize

    target = None if device is None else torch.device(device)
    if index is not None:
        part = _materialize.shard(tensor, index)
        floating = dtype if part.is_floating_point() else None
        return part.to(device=target, dtype=floating)
    slots, _ = _materialize.materialize([tensor], (target, dtype))
    _materialize.finish(slots)
    return tensor


def materialize_module(
    module: M,
    *,
    device: Device = None,
    dtype: torch.dtype | None = None,
    buffers_only: bool = False,
    check_fn: Callable[[Module], bool] | None = None,
    skip_materialized: bool = True,
    init_fn: Callable[[Module], None] | None = None,
) -> M:
    """Give what is deferred of a module and its submodules its memory and values.

    After ``load_state_dict`` these are the tensors that the state dict did not bring, such as non-persistent buffers.
    Tensors stay the same objects. What the module keeps in plain attributes, also in lists, tuples, sets and dicts, is
    materialized with it. If this raises, the module is as it was.

    Of a parameter that :func:`~torch.distributed.fsdp.fully_shard` or
    :func:`~torch.distributed.tensor.distribute_tensor` has sharded on meta, each rank gets its part: bit for bit that
    of the unsharded model, without communication, and with one whole tensor in memory at a time. All ranks have to
    start from the same seed, and each draws all numbers. Where nothing was recorded (``with torch.device("meta")``),
    ``init_fn`` initializes the modules that have something on meta, one after the other in the order of
    :meth:`~torch.nn.Module.modules`, each once, and sees its parameters whole.

    Args:
        module (Module): what :func:`deferred_init` returned, or a part of it.
        device (torch.device, optional): where tensors are to be. Values are computed where the constructor computes
            them, and moved: on CUDA where it names ``"cuda"``, else on the CPU. Default: where the constructor would,
            and for a sharded parameter the device of its mesh.
        dtype (torch.dtype, optional): what floating-point tensors that are deferred are cast to.
        buffers_only (bool): leave parameters deferred. Default: ``False``
        check_fn (Callable, optional): called with each submodule; what it returns ``False`` for is left out.
        skip_materialized (bool): when ``False``, a tensor that has memory already is an error. Default: ``True``
        init_fn (Callable, optional): initializes the parameters and buffers that the module which it is called with
            itself has, for modules that have some on meta of which nothing was recorded. They have memory by then, and
            what has its values already is a copy. Default: ``reset_parameters()``, for a sharded model that was not
            made by :func:`deferred_init`; other tensors that were put on meta stay there

    Returns:
        Module: ``module``

    Raises:
        ValueError: ``skip_materialized=False``, and a tensor is not deferred.
        RuntimeError: a real tensor that the recorded calls read was written to; or a module that would have to be
            initialized has no ``reset_parameters()``.

    Example::

        >>> # xdoctest: +SKIP("distributed")
        >>> m = torch.nn.utils.deferred_init(Transformer, config)
        >>> for layer in m.layers:
        ...     fully_shard(layer)
        >>> fully_shard(m)
        >>> torch.nn.utils.materialize_module(m)  # each rank its shards of Transformer(config)
    """
    from torch.nn.utils._deferred_init import _materialize, _scripted
    from torch.utils._sharded_meta import is_sharded, tell_fsdp

    target = torch.device(device) if device is not None else None
    if not skip_materialized:
        _materialize.check_deferred(module)
    if init_fn is not None and buffers_only:
        raise ValueError("Expected buffers_only=False with init_fn, got both.")
    tensors = _materialize.chosen(module, buffers_only, check_fn)
    recorded = [t for t in tensors if is_deferred(t)]
    known: list[Tensor] = []
    if init_fn is not None:
        known = [t for t in recorded if _materialize.is_from_meta_block(t)]
        # NB: of a shard, init_fn is to see the whole.
        left = {id(t) for t in known if is_sharded(t)}
        recorded = [t for t in recorded if id(t) not in left]
        known = [t for t in known if id(t) not in left]
    lost = [t for t in tensors if _materialize.is_lost(t)]
    initializes = init_fn is not None or any(
        _materialize.is_sharded_on_meta(t) and not is_deferred(t) for t in tensors
    )
    if not initializes:
        _materialize.check_known(module, lost)
    untouched = all(t.is_meta for t in tensors)
    put_back = _scripted.put_back(module)
    slots, undo = _materialize.materialize(recorded, (target, dtype))
    put_back()
    untouched &= not any(slot.tape.is_load for slot in slots)
    _materialize.finish(slots, eager=untouched)
    if initializes:
        try:
            _materialize.initialize(module, (target, dtype), check_fn, init_fn, known)
        except BaseException:
            undo()
            put_back()
            raise
    elif recorded:
        tell_fsdp(module)
    return module


for _name in __all__:  # their home is where they are imported from
    globals()[_name].__module__ = "torch.nn.utils"
