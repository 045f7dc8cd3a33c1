"""What a ``with torch.device(...):`` block does to the calls in it, where ``meta`` is concerned.

Law: in a meta block no factory, ``*_like`` or ``new_*`` that names a device, and so no
module built with ``device=``, makes anything but a meta tensor, and a constructor that
builds where only a *missing* ``device`` is filled in builds here, too (limits below).
Nothing is drawn from a generator. The innermost block decides: ``with torch.device("cpu"):``
inside of a meta block is how to get a real tensor.

A *default* device (``torch.set_default_device("meta")``) is no block and overrides nothing
explicit. It is told apart because only it goes through ``DeviceContext.__enter__``: the
``with`` statement and the decorator push the mode from C++.

Limits: a constructor may read the constants that it makes on an explicit device
(Note [Constants]), but not what it *computes* from them (``(2 * c).item()``), nor one that
it wrote to; and an operation between such a constant and a real tensor of one or more
dimensions raises, as between any two devices. What names no device or never reaches a
function mode is as without this file: legacy constructors, ``torch.range``, ``.to()``,
``from_numpy``, ATen ops called directly. Quantized and nested tensors, which meta lacks,
``out=`` and ``asarray(copy=False)`` keep the device that they name.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch.overrides import _get_current_function_mode_stack


Function: TypeAlias = Callable[..., Any]
Rule: TypeAlias = Callable[
    ["MetaBlock", Function, tuple[Any, ...], dict[str, Any]], Any
]


def block(device: Any) -> "MetaBlock | RealBlock | None":
    """Return what is to answer the calls in a block of ``device`` that opens here; None: stock's rule does.

    Raises:
        RuntimeError: if ``device`` is no device.
    """
    if not isinstance(device, torch.device):
        device = torch.device(device)
    if device.type == "meta":
        return MetaBlock(device)
    blocks = [getattr(m, "block", None) for m in _get_current_function_mode_stack()]
    around = [b for b in blocks if isinstance(b, MetaBlock)]
    return RealBlock(device, around) if around else None


class MetaBlock:
    """A block of the meta device: the device that a call names gives way to it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rule = _rules().get
        self.constants: dict[int, _Constant] = {}  # by the address of their storage
        self.overruled = 0  # depth of calls that come from a block inside of this one

    def call(
        self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any] | None
    ) -> Any:
        """Call ``func`` by the rules of this block."""
        # NB: every torch function in the block comes through here, and few have a rule:
        # what is done before that is known is paid for by all the others.
        rule = self.rule(func)
        if rule is None:
            return func(*args) if kwargs is None else func(*args, **kwargs)
        if rule is not _override:
            return rule(self, func, args, kwargs or {})
        if kwargs is None:
            return func(*args, device=self.device)
        device = kwargs.get("device")
        if device is None:
            kwargs["device"] = self.device
        elif device != self.device:
            return _override(self, func, args, kwargs)
        return func(*args, **kwargs)

    def constant(self, value: Any) -> "_Constant | None":
        """Return the constant that ``value`` is or is a view of, if what it holds is known."""
        if not (isinstance(value, torch.Tensor) and value.is_meta):
            return None
        if value.layout is not torch.strided or value.is_conj() or value.is_neg():
            return None
        address = value.untyped_storage()._cdata
        found = self.constants.get(address)
        if found is None or found.meta.untyped_storage()._cdata != address:
            return None
        # The views of a tensor count their writes together with it.
        return found if found.meta._version == 0 else None


class RealBlock:
    """A block of a real device inside of meta blocks, which leave alone what comes through it."""

    def __init__(self, device: torch.device, around: list[MetaBlock]) -> None:
        from torch.utils._device import _device_constructors

        self.device = device
        self.around = around
        self.constructors = _device_constructors()

    def call(
        self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any] | None
    ) -> Any:
        """Call ``func`` by stock's rule, while the blocks around this one override nothing."""
        kwargs = kwargs or {}
        if func in self.constructors and kwargs.get("device") is None:
            kwargs["device"] = self.device
        for outer in self.around:
            outer.overruled += 1
        try:
            return func(*args, **kwargs)
        finally:
            for outer in self.around:
                outer.overruled -= 1


