"""Record what is done to the memory of storages that have none, and do it later.

What is recorded is no graph of tensors: each :class:`Node` names the slots that it reads and writes, and each slot
lists its nodes in program order. Law: :func:`replay` leaves the memory of a slot as the program would have left
it, and so whatever is replayed in whatever order; each node runs once at most. A node that was run forgets its
operands; one that nobody can want any more is freed with the storages that it would have written to.
"""

import bisect
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils._deferred_init._random import (
    default_generator,
    default_state,
    reality,
    Stream,
)
from torch.nn.utils._deferred_init._slot import (
    detach,
    FRESH,
    META,
    NAME,
    READ,
    Ref,
    Slot,
    slot_on,
)


lock = threading.RLock()  # held while anything is replayed
_program = itertools.count()  # one for all tapes: a node may have to do with several


class Constant:
    """A real tensor that a recorded op reads, as it is when the op is recorded."""

    __slots__ = ("tensor", "version")

    _SMALL = 1 << 20  # bytes: what is larger is not copied, and must not change

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version: int | None = None
        if tensor.layout is not torch.strided or tensor.nbytes > self._SMALL:
            self.version = None if tensor.is_inference() else tensor._version
        else:
            with reality():
                self.tensor = tensor.detach().clone()

    def value(self, node: "Node") -> Tensor:
        if self.version is not None and self.tensor._version != self.version:
            raise RuntimeError(
                f"Expected the real tensor of shape {list(self.tensor.shape)} that {node} reads to be as it was when "
                "the call was deferred, got one that has been written to since. (Did you mean to pass a clone of it "
                "to deferred_init, or to materialize the module before that?)"
            )
        return self.tensor


class Node:
    """A recorded call.

    Attributes:
        index: its place in the program.
        line: where it was called, of one that reads a real tensor that must not change.
        func: what was called; None once it was run.
        outs: what the tensors that it returns are views of; None for one that needs no memory of its own.
        touched: ``(slot, READ | WRITE | FRESH)`` of all that it has to do with.
        draw: the stream and the position of a random one.
        fills: whether it reads nothing, so that it can draw for nobody.
        takes_generator: whether ``func`` has an argument of that name.
    """

    __slots__ = (
        *("args", "draw", "fills", "func", "index", "kwargs"),
        *("line", "outs", "takes_generator", "touched"),
    )

    def __init__(self, func: Callable[..., Any]) -> None:
        self.index = next(_program)
        self.func: Callable[..., Any] | None = func
        self.line = ""
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.outs: tuple[Ref | None, ...] = ()
        self.touched: tuple[tuple[Slot, int], ...] = ()
        self.draw: tuple[Stream, int] | None = None
        self.fills = False
        self.takes_generator = True

    def __str__(self) -> str:
        name = name_of(self.func) if self.func else "a call"
        return f"{name} ({self.line})" if self.line else name

    def touch(self, *touched: tuple[Slot, int]) -> None:
        """Record this as the next thing that is done to the slots."""
        self.touched = touched
        # NB: eager construction moves the generator for it, even if it is overwritten before anybody reads it.
        drawn = self.draw is not None or any(s.drawn for s, k in touched if k is READ)
        for slot, kind in touched:
            slot.events.append((self.index, kind, self))
            if drawn and kind is not READ:
                slot.drawn = True

    def draw_after(self, state: Tensor) -> Tensor:
        """The state of a generator in ``state`` after this has drawn from it, for nobody."""
        assert self.draw is not None
        generator = torch.Generator(self.draw[0].generator.device)
        generator.set_state(state)
        # How much it draws may depend on what it reads. It may be long overwritten what it writes.
        read = [slot for slot, kind in self.touched if kind is READ]
        replay(read, before=self.index)
        with reality():
            self.call(
                generator, lambda r: in_place(r) if r.slot in read else r.scratch()
            )
        return generator.get_state()

    def call(
        self, generator: torch.Generator | None, tensor: Callable[[Ref], Tensor]
    ) -> Any:
        """Make the call on real tensors: ``tensor`` tells those that the refs stand for."""
        assert self.func is not None
        args = [_real(a, self, tensor) for a in self.args]
        kwargs = {k: _real(v, self, tensor) for k, v in self.kwargs.items()}
        if generator is None:
            return self.func(*args, **kwargs)
        if self.takes_generator:
            return self.func(*args, **kwargs, generator=generator)
        with default_state(generator):
            return self.func(*args, **kwargs)


