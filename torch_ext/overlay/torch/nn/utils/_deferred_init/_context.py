"""The contexts in which a module is constructed without memory: who decides about a call, and what is switched on.

A function mode answers the calls of Python, a dispatch mode the ops, and under a meta block registration hooks catch a
real tensor that becomes a parameter or buffer. Law: the innermost context decides; however it is left, everything is as
it was outside, and a thread or generator that was started inside and outlives it is outside, too.

Nothing reaches a scripted function (``torch.jit.script``), and a tensor that is made without the dispatcher
(``frombuffer``, ``from_dlpack``, ``from_file``) stays real until a module or an op on a recorded tensor gets it.
"""

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TYPE_CHECKING

import torch
from torch import Tensor
from torch._C import _get_function_stack_at, _len_torch_function_stack
from torch.nn.modules import _to_empty
from torch.nn.modules import module as _module
from torch.nn.parameter import is_lazy
from torch.nn.utils._deferred_init import _materialize, _threads
from torch.nn.utils._deferred_init._calls import (
    as_it_is,
    DEVICE_CONSTRUCTORS,
    FAST_RULES,
    RULES,
    SEEN_RULES,
)
from torch.nn.utils._deferred_init._ops import Ops
from torch.nn.utils._deferred_init._random import reality
from torch.nn.utils._deferred_init._schema import (
    below_modes,
    call_below,
    is_plain,
    overrides,
    where,
)
from torch.nn.utils._deferred_init._slot import (
    attach,
    CPU,
    FRESH,
    mark_of,
    META,
    NAME,
    READ,
    Ref,
    slot_of,
    Unknown,
    unknown_mark,
)
from torch.nn.utils._deferred_init._tape import Node, Tape
from torch.overrides import _get_current_function_mode_stack, TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode, TorchDispatchMode


if TYPE_CHECKING:
    from torch._ops import OpOverload


class _State(threading.local):
    """What this thread is doing.

    Attributes:
        handling: the recorder that handles a call of Python now; contexts around it let that call through.
        reals: how many blocks of a real device, inside of a meta block, a call came through.
    """

    handling: "Recorder | None" = None
    reals = 0


state = _State()


