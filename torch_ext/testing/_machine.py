"""A state machine that does to modules what programs do, and compares them with their naive models.

The law: after every step each module agrees with its model on names, values, dtypes, gradients, identities and ties,
across all modules and state dicts of a run. The one thing that a model takes from its module is which tensors share
memory with the state dict after a load that may share; what that may not break is checked.
"""

import copy
import io
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import hypothesis.strategies as st
import torch
from hypothesis.stateful import (
    Bundle,
    initialize,
    invariant,
    precondition,
    rule,
    RuleBasedStateMachine,
)
from torch import nn, Tensor

from torch_ext.testing._kinds import PLAIN
from torch_ext.testing._modules import named_tensors, Recipe, recipes
from torch_ext.testing._reference import (
    Cell,
    converted,
    Entries,
    is_float,
    Model,
    model_of,
    saved,
    Slot,
)


RATE = 0.25
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(eq=False)
class Trained:
    """A module, its model, and its optimizer if it has one."""

    module: nn.Module
    model: Model
    optimizer: torch.optim.Optimizer | None = None


@dataclass(eq=False)
class Saved:
    """A state dict and its model."""

    state_dict: "OrderedDict[str, Tensor]"
    entries: Entries


class ModuleMachine(RuleBasedStateMachine):
    """Construct, load each way, save, deepcopy, convert, train and empty modules of one architecture.

    Attributes:
        ways: which of ``"copy"``, ``"assign"`` and ``"reuse"`` to load with; the last one needs a torch whose
            ``load_state_dict`` has ``reuse_tensors``, or another :meth:`load`.
        skips_materialized: whether ``to_empty`` has ``skip_materialized``.

    Example::

        >>> class MyMachine(ModuleMachine):
        ...     ways = ("copy",)
        ...     def load(self, module, state_dict, way):
        ...         module.load_state_dict(state_dict, strict=False)
        >>> from hypothesis import settings
        >>> from hypothesis.stateful import run_state_machine_as_test
        >>> run_state_machine_as_test(MyMachine, settings=settings(max_examples=5, deadline=None))
    """

    ways: ClassVar[tuple[str, ...]] = ("copy", "assign")
    skips_materialized: ClassVar[bool] = False

    modules: ClassVar[Bundle[Trained]] = Bundle("modules")
    state_dicts: ClassVar[Bundle[Saved]] = Bundle("state_dicts")

    def __init__(self) -> None:
        super().__init__()
        self.recipe = Recipe(())
        self.all_modules: list[Trained] = []
        self.all_state_dicts: list[Saved] = []

    def load(
        self, module: nn.Module, state_dict: "OrderedDict[str, Tensor]", way: str
    ) -> None:
        """Load in one of ``ways``, not strictly."""
        how: dict[str, Any] = {
            "assign": {"assign": True},
            "reuse": {"reuse_tensors": True},
        }.get(way, {})
        module.load_state_dict(state_dict, strict=False, **how)

    # What modules there are

    @initialize(
        target=modules, recipe=recipes(kinds=PLAIN, devices=["cpu"], in_use=False)
    )
    def choose(self, recipe: Recipe) -> Trained:
        self.recipe = recipe
        return self._new(recipe.build().module)

    @rule(
        target=modules, seed=st.integers(1, 9), device=st.sampled_from(["cpu", "meta"])
    )
    def construct(self, seed: int, device: str) -> Trained:
        return self._new(self.recipe.on(device).build(seed).module)

    @rule(target=modules, old=modules)
    def deepcopy(self, old: Trained) -> Trained:
        new = Trained(copy.deepcopy(old.module), old.model.deepcopy())
        self.all_modules.append(new)
        return new

    # State dicts of them

    @rule(target=state_dicts, of=modules)
    def state_dict(self, of: Trained) -> Saved:
        """Of what is not on meta."""
        entries = of.model.state_dict()
        entries = {k: cell for k, cell in entries.items() if not cell.memory.is_meta}
        return self._saved(of.module.state_dict(), entries)

    @rule(target=state_dicts, old=state_dicts)
    def save_and_load(self, old: Saved) -> Saved:
        file = io.BytesIO()
        torch.save(old.state_dict, file)
        return self._saved(torch.load(io.BytesIO(file.getvalue())), saved(old.entries))

    @rule(target=state_dicts, old=state_dicts, dtype=st.sampled_from(DTYPES))
    def convert_state_dict(self, old: Saved, dtype: torch.dtype) -> Saved:
        values = {
            key: value.to(dtype) if is_float(value.dtype) else value
            for key, value in old.state_dict.items()
        }
        return self._saved(OrderedDict(values), converted(old.entries, dtype))

    @rule(target=state_dicts, old=state_dicts, data=st.data())
    def swap_entries(self, old: Saved, data: st.DataObject) -> Saved:
        """Two of one shape, or drop one."""
        values, entries = OrderedDict(old.state_dict), dict(old.entries)
        if values:
            key = data.draw(st.sampled_from(list(values)))
            alike = [k for k, v in values.items() if _alike(v, values[key])]
            other = data.draw(st.sampled_from(alike))
            values[key], values[other] = values[other], values[key]
            entries[key], entries[other] = entries[other], entries[key]
            if key == other:
                del values[key], entries[key]
        return self._saved(values, entries)

    # Loading

    @precondition(lambda self: "copy" in self.ways)
    @rule(into=modules, source=state_dicts)
    def load_copying(self, into: Trained, source: Saved) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*to a meta parameter.*")
            self.load(into.module, source.state_dict, "copy")
        into.model.copy_from(source.entries)

    @precondition(lambda self: "assign" in self.ways)
    @rule(into=modules, source=state_dicts)
    def load_assigning(self, into: Trained, source: Saved) -> None:
        # NB: an assigning load marks the metadata, so that later loads assign, too (pytorch #188166).
        self.load(into.module, OrderedDict(source.state_dict), "assign")
        into.model.assign_from(source.entries)

    @precondition(lambda self: "reuse" in self.ways)
    @rule(into=modules, source=state_dicts)
    def load_reusing(self, into: Trained, source: Saved) -> None:
        required = self._required(into, source)
        within, outside = _overlapping(into.model), self._outside(into.model)
        self.load(into.module, source.state_dict, "reuse")
        tensors = dict(named_tensors(into.module))
        shared = {
            name
            for name, value in source.state_dict.items()
            if _place(value) == _place(tensors[name])
        }
        into.model.reuse_from(source.entries, shared)
        assert required <= shared, f"copied for no reason: {required - shared}"
        assert _overlapping(into.model) == within, (
            "other tensors of the module share memory now"
        )
        assert outside <= self._outside(into.model), (
            "who saw the module's memory does not any more"
        )

    # Everything else that happens to modules

    @rule(of=modules, dtype=st.sampled_from(DTYPES))
    def to(self, of: Trained, dtype: torch.dtype) -> None:
        of.module.to(dtype)
        of.model.convert(dtype)

    @rule(of=modules)
    def half(self, of: Trained) -> None:
        of.module.half()
        of.model.convert(torch.float16)

    @rule(of=modules)
    def to_meta(self, of: Trained) -> None:
        self._zero_grad(of)
        of.module.to("meta")
        of.model.forget()

    @rule(of=modules)
    def to_empty(self, of: Trained) -> None:
        self._zero_grad(of)
        of.module.to_empty(device="cpu")
        of.model.empty()
        _fill(of, list(of.model.names))

    @precondition(lambda self: self.skips_materialized)
    @rule(of=modules)
    def to_empty_skipping_materialized(self, of: Trained) -> None:
        self._zero_grad(of)
        cells = {name: of.model.cells[slot] for name, slot in of.model.names.items()}
        on_meta = [name for name, cell in cells.items() if cell.memory.is_meta]
        of.module.to_empty(device="cpu", skip_materialized=True)  # type: ignore[call-arg]
        of.model.materialize()
        _fill(of, on_meta)

    @rule(of=modules)
    def optimize(self, of: Trained) -> None:
        groups = [{"params": list(of.module.parameters())}]
        of.optimizer = torch.optim.SGD(groups, lr=RATE, foreach=False)
        of.model.optimized = of.model.distinct_parameters()

    @rule(of=modules)
    def train(self, of: Trained) -> None:
        """A step whose loss is the sum of the squares."""
        of.module.zero_grad()
        alive = (p for p in of.module.parameters() if p.requires_grad and not p.is_meta)
        losses = [(p * p).sum().double() for p in alive]
        if losses:
            torch.stack(losses).sum().backward()
        if of.optimizer is not None:
            of.optimizer.step()
        of.model.train(RATE)

    # The law

    @invariant()
    def agree(self) -> None:
        objects = _OneToOne("objects")
        storages = _OneToOne("storages")
        for trained in self.all_modules:
            tensors = dict(named_tensors(trained.module))
            assert list(tensors) == list(trained.model.names)
            for name, tensor in tensors.items():
                _compare(name, tensor, trained.model.cells[trained.model.names[name]])
        for name, tensor, cell in self._all():
            objects.add(name, id(tensor), id(cell))
            if tensor.numel():
                storages.add(name, _storage(tensor), id(cell.memory))
        for held in self.all_state_dicts:
            for key, cell in held.entries.items():
                _compare(key, held.state_dict[key], cell)

    def _all(self) -> Iterator[tuple[str, Tensor, Cell]]:
        for trained in self.all_modules:
            model = trained.model
            for name, tensor in named_tensors(trained.module):
                yield name, tensor, model.cells[model.names[name]]
            if trained.optimizer is not None:
                optimized = trained.optimizer.param_groups[0]["params"]
                for tensor, cell in zip(optimized, model.optimized or (), strict=True):
                    yield "one that is optimized", tensor, cell
        for held in self.all_state_dicts:
            for key, cell in held.entries.items():
                yield key, held.state_dict[key], cell

    def _new(self, module: nn.Module) -> Trained:
        self.all_modules.append(Trained(module, model_of(module)))
        return self.all_modules[-1]

    def _saved(self, values: dict[str, Tensor], entries: Entries) -> Saved:
        for key in set(values) - set(entries):
            del values[key]
        self.all_state_dicts.append(Saved(OrderedDict(values), entries))
        return self.all_state_dicts[-1]

    def _zero_grad(self, of: Trained) -> None:
        of.module.zero_grad()
        of.model.zero_grad()

    def _outside(self, model: Model) -> set[tuple[Cell, Cell]]:
        """Pairs of this model's cells and others that share memory which is not on meta."""
        own = set(model.cells.values())
        others = {cell for _, _, cell in self._all()} - own
        return {
            (a, b)
            for a in own
            for b in others
            if a.memory is b.memory
            and not a.memory.is_meta
            and set(a.places) & set(b.places)
        }

    def _required(self, into: Trained, source: Saved) -> set[str]:
        """Names that a load has no reason not to share."""
        users = Counter(cell.memory for cell in {cell for _, _, cell in self._all()})
        model, tensors = into.model, dict(named_tensors(into.module))
        names = Counter(model.cells[slot] for _, slot in model.persistent())
        required = set()
        for name, entry in source.entries.items():
            cell, tensor = model.cells[model.names[name]], tensors[name]
            value = source.state_dict[name]
            alone = users[cell.memory] == users[entry.memory] == names[cell] == 1
            plain = tensor.is_contiguous() and tensor.stride() == value.stride()
            # NB: of memory from elsewhere (torch.load, numpy) the users are not known,
            # and the base of a view is one that the model does not have.
            resizable = tensor.untyped_storage().resizable()
            known = tensor.is_meta or (resizable and tensor._base is None)
            if (
                alone
                and plain
                and known
                and cell.dtype is entry.dtype
                and tensor.numel()
            ):
                required.add(name)
        return required


