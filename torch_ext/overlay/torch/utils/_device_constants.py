"""The values of what a constructor makes on a device that it names, in a block that makes it on meta instead.

Constructors name a device because they want to look at what they make, as the drop path schedules of timm do:
``[x.item() for x in torch.linspace(0, rate, n, device="cpu")]``. So the memory of such a meta tensor is remembered with
how it would have been made. Law: what is told of it, or of what was computed from it, is what stock would tell without
the block, or it raises as for any meta tensor. Nothing is drawn from a generator.

Known are storages, not tensors: views, ``.data``, ``.detach()`` and parameters need no word. What a call does to small
known tensors it does to their values at once, and what meta cannot do (``nonzero``, a tensor as fill value, ``.cpu()``)
is done to the values alone. Anything that reads an unknown tensor, draws random numbers or takes arguments with a state
of their own makes what it writes unknown.

Limit: a write that no function mode sees (C++, ``torch.jit.script``) makes the storage unknown, unless it goes through
an alias that counts its writes on its own, as ``.data`` does: then it is missed.
"""

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


Function: TypeAlias = Callable[..., Any]
Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]

# What is larger is not computed with: nobody reads it number by number.
_SMALL = 1 << 20  # bytes

_IMMUTABLE = frozenset(
    (
        *(bool, int, float, complex, str, type(None), torch.Size),
        *(torch.device, torch.dtype, torch.layout, torch.memory_format),
    )
)
_HARMLESS = _IMMUTABLE | {slice, type(...)}


class _UnknownError(Exception):
    """A value is needed that is not known."""


class _Memory:
    """A storage on meta, and the real one that stock would have.

    Attributes:
        meta: a tensor that keeps the storage alive and counts the writes to it.
        recipe: how to make the real tensor, as long as that was not needed.
        shift: where in the real storage the other one begins, in bytes.
    """

    __slots__ = ("meta", "real", "recipe", "shift", "version")

    def __init__(self, meta: Tensor, recipe: tuple[Function, Args, Kwargs] | None):
        self.meta = meta
        self.recipe = recipe
        self.real: torch.UntypedStorage | None = None
        self.shift = 0
        self.version = 0

    def make(self) -> torch.UntypedStorage:
        # NB: kept once made: an array that `numpy()` handed out shares this memory, so
        # that what is written to it shows in what is read later.
        if self.real is None:
            assert self.recipe is not None
            func, args, kwargs = self.recipe
            with torch.no_grad():
                self.take(func(*args, **kwargs))
            self.recipe = None
        assert self.real is not None
        return self.real

    def take(self, real: Any) -> None:
        """Let ``real`` be what :attr:`meta` would be."""
        meta = self.meta
        if not _is_plain(real) or real.is_meta or real.shape != meta.shape:
            raise _UnknownError
        if real.stride() != meta.stride():
            real = torch.empty_like(meta, device=real.device).copy_(real)
        self.real = real.untyped_storage()
        # NB: `as_tensor` may have returned a part of another tensor.
        self.shift = int(real.storage_offset()) * real.itemsize
        self.shift -= int(meta.storage_offset()) * meta.itemsize

    def view(self, like: Tensor) -> Tensor:
        """Return of the real storage the view that ``like`` is of the one on meta."""
        real = self.make()
        offset = like.storage_offset() + self.shift // like.itemsize
        view = torch.empty(0, dtype=like.dtype, device=real.device)
        return view.set_(real, offset, like.size(), like.stride())


class _Call:
    """A call that has to do with known tensors, to be made on their values, too."""

    def __init__(
        self, func: Function, args: Args, kwargs: Kwargs, constants: "Constants"
    ) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.leaves = tree_leaves((args, kwargs))
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self.versions = list(map(_version, self.tensors))
        self.values: dict[int, Tensor] = {}
        # NB: the call may change what of the storage a tensor is a view of.
        if sum(t.nbytes for t in self.tensors) <= _SMALL:
            values = map(constants.value, self.tensors)
            pairs = zip(self.tensors, values, strict=True)
            self.values = {id(t): v for t, v in pairs if not v.is_meta}

    def written(self) -> list[Tensor]:
        """The tensors that were written to since this was made."""
        pairs = zip(self.tensors, self.versions, strict=True)
        return [t for t, version in pairs if _version(t) != version]

    def is_known(self) -> bool:
        """Whether the values of all arguments are known."""
        return all(
            id(leaf) in self.values if isinstance(leaf, Tensor) else _is_harmless(leaf)
            for leaf in self.leaves
        )

    def repeat(self) -> Any:
        """Make the call on what values are known, and return what it returns."""
        if any(not t.is_meta for t in self.written()):  # once is enough
            raise _UnknownError
        args, kwargs = tree_map_only(
            Tensor, lambda t: self.values.get(id(t), t), (self.args, self.kwargs)
        )
        generator = torch.default_generator
        before = generator.get_state()
        try:
            real = self.func(*args, **kwargs)
        finally:
            drawn = not torch.equal(generator.get_state(), before)
            generator.set_state(before)
        if drawn:
            raise _UnknownError
        return real


