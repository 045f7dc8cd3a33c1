"""The context in which a module is constructed without memory: what is switched on, for whom, and off again.

A function mode answers the calls of Python, a dispatch mode the ops; under ``meta_init`` registration hooks catch what
is real when it becomes a parameter or buffer. Law: however the block is left, everything is as it was outside, and a
thread or generator that was started inside and outlives it is outside, too.

Threads that are started inside are inside. Nothing reaches a scripted function (``torch.jit.script``), and a tensor
that is made without the dispatcher (``frombuffer``, ``from_dlpack``, ``from_file``) stays real until a module or an op
gets it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as _module
from torch.nn.parameter import is_lazy
from torch.nn.utils._deferred_init._calls import rules
from torch.nn.utils._deferred_init._ops import Ops
from torch.nn.utils._deferred_init._random import reality
from torch.nn.utils._deferred_init._schema import below_modes, is_plain, where
from torch.nn.utils._deferred_init._slot import CPU, FRESH, META, READ, Ref, slot_of
from torch.nn.utils._deferred_init._tape import Node, Tape
from torch.overrides import _get_current_function_mode_stack, TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder:
    """One context, in whatever threads it is."""

    def __init__(self, tape: Tape, report: list[str] | None = None) -> None:
        self.tape = tape
        self.device = _default_device() if tape.random else META
        self.ops = Ops(tape, self.device if tape.random else CPU)
        self.report = report
        self._twins: dict[int, tuple[Tensor, Tensor | None]] = {}  # what was registered

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let this thread be inside."""
        before = getattr(_thread, "recorder", None)
        with _OpMode(self), (_Calls if self.tape.random else _MetaCalls)(self):
            _thread.recorder = self
            try:
                yield
            finally:
                _thread.recorder = before

    def is_innermost(self) -> bool:
        """Whether this is what decides about the calls of this thread."""
        return not self.tape.closed and current() is self

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The whole context, from its beginning to its end."""
        # NB: in deferred_init what is real stays the very tensor that it is.
        hooks = []
        if not self.tape.random:
            hooks = [
                _module.register_module_parameter_registration_hook(self._register),
                _module.register_module_buffer_registration_hook(self._register),
            ]
        try:
            with _threads_inherit(), self.entered():
                yield
        finally:
            self.tape.closed = True
            for hook in hooks:
                hook.remove()
            for stream in self.tape.streams():
                stream.suspend()
            if not self.tape.random:
                self.ops.forget()
            self.ops.twins.clear()
            self._twins.clear()

    def overridden(self, func: Callable[..., Any], device: torch.device | None) -> None:
        """Report a call that would have made a real tensor under ``torch.device("meta")``."""
        if self.report is not None and device is not None and device.type != "meta":
            name = getattr(func, "__name__", str(func))
            self.report.append(f"{where()}: {name}, device={str(device)!r}")

    def real_device(self, device: torch.device) -> torch.device:
        """Where values that are asked for are computed, of a tensor that is to be on ``device``."""
        return device if self.tape.random else CPU

    def _register(self, module: torch.nn.Module, name: str, tensor: Any) -> Any:
        """Let a module have, instead of a real parameter or buffer, what stands for it."""
        if tensor is None or current() is not self:
            return None
        with torch._C.DisableTorchFunction():
            if tensor.is_meta or is_lazy(tensor) or not is_plain(tensor):
                return None
            if self.report is not None:
                kind = type(module).__name__
                self.report.append(f"{where()}: {kind}.{name}, a real tensor")
            _, twin = self._twins.setdefault(id(tensor), (tensor, None))
            if twin is None:
                with reality():
                    twin = self.ops.adopt(tensor.detach())
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


_thread = threading.local()


def current() -> Recorder | None:
    """The innermost context that this thread is in."""
    return getattr(_thread, "recorder", None)


class _Calls(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.device = META  # of _MetaCalls
        self.rule = rules(recorder.tape.random).get
        self.below = _dispatch_modes()

    __enter__ = TorchFunctionMode.__enter__
    __exit__ = TorchFunctionMode.__exit__

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        rule = self.rule(func)
        recorder = self.recorder
        # NB: a dispatch mode that was entered inside of the context has the first say.
        if (
            rule is None
            or recorder.tape.closed
            or getattr(_thread, "recorder", None) is not recorder
            or _dispatch_modes() != self.below
        ):
            return func(*args, **kwargs) if kwargs else func(*args)
        return rule(recorder, func, args, kwargs or {})


class _MetaCalls(_Calls, DeviceContext):
    """For those who look: this is a context of the meta device."""


class _OpMode(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.fake = _fake_mode()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # NB: a FakeTensorMode lies below all others, also if it was entered inside of the context.
        if not self.recorder.is_innermost() or _fake_mode() is not self.fake:
            return func(*args, **(kwargs or {}))
        # NB: function modes are on here, and would lie to us about devices.
        with torch._C.DisableTorchFunction():
            return self.recorder.ops.call(func, args, kwargs or {})


def _dispatch_modes() -> tuple[int, Any]:
    """What tells the dispatch modes that are on from others."""
    return torch._C._len_torch_dispatch_stack(), _fake_mode()


def _fake_mode() -> Any:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def _default_device() -> torch.device:
    """The device of factories that name none, where the context is entered."""
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, DeviceContext) and not isinstance(mode, _MetaCalls):
            return mode.device
    return CPU


# -- threads

_inside = 0  # contexts that are open in this process
_lock = threading.Lock()
_start = threading.Thread.start


@contextmanager
def _threads_inherit() -> Iterator[None]:
    """Threads that are started by a thread inside are inside."""
    global _inside
    with _lock:
        _inside += 1
        threading.Thread.start = _start_inside  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and threading.Thread.start is _start_inside:
                threading.Thread.start = _start  # type: ignore[method-assign]


def _start_inside(thread: threading.Thread) -> None:
    recorder = current()
    if recorder is not None:
        run = thread.run

        def run_inside() -> None:
            del thread.run
            with recorder.entered():
                run()

        thread.run = run_inside  # type: ignore[method-assign]
    _start(thread)