def name_of(func: Callable[..., Any]) -> str:
    return str(getattr(func, "__name__", func))


def _real(value: Any, node: Node, tensor: Callable[[Ref], Tensor]) -> Any:
    if isinstance(value, Ref):
        return tensor(value)
    if isinstance(value, Constant):
        return value.value(node)
    if isinstance(value, (list, tuple)):
        return type(value)(_real(v, node, tensor) for v in value)
    return value


class Tape:
    """What one context recorded: the slots and nodes hold each other, this holds what they have in common.

    Args:
        random: whether random ops have their values, or none at all.

    Attributes:
        is_remembered: whether what is known is known after the context, too. Not so in a meta block inside of
            deferred_init, where the model itself puts it on meta.
        is_load: whether it records a load into a deferred module.
        ops: what records ops here, as long as the context is open.
        drawn: whether something was materialized for which it recorded random ops.
    """

    def __init__(self, random: bool) -> None:
        self.random = random
        self.is_remembered = True
        self.is_load = False
        self.ops: Any = None
        self.closed = False
        self.drawn = False
        self._streams: dict[torch.device, Stream] = {}

    def stream(self, device: torch.device) -> Stream:
        """The random ops that draw from the default generator of ``device``."""
        generator = default_generator(device)
        stream = self._streams.get(generator.device)
        if stream is None:
            stream = self._streams[generator.device] = Stream(generator)
        return stream

    def streams(self) -> list[Stream]:
        return list(self._streams.values())


class Filled:
    """A slot to be, to which nothing was done but to fill the whole of it, or not even that.

    Most of a model is such, and this takes a tenth of what a slot takes with a node.

    Args:
        func: what fills a tensor of ``dtype``, given that and ``args``; None: the memory is not initialized.
    """

    __slots__ = ("args", "device", "dtype", "func", "kwargs", "tape")

    def __init__(
        self,
        tape: Tape,
        device: torch.device,
        func: Callable[..., Any] | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.uint8,
    ) -> None:
        self.tape, self.device, self.dtype = tape, device, dtype
        self.func, self.args, self.kwargs = func, args, kwargs

    def become_slot(self, storage: torch.UntypedStorage) -> Slot:
        with lock, reality():
            mark = storage.__dict__.get(NAME)
            if isinstance(mark, Slot):  # another thread was here
                return mark
            whole = torch.empty(0, dtype=self.dtype, device=META).set_(storage)
            detach(storage)
            slot = slot_on(storage, self.tape, self.device)
            if self.func is not None:
                node = Node(self.func)
                node.args = (Ref(slot, whole), *self.args)
                node.kwargs, node.fills = self.kwargs or {}, True
                node.touch((slot, FRESH))
            return slot


def replay(
    slots: Sequence[Slot], handed_over: bool = False, before: int | None = None
) -> bool:
    """Bring the memory of ``slots`` up to date; return whether anything was drawn for it.

    With ``handed_over``, somebody who is not recorded may write to it afterwards, so what has yet to read it does now.
    With ``before``, up to date is what it was when the node of that index was recorded.
    """
    drawn = False
    with lock, reality():
        nodes = pending(slots, handed_over, before)
        touched = dict.fromkeys(slot for node in nodes for slot, _ in node.touched)
        try:
            for node in nodes:
                if node.func is not None:
                    drawn |= node.draw is not None
                    run(node, in_place, _take)
                    # NB: what the node held is freed here, before the next one asks for memory.
                    node.func, node.args, node.kwargs = None, (), {}
                    node.outs, node.touched = (), ()
        finally:
            for slot in touched:
                _prune(slot)
        for slot in slots:
            slot.memory()
    return drawn


