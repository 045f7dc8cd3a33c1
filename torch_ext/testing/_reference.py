"""A naive model of modules: what each operation on them means, in lists of Python numbers.

The law: a module and its model that went through the same operations agree on every name, value, dtype, gradient and
tie. Nothing here asks a tensor for a result; only :func:`model_of` reads one, when a module is new.

How: a ``Cell`` is a tensor as an object, a ``Memory`` is a storage, and a cell sees some places of one. Two names are
tied if they have the same cell or cells with the same memory. What it does not model: hooks, subclasses, lazy modules,
kinds of modules with a load of their own, and the layout of memory.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn, Tensor


Number: TypeAlias = float | int | bool

META = None


@dataclass(eq=False)
class Memory:
    """A storage: its numbers, or none (meta)."""

    size: int
    numbers: list[Number] | None

    @property
    def is_meta(self) -> bool:
        return self.numbers is META

    def copy(self) -> "Memory":
        return Memory(self.size, None if self.numbers is META else list(self.numbers))


@dataclass(eq=False)
class Cell:
    """A tensor: an object that sees some places of a memory."""

    memory: Memory
    places: list[int]
    shape: torch.Size
    dtype: torch.dtype
    trainable: bool = False
    gradient: list[Number] | None = None

    @classmethod
    def new(
        cls, like: "Cell", numbers: list[Number] | None, dtype: torch.dtype
    ) -> "Cell":
        """In memory of its own."""
        n = len(like.places)
        return cls(
            Memory(n, numbers), list(range(n)), like.shape, dtype, like.trainable
        )

    def alias(self) -> "Cell":
        """Another object over the same memory, as ``detach()``."""
        return Cell(self.memory, self.places, self.shape, self.dtype)

    def see(self, other: "Cell") -> None:
        self.memory, self.places, self.dtype = other.memory, other.places, other.dtype

    def read(self) -> list[Number]:
        assert self.memory.numbers is not META
        return [self.memory.numbers[i] for i in self.places]

    def write(self, numbers: Iterable[Number]) -> None:
        assert self.memory.numbers is not META
        for i, number in zip(self.places, numbers, strict=True):
            self.memory.numbers[i] = convert(number, self.dtype)


Slot: TypeAlias = tuple[int, str]
Entries: TypeAlias = dict[str, Cell]


@dataclass(eq=False)
class Model:
    """The model of a module.

    Attributes:
        names: the (number of the module, own name) for each full name, in the order of a state dict.
        parameters: the slots that have a Parameter, in the order of ``_apply``.
        buffers: the slots that have a buffer, in the order of ``_apply``.
        hidden: slots of non-persistent buffers.
        cells: what is in the slots.
        optimized: the cells that an optimizer was given, or None.
    """

    names: dict[str, Slot]
    parameters: list[Slot]
    buffers: list[Slot]
    hidden: set[Slot]
    cells: dict[Slot, Cell]
    optimized: list[Cell] | None = None

    def persistent(self) -> Iterator[tuple[str, Slot]]:
        return ((n, slot) for n, slot in self.names.items() if slot not in self.hidden)

    def distinct_parameters(self) -> list[Cell]:
        slots = (slot for slot in self.names.values() if slot in self.parameters)
        return list(dict.fromkeys(self.cells[slot] for slot in slots))

    def state_dict(self) -> Entries:
        return {name: self.cells[slot].alias() for name, slot in self.persistent()}

    def copy_from(self, entries: Entries) -> None:
        """The copying load; nothing can be copied to meta."""
        for name, slot in self.persistent():
            cell = self.cells[slot]
            if name in entries and not cell.memory.is_meta:
                cell.write(entries[name].read())

    def reuse_from(self, entries: Entries, shared: Iterable[str]) -> None:
        """The copying load, that gives memory to what is on meta; then ``shared`` names have the entry's."""
        on_meta = [cell for cell in self.cells.values() if cell.memory.is_meta]
        for name, slot in self.persistent():
            if name in entries:
                self.materialize(self.cells[slot].memory)
                self.cells[slot].write(entries[name].read())
        was_meta = {cell.memory for cell in on_meta}
        for name in shared:
            cell, entry = self.cells[self.names[name]], entries[name]
            if cell.memory is not entry.memory:
                # NB: as text, because NaN is not equal to itself.
                assert repr(cell.read()) == repr(entry.read()), f"{name} is shared"
                self._see_with_its_ties(cell, entry, was_meta)

    def _see_with_its_ties(
        self, cell: Cell, entry: Cell, was_meta: set[Memory]
    ) -> None:
        """Those from meta that lie in the cell's old memory lie in the entry's likewise."""
        old = cell.memory
        moved = dict(zip(cell.places, entry.places, strict=True))
        cell.see(entry)
        for other in dict.fromkeys(self.cells.values()):
            if (
                old in was_meta
                and other.memory is old
                and moved.keys() >= set(other.places)
            ):
                other.memory, other.places = (
                    entry.memory,
                    [moved[i] for i in other.places],
                )

    def materialize(self, memory: Memory | None = None) -> None:
        """``module.to_empty(device="cpu", skip_materialized=True)``: zeros in one memory on meta, or in all."""
        made: dict[Memory, Memory] = {}
        for cell in dict.fromkeys(self.cells.values()):
            old = cell.memory
            if old.is_meta and memory in (None, old):
                zeros: list[Number] = [convert(0, cell.dtype)] * old.size
                cell.memory = made.setdefault(old, Memory(old.size, zeros))

    def assign_from(self, entries: Entries) -> None:
        """``assign=True``: other objects, that see the entries' memory."""
        for name, slot in self.persistent():
            if name in entries:
                cell = entries[name]
                if slot in self.parameters:
                    trainable = self.cells[slot].trainable
                    cell = cell.alias()
                    cell.trainable = trainable
                self.cells[slot] = cell

    def convert(self, dtype: torch.dtype) -> None:
        """``module.to(dtype)``: the same Parameters in other memory, and other buffers."""
        for slot in self.parameters:
            cell = self.cells[slot]
            if is_float(cell.dtype) and cell.dtype != dtype:
                cell.see(_converted(cell, dtype))
                if cell.gradient is not None:
                    cell.gradient = [convert(x, dtype) for x in cell.gradient]
        for slot in self.buffers:
            cell = self.cells[slot]
            if is_float(cell.dtype) and cell.dtype != dtype:
                self.cells[slot] = _converted(cell, dtype)

    def forget(self) -> None:
        """``module.to("meta")``: other objects for what is not on meta."""
        for slot in (*self.parameters, *self.buffers):
            cell = self.cells[slot]
            if not cell.memory.is_meta:
                self.cells[slot] = Cell.new(cell, META, cell.dtype)

    def empty(self) -> None:
        """``module.to_empty(device="cpu")``, which unties memory, and objects if they are buffers or on meta."""
        for slot in (*self.parameters, *self.buffers):
            cell = self.cells[slot]
            zeros: list[Number] = [convert(0, cell.dtype)] * len(cell.places)
            new = Cell.new(cell, zeros, cell.dtype)
            if slot in self.parameters and not cell.memory.is_meta:
                cell.see(new)
            else:
                self.cells[slot] = new

    def deepcopy(self) -> "Model":
        """Other objects, tied alike; but memory is shared by buffers only, and not on meta."""
        cells: dict[Cell, Cell] = {}
        memories: dict[Memory, Memory] = {}
        for slot, cell in self.cells.items():
            if cell in cells:
                continue
            if slot in self.parameters or cell.memory.is_meta:
                numbers = META if cell.memory.is_meta else cell.read()
                cells[cell] = Cell.new(cell, numbers, cell.dtype)
            else:
                cells[cell] = _moved(cell, memories)
        copies = {slot: cells[cell] for slot, cell in self.cells.items()}
        return Model(self.names, self.parameters, self.buffers, self.hidden, copies)

    def zero_grad(self) -> None:
        for cell in self.distinct_parameters():
            cell.gradient = None

    def train(self, rate: float) -> None:
        """A step of plain SGD for the sum of squares of all that is trainable and not on meta."""
        self.zero_grad()
        for cell in self.distinct_parameters():
            if cell.trainable and not cell.memory.is_meta:
                cell.gradient = [convert(2 * x, cell.dtype) for x in cell.read()]
        for cell in self.optimized or ():
            if cell.gradient is not None:
                cell.write(
                    x - rate * g
                    for x, g in zip(cell.read(), cell.gradient, strict=True)
                )