class Recorder:
    """What one context, in whatever threads it is, does to the calls inside of it."""

    def __init__(self, tape: Tape, report: list[str] | None = None) -> None:
        self.tape = tape
        self.device = _default_device() if tape.random else META
        self.ops = Ops(tape, self.device if tape.random else CPU)
        self.report = report
        self._twins: dict[int, tuple[Tensor, Tensor | None]] = {}  # what was registered
        self._rule = RULES[tape.random].get
        self._others = other_dispatch_modes() if tape.random else 0
        self._fake = _fake_mode()
        self._hooks: list[Any] = []
        self.marks: dict[Any, Any] = {}  # of storages in a meta block
        tape.ops = self.ops
        tape.is_remembered = tape.random or not _is_in_deferred_init()

    def unknown(self, cause: str) -> Unknown:
        """The mark of random values, which a meta block does not record."""
        return unknown_mark(cause, self.tape.is_remembered)

    # -- calls

    def call(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None,
    ) -> Any:
        """Answer a call of Python that a function mode saw; ``types`` are those of arguments that may override it."""
        if state.handling is not None or self.tape.closed:
            return func(*args, **kwargs) if kwargs else func(*args)
        rule = self._rule(func)
        if rule is as_it_is:
            return func(*args, **kwargs) if kwargs else func(*args)
        if types and any(map(overrides, types)):
            return self.follow(func, args, kwargs or {})
        # NB: what another dispatch mode is to see is made without a short cut.
        if other_dispatch_modes() != self._others or (
            not self.tape.random
            and (
                _current_transform() is not None
                or (_len_torch_function_stack() and _others_see_calls())
            )
        ):
            if self.tape.random:
                return func(*args, **kwargs) if kwargs else func(*args)
            if _is_traced() or _current_transform() is not None:
                return self._as_default_device(func, args, kwargs or {})
            rule = SEEN_RULES.get(func)
        elif rule in FAST_RULES:
            return rule(self, func, args, kwargs or {})
        elif rule is None and not self.tape.random:
            recorded: list[Tensor] = []
            sides = _sides(args, kwargs, recorded)
            if sides in (_UNKNOWN, _REAL):
                return call_below(func, args, kwargs or {})
            if sides == _UNKNOWN | _RECORDED and not _is_named_in_place(func):
                return self._mixed(func, args, kwargs or {}, recorded)
        state.handling = self
        try:
            if rule is not None:
                return rule(self, func, args, kwargs or {})
            return func(*args, **kwargs) if kwargs else func(*args)
        finally:
            state.handling = None

    @staticmethod
    def _as_default_device(
        func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What stock's ``torch.device("meta")`` does: under FakeTensorMode and make_fx, a meta block does no more."""
        if func in DEVICE_CONSTRUCTORS and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": META}
        return func(*args, **kwargs)

    def follow(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make a call without a rule; the dispatch mode sees its ops."""
        state.handling = self
        try:
            return func(*args, **kwargs)
        finally:
            state.handling = None

    def _mixed(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        recorded: list[Tensor],
    ) -> Any:
        """Call what takes unknown values beside ``recorded`` ones, without a record: it makes unknown values.

        What it writes to, as batch_norm does to the running statistics, is found by its version.
        """
        with torch._C.DisableTorchFunction():
            versions = [t._version for t in recorded]
        try:
            return call_below(func, args, kwargs)
        finally:
            with torch._C.DisableTorchFunction():
                for tensor, version in zip(recorded, versions, strict=True):
                    if tensor._version != version:
                        self.ops.forget(tensor, func.__name__)

    def makes(self) -> bool:
        """Whether new tensors are of this context, as they are not in a block of a real device inside of it."""
        return not state.reals

    def passed_on(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Let the contexts around this one answer the call."""
        before, state.handling = state.handling, None
        try:
            return func(*args, **kwargs)
        finally:
            state.handling = before

    def op(
        self,
        func: "OpOverload[..., Any]",
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Answer an op that a dispatch mode saw."""
        if self.tape.closed or _fake_mode() is not self._fake:
            return func(*args, **kwargs)
        if not self.tape.random and _is_traced():
            return func(*args, **kwargs)
        if state.handling is not None:
            follows, makes = state.handling is self, not state.reals
        else:
            first, maker = deciding()
            follows, makes = first is self, maker is self
        if not (follows or makes):
            return func(*args, **kwargs)
        if not self.tape.random and torch._C._is_torch_function_all_disabled():
            makes = (
                False  # as in stock, where DisableTorchFunction turns the context off
            )
        # NB: function modes are on here, and would lie to us about devices.
        with torch._C.DisableTorchFunction():
            return self.ops.call(func, args, kwargs, makes)

    # -- open and closed

    def open(self) -> None:
        """From now on real tensors are exchanged as modules register them."""
        # NB: in deferred_init what is real stays the very tensor that it is.
        if not self.tape.random:
            self._hooks = [
                _module.register_module_parameter_registration_hook(self._register),
                _module.register_module_buffer_registration_hook(self._register),
            ]

    def close(self) -> None:
        """The context has ended, in all threads."""
        self.tape.closed = True
        self.tape.ops = None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for stream in self.tape.streams():
            stream.suspend()
        self.ops.twins.clear()
        self._twins.clear()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let this thread be inside."""
        mode = OpMode(self)
        with (_Calls if self.tape.random else _MetaCalls)(self):
            mode.put_on()
            try:
                yield
            finally:
                mode.take_off()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The whole context, from its beginning to its end."""
        self.open()
        try:
            with _threads.inherit(current), self.entered():
                yield
        finally:
            self.close()

    # -- what rules ask for

    def overridden(self, func: Callable[..., Any], device: torch.device | None) -> None:
        """Report a call that would have made a real tensor under ``torch.device("meta")``."""
        if self.report is not None and device is not None and device.type != "meta":
            name = getattr(func, "__name__", str(func))
            self.report.append(f"{where()}: {name}, device={str(device)!r}")

    def _register(self, module: torch.nn.Module, name: str, tensor: Any) -> Any:
        """Let a module have, instead of a real parameter or buffer, what stands for it."""
        if tensor is None or _current_transform() is not None:
            return None
        with torch._C.DisableTorchFunction():
            if tensor.is_meta and mark_of(tensor) is not None:
                return None
            if current() is not self:
                return None
            if tensor.is_meta:
                if is_plain(tensor):
                    mark = self.unknown("an op on unknown values")
                    attach(tensor.untyped_storage(), mark)
                return None
            if is_lazy(tensor) or not is_plain(tensor):
                return None
            if self.report is not None:
                kind = type(module).__name__
                self.report.append(f"{where()}: {kind}.{name}, a real tensor")
            _, twin = self._twins.setdefault(id(tensor), (tensor, None))
            if twin is None:
                with reality():
                    twin = self.ops.adopt(tensor.detach(), shared=True)
                    if type(tensor) is not Tensor:
                        twin = Tensor._make_subclass(type(tensor), twin)
                    twin.requires_grad_(tensor.requires_grad)
                    twin.__dict__.update(tensor.__dict__)
                self._twins[id(tensor)] = (tensor, twin)
            return twin

    def copied(
        self, tensor: Tensor, device: torch.device, kwargs: dict[str, Any]
    ) -> Tensor:
        """``tensor.to(device, ...)``, for a device that it is not on."""
        with torch.no_grad(), below_modes():
            made = tensor.to(**{"dtype": tensor.dtype, **kwargs}).clone()
        slot = slot_of(tensor)
        assert slot is not None
        new = self.ops.slot(made, device)
        node = Node(torch.Tensor.to)
        node.args, node.kwargs = (Ref(slot, tensor), device), kwargs
        node.outs = (Ref(new, made),)
        node.touch((slot, READ), (new, FRESH))
        return made


# What the tensors of a call are. OTHER: not known to be plain, or recorded by a deferred_init around a meta block.
_UNKNOWN, _REAL, _RECORDED, _OTHER = 1, 2, 4, 8
_TENSORS = (Tensor, torch.nn.Parameter)


def _sides(args: Any, kwargs: dict[str, Any] | None, recorded: list[Tensor]) -> int:
    """What takes part in a call, as flags; the tensors that are recorded go to ``recorded``."""
    if kwargs and "device" in kwargs:
        return _OTHER
    sides = 0
    for value in (*args, *kwargs.values()) if kwargs else args:
        sides |= _side(value, recorded)
    return sides


def _side(value: Any, recorded: list[Tensor]) -> int:
    kind = type(value)
    if kind in _TENSORS:
        return _side_of_tensor(value, recorded)
    if kind is list or kind is tuple:
        sides = 0
        for item in value:
            sides |= _side(item, recorded)
        return sides
    if isinstance(value, Tensor):
        if kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
            return _OTHER
        with torch._C.DisableTorchFunction():
            return _side_of_tensor(value, recorded)
    return _OTHER if kind is torch.device else 0


def _side_of_tensor(tensor: Tensor, recorded: list[Tensor]) -> int:
    try:
        mark = tensor.untyped_storage().__dict__.get(NAME)
    except (NotImplementedError, RuntimeError):  # sparse, nested, wrapped ...
        return _OTHER
    if mark is None or type(mark) is Unknown:
        return _UNKNOWN if tensor.is_meta else _REAL
    if mark.tape.random or tensor.is_inference():  # has no version
        return _OTHER
    recorded.append(tensor)
    return _RECORDED


def _is_named_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "_")
    return name.endswith(("_", "batch_norm"))  # which writes, also on meta


def deciding() -> tuple[Recorder | None, Recorder | None]:
    """Of the contexts that this thread is in: who follows what is recorded, and who decides about new tensors.

    That is the innermost one, but a block of a real device takes new tensors from the meta blocks around it.
    """
    first, in_real = None, state.reals > 0
    for i in range(_len_torch_function_stack() - 1, -1, -1):
        block = getattr(_get_function_stack_at(i), "block", None)
        if block is None:
            continue
        recorder: Recorder | None = block.recorder
        if recorder is None:
            in_real = True
            continue
        first = first or recorder
        if recorder.tape.random or not in_real:
            return first, recorder
    return first, None


def current() -> Recorder | None:
    """The context that decides about new tensors in this thread."""
    if state.handling is not None:
        return None if state.reals else state.handling
    return deciding()[1]


def innermost() -> Recorder | None:
    """The context that this thread is in, also if that is suspended."""
    return deciding()[0]


@contextmanager
def suspended() -> Iterator[None]:
    """No context answers what this thread calls."""
    handling = state.handling
    state.handling, state.reals = _NOBODY, state.reals + 1
    try:
        yield
    finally:
        state.handling, state.reals = handling, state.reals - 1


def _is_in_deferred_init() -> bool:
    for mode in _get_current_function_mode_stack():
        block = getattr(mode, "block", None)
        if (
            block is not None
            and block.recorder is not None
            and block.recorder.tape.random
        ):
            return True
    return False


class _Calls(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    @property
    def block(self) -> "_Calls":
        return self

    __enter__ = TorchFunctionMode.__enter__
    __exit__ = TorchFunctionMode.__exit__

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.recorder.call(func, types, args, kwargs)


class _MetaCalls(_Calls, DeviceContext):  # type: ignore[misc]
    """A DeviceContext, so that code that searches the stack of modes for one finds the meta device."""

    device = META


class OpMode(TorchDispatchMode):
    """The dispatch mode of a recorder in one thread."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.left = self.is_on = False
        self.ignores_real_tensors = (
            not recorder.tape.random
        )  # for torch.load(lazy=True)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # NB: the default imports torch._dynamo with the first op

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.recorder.op(func, args, kwargs or {})

    def put_on(self) -> None:
        _remove_left()
        self.__enter__()
        self.is_on = True

    def take_off(self) -> None:
        """Take this off the stack; if other modes lie above it, it does nothing there, and is taken off later."""
        self.left = True
        _remove_left()


def _remove_left() -> None:
    while isinstance(mode := _get_current_dispatch_mode(), OpMode) and mode.left:
        if mode.is_on:
            mode.is_on = False
            mode.__exit__(None, None, None)
        else:  # put back by who saved the stack, as torch.compile does
            torch._C._pop_torch_dispatch_stack(None)


def other_dispatch_modes() -> int:
    """How many dispatch modes are on in this thread that are not ours."""
    n = torch._C._len_torch_dispatch_stack()
    if n == 1:  # NB: asked with every call
        return int(type(torch._C._get_dispatch_stack_at(0)) is not OpMode)
    modes = map(torch._C._get_dispatch_stack_at, range(n))
    return sum(type(mode) is not OpMode for mode in modes)


def _others_see_calls() -> bool:
    """Whether a function mode around the context sees the calls that are made here."""
    for i in range(_len_torch_function_stack()):
        mode = _get_function_stack_at(i)
        if not isinstance(mode, (_Calls, DeviceContext)):
            return True
    return False


_current_transform = torch._C._functorch.maybe_current_level


def _is_traced() -> bool:
    """Whether fake tensors or proxies stand for the tensors of this thread."""
    keys = torch._C._TorchDispatchModeKey
    return any(
        torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY)
    )


def _fake_mode() -> Any:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def _default_device() -> torch.device:
    """The device of factories that name none, where the context is entered."""
    for mode in reversed(_get_current_function_mode_stack()):
        block = getattr(mode, "block", None)
        if isinstance(mode, DeviceContext) and (
            block is None or block.recorder is None
        ):
            return mode.device
    return CPU


_NOBODY = Recorder(Tape(random=False))  # handles calls that no context is to see
_to_empty.fillers.append(_materialize.fill)

# NB: seams take it in sys.modules as the sign that something can be deferred; it imports this file.
from torch.nn.utils._deferred_init import _outside as _outside  # noqa: E402