class Constants:
    """What is known in one block.

    Attributes:
        known: what is, by the address of the storage, which nothing else can get as long as it is held here.
    """

    def __init__(self) -> None:
        self.known: dict[int, _Memory] = {}

    def add(self, made: Any, func: Function, args: Args, kwargs: Kwargs) -> None:
        """Remember that ``made`` would have been ``func(*args, **kwargs)``."""
        if is_alone():
            self._add(made, func, args, kwargs)
        else:  # what other modes are to see is the user's calls
            with torch._C.DisableTorchFunction():
                self._add(made, func, args, kwargs)

    def _add(self, made: Any, func: Function, args: Args, kwargs: Kwargs) -> None:
        if made.layout is not torch.strided:
            return
        kwargs["dtype"] = made.dtype  # the default one may be another by then
        memory = _Memory(made, (func, args, kwargs))
        if not (all_immutable(args) and all_immutable(kwargs.values())):
            # The caller may change the data that this is made of.
            if made.nbytes > _SMALL:
                return
            kwargs["device"] = "cpu"
            try:
                with torch._C.DisableTorchFunction():
                    memory.make()
            except (RuntimeError, NotImplementedError, _UnknownError):
                return
        self.known[made.untyped_storage()._cdata] = memory

    def read(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Call ``func``, which tells Python the values of tensors, with the real ones where they are known."""
        if self.known:
            with torch._C.DisableTorchFunction():
                args = self._values(args)
        return func(*args, **kwargs)

    def _values(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.value(value)
        return (
            type(value)(map(self._values, value))
            if type(value) in (list, tuple)
            else value
        )

    def follow(self, func: Function, args: Args, kwargs: Kwargs, really: Kwargs) -> Any:
        """Call ``func``, and do to the values of known tensors what it does to the tensors.

        Args:
            really: the ``kwargs`` as they would be without the block.
        """
        # NB: every call in a block with constants comes through here.
        if is_alone():
            known = self._knows_any((*args, *kwargs.values()))
        else:
            with torch._C.DisableTorchFunction():
                known = self._knows_any((*args, *kwargs.values()))
        if not known:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            call = _Call(func, args, really, self)
        try:
            made = func(*args, **kwargs)
        except Exception:
            with torch._C.DisableTorchFunction(), suppress(_UnknownError):
                if call.is_known():
                    real = call.repeat()
                    self._keep(call.written())
                    return tree_map_only(Tensor, self._stand_in, real)
                with suppress(Exception):  # a known size or index of unknown tensors
                    call.kwargs = kwargs
                    return call.repeat()
            raise
        with torch._C.DisableTorchFunction():
            written, leaves = call.written(), tree_leaves(made)
            if written or any(map(self._is_new, leaves)):
                try:
                    if not call.is_known():
                        raise _UnknownError
                    self._learn(leaves, tree_leaves(call.repeat()))
                    self._keep(written)
                except Exception:
                    self._forget(written)
        return made

    def _knows_any(self, values: Iterable[Any]) -> bool:
        for value in values:
            if isinstance(value, Tensor):
                if (
                    value.is_meta
                    and value.layout is torch.strided
                    and value.untyped_storage()._cdata in self.known
                ):
                    return True
            elif isinstance(value, (list, tuple)) and self._knows_any(value):
                return True
        return False

    def _memory(self, value: Tensor) -> _Memory | None:
        """What is known of the memory of ``value``."""
        if not (value.is_meta and _is_plain(value)):
            return None
        address = value.untyped_storage()._cdata
        memory = self.known.get(address)
        # NB: tensors can swap what they are.
        if memory is None or memory.meta.untyped_storage()._cdata != address:
            return None
        return memory if memory.meta._version == memory.version else None

    def value(self, tensor: Tensor) -> Tensor:
        """The real tensor that ``tensor`` stands for, or itself."""
        memory = self._memory(tensor)
        try:
            return tensor if memory is None else memory.view(tensor)
        except Exception:  # as where there is no such device
            return tensor

    def _is_new(self, value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and value.is_meta
            and _is_plain(value)
            and value.untyped_storage()._cdata not in self.known
        )

    def _learn(self, made: list[Any], real: list[Any]) -> None:
        """Remember the tensors in ``real`` as the values of those in ``made``."""
        for meta, value in zip(made, real, strict=True):
            if self._is_new(meta) and meta.nbytes <= _SMALL:
                memory = _Memory(meta, None)
                memory.take(value)
                memory.version = meta._version
                self.known[meta.untyped_storage()._cdata] = memory

    def _keep(self, written: list[Tensor]) -> None:
        """What was written to ``written`` was written to the values, too."""
        for tensor in written:
            memory = self.known.get(tensor.untyped_storage()._cdata)
            if memory is not None:
                memory.version = memory.meta._version

    def _forget(self, written: list[Tensor]) -> None:
        """Nobody knows what was written to ``written``."""
        for tensor in written:
            self.known.pop(tensor.untyped_storage()._cdata, None)

    def _stand_in(self, real: Tensor) -> Tensor:
        """What to hand out instead of ``real``."""
        if real.is_meta or not _is_plain(real):
            return real
        storage = real.untyped_storage()
        for memory in self.known.values():
            if memory.real is not None and memory.real._cdata == storage._cdata:
                offset = real.storage_offset() - memory.shift // real.itemsize
                view = torch.empty(0, dtype=real.dtype, device="meta")
                meta = memory.meta.untyped_storage()
                return view.set_(meta, offset, real.size(), real.stride())
        made = torch.empty_strided(
            real.size(), real.stride(), dtype=real.dtype, device="meta"
        )
        self._learn([made], [real])
        return made


def is_alone() -> bool:
    """Whether no other mode sees the calls that are made here."""
    return not (
        torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
    )


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_conj() or value.is_neg() or value.is_inference())
    )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def all_immutable(values: Collection[Any]) -> bool:
    return _IMMUTABLE.issuperset(map(type, values)) or all(
        type(v) in _IMMUTABLE or (type(v) is tuple and all_immutable(v)) for v in values
    )


def _is_harmless(value: Any) -> bool:
    return type(value) in _HARMLESS or type(value).__module__ == "numpy"