# Note [Constants]
# ~~~~~~~~~~~~~~~~
# Constructors name a device because they want to look at what they make, as the drop path
# schedules of timm do: `[x.item() for x in torch.linspace(0, rate, n, device="cpu")]`. The
# meta tensor that a block makes instead therefore remembers how it would have been made;
# asked for its value in Python, it (or a view of it) has the call made on the device that
# was named, once, and tells the truth. A constant is found by the address of its storage,
# which nothing else can get as long as the block holds the tensor. Once the storage may
# have been written to, the value is forgotten, and asking raises as it does for any meta
# tensor.
#
# NB: no mode sees `other.set_(constant)`; what is then written through `other` is missed.
class _Constant:
    __slots__ = ("args", "func", "kwargs", "meta", "real")

    def __init__(
        self,
        meta: torch.Tensor,
        func: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.meta, self.func, self.args, self.kwargs = meta, func, args, kwargs
        self.real: torch.Tensor | None = None

    def make(self) -> torch.Tensor:
        # NB: kept once made: an array that `numpy()` handed out shares this memory, so
        # that what is written to it shows in what is read later.
        if self.real is None:
            self.real = self.func(*self.args, **self.kwargs)
        return self.real

    def view(self, like: torch.Tensor) -> torch.Tensor:
        """Return of the real tensor the view that ``like`` is of the meta one."""
        real = self.make()
        # NB: `as_tensor` may have returned a part of another tensor.
        offset = real.storage_offset() + like.storage_offset()
        view = torch.empty(0, dtype=like.dtype, device=real.device)
        return view.set_(real.untyped_storage(), offset, like.size(), like.stride())

    def is_faithful(self) -> bool:
        """Whether the real tensor lies in its memory as the meta one does."""
        real = self.make()
        return real.stride() == self.meta.stride() and not (
            real.is_conj() or real.is_neg()
        )


# The caller may change the data that a constant was made of, so the real tensor is made at
# once; what is larger is not worth the memory: nobody reads it number by number.
_SMALL = 1 << 16  # bytes

_IMMUTABLE = frozenset(
    (
        *(bool, int, float, complex, str, type(None), torch.Size),
        *(torch.device, torch.dtype, torch.layout, torch.memory_format),
    )
)


def _is_immutable(values: Iterable[Any]) -> bool:
    return all(
        type(v) in _IMMUTABLE or (type(v) is tuple and _is_immutable(v)) for v in values
    )


@functools.lru_cache
def _parse(device: str) -> torch.device:
    with (
        torch._C.DisableTorchFunction()
    ):  # no mode is to see it, nor to have its say in the cache
        return torch.device(device)


def _override(
    block: MetaBlock, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Rule of what stock fills in a missing ``device`` for (:meth:`MetaBlock.call` has): override an explicit one."""
    named = kwargs["device"]
    if isinstance(named, str):
        named = _parse(named)  # raises as it does without the block
    if block.overruled or kwargs.get("out") is not None:
        return func(*args, **kwargs)
    if func is torch.asarray and kwargs.get("copy") is False:
        return func(*args, **kwargs)
    kwargs["device"] = block.device
    made = func(*args, **kwargs)
    if func in _known() and named != block.device:
        _remember(block, made, func, args, {**kwargs, "device": named})
    return made


def _override_explicit(
    block: MetaBlock, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Rule of what knows a device without one being named."""
    if kwargs.get("device") is None:
        return func(*args, **kwargs)
    return _override(block, func, args, kwargs)


def _override_unchecked(
    block: MetaBlock, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Rule of sparse tensors: as :func:`_override`, but there are no indices to check."""
    if kwargs.get("device") is None:
        return _fill_in(block, func, args, kwargs)
    if not block.overruled:
        kwargs["check_invariants"] = False
    return _override(block, func, args, kwargs)


def _fill_in(
    block: MetaBlock, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Rule of what meta has no tensors of: stock's."""
    if kwargs.get("device") is None:
        kwargs["device"] = block.device
    return func(*args, **kwargs)


def _remember(
    block: MetaBlock,
    made: Any,
    func: Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Note how ``made`` would have been made: see Note [Constants]."""
    # What other modes are to see is the user's calls.
    with torch._C.DisableTorchFunction():
        if type(made) is not torch.Tensor or made.layout is not torch.strided:
            return
        if made.requires_grad or made.is_inference():  # the latter count no writes
            return
        kwargs["dtype"] = made.dtype  # the default one may be another by then
        constant = _Constant(made, func, args, kwargs)
        if not (_is_immutable(args) and _is_immutable(kwargs.values())):
            if made.nbytes > _SMALL:
                return
            kwargs["device"] = "cpu"
            try:
                if not constant.is_faithful():
                    return
            except (RuntimeError, NotImplementedError):  # made of a meta tensor
                return
        block.constants[made.untyped_storage()._cdata] = constant


def _read(
    block: MetaBlock, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Rule of what tells Python the values of tensors: tell those of constants."""
    if block.constants:
        with torch._C.DisableTorchFunction():
            args = tuple(c.view(a) if (c := block.constant(a)) else a for a in args)
    return func(*args, **kwargs)


def _forget(
    block: MetaBlock, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Rule of what gives a storage to a tensor that counts its writes on its own."""
    if block.constants:
        with torch._C.DisableTorchFunction():
            for value in args:
                if block.constant(value):
                    del block.constants[value.untyped_storage()._cdata]
    return func(*args, **kwargs)


@functools.lru_cache(1)
def _rules() -> dict[Function, Rule]:
    """What is done to the few functions that a block does not just let through."""
    from torch.utils._device import _device_constructors

    rules: dict[Function, Rule] = dict.fromkeys(_device_constructors(), _override)
    rules[torch.empty_quantized] = rules[torch.nested.nested_tensor] = _fill_in
    sparse = """sparse_bsc_tensor sparse_bsr_tensor sparse_compressed_tensor
        sparse_coo_tensor sparse_csc_tensor sparse_csr_tensor"""
    rules.update(dict.fromkeys(_members(torch, sparse), _override_unchecked))
    explicit = """empty_like full_like normal ones_like rand_like randint_like randn_like
        zeros_like"""
    rules.update(dict.fromkeys(_members(torch, explicit), _override_explicit))
    explicit = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros"
    rules.update(dict.fromkeys(_members(torch.Tensor, explicit), _override_explicit))
    reads = """__array__ __bool__ __complex__ __contains__ __float__ __format__ __index__
        __int__ allclose equal is_nonzero item numpy tolist"""
    rules.update(dict.fromkeys(_members(torch.Tensor, reads), _read))
    reads = "allclose equal is_nonzero"
    rules.update(dict.fromkeys(_members(torch, reads), _read))
    data: Any = torch.Tensor.data
    rules[data.__get__] = rules[data.__set__] = _forget
    return rules


@functools.lru_cache(1)
def _known() -> frozenset[Function]:
    """The factories whose arguments tell the values."""
    names = """arange as_tensor asarray bartlett_window blackman_window eye full
        hamming_window hann_window kaiser_window linspace logspace ones scalar_tensor
        tensor tril_indices triu_indices zeros"""
    return frozenset((*_members(torch, names), torch.fft.fftfreq, torch.fft.rfftfreq))


def _members(owner: object, names: str) -> list[Function]:
    return [getattr(owner, name) for name in names.split()]
