"""Give what is deferred its memory and its values, while it stays the same object.

Law: whatever is materialized, in whatever order, has the values, ties, strides and classes of eager construction, and
the storages that tensors share then they share now. Nothing is changed if replaying raises. What has memory already,
from a checkpoint perhaps, is left alone, and so is what was on meta on purpose.

A tensor that autograd computed (the ``weight`` of the old ``torch.nn.utils.weight_norm``) becomes a leaf with its
value. Found are parameters, buffers, and tensors in the attributes of modules, also in lists, tuples, sets, dicts and
plain objects there; others, such as one in a closure, stay deferred for :func:`materialize_tensor`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules._init_once import (
    check_can_reset,
    reset_parameters,
)
from torch.nn.modules._init_once import (
    initialize as initialize_once,
)
from torch.nn.modules._to_empty import own, own_dicts
from torch.nn.modules.module import Module
from torch.nn.parameter import is_lazy, Parameter
from torch.nn.utils._deferred_init import _scripted
from torch.nn.utils._deferred_init._random import reality
from torch.nn.utils._deferred_init._schema import is_unknown
from torch.nn.utils._deferred_init._slot import mark_of, Ref, Slot, slot_of, Unknown
from torch.nn.utils._deferred_init._tape import (
    lock,
    memory_of,
    pending,
    replay,
    run,
)
from torch.utils._sharded_meta import (
    is_sharded,
    local_of,
    part_of,
    shell_for,
    tell_fsdp,
)
from torch.utils._swap_meta import swap_all


Target = tuple[torch.device | None, torch.dtype | None]


def is_deferred(value: Any) -> bool:
    """See :func:`torch.nn.utils.is_deferred`."""
    if isinstance(value, Module):
        return any(is_deferred(t) for m in value.modules() for t in tensors_of(m))
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected a Tensor or a Module, got {type(value).__name__}.")
    # Lazy parameters have functions of their own, and contexts answer for the device.
    with torch._C.DisableTorchFunction():
        return value.is_meta and known_slot(value) is not None


def known_slot(tensor: Tensor) -> Slot | None:
    """The slot of ``tensor``, on meta, if its values are recorded."""
    slot = slot_of(recorded(tensor))
    if slot is None or not slot.tape.is_remembered:
        return None
    if slot.tape.random:
        return slot
    # NB: a parameter that a constructor leaves uninitialized is to be loaded or initialized; a buffer is memory to use.
    if not slot.events and slot.real is None and isinstance(tensor, Parameter):
        return None
    return None if any(is_unknown(node) for node in pending([slot])) else slot


def is_from_meta_block(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` are known from a meta block, which records no random initialization."""
    slot = known_slot(tensor)
    return slot is not None and not slot.tape.random


def is_lost(tensor: Tensor) -> bool:
    """Whether ``tensor`` was put on meta by a context that has no record of its values."""
    with torch._C.DisableTorchFunction():
        if not tensor.is_meta or known_slot(tensor) is not None:
            return False
        mark = mark_of(recorded(tensor))
        if isinstance(mark, Unknown):
            return mark.is_lost
        return mark is not None and mark.tape.is_remembered


def fill(modules: Iterable[Module], device: torch.device) -> None:
    """Materialize, of the parameters and buffers of ``modules``, those whose values are recorded."""
    slots, _ = materialize([t for m in modules for t in own(m)], (device, None))
    finish(slots)


def check_known(module: Module, tensors: Iterable[Tensor]) -> None:
    """Raise if one of ``tensors``, of ``module``, would be left on meta though nothing says that it belongs there."""
    lost = {id(t): t for t in tensors if is_lost(t)}
    if not lost:
        return
    names = {
        id(t): f"{prefix}.{name}".lstrip(".")
        for prefix, m in module.named_modules()
        for kept in (m.__dict__, _scripted.attributes(m), *own_dicts(m))
        for name, t in kept.items()
    }
    described = [
        names.get(key, f"an attribute of shape {list(t.shape)}")
        for key, t in lost.items()
    ]
    shown = ", ".join(described[:_SHOWN])
    more = len(described) - _SHOWN
    raise RuntimeError(
        "Expected every tensor of the module to be loaded or to have recorded values, got on meta without any: "
        f"{shown}{f' and {more} more' if more > 0 else ''}. Random initialization is recorded by deferred_init alone, "
        "and what is done to a module on meta afterwards is not recorded. Load them first, pass init_fn, or call "
        "to_empty(skip_materialized=True), which leaves them uninitialized."
    )


_SHOWN = 8


def recorded(tensor: Tensor) -> Tensor:
    """What was recorded of ``tensor``: of a shard, the view of the whole tensor that it was cut from."""
    if not is_sharded(tensor):
        return tensor
    part = part_of(tensor)
    return local_of(tensor) if part is None else part.view


