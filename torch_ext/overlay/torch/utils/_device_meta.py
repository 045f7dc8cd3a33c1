"""What a ``with torch.device(...):`` block does to the calls in it, where ``meta`` is concerned.

Law: in a meta block no factory, ``*_like`` or ``new_*`` that names a device, and so no
module built with ``device=``, makes anything but a meta tensor, and a constructor that
builds where only a *missing* ``device`` is filled in builds here, too (limits below).
Nothing is drawn from a generator. The innermost block decides: ``with torch.device("cpu"):``
inside of a meta block is how to get a real tensor.

A *default* device (``torch.set_default_device("meta")``) is no block and overrides nothing
explicit. It is told apart because only it goes through ``DeviceContext.__enter__``: the
``with`` statement and the decorator push the mode from C++.

A constructor may read the constants that it makes on an explicit device, and what it
computes from them: see ``torch/utils/_device_constants.py``.

Limits: random numbers cannot be read, since nothing is drawn, nor what is computed from
constants larger than 1 MiB. What names no device or never reaches a
function mode is as without this file: legacy constructors, ``torch.range``, ``.to()``,
``from_numpy``, ATen ops called directly. Quantized and nested tensors, which meta lacks,
``out=`` and ``asarray(copy=False)`` keep the device that they name.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device_constants import all_immutable, Constants, is_alone


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
        self.constants = Constants()
        self.known = self.constants.known
        self.overruled = 0  # depth of calls that come from a block inside of this one

    def call(
        self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any] | None
    ) -> Any:
        """Call ``func`` by the rules of this block."""
        # NB: every torch function in the block comes through here, and few have a rule:
        # what is done before that is known is paid for by all the others.
        rule = self.rule(func)
        if rule is None:
            if self.known:
                kwargs = kwargs or {}
                return self.constants.follow(func, args, kwargs, kwargs)
            return func(*args) if kwargs is None else func(*args, **kwargs)
        if rule is not _override:
            return rule(self, func, args, kwargs or {})
        if kwargs is None:
            kwargs = {"device": self.device}
        else:
            device = kwargs.get("device")
            if device is None:
                kwargs["device"] = self.device
            elif device != self.device:
                return _override(self, func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError):  # a size may be a constant
            if not self.known:
                raise
            return self.constants.follow(func, args, kwargs, kwargs)


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


@functools.lru_cache
def _parse(device: str) -> torch.device:
    with (
        torch._C.DisableTorchFunction()
    ):  # no mode is to see it, nor to have its say in the cache
        return torch.device(device)


_FILLED = frozenset((torch.ones, torch.zeros))


def _override(
    block: MetaBlock, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Rule of what stock fills in a missing ``device`` for (:meth:`MetaBlock.call` has): override an explicit one."""
    named = kwargs["device"]
    if isinstance(named, str):
        named = _parse(named)  # raises as it does without the block
    if block.overruled:
        return block.constants.read(func, args, kwargs)
    if kwargs.get("out") is not None:
        return func(*args, **kwargs)
    if func is torch.asarray and kwargs.get("copy") is False:
        return func(*args, **kwargs)
    really = {**kwargs, "device": named}
    kwargs["device"] = block.device
    if func in _FILLED and is_alone() and all_immutable(args):
        made = torch.empty(*args, **kwargs)  # on meta there is nothing to fill
    elif block.known:
        made = block.constants.follow(func, args, kwargs, really)
    else:
        made = func(*args, **kwargs)
    if func in _known() and named != block.device:
        block.constants.add(made, func, args, really)
    return made


def _override_explicit(
    block: MetaBlock, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Rule of what knows a device without one being named."""
    if kwargs.get("device") is None:
        return block.constants.follow(func, args, kwargs, kwargs)
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


def _read(
    block: MetaBlock, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Rule of what tells Python the values of tensors: tell those of constants."""
    return block.constants.read(func, args, kwargs)


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