def _prune(slot: Slot) -> None:
    """Forget what was run, and what it made unwanted."""
    events = slot.events
    done = next((i for i in range(len(events), 0, -1) if not events[i - 1][2].func), 0)
    slot.events = [e for e in events[:done] if e[1] is READ and e[2].func]
    slot.events += events[done:]


def in_place(ref: Ref) -> Tensor:
    """The real tensor that ``ref`` stands for."""
    return ref.tensor(ref.slot.memory())


def _take(ref: Ref, made: Tensor) -> None:
    if ref.slot.real is None:
        ref.slot.real = memory_of(ref, made)


def run(
    node: Node,
    tensor: Callable[[Ref], Tensor],
    take: Callable[[Ref, Tensor], None],
) -> None:
    """Call what ``node`` recorded on real tensors, and hand over what it makes."""
    if node.draw is None:
        out = node.call(None, tensor)
    else:
        stream, position = node.draw
        out = stream.run(position, lambda generator: node.call(generator, tensor))
    for ref, made in zip(node.outs, tensors_in((out,)), strict=False):
        if ref is not None:
            take(ref, made)


def memory_of(ref: Ref, made: Tensor) -> torch.UntypedStorage:
    """The storage of ``made``, if it lies there as ``ref`` lies in its slot, else a copy that does."""
    storage = made.untyped_storage()
    if (
        made.stride() == ref.stride
        and made.storage_offset() == ref.offset
        and storage.nbytes() >= ref.slot.nbytes
        and (made.is_conj(), made.is_neg()) == (ref.conj, ref.neg)
    ):
        return storage
    storage = torch.UntypedStorage(ref.slot.nbytes, device=made.device)
    if made.numel():
        ref.tensor(storage).copy_(made)
    else:  # NB: of batch_norm in eval mode, meta kernels make statistics, and CPU's don't.
        storage.fill_(0)  # type: ignore[attr-defined]
    return storage


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


_NO_TENSORS = frozenset(
    (bool, int, float, str, type(None), torch.Size, torch.device, torch.dtype)
)


def has_tensors(values: Collection[Any]) -> bool:
    if _NO_TENSORS.issuperset(map(type, values)):
        return False
    for value in values:
        if isinstance(value, Tensor):
            return True
        if isinstance(value, (list, tuple)) and has_tensors(value):
            return True
    return False


# Note [What a slot needs]
# ~~~~~~~~~~~~~~~~~~~~~~~~
# Going back from the end of a slot's events: a write has to be done. A read has to be done if a later write is, which
# would destroy what it reads. A fresh write makes what was written before it unwanted, up to the latest read. Each
# node that has to be done needs all its slots as they were at its place in the program, those that it writes to
# without being fresh included. Each event is looked at once or twice, so this is linear.
def pending(
    slots: Iterable[Slot], overwritten: bool = False, before: int | None = None
) -> list[Node]:
    """The nodes that have to be run for ``slots``, in program order."""
    found: dict[int, Node] = {}
    seen: dict[Slot, int] = {}  # up to which event
    todo = [(slot, _place(slot, before), overwritten, False) for slot in slots]
    while todo:
        slot, end, overwritten, unwanted = todo.pop()
        start = seen.get(slot, 0)
        seen[slot] = max(start, end)
        for i in range(end - 1, -1, -1):
            if i < start and (slot.events[i][1] is not READ or not overwritten):
                break
            index, kind, node = slot.events[i]
            if (kind is READ and not overwritten) or (kind is not READ and unwanted):
                continue
            overwritten = overwritten or kind is not READ
            unwanted = kind is FRESH
            if index in found:
                continue
            found[index] = node
            for other, how in node.touched:
                if other is not slot:
                    at = _place(other, index)
                    todo.append((other, at, how is not READ, how is FRESH))
    return [found[index] for index in sorted(found)]


def _place(slot: Slot, index: int | None) -> int:
    """Where among the events of ``slot`` those of the node ``index`` and later ones begin."""
    if index is None:
        return len(slot.events)
    return bisect.bisect_left(slot.events, index, key=lambda e: e[0])