def saved(entries: Entries) -> Entries:
    """What ``torch.load`` gives of what ``torch.save`` was given: other memory, shared alike."""
    memories: dict[Memory, Memory] = {}
    return {name: _moved(cell, memories) for name, cell in entries.items()}


def converted(entries: Entries, dtype: torch.dtype) -> Entries:
    """``{key: value.to(dtype)}`` where that is a floating-point tensor."""
    return {
        name: _converted(cell, dtype)
        if is_float(cell.dtype) and cell.dtype != dtype
        else cell
        for name, cell in entries.items()
    }


def convert(number: Number, dtype: torch.dtype) -> Number:
    """A number as ``dtype`` has it.

    Example::

        >>> convert(0.1, torch.float16), convert(2.5, torch.int64), convert(3, torch.bool)
        (0.0999755859375, 2, True)
    """
    if is_float(dtype):
        # NB: rounding is the one thing that is left to torch.
        return torch.tensor(number, dtype=torch.float64).to(dtype).item()
    return bool(number) if dtype is torch.bool else math.trunc(number)


def is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


def _converted(cell: Cell, dtype: torch.dtype) -> Cell:
    if cell.memory.is_meta:
        return Cell.new(cell, META, dtype)
    return Cell.new(cell, [convert(x, dtype) for x in cell.read()], dtype)