def materialize(
    tensors: Iterable[Tensor], target: Target
) -> tuple[Iterable[Slot], Callable[[], None]]:
    """Materialize those of ``tensors`` that are deferred; returns their slots, for :func:`finish`, and what undoes it.

    Args:
        target: device and floating dtype; None is that of eager construction.
    """
    with torch._C.DisableTorchFunction():
        found = {id(t): t for t in tensors if is_deferred(t)}
        slots: dict[Slot, list[Tensor]] = {}
        shards: dict[Slot, list[Tensor]] = {}
        for tensor in found.values():
            slot = known_slot(tensor)
            assert slot is not None
            kind = shards if is_sharded(tensor) else slots
            kind.setdefault(slot, []).append(tensor)
        unmoved = [slot for slot in slots if target not in slot.moved]
        replay(unmoved, handed_over=True)
        with lock, reality():
            pairs = [
                (tensor, _real(tensor, slot, target))
                for slot, group in slots.items()
                for tensor in group
            ]
            for slot, group in shards.items():
                pairs += _cut(slot, group, target)
            specs: list[tuple[Any, Any]] = [
                (tensor, tensor._spec)  # type: ignore[attr-defined]
                for tensor, _ in pairs
                if is_sharded(tensor)
            ]
            swap_all([tensor for tensor, _ in pairs], [data for _, data in pairs])
            for tensor, shell in pairs:
                if is_sharded(tensor):
                    tensor._spec = shell._spec  # type: ignore[attr-defined]

    def undo() -> None:
        swap_all([tensor for tensor, _ in pairs], [data for _, data in pairs])
        for tensor, spec in specs:
            tensor._spec = spec

    return [*slots, *shards], undo


def finish(slots: Iterable[Slot], eager: bool = False) -> None:
    """After ``slots`` were materialized, put the generators where eager construction leaves them.

    Args:
        eager: also if no random op was recorded for them.
    """
    slots = list(slots)
    for slot in slots:
        slot.tape.drawn |= slot.drawn
    if eager or any(slot.tape.drawn for slot in slots):
        # NB: while a context is open its generator is marked, and is put right when it is left.
        tapes = {slot.tape for slot in slots if slot.tape.closed}
        for stream in {s for tape in tapes for s in tape.streams()}:
            stream.finish()


def _cut(
    slot: Slot, shards: list[Tensor], target: Target
) -> Iterator[tuple[Tensor, Tensor]]:
    """The local tensors of ``shards`` and the shards, each with what it is to be exchanged with."""
    whole = _computed(slot)  # NB: in memory that is free again when this ends
    for tensor in shards:
        local, view = local_of(tensor), recorded(tensor)
        device, dtype = target
        cast = dtype if dtype and local.dtype.is_floating_point else local.dtype
        memory = torch.zeros(
            local.untyped_storage().nbytes() // local.dtype.itemsize,
            dtype=cast,
            device=device or tensor.device_mesh.device_type,  # type: ignore[attr-defined]
        )
        # NB: as it lies on meta; fully_shard wants room behind a shard that is smaller than others.
        data = torch.empty(0, dtype=cast, device=memory.device).set_(
            memory.untyped_storage(),
            local.storage_offset(),
            local.size(),
            local.stride(),
        )
        data.copy_(whole(Ref(slot, view)))
        data.requires_grad_(local.requires_grad)
        yield local, data
        yield tensor, shell_for(tensor, data)


def _real(tensor: Tensor, slot: Slot, target: Target) -> Tensor:
    """The real tensor that ``tensor`` is to be."""
    device, dtype = target
    cast = dtype if dtype and tensor.dtype.is_floating_point else tensor.dtype
    if is_lazy(tensor):
        data = torch.empty(0, dtype=cast, device=device or slot.device)
        return data.requires_grad_(tensor.requires_grad)
    ref = Ref(slot, tensor)
    data = ref.tensor(_memory(slot, (device, cast), tensor.dtype))
    if cast != tensor.dtype:
        ref.dtype = cast
        data = ref.tensor(_memory(slot, (device, cast), tensor.dtype))
    return data.requires_grad_(tensor.requires_grad)


def _memory(slot: Slot, target: Target, dtype: torch.dtype) -> torch.UntypedStorage:
    """The memory of ``slot`` as ``target`` wants it: one for all tensors that share it."""
    device, cast = target
    key = (device, cast if cast != dtype else None)
    memory = slot.moved.get(key)
    if memory is None:
        memory = slot.memory()
        if cast != dtype:
            whole = torch.empty(0, dtype=dtype, device=memory.device).set_(memory)
            memory = whole.to(device=device, dtype=cast).untyped_storage()
        elif device is not None and memory.device != _indexed(device):
            memory = _bytes(memory).to(device).untyped_storage()
        slot.moved[key] = memory
    return memory


def _bytes(memory: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)


