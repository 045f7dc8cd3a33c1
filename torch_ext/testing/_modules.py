"""Recipes for modules in use, and strategies that draw them.

The law: ``recipe.build(seed)`` makes the same module, bit for bit, each time, so that one can be loaded one way and
its twin another; and the twin on another device has the same names, ties and hooks. The global random state stays as
it was. What a recipe does not have: forward passes (its ties and values make no sense to a network).
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import hypothesis.strategies as st
import torch
from torch import nn, Tensor

from torch_ext.testing._kinds import KINDS


Tree: TypeAlias = tuple["str | Tree", ...]

HOOKS = ("grad", "accumulated")
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.5, momentum=0.5),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.5),
}


@dataclass(frozen=True)
class Tie:
    """Let what is called ``target`` be, or lie in, what is called ``source``.

    ``how`` is ``"same"`` (the very object, under both names), ``"memory"`` (another object over all of its memory),
    ``"part"`` (another object over a part of its memory) or ``"module"`` (the same module under two names).
    """

    how: str
    target: str
    source: str


@dataclass
class Subject:
    """A module and those who refer to it.

    Attributes:
        module: the module.
        optimizer: over all of its parameters, or None.
        held: the tensors that it was built with, by name, as a user's own references.
        calls: what its hooks appended, in order.
        weak: weak references to the tensors, if the recipe has some.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    held: dict[str, Tensor] = field(default_factory=dict)
    calls: list[object] = field(default_factory=list)
    weak: list["weakref.ref[Tensor]"] = field(default_factory=list)

    def use(self) -> None:
        """A training step, whose loss is the sum of what is trainable and not on meta; tells whether hooks fire.

        Example::

            >>> subject = Recipe(("linear",), optimizer="sgd").build()
            >>> before = subject.module[0].bias.detach().clone()
            >>> subject.use()
            >>> subject.module[0].bias - before
            tensor([-0.5000, -0.5000], grad_fn=<SubBackward0>)
        """
        self.module.zero_grad()
        terms = [
            p.double().sum()
            for p in self.module.parameters()
            if p.requires_grad and not p.is_meta
        ]
        if terms:
            torch.stack(terms).sum().backward()
        if self.optimizer is not None:
            self.optimizer.step()


