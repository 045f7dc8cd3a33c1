"""The values of what a constructor makes on a device that it names, in a block that makes it on meta instead.

Constructors name a device because they want to look at what they make, as the drop path schedules of timm do:
``[x.item() for x in torch.linspace(0, rate, n, device="cpu")]``. So the memory of such a meta tensor is remembered with
how it would have been made. Law: what is told of it, or of what was computed from it, is what stock would tell without
the block, or it raises as for any meta tensor. Nothing is drawn from a generator.

Known are storages, not tensors: views, ``.data``, ``.detach()`` and parameters need no word. What a call does to small
known tensors it does to their values at once, and what meta cannot do (``nonzero``, a tensor as fill value, ``.cpu()``)
is done to the values alone. Anything that reads an unknown tensor, draws random numbers or takes arguments with a state
of their own makes what it writes unknown.

Limits: a write that no function mode sees (C++, ``torch.jit.script``) makes the storage unknown, unless it goes through
an alias that counts its writes on its own, as ``.data`` does: then it is missed. NumPy arrays that share memory with a
constant of more than 1 MiB do not see later writes to it, and ``as_tensor`` of an array with gaps does not see later
writes to the array. What was made in a block inside of this one is not known here.
"""

import functools
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._device_memory import is_plain, is_wrapped, Memory, UnknownError
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


_ARRAYS = ("numpy", "__array__")


@functools.cache
def _moves() -> frozenset[Function]:
    """What returns its argument where that is on the right device already."""
    return frozenset((Tensor.to, torch.as_tensor, torch.asarray))


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
        if sum(map(constants.size, self.tensors)) <= _SMALL:
            values = map(constants.value, self.tensors)
            pairs = zip(self.tensors, values, strict=True)
            self.values = {id(t): v for t, v in pairs if not v.is_meta}

    def written(self) -> list[Tensor]:
        """The tensors that were written to since this was made."""
        pairs = zip(self.tensors, self.versions, strict=True)
        return [t for t, version in pairs if _version(t) != version]

    def has_real(self) -> bool:
        """Whether real tensors take part."""
        return any(not t.is_meta for t in self.tensors)

    def goes_to_meta(self) -> bool:
        """Whether the call moves its tensor to the meta device without the block, too."""
        try:
            return bool(self.repeat().is_meta)
        except Exception:
            return False

    def is_known(self) -> bool:
        """Whether the values of all arguments are known."""
        return all(
            id(leaf) in self.values if isinstance(leaf, Tensor) else _is_harmless(leaf)
            for leaf in self.leaves
        )

    def repeat(self) -> Any:
        """Make the call on what values are known, and return what it returns."""
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
            raise UnknownError
        return real