def _moved(cell: Cell, memories: dict[Memory, Memory]) -> Cell:
    if cell.memory not in memories:
        memories[cell.memory] = cell.memory.copy()
    return Cell(memories[cell.memory], cell.places, cell.shape, cell.dtype)


def model_of(module: nn.Module) -> Model:
    """The model of a module that is new."""
    children = list(module.modules())
    numbers = {id(child): i for i, child in enumerate(children)}
    cells: dict[int, Cell] = {}
    memories: dict[int, Memory] = {}
    model = Model({}, [], [], set(), {})
    for prefix, child in module.named_modules(remove_duplicate=False):
        for own in (child._parameters, child._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    slot = numbers[id(child)], name
                    model.names[f"{prefix}.{name}" if prefix else name] = slot
                    if id(tensor) not in cells:
                        cells[id(tensor)] = _cell_of(tensor, memories)
                    model.cells[slot] = cells[id(tensor)]
                    if name in child._non_persistent_buffers_set:
                        model.hidden.add(slot)
    order: list[Slot] = []
    _in_order_of_apply(module, numbers, order.append)
    model.parameters = [s for s in order if s[1] in children[s[0]]._parameters]
    model.buffers = [s for s in order if s[1] in children[s[0]]._buffers]
    return model


def _in_order_of_apply(
    module: nn.Module, numbers: dict[int, int], visit: Callable[[Slot], None]
) -> None:
    for child in module.children():
        _in_order_of_apply(child, numbers, visit)
    for own in (module._parameters, module._buffers):
        for name, tensor in own.items():
            if tensor is not None:
                visit((numbers[id(module)], name))


def _cell_of(tensor: Tensor, memories: dict[int, Memory]) -> Cell:
    storage = tensor.untyped_storage()
    if storage._cdata not in memories:
        size = storage.nbytes() // tensor.element_size()
        numbers = None
        if not tensor.is_meta:
            flat = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (size,), (1,))
            numbers = flat.tolist()
        memories[storage._cdata] = Memory(size, numbers)
    places = torch.arange(memories[storage._cdata].size).as_strided(
        tensor.size(), tensor.stride(), tensor.storage_offset()
    )
    shape, trainable = tensor.shape, tensor.requires_grad
    return Cell(
        memories[storage._cdata],
        places.reshape(-1).tolist(),
        shape,
        tensor.dtype,
        trainable,
    )