@dataclass(frozen=True)
class Recipe:
    """How to build a module; the ``repr`` of one is the code to build it again.

    Attributes:
        tree: names of :data:`KINDS`, nested as the ``nn.Sequential`` that it describes.
        meta: children of the root that are built under ``torch.device("meta")``.
        casts: (child of the root, dtype): its floating-point tensors have this dtype.
        ties: applied in order.
        frozen: names of parameters that require no grad.
        hooks: (one of ``HOOKS``, name of a parameter): ``register_hook`` or ``register_post_accumulate_grad_hook``.
        marked: names of tensors with an attribute of their own.
        post_hooks: names of modules with a post-hook of ``load_state_dict``, which notes the missing keys.
        weak: whether all tensors are referred to weakly.
        optimizer: None or one of ``OPTIMIZERS``.
        steps: training steps that were taken, so that there are gradients and the optimizer has state.

    Example::

        >>> recipe = Recipe(("linear", ("norm",)), ties=(Tie("memory", "1.0.weight", "0.bias"),))
        >>> module = recipe.build().module
        >>> module[1][0].weight.data_ptr() == module[0].bias.data_ptr()
        True
        >>> recipe
        Recipe(tree=('linear', ('norm',)), ties=(Tie(how='memory', target='1.0.weight', source='0.bias'),))
    """

    tree: Tree
    meta: tuple[int, ...] = ()
    casts: tuple[tuple[int, torch.dtype], ...] = ()
    ties: tuple[Tie, ...] = ()
    frozen: tuple[str, ...] = ()
    hooks: tuple[tuple[str, str], ...] = ()
    marked: tuple[str, ...] = ()
    post_hooks: tuple[str, ...] = ()
    weak: bool = False
    optimizer: str | None = None
    steps: int = 0

    def __repr__(self) -> str:
        told = (f for f in fields(self) if getattr(self, f.name) != f.default)
        listed = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in told)
        return f"Recipe({listed})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # what hypothesis shows

    def on(self, device: str) -> "Recipe":
        """The twin all on ``"cpu"`` or all on ``"meta"``, where no step can have been taken."""
        if device == "cpu":
            return replace(self, meta=())
        return replace(self, meta=tuple(range(len(self.tree))), steps=0)

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds that occur in it."""
        return frozenset(_leaves(self.tree))

    def build(self, seed: int = 0) -> Subject:
        """The module, with values that depend on ``seed`` alone, and those who refer to it."""
        module = nn.Sequential()
        with torch.random.fork_rng(devices=[]):
            for i, entry in enumerate(self.tree):
                torch.manual_seed(seed)
                with torch.device("meta" if i in self.meta else "cpu"):
                    module.append(_plant(entry))
        for i, dtype in self.casts:
            _cast(module[i], dtype)
        for tie in self.ties:
            _tie(module, tie)
        for i, (_, tensor) in enumerate(named_tensors(module)):
            _fill(tensor, 1000 * seed + i)
        return self._put_to_use(module)

    def _put_to_use(self, module: nn.Module) -> Subject:
        subject = Subject(module, held=dict(named_tensors(module)))
        for name in self.frozen:
            subject.held[name].requires_grad_(False)
        for how, name in self.hooks:
            _hook(subject, how, name)
        for name in self.marked:
            subject.held[name].mark = name  # type: ignore[attr-defined]
        for name in self.post_hooks:
            note = _noting(subject.calls, name)
            module.get_submodule(name).register_load_state_dict_post_hook(note)
        if self.weak:
            subject.weak = [weakref.ref(tensor) for tensor in subject.held.values()]
        if self.optimizer is not None:
            group = {"params": list(module.parameters())}  # there may be none
            subject.optimizer = OPTIMIZERS[self.optimizer]([group])
        for _ in range(self.steps):
            subject.use()
        return subject


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers with each name that they have, non-persistent buffers included.

    Example::

        >>> [name for name, _ in named_tensors(torch.nn.BatchNorm1d(2))]
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    for prefix, child in module.named_modules(remove_duplicate=False):
        for own in (child._parameters, child._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    yield f"{prefix}.{name}" if prefix else name, tensor


def _leaves(tree: Tree) -> Iterator[str]:
    for entry in tree:
        yield from (entry,) if isinstance(entry, str) else _leaves(entry)


def _plant(entry: str | Tree) -> nn.Module:
    if isinstance(entry, str):
        return KINDS[entry]()
    return nn.Sequential(*map(_plant, entry))


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    # NB: module.to(dtype) would make complex tensors real.
    module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    prefix, _, last = name.rpartition(".")
    return module.get_submodule(prefix), last


def _tie(module: nn.Module, tie: Tie) -> None:
    owner, name = _owner(module, tie.target)
    if tie.how == "module":
        owner._modules[name] = module.get_submodule(tie.source)
        return
    held = dict(named_tensors(module))
    source, is_parameter = held[tie.source], name in owner._parameters
    if tie.how != "same" or isinstance(source, nn.Parameter) != is_parameter:
        memory = source.detach()
        if tie.how == "part" and memory.dim():
            memory = memory[memory.shape[0] // 2 :]
        grad = memory.is_floating_point()
        source = nn.Parameter(memory, requires_grad=grad) if is_parameter else memory
    setattr(owner, name, source)


def _fill(tensor: Tensor, seed: int) -> None:
    """Values that an initialization would not happen to give; some are no numbers."""
    if tensor.is_meta:
        return
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-9, 9, tensor.shape, generator=random)
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            values = numbers.to(tensor.dtype) / 8
            values[numbers == 8] = float("nan")
            values[numbers == -9] = -0.0
            tensor.copy_(values)
        else:
            tensor.copy_(numbers.abs())


def _hook(subject: Subject, how: str, name: str) -> None:
    tensor, calls = subject.held[name], subject.calls
    if not tensor.requires_grad:
        return
    if how == "grad":

        def double(grad: Tensor) -> Tensor:
            calls.append((how, name))
            return grad * 2

        tensor.register_hook(double)
    else:
        tensor.register_post_accumulate_grad_hook(lambda _: calls.append((how, name)))


def _noting(calls: list[object], name: str) -> Callable[[nn.Module, Any], None]:
    def note(module: nn.Module, keys: Any) -> None:
        calls.append(("loaded", name, tuple(keys.missing_keys)))

    return note


@st.composite
def recipes(
    draw: st.DrawFn,
    *,
    kinds: Iterable[str] = tuple(KINDS),
    devices: Iterable[str] = ("cpu", "meta", "mixed"),
    in_use: bool = True,
) -> Recipe:
    """Recipes for nested modules that are tied in every way.

    Args:
        kinds: names of :data:`KINDS` to build them from.
        devices: one or more of ``"cpu"``, ``"meta"`` and ``"mixed"``.
        in_use: whether some have hooks, attributes, frozen parameters, weak references and optimizers.

    Example::

        >>> from hypothesis import given
        >>> @given(recipes(kinds=["linear", "lstm"], devices=["meta"]))
        ... def test(recipe):
        ...     assert all(p.is_meta for p in recipe.build().module.parameters())
        >>> test()
    """
    tree = draw(_trees(st.sampled_from(sorted(kinds))))
    device = draw(st.sampled_from(sorted(devices)))
    top = range(len(tree))
    meta = {"cpu": (), "meta": tuple(top), "mixed": draw(_some(top))}[device]
    dtype = st.sampled_from([torch.float64, torch.float16, torch.bfloat16])
    casts = tuple((i, draw(dtype)) for i in draw(_some(top)))
    recipe = Recipe(tree, meta, casts)
    recipe = replace(recipe, ties=draw(_ties(recipe)))
    if not in_use:
        return recipe
    module = recipe.on("meta").build().module
    parameters = [n for n, t in named_tensors(module) if isinstance(t, nn.Parameter)]
    optimizer = draw(st.none() | st.sampled_from(sorted(OPTIMIZERS)))
    return replace(
        recipe,
        frozen=draw(_some(parameters)),
        hooks=tuple((draw(st.sampled_from(HOOKS)), n) for n in draw(_some(parameters))),
        marked=draw(_some([name for name, _ in named_tensors(module)])),
        post_hooks=draw(_some([name for name, _ in module.named_modules()])),
        weak=draw(st.booleans()),
        optimizer=optimizer,
        steps=0 if meta else draw(st.integers(0, 2)),
    )


def modules(
    *,
    kinds: Iterable[str] = tuple(KINDS),
    devices: Iterable[str] = ("cpu", "meta", "mixed"),
) -> st.SearchStrategy[nn.Module]:
    """Modules as :func:`recipes` describes them, for tests that need no twin.

    Example::

        >>> from hypothesis import given
        >>> @given(modules(kinds=["norm"]))
        ... def test(module):
        ...     assert module.half() is module
        >>> test()
    """
    drawn = recipes(kinds=kinds, devices=devices)
    return st.builds(lambda recipe, seed: recipe.build(seed).module, drawn, _SEEDS)


_SEEDS = st.integers(0, 99)


def _trees(kinds: st.SearchStrategy[str]) -> st.SearchStrategy[Tree]:
    def level(entries: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.lists(entries, min_size=1, max_size=3).map(tuple)

    return st.recursive(level(kinds), lambda tree: level(kinds | tree), max_leaves=3)


def _some(values: Iterable[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    listed = list(values)
    if not listed:
        return st.just(())
    return st.lists(st.sampled_from(listed), max_size=3, unique=True).map(tuple)


@st.composite
def _ties(draw: st.DrawFn, recipe: Recipe) -> tuple[Tie, ...]:
    module = recipe.on("meta").build().module
    listed = list(named_tensors(module))
    drawn = []
    for _ in range(draw(st.integers(0, 3)) if listed else 0):
        how = draw(st.sampled_from(["same", "memory", "part"]))
        target, old = draw(st.sampled_from(listed))
        # NB: a parameter that is no floating point could not be trained.
        alike = [
            name
            for name, t in listed
            if t.is_floating_point() == old.is_floating_point()
        ]
        drawn.append(Tie(how, target, draw(st.sampled_from(alike))))
    if len(recipe.tree) > 1 and draw(st.booleans()):
        last = str(len(recipe.tree) - 1)
        drawn.append(Tie("module", last, "0"))
    return tuple(drawn)
