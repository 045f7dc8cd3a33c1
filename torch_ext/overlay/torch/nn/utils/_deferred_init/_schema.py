"""What can be told about an op or a tensor before anything is done with it."""

import functools
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TYPE_CHECKING

import torch
from torch import Tensor


if TYPE_CHECKING:
    from torch._ops import OpOverload


_PYTHON_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)


def below_modes() -> Any:
    """For calls that are recorded already, or are no business of any mode."""
    return torch._C._ExcludeDispatchKeyGuard(_PYTHON_KEY)


def call_below(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Make one call in :func:`below_modes`, in half of the time that it takes to enter and leave it."""
    guard = torch._C._DisableTorchDispatch()  # as long as it lives
    try:
        return func(*args, **kwargs)
    finally:
        del guard


# What fills its first argument, and reads nothing of it.
_FILLS = frozenset(
    (
        *("bernoulli_", "cauchy_", "copy_", "exponential_", "fill_", "geometric_"),
        *("log_normal_", "normal_", "random_", "uniform_", "zero_"),
    )
)


# NB: in training they write to the running statistics, though their schemas do not say so.
_BATCH_NORMS = frozenset(("cudnn_batch_norm", "miopen_batch_norm", "native_batch_norm"))

_COMMUNICATION = frozenset(("c10d", "c10d_functional", "_c10d_functional"))


class Op:
    """What the schema of an op tells about it."""

    def __init__(self, func: "OpOverload[..., Any]") -> None:
        arguments = func._schema.arguments
        names = [a.name for a in arguments]
        self.name = func._schema.name.removeprefix("aten::")
        self.writes = [
            a.name for a in arguments if a.alias_info and a.alias_info.is_write
        ]
        self.places = {name: i for i, name in enumerate(names)}
        self.device = "device" in names
        self.dtype = "dtype" in names
        self.generator = "generator" in names
        self.random = torch.Tag.nondeterministic_seeded in func.tags
        self.fills = self.name in _FILLS
        returns = func._schema.returns
        aliases = any(r.alias_info for r in returns)
        self.views = aliases and not self.writes
        self.returns_written = aliases and bool(self.writes)
        self.communicates = func.namespace in _COMMUNICATION
        self.tells = not any("Tensor" in str(r.type) for r in returns)

    def written(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """The tensors that the schema says are written to, which an op returns."""
        return self._named(self.writes, args, kwargs)

    def silently_written(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> list[Any]:
        """The running statistics that ``native_batch_norm`` writes to."""
        if self.name in _BATCH_NORMS and any(self._named(["training"], args, kwargs)):
            return self._named(["running_mean", "running_var"], args, kwargs)
        return []

    def _named(
        self, names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> list[Any]:
        found = []
        for name in names:
            place = self.places[name]
            found.append(args[place] if place < len(args) else kwargs.get(name))
        flat = (t if isinstance(t, (list, tuple)) else [t] for t in found)
        return [t for some in flat for t in some if t is not None]


@functools.lru_cache(None)
def op_of(func: "OpOverload[..., Any]") -> Op:
    return Op(func)


class UnknownValue(RuntimeError):
    """A value was asked for that is not recorded.

    NB: no NotImplementedError, which parametrize takes for a missing ``right_inverse``.
    """

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"Expected a value that is known while a module is constructed on meta, got the result of {cause}, which "
            "draws random numbers or reads unknown values. Use torch.nn.utils.deferred_init instead, which records "
            "random numbers too."
        )


@functools.lru_cache(None)
def unknown(name: str) -> Callable[..., Any]:
    """Stands for a call whose result is not recorded; raises :class:`UnknownValue`."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise UnknownValue(name)

    fail.is_unknown = True  # type: ignore[attr-defined]
    return fail


def is_unknown(node: Any) -> bool:
    """Whether what a recorded call makes is not recorded."""
    return hasattr(node.func, "is_unknown")


def where() -> str:
    """The line of the innermost caller that is not torch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != "torch" and not name.startswith("torch.") and name != "contextlib":
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


# Modules that make tensors for a purpose of their own, on the device of a storage, a file or a process group.
_MAKERS = (
    *("torch._utils", "torch._load_lazy", "torch._weights_only_unpickler"),
    *("torch.serialization", "torch.storage", "torch.multiprocessing", "torch.hub"),
    *("torch.package", "torch.jit", "torch.distributed", "torch.nn.parallel"),
    *("torch.utils.data", "torch._subclasses", "torch._dynamo", "torch._inductor"),
    *("torch._functorch", "torch.export", "torch.fx"),
    "safetensors",
)
_OURS = (__package__ or "", "torch.utils._device", "torch.overrides", "torch._ops")


def called_by_library() -> bool:
    """Whether the innermost caller is code of torch (or safetensors) that makes tensors for itself.

    The device that it names is that of a storage, a file or a process group, not a user's choice.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(_OURS):
            return bool(name.startswith(_MAKERS))
        frame = frame.f_back
    return False


def as_device(named: Any) -> torch.device:
    """The device that a call names; a number is one of CUDA's, also where torch is built without."""
    return (
        torch.device("cuda", named) if isinstance(named, int) else torch.device(named)
    )


def is_plain(value: Any) -> bool:
    """Whether this is a strided tensor that no subclass has its hands in."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    if value.is_quantized or value.is_nested:
        return False
    return type(value).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl


def overrides(cls: type) -> bool:
    """Whether a type that torch names in ``types`` has a ``__torch_function__`` of its own."""
    function: Any = cls.__torch_function__  # type: ignore[attr-defined]
    return (
        getattr(function, "__func__", None) is not Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
        and function is not torch._C._disabled_torch_function_impl
    )