class _OneToOne:
    """Real things and their models, that must not be two where the other is one."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.model_of: dict[int, int] = {}
        self.real_of: dict[int, int] = {}

    def add(self, name: str, real: int, model: int) -> None:
        known = (
            self.model_of.setdefault(real, model),
            self.real_of.setdefault(model, real),
        )
        assert known == (model, real), f"{name}: not the {self.what} that are expected"


def _compare(name: str, tensor: Tensor, cell: Cell) -> None:
    seen: list[object] = [
        tensor.dtype,
        tensor.shape,
        tensor.requires_grad,
        tensor.is_meta,
    ]
    expected = [cell.dtype, cell.shape, cell.trainable, cell.memory.is_meta]
    if not tensor.is_meta:
        grad = tensor.grad
        seen += [
            tensor.flatten().tolist(),
            None if grad is None else grad.flatten().tolist(),
        ]
        expected += [cell.read(), cell.gradient]
    # NB: as text, because NaN is not equal to itself.
    assert repr(seen) == repr(expected), f"{name}: {seen}, not {expected}"


def _overlapping(model: Model) -> set[tuple[Slot, Slot]]:
    return {
        (a, b)
        for a, one in model.cells.items()
        for b, other in model.cells.items()
        if one.memory is other.memory and set(one.places) & set(other.places)
    }


def _fill(of: Trained, names: list[str]) -> None:
    """Initialize what to_empty did not."""
    tensors = dict(named_tensors(of.module))
    for i, name in enumerate(names):
        with torch.no_grad():
            tensors[name].fill_(i + 1)
        cell = of.model.cells[of.model.names[name]]
        cell.write([i + 1] * len(cell.places))


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and is_float(a.dtype) == is_float(b.dtype)


def _place(tensor: Tensor) -> tuple[int, int]:
    return _storage(tensor), int(tensor.storage_offset())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