def _indexed(device: torch.device) -> torch.device:
    return torch.empty(0, device=device).device


def shard(tensor: Tensor, index: Any) -> Tensor:
    """The values of ``tensor[index]``, which shares memory with nothing; ``tensor`` stays deferred."""
    view = recorded(tensor)
    slot = slot_of(view)
    assert slot is not None
    with lock, reality():
        return _computed(slot)(Ref(slot, view))[index].clone()


def _computed(slot: Slot) -> Callable[[Ref], Tensor]:
    """Compute the memory of ``slot`` for a while; return what tells the tensors in it."""
    memory: dict[Slot, torch.UntypedStorage] = {}

    def scratch(ref: Ref) -> Tensor:
        if ref.slot not in memory:
            made = torch.UntypedStorage(ref.slot.nbytes, device=ref.slot.device)
            if ref.slot.real is not None:
                made.copy_(ref.slot.memory())
            memory[ref.slot] = made
        return ref.tensor(memory[ref.slot])

    def take(ref: Ref, made: Tensor) -> None:
        if ref.slot in memory or ref.slot.real is not None:
            scratch(ref).copy_(made)
        else:
            memory[ref.slot] = memory_of(ref, made)

    for node in pending([slot]):
        run(node, scratch, take)
    return scratch


def chosen(
    module: Module, buffers_only: bool, check_fn: Callable[[Module], bool] | None
) -> list[Tensor]:
    """The tensors that :func:`torch.nn.utils.materialize_module` is asked for."""
    modules = [m for m in module.modules() if check_fn is None or check_fn(m)]
    tensors = [t for m in modules for t in tensors_of(m)]
    if not buffers_only:
        return tensors
    kept = {id(p) for m in module.modules() for p in m._parameters.values()}
    return [t for t in tensors if id(t) not in kept]


def is_sharded_on_meta(tensor: Tensor) -> bool:
    return is_sharded(tensor) and tensor.is_meta


def initialize(
    module: Module,
    target: Target,
    check_fn: Callable[[Module], bool] | None,
    init_fn: Callable[[Module], None] | None,
    known: Iterable[Tensor],
) -> None:
    """Initialize what is on meta of ``module`` and was not recorded; ``init_fn`` may change ``known``, too."""
    device, dtype = target
    ids = set(map(id, known))
    modules = {
        name: m
        for name, m in module.named_modules()
        if (check_fn is None or check_fn(m))
        and any(t.is_meta or id(t) in ids for t in own(m))
    }
    tensors = [t for m in modules.values() for t in own(m) if t.is_meta]
    sharded = [t for t in tensors if is_sharded(t)]
    if dtype is not None and tensors:
        raise ValueError(
            f"Expected dtype=None for tensors that no deferred_init recorded, got {dtype}. (Did you mean to call "
            "module.to(dtype) while it is on meta?)"
        )
    for name, m in modules.items():
        for tensor in own(m):
            if is_sharded_on_meta(tensor) and part_of(tensor) is None:
                raise RuntimeError(
                    f"Expected the sharded tensors of {name or 'the module'} to have been cut by fully_shard or "
                    f"distribute_tensor on meta, got one of shape {list(tensor.shape)} that was not."
                )
    if init_fn is None:
        check_can_reset(modules)
    if sharded and device is None:
        device = torch.device(sharded[0].device_mesh.device_type)  # type: ignore[attr-defined]
    if tensors and device is None:
        raise ValueError(
            "Expected a device for tensors that no deferred_init recorded, got None."
        )
    initialize_once(list(modules.values()), device, init_fn or reset_parameters, known)
    tell_fsdp(module)


def check_deferred(module: Module) -> None:
    """Raise if a parameter or buffer of ``module`` has memory already."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not is_deferred(tensor):
            raise ValueError(
                f"Expected every tensor of the module to be deferred, got {name} on {tensor.device}. "
                "(Did you mean skip_materialized=True?)"
            )


def tensors_of(module: Module) -> Iterator[Tensor]:
    """The tensors that ``module`` itself holds, wherever."""
    for tensors in (module._parameters, module._buffers):
        yield from (t for t in tensors.values() if t is not None)
    seen: set[int] = set()
    for name, value in module.__dict__.items():
        if name not in ("_parameters", "_buffers", "_modules"):
            yield from _inside(value, seen)
    yield from _inside(_scripted.attributes(module), seen)


_LEAVES = (bool, int, float, complex, str, bytes, type(None), type, Module, torch.dtype)


def _inside(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, _LEAVES) or (
        callable(value) and not hasattr(value, "__dict__")
    ):
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        parts: Iterable[Any] = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    elif type(value).__module__.partition(".")[0] in _OPAQUE:
        return
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from _inside(part, seen)


_OPAQUE = {"builtins", "torch", "numpy", "logging", "threading", "weakref", "types"}
