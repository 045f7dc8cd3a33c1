"""Name a piece of a storage that has no memory yet, for as long as that storage lives.

A tensor under construction is a tensor on meta; what tells one from another is its storage. A :class:`Slot` stands for
the memory that the storage would have, and rides on the storage object itself, which lives exactly as long as some
tensor has the storage: nothing else has to be kept in step, and what nobody can reach any more is freed with it. A
:class:`Ref` is a tensor less its identity: a view of a slot. So views, ``.data``, ``detach``, ``Parameter(t)``, ties
and ``set_`` are no events; whoever ends up with the storage ends up with its history.

Law: ``Ref.of(t).tensor()`` lies in the slot's memory as ``t`` lies in its storage.
"""

import functools
from typing import Any, TYPE_CHECKING

import torch
from torch import Tensor


if TYPE_CHECKING:
    from torch.nn.utils._deferred_init._tape import Filled, Node, Tape


READ, WRITE, FRESH = range(3)  # FRESH: every byte is written and none is read

META = torch.device("meta")
CPU = torch.device("cpu")
NAME = "_deferred_init_slot"


class Slot:
    """The memory that a storage on meta stands for.

    Attributes:
        tape: where what is to be done to it is recorded.
        nbytes: how large it is.
        device: where eager construction would have put it.
        real: the memory, once there is some: up to date but for ``events``.
        events: ``(index, READ | WRITE | FRESH, node)`` of what is still to be done, in program order.
        shared: whether somebody who is not recorded sees the memory, so that what is written to it is written at once.
        moved: where tensors that were materialized find it, if that is not ``real``.
        drawn: whether random ops were recorded for it, also if their values were overwritten since.
    """

    __slots__ = (
        *("device", "drawn", "events", "moved", "nbytes", "real", "shared", "tape"),
    )

    def __init__(self, tape: "Tape", nbytes: int, device: torch.device) -> None:
        self.tape = tape
        self.nbytes = nbytes
        self.device = device
        self.real: torch.UntypedStorage | None = None
        self.events: list[tuple[int, int, Node]] = []
        self.moved: dict[Any, torch.UntypedStorage] = {}
        self.shared = False
        self.drawn = False

    def memory(self) -> torch.UntypedStorage:
        """The memory; if there is none yet, some that is not initialized, as ``torch.empty`` gives it."""
        if self.real is None:
            self.real = torch.UntypedStorage(self.nbytes, device=self.device)
        elif self.real.nbytes() < self.nbytes:  # resize_() grew the storage
            self.real.resize_(self.nbytes)
        return self.real


class Unknown:
    """Marks a storage on meta whose values are not recorded.

    Attributes:
        cause: name of the op that made them.
        is_lost: whether a tensor is lost by it: False for what a model puts on meta on purpose, which
            :func:`torch.nn.utils.materialize_module` leaves there.
    """

    __slots__ = ("cause", "is_lost")

    def __init__(self, cause: str, is_lost: bool) -> None:
        self.cause = cause
        self.is_lost = is_lost


@functools.cache
def unknown_mark(cause: str, is_lost: bool = True) -> Unknown:
    """The mark of ``cause``; one for all storages, since a model has many."""
    return Unknown(cause, is_lost)


def mark_of(tensor: Tensor) -> "Slot | Filled | Unknown | None":
    """What is known of the memory of ``tensor``."""
    try:
        return tensor.untyped_storage().__dict__.get(NAME)
    except (NotImplementedError, RuntimeError):  # sparse, nested, wrapped ...
        return None


def slot_of(tensor: Tensor) -> Slot | None:
    """The slot of the storage of ``tensor``; None if it has none."""
    mark = mark_of(tensor)
    if mark is None or isinstance(mark, Slot):
        return mark
    if isinstance(mark, Unknown):
        return None
    return mark.become_slot(tensor.untyped_storage())


def slot_on(storage: torch.UntypedStorage, tape: "Tape", device: torch.device) -> Slot:
    """The slot of ``storage``, on meta, which from now on stands for memory on ``device`` if it had none."""
    mark: Slot | Filled | Unknown | None = storage.__dict__.get(NAME)
    if mark is None or isinstance(mark, Unknown):
        mark = storage.__dict__[NAME] = Slot(tape, storage.nbytes(), device)
    return mark if isinstance(mark, Slot) else mark.become_slot(storage)


def attach(storage: torch.UntypedStorage, mark: "Slot | Filled | Unknown") -> None:
    """Let ``storage``, on meta, stand for the memory of a slot."""
    storage.__dict__[NAME] = mark


def detach(storage: torch.UntypedStorage) -> None:
    """Let ``storage`` stand for nothing."""
    storage.__dict__.pop(NAME, None)


class Ref:
    """A view of the memory of a slot: a tensor without identity."""

    __slots__ = (
        *("conj", "contiguous", "dtype", "neg", "offset"),
        *("size", "slot", "stride"),
    )

    def __init__(self, slot: Slot, tensor: Tensor) -> None:
        self.slot = slot
        self.dtype = tensor.dtype
        self.size = tensor.size()
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()
        self.contiguous = tensor.is_contiguous()
        self.conj = tensor.is_conj()
        self.neg = tensor.is_neg()

    def numel(self) -> int:
        return self.size.numel()

    def is_whole(self) -> bool:
        """Whether it has every byte of the slot once."""
        whole: bool = self.numel() * self.dtype.itemsize == self.slot.nbytes
        return whole and self.offset == 0 and self.contiguous

    def tensor(self, memory: torch.UntypedStorage) -> Tensor:
        """The real tensor that lies in ``memory`` as this lies in the slot."""
        tensor = torch.empty(0, dtype=self.dtype, device=memory.device)
        tensor.set_(memory, self.offset, self.size, self.stride)
        if self.conj:
            tensor = torch._conj(tensor)
        return torch._neg_view(tensor) if self.neg else tensor

    def scratch(self) -> Tensor:
        """Memory of the same layout that is not initialized and belongs to nobody."""
        return torch.empty_strided(
            self.size, self.stride, dtype=self.dtype, device=self.slot.device
        )