class Constants:
    """What is known in one block.

    Attributes:
        known: what is, by the address of the storage, which nothing else can get as long as it is held here.
    """

    def __init__(self) -> None:
        self.known: dict[int, Memory] = {}
        # By memo and memory, the memo and the copies that were made with it.
        self._copies: dict[tuple[int, int], list[Any]] = {}

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
        memory = Memory(made, (func, args, kwargs))
        if not (all_immutable(args) and all_immutable(kwargs.values())):
            # The caller may change the data that this is made of.
            if made.nbytes > _SMALL:
                return
            kwargs["device"] = "cpu"
            try:
                with torch._C.DisableTorchFunction():
                    memory.make()
            except (RuntimeError, NotImplementedError, UnknownError):
                return
        self.known[made.untyped_storage()._cdata] = memory

    def read(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Call ``func``, which tells Python the values of tensors, with the real ones where they are known."""
        if self.known:
            with torch._C.DisableTorchFunction():
                # NB: what requires a gradient gives no array.
                if func.__name__ not in _ARRAYS or not args[0].requires_grad:
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
        if func.__name__ == "__deepcopy__":
            return self._deepcopy(func, *args)
        with torch._C.DisableTorchFunction():
            call = _Call(func, args, really, self)
        if call.has_real() and call.is_known():
            # NB: on meta, `real.add_(constant)` does nothing, and raises nothing.
            with torch._C.DisableTorchFunction():
                return self._instead(call)
        try:
            made = func(*args, **kwargs)
        except Exception:
            if any(t.requires_grad for t in call.tensors):  # as of a leaf
                raise
            with torch._C.DisableTorchFunction(), suppress(UnknownError):
                if call.is_known():
                    return self._instead(call)
                with suppress(Exception):  # a known size or index of unknown tensors
                    call.kwargs = kwargs
                    return call.repeat()
            raise
        if func in _moves():
            with torch._C.DisableTorchFunction():
                if made.is_meta and self._memory(made) and call.goes_to_meta():
                    return torch.empty_like(made, requires_grad=made.requires_grad)
        with torch._C.DisableTorchFunction():
            written, leaves = call.written(), tree_leaves(made)
            if written or any(map(self._is_new, leaves)):
                try:
                    if not call.is_known():
                        raise UnknownError
                    self._learn(leaves, tree_leaves(call.repeat()))
                    self._keep(written)
                except Exception:
                    self._forget(written)
        return made

    def _deepcopy(self, func: Function, tensor: Tensor, memo: dict[int, Any]) -> Any:
        made = func(tensor, memo)
        with torch._C.DisableTorchFunction():
            memory = self._memory(tensor)
            if memory is None or not self._is_new(made):
                return made
            # NB: on meta, copies of what shares memory do not, so what is written to one is not known of the others.
            copies = self._copies.setdefault((id(memo), id(memory)), [memo])
            copies.append(made.detach())
            if len(copies) > 2:
                self._forget(copies[1:])
                return made
            with suppress(UnknownError):
                self._learn([made], [self.value(tensor).clone()])
        return made

    def _instead(self, call: _Call) -> Any:
        """Make a call on the values alone, and return what stands for what it returns."""
        own = {id(call.values[id(t)]): t for t in call.tensors}
        real = call.repeat()
        self._keep(call.written())
        return tree_map_only(
            Tensor,
            lambda t: own.get(id(t)) if id(t) in own else self._stand_in(t),
            real,
        )

    def _knows_any(self, values: Iterable[Any]) -> bool:
        for value in values:
            if isinstance(value, Tensor):
                if (
                    value.is_meta
                    and value.layout is torch.strided
                    and not is_wrapped(value)
                    and value.untyped_storage()._cdata in self.known
                ):
                    return True
            elif isinstance(value, (list, tuple)) and self._knows_any(value):
                return True
        return False

    def _memory(self, value: Tensor) -> Memory | None:
        """What is known of the memory of ``value``."""
        if not (value.is_meta and is_plain(value)):
            return None
        address = value.untyped_storage()._cdata
        memory = self.known.get(address)
        if memory is None or memory.meta._version != memory.version:
            return None
        return memory

    def value(self, tensor: Tensor) -> Tensor:
        """The real tensor that ``tensor`` stands for, or itself."""
        memory = self._memory(tensor)
        try:
            return tensor if memory is None else memory.view(tensor)
        except Exception:  # as where there is no such device
            return tensor

    def size(self, tensor: Tensor) -> int:
        """How many bytes have to be there to compute with ``tensor``."""
        if self._memory(tensor) is None:
            return 0
        return tensor.untyped_storage().nbytes()

    def _is_new(self, value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and value.is_meta
            and is_plain(value)
            and value.untyped_storage()._cdata not in self.known
        )

    def _learn(self, made: list[Any], real: list[Any]) -> None:
        """Remember the tensors in ``real`` as the values of those in ``made``."""
        for meta, value in zip(made, real, strict=True):
            if self._is_new(meta) and meta.nbytes <= _SMALL:
                memory = Memory(meta, None)
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
        if real.is_meta or not is_plain(real):
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


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def all_immutable(values: Collection[Any]) -> bool:
    return _IMMUTABLE.issuperset(map(type, values)) or all(
        type(v) in _IMMUTABLE or (type(v) is tuple and all_immutable(v)) for v in values
    )


def _is_harmless(value: Any) -> bool:
    return type(value) in _HARMLESS or type(value).__module__ == "numpy"
