"""Record what reaches the dispatcher: the general case, for any op, as the calls in ``_calls.py`` are not.

An op whose tensors are all under construction, or that makes one, runs on meta, for the shapes, and is recorded. Law:
what it returns stands for what it would return in eager construction. What has no answer on meta (``item``, a shape
that depends on data, no kernel) is answered by the truth: what is known of the operands is replayed, the op is
called for real, and its results are constants. A real tensor that is written to is written to at once.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.nn.utils._deferred_init._random import count, reality
from torch.nn.utils._deferred_init._schema import (
    below_modes,
    called_by_library,
    is_plain,
    is_unknown,
    Op,
    op_of,
    unknown,
    UnknownValue,
    where,
)
from torch.nn.utils._deferred_init._slot import (
    attach,
    CPU,
    FRESH,
    mark_of,
    META,
    READ,
    Ref,
    Slot,
    slot_of,
    slot_on,
    Unknown,
    unknown_mark,
    WRITE,
)
from torch.nn.utils._deferred_init._tape import (
    Constant,
    has_tensors,
    in_place,
    name_of,
    Node,
    replay,
    Tape,
    tensors_in,
)
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


if TYPE_CHECKING:
    from torch._ops import OpOverload


class Ops:
    """What a context does to ops."""

    def __init__(self, tape: Tape, device: torch.device) -> None:
        self.tape = tape
        self.device = device  # of what names none
        self.follows_blocks = not tape.random  # records what meta blocks know, too
        self.twins: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    # -- tensors

    def slot(self, tensor: Tensor, device: torch.device) -> Slot:
        """The slot of what was made on meta instead of on ``device``."""
        return slot_on(
            tensor.untyped_storage(), self.tape, self.computing_device(device)
        )

    def slot_of(self, tensor: Tensor) -> Slot | None:
        """The slot of ``tensor``, if it is under construction here."""
        slot = slot_of(tensor)
        # NB: what a meta block inside of deferred_init made is on meta on purpose.
        if slot is not None and not (self.follows_blocks or slot.tape.random):
            return None
        return slot

    def computing_device(self, device: torch.device) -> torch.device:
        """Where values are computed of a tensor that is to be on ``device``."""
        # NB: in a meta block one may name a device that is not there.
        if self.tape.random or device.type == "cpu":
            return device
        if device.type == "meta" or not _is_available(device.type):
            return CPU
        return device

    def adopt(self, real: Tensor, shared: bool = False) -> Tensor:
        """A tensor on meta that stands for ``real``, whose memory it will have, and may share with an array."""
        storage = real.untyped_storage()
        twin = self.twin(storage)
        if shared:
            slot_on(twin, self.tape, storage.device).shared = True
        with below_modes():
            meta = torch.empty(0, dtype=real.dtype, device=META)
            meta.set_(twin, real.storage_offset(), real.size(), real.stride())
            if real.is_conj():
                meta = torch._conj(meta)
            return torch._neg_view(meta) if real.is_neg() else meta

    def twin(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """The storage on meta that stands for ``storage``."""
        found = self.twins.get(storage._cdata)
        if found is None:
            twin = torch.UntypedStorage(storage.nbytes(), device=META)
            slot = Slot(self.tape, storage.nbytes(), storage.device)
            slot.real = storage
            attach(twin, slot)
            # NB: both are kept, so that neither address is given to another storage.
            found = self.twins[storage._cdata] = (twin, storage)
        return found[0]

    def value(self, value: Any, handed_over: bool = False) -> Any:
        """The real tensor that ``value`` stands for, in a list as well; other values as they are."""
        if isinstance(value, Tensor):
            slot = self.slot_of(value)
            if slot is None:
                mark = mark_of(value)
                if isinstance(mark, Unknown) and mark.is_lost:
                    raise UnknownValue(mark.cause)
                return value
            replay((slot,), handed_over)
            if handed_over:  # and may come back
                slot.shared = True
                storage = value.untyped_storage()
                self.twins[slot.memory()._cdata] = (storage, slot.memory())
            with reality():
                real = in_place(Ref(slot, value))
                if type(value) is Parameter:  # C++ may keep it, as prepack ops do
                    return Parameter(real, value.requires_grad)
                return real.requires_grad_() if value.requires_grad else real
        if type(value) in (list, tuple) and has_tensors(value):
            return type(value)(map(self.value, value))
        return value

    def _value_if_known(self, value: Any) -> Any:
        if isinstance(value, Tensor) and self.slot_of(value) is None:
            return value
        return self.value(value)

    # -- ops

    def call(
        self,
        func: "OpOverload[..., Any]",
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        makes: bool = True,
    ) -> Any:
        """Do what ``func`` does as far as it can be done on meta, and record the rest.

        Args:
            makes: whether tensors that ``func`` makes of nothing are to be on meta.
        """
        op = op_of(func)
        tensors = list(tensors_in((*args, *kwargs.values())))
        known = [t for t in tensors if is_plain(t) and self.slot_of(t) is not None]
        if not all(is_plain(t) for t in tensors):
            if not known:
                return func(*args, **kwargs)
            return self.execute(op, func, args, kwargs)
        real = [t for t in tensors if not t.is_meta]
        around = self._around(known)
        if around is not None and len(known) + len(real) == len(tensors):
            return around.call(func, args, kwargs)
        if op.communicates and (known or self.tape.random):
            return self.communicate(func, args, kwargs)
        if not self.tape.random and len(real) == len(tensors):
            return self._outside(op, func, args, kwargs, tensors, makes)
        named = kwargs.get("device")
        if not makes and op.device and named is not None and named != META:
            with reality():
                return func(*_map(self._value_if_known, args), **kwargs)
        # NB: meta kernels make plain tensors of what is to be quantized.
        if "quantize" in op.name or "affine" in op.name:
            return self.execute(op, func, args, kwargs)
        if op.name == "set_":
            # The storage is what carries the history.
            return func(*self.with_twin(args, kwargs), **kwargs)
        if op.name in ("lift_fresh", "lift") and real:
            return self.adopt(args[0], shared=True)  # from_numpy
        if not known and not real:
            return self._make(op, func, args, kwargs, tensors)
        if len(known) + len(real) < len(tensors):
            return self._poison(op, func, args, kwargs)
        # NB: how much a random op draws may depend on what it writes to.
        draws_by_value = op.random and op.writes and not op.fills
        written = op.written(args, kwargs)
        writes_aside = op.silently_written(args, kwargs) or (
            written and not op.returns_written
        )
        at_once = op.tells or draws_by_value or bool(writes_aside)
        if at_once or any(not t.is_meta for t in written):
            return self.execute(op, func, args, kwargs)
        if op.views or op.name == "resize_":
            return self._view(func, args, kwargs)
        return self._record(op, func, args, kwargs)

    def _around(self, known: list[Tensor]) -> "Ops | None":
        """In a meta block, what records the tensors of a deferred_init around it."""
        if self.tape.random:
            return None
        for tensor in known:
            slot = slot_of(tensor)
            if slot is not None and slot.tape.random and slot.tape.ops is not None:
                around: Ops = slot.tape.ops
                return around
        return None

    def _outside(
        self,
        op: Op,
        func: "OpOverload[..., Any]",
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        makes: bool,
    ) -> Any:
        """In a meta block, a factory, or an op on real tensors: those come from outside, and stay real."""
        named = kwargs.get("device")
        lifted = op.name in ("lift_fresh", "lift")
        if named == META and not tensors:  # by C++ beside a tensor on meta
            return self._make(op, func, args, kwargs, tensors)
        if not (makes and (op.device or lifted)) or called_by_library():
            return func(*args, **kwargs)
        if (
            tensors
            and not lifted
            and (named is None or _is_moved_to_itself(op, named, tensors))
        ):
            return func(*args, **kwargs)
        if lifted:
            # A legacy constructor; NB: memory of NumPy, which cannot be resized, comes from outside.
            owned = args[0].untyped_storage().resizable()
            return self.adopt(args[0], shared=True) if owned else args[0]
        if not tensors:
            return self._make(op, func, args, kwargs, tensors)
        return self._record(op, func, args, kwargs)

    def _make(
        self,
        op: Op,
        func: "OpOverload[..., Any]",
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
    ) -> Any:
        """A factory, or an op on tensors of which nothing is known."""
        named = kwargs.get("device", META)
        if not op.device or self.device == META or (tensors and named == META):
            return self._on_purpose(op, func(*args, **kwargs))
        if tensors and op.name == "_to_copy":  # an error, out of meta
            return func(*args, **kwargs)
        # NB: a model's own tensor on meta never comes here. This is one that C++ makes beside another tensor, as
        # the right side of `t[i] = 0`.
        if named == META:
            kwargs = {**kwargs, "device": self.device}
        return self._record(op, func, args, kwargs)

    def _on_purpose(self, op: Op, made: Any) -> Any:
        """Under deferred_init, note that the model itself put ``made`` on meta."""
        if self.tape.random:
            for tensor in tensors_in((made,)):
                if tensor.is_meta and is_plain(tensor) and mark_of(tensor) is None:
                    mark = unknown_mark(op.name, is_lost=False)
                    attach(tensor.untyped_storage(), mark)
        return made

    def _view(
        self,
        func: "OpOverload[..., Any]",
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        made = func(*_map(self._on_meta, args), **kwargs)
        for tensor in tensors_in((made,)):
            slot = slot_of(tensor)
            if slot is not None:  # resize_() changes it
                slot.nbytes = tensor.untyped_storage().nbytes()
        return made

    def _record(
        self,
        op: Op,
        func: "OpOverload[..., Any]",
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        written = op.written(args, kwargs)
        tensors = list(tensors_in((*args, *kwargs.values())))
        if op.name in ("linspace", "logspace") and kwargs.get("device") == META:
            kwargs = {**kwargs, "device": self.device}  # factories, as in _make
        device = kwargs.get("device") or _device_of(tensors)
        if op.device and not self.tape.random:
            device = self.computing_device(torch.device(device))
            if op.places["device"] >= len(args):
                kwargs = {**kwargs, "device": device}
        on_meta = {k: _map(_shape, v) for k, v in kwargs.items() if k != "generator"}
        if op.device:
            on_meta["device"] = META
            on_meta.pop("pin_memory", None)
        try:
            # NB: a fill changes no shape, and several are slow on meta.
            is_seen = not self.tape.random and _other_modes_see()
            skip = op.fills and op.name != "copy_" and not is_seen
            with nullcontext() if is_seen else below_modes():
                made = args[0] if skip else func(*_map(_shape, args), **on_meta)
        except Exception:  # no kernel, or what eager construction raises as well
            return self.execute(op, func, args, kwargs)
        if op.dtype and isinstance(made, Tensor):
            kwargs = {**kwargs, "dtype": made.dtype}  # the default may be another later
        outs = list(tensors_in((made,)))
        if not written and not all(is_plain(t) for t in outs):
            return self.execute(op, func, args, kwargs)
        fresh = [t for t in outs if self.slot_of(t) is None]
        for tensor in fresh:
            self.slot(tensor, torch.device(device))
        self._add(op, func, args, kwargs, written or outs, fresh)
        if written:
            return written[0] if len(outs) == 1 else tuple(written)
        return made

    def _add(
        self,
        op: Op,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outs: list[Tensor],
        fresh: list[Tensor],
    ) -> None:
        node = Node(func)
        node.args, node.kwargs = (
            _map(encode, args),
            {k: _map(encode, v) for k, v in kwargs.items()},
        )
        kinds: dict[Slot, int] = {}
        for tensor in tensors_in((*args, *kwargs.values())):
            if (slot := slot_of(tensor)) is not None:
                kinds[slot] = READ
            else:
                node.line = where()
        refs = [Ref(known, t) for t in outs if (known := slot_of(t)) is not None]
        for ref in refs:
            whole = ref.is_whole() and op.fills and len(kinds) == 1
            kinds[ref.slot] = FRESH if whole else WRITE
        for tensor in fresh:
            if (slot := slot_of(tensor)) is not None:
                kinds[slot] = FRESH
        if op.name == "copy_" and len(kinds) == 2 and refs[0].is_whole():
            kinds[refs[0].slot] = FRESH
        node.outs = tuple(refs) if not op.writes else ()
        node.fills = READ not in kinds.values() and (op.fills or not op.writes)
        node.takes_generator = op.generator
        if op.random:
            self.draw(node, op.name, refs[0])
        node.touch(*kinds.items())
        if not is_unknown(node):
            self.write_through(node)

    def write_through(self, node: Node) -> None:
        """Do now what ``node`` writes to memory that others see."""
        seen = [s for s, kind in node.touched if s.shared and kind is not READ]
        if seen:
            replay(seen, handed_over=True)

    def draw(self, node: Node, name: str, ref: Ref) -> None:
        """Record that ``node`` draws for ``ref``."""
        if not self.tape.random:
            node.func = unknown(name)
            return
        node.kwargs = dict(node.kwargs)
        own = node.kwargs.pop("generator", None)
        numbers = count(name, ref)
        if own is None:
            stream = self.tape.stream(ref.slot.device)
            draw = node if numbers is None else numbers
            node.draw = (stream, stream.add(draw))
            return
        # A generator of the user's, who may ask for its state any time: it moves now.
        node.kwargs["generator"] = own.clone_state()
        with reality():
            if node.fills:
                node.kwargs, kept = {**node.kwargs, "generator": own}, node.kwargs
                node.call(None, Ref.scratch)
                node.kwargs = kept

    def execute(
        self,
        op: Op,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call ``func`` now, on real tensors: what is made is known by its value, what is written to is up to date."""
        if op.random and kwargs.get("generator") is None and self.tape.random:
            self.tape.stream(_device_of(tensors_in(args))).sync()
        written = op.written(args, kwargs)
        slots = [slot for t in written if (slot := self.slot_of(t)) is not None]
        with reality():
            replay(slots, handed_over=True)  # what reads them is done before the write
            try:
                args = tuple(map(self.value, args))
                kwargs = {k: self.value(v) for k, v in kwargs.items()}
            except UnknownValue as e:
                e.args = (f"{e} It is needed by {op.name}, called at {where()}.",)
                raise
            made = func(*args, **kwargs)
        if made is None:
            return None
        if op.returns_written:
            return written[0] if isinstance(made, Tensor) else tuple(written)
        return _map(self._adopt_plain, made)

    def communicate(
        self,
        func: "OpOverload[..., Any]",
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call ``func``, which sends tensors to other ranks, now and with the memory that they have from now on."""
        given: dict[int, Tensor] = {}

        def real(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            memory = self.value(value, handed_over=True)
            given[id(memory)] = value
            return memory

        real_args = _map(real, args)
        real_kwargs = {k: _map(real, v) for k, v in kwargs.items()}
        with reality():
            made = func(*real_args, **real_kwargs)
            if hasattr(made, "trigger_wait"):  # an AsyncCollectiveTensor
                made = made.trigger_wait()
        return _map(
            lambda v: given[id(v)] if id(v) in given else self._adopt_plain(v), made
        )

    def _adopt_plain(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        return self.adopt(value) if is_plain(value) else self.unplain(value)

    def unplain(self, real: Tensor) -> Tensor:
        """What stands for a sparse, nested or quantized tensor: itself, where it is to be real."""
        if self.tape.random:
            return real
        try:
            return real.to(META)
        except (RuntimeError, NotImplementedError, AssertionError):
            return real

    def _poison(
        self,
        op: Op,
        func: "OpOverload[..., Any]",
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """An op on something of which nothing is known: neither is what it writes to."""
        written = op.written(args, kwargs)
        if not all(t.is_meta for t in written):
            source = next(t for t in tensors_in(args) if self._is_nothing_known(t))
            cause = getattr(mark_of(source), "cause", "an op on unknown values")
            error = UnknownValue(cause)
            error.args = (
                f"{error} {op.name}, called at {where()}, writes it to a real tensor.",
            )
            raise error
        made = self._on_purpose(op, func(*_map(_shape, args), **kwargs))
        for tensor in [*written, *op.silently_written(args, kwargs)]:
            self.forget(tensor, name_of(func))
        return made

    def forget(self, tensor: Tensor, cause: str) -> None:
        """Record that unknown values were written to ``tensor``."""
        if (slot := self.slot_of(tensor)) is not None:
            Node(unknown(cause)).touch((slot, WRITE))

    def _is_nothing_known(self, tensor: Tensor) -> bool:
        return tensor.is_meta and self.slot_of(tensor) is None

    def with_twin(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Any]:
        """The arguments of ``set_`` with a source that is on meta as the target is."""
        target, *rest = args
        if not rest or not is_plain(target):
            return args
        source = rest[0]
        if isinstance(source, Tensor):
            source = self._on_meta(source)
        elif source.device != META and target.is_meta:
            source = self.twin(getattr(source, "_untyped_storage", source))
        return target, source, *rest[1:]

    def _on_meta(self, value: Any) -> Any:
        if isinstance(value, Tensor) and not value.is_meta:
            return self.adopt(value)
        return value


def encode(value: Any) -> Any:
    """What stands for a tensor on the tape."""
    if not isinstance(value, Tensor):
        return value
    slot = slot_of(value)
    return Constant(value) if slot is None else Ref(slot, value)


def _other_modes_see() -> bool:
    # NB: that of this context is off while it handles an op.
    modes = _get_current_dispatch_mode_stack()
    return any(not getattr(m, "ignores_real_tensors", False) for m in modes)


def _is_moved_to_itself(op: Op, device: torch.device, tensors: list[Tensor]) -> bool:
    return op.name == "_to_copy" and device.type == tensors[0].device.type


def _is_available(device_type: str) -> bool:
    module = getattr(torch, device_type, None)
    return module is not None and bool(module.is_available())


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor) and not value.is_meta:
        return torch.empty_strided(
            value.size(), value.stride(), dtype=value.dtype, device=META
        )
    return value


def _map(do: Callable[[Any], Any], value: Any) -> Any:
    if type(value) in (list, tuple):
        return type(value)([_map(do, v) for v in value])
    return do(value)


def _device_of(tensors: Iterable[Tensor]) -> torch.device:
    for tensor in tensors:
        slot = slot_of(tensor)
        return tensor.device if slot is None else slot.device
    return CPU
