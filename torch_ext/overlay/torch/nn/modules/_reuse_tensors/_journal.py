"""Run code that is not ours (hooks, overrides) so that its effects can be undone.

While a journal is entered, ``copy_`` from the state dict to a tensor of the module is
done by the plan, which shares memory where it may; so every override of
``_load_from_state_dict`` that ends up in ``Module._load_from_state_dict`` just works.
Before anything else writes to a tensor of the module or takes a view of it, the tensor is
saved or gets memory of its own, so that the state dict is never written to.

What cannot be undone: what that code does outside of its module and the children of it,
in attributes of attributes, and in memory that is no parameter or buffer.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules._reuse_tensors._commit import (
    commit,
    do_now,
    materialize,
    Undo,
    unshare,
)
from torch.nn.modules._reuse_tensors._plan import Move, Plan, SHARE, tensors_of
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._swap_meta import undisturbed


class Journal:
    """What was changed so far, and how to undo it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.undo: Undo = []
        self._seen: set[int] = set()
        self._by_storage: dict[int, dict[int, Tensor]] = {}

    def watching(self, module: Module) -> _Watch:
        """Code of ``module`` runs in this context."""
        self._save_subtree(module)
        return _Watch(self, {}, {}, False)

    def loading(
        self, module: Module, prefix: str, state_dict: Mapping[str, Any], *, plans: bool
    ) -> _Watch:
        """``module._load_from_state_dict(state_dict, prefix, ...)`` runs in this context.

        Args:
            plans: whether what can be planned may wait for the commit.
        """
        self._save_subtree(module)
        self._save_extra_state(module)
        own = (module._parameters, module._buffers)
        keys = {id(t): prefix + n for d in own for n, t in d.items() if t is not None}
        return _Watch(self, keys, state_dict, plans)

    def commit(self) -> None:
        """Do what is planned so far, undoably, for code that looks at the outcome."""
        plan = self.plan
        moved = [plan.targets[i] for i in plan.alike.values()]
        moved += [move.target for move in plan.moves.values()]
        commit(plan, self.undo, back_up=True)
        # NB: a module that loads itself may be watched now. If it writes to one of
        # these, say by another name, the state dict must not see it.
        for tensor in moved:
            self._note_memory(tensor)

    def do_now(self, move: Move) -> None:
        """What the plan does here can be undone, and its memory is watched from now on."""
        do_now(self.plan, move, self.undo)
        self._note_memory(move.target)

    def materialize(self, tensor: Tensor, device: torch.device) -> None:
        """Give memory to a tensor on meta, for a ``copy_`` that cannot be planned."""
        materialize(self.plan, tensor, device, self.undo)
        for tied in self.plan.meta_ties().get(id(tensor), [tensor]):
            self._note_memory(tied)
            # NB: undone, it is on meta again; what is written to it need not be saved.
            self._seen.add(id(tied))

    def unshare(self, exposed: object) -> bool:
        """Let the module's tensors that lie in this memory of the state dict have their own.

        Returns:
            bool: whether there were some, other than ``exposed`` itself.
        """
        shared = [
            tensor
            for tensor in self._lying_in(exposed)
            if tensor is not exposed and self.plan.outcome.get(id(tensor)) is SHARE
        ]
        for tensor in shared:
            self._unshare(tensor)
        return bool(shared)

    def save(self, written: Tensor) -> None:
        """Before ``written`` is: save the module's tensors that lie in its memory, once."""
        for tensor in self._lying_in(written):
            self._unshare(tensor)
            if id(tensor) not in self._seen:
                self._seen.add(id(tensor))
                with undisturbed():
                    content = tensor.detach().clone()
                state = (tensor.data, content, tensor.requires_grad)
                self.undo.append((_restore_tensor, (tensor, *state)))

    def _unshare(self, tensor: Tensor) -> None:
        with undisturbed():
            unshare(self.plan, tensor, self.undo)
        self._note_memory(tensor)

    def _lying_in(self, memory: object) -> list[Tensor]:
        if not (isinstance(memory, Tensor) and torch._C._has_storage(memory)):
            return []
        with undisturbed():
            storage = memory.untyped_storage()._cdata
        return list(self._by_storage.get(storage, {}).values())

    def _note_memory(self, tensor: Tensor) -> None:
        if torch._C._has_storage(tensor):
            with undisturbed():
                storage = tensor.untyped_storage()._cdata
            self._by_storage.setdefault(storage, {})[id(tensor)] = tensor

    def _save_subtree(self, module: Module) -> None:
        self._by_storage = {}
        for child in Module.modules(module):
            if id(child) not in self._seen:
                self._seen.add(id(child))
                self._save_module(child)
        for tensor in tensors_of(module):
            self._note_memory(tensor)

    def _save_module(self, module: Module) -> None:
        state = module.__dict__.copy()
        contents = [
            (v, v.copy())
            for v in state.values()
            if type(v) in (dict, OrderedDict, set, list)
        ]
        self.undo.append((_restore_module, (module, type(module), state, contents)))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and is_lazy(tensor):
                self.undo.append((setattr, (tensor, "__class__", type(tensor))))

    def _save_extra_state(self, module: Module) -> None:
        cls = type(module)
        sets = cls.set_extra_state is not Module.set_extra_state
        if sets and cls.get_extra_state is not Module.get_extra_state:
            state = copy.deepcopy(module.get_extra_state())
            self.undo.append((module.set_extra_state, (state,)))


class _Watch(TorchFunctionMode):
    """``keys`` has, by ``id``, the state dict's key of each tensor that is loaded here."""

    def __init__(
        self,
        journal: Journal,
        keys: dict[int, str],
        state_dict: Mapping[str, Any],
        plans: bool,
    ) -> None:
        super().__init__()
        self.journal = journal
        self.keys = keys
        self.state_dict = state_dict
        self.plans = plans

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if args and id(args[0]) in self.keys:
            if getattr(func, "__self__", None) is Tensor.is_meta:
                # NB: Module._load_from_state_dict warns that copying to meta does
                # nothing. Here it does, and whoever asks is answered as if it had.
                return False
            if func is Tensor.copy_ and self._take(*args[:2]):
                return args[0]
            # Comes in place of copy_ if torch.__future__ asks for swap_tensors.
            if func is Tensor.module_load and self._take(*args[:2]):
                return args[0].detach()
        writes = _writes(func, kwargs)
        if writes or getattr(func, "__name__", "") in _EXPOSES:
            for tensor in _flat((*args, *kwargs.values())):
                self.journal.save(tensor)
        out = func(*args, **kwargs)
        if not writes:
            # NB: a view would let it write to the state dict; if so, take it again.
            exposed = [self.journal.unshare(tensor) for tensor in _flat((out,))]
            out = func(*args, **kwargs) if any(exposed) else out
        return out

    def _take(self, target: Tensor, source: Any) -> bool:
        """Let the plan do a ``copy_``; false if only a real one can tell whether it works."""
        key = self.keys[id(target)]
        journal = self.journal
        move = journal.plan.propose(key, target, source)
        if move is None:
            if journal.plan.sharding is not None:
                journal.plan.sharding.check(target, source)
            if self.plans:
                journal.commit()
            has_values = isinstance(source, Tensor) and not source.is_meta
            if has_values and target.is_meta and journal.plan.is_plain(target):
                journal.materialize(target, source.device)
            return False
        if self.state_dict.get(key) is not source:
            # NB: who else has this memory is not known.
            move.do_not_share()
        if self.plans:
            journal.plan.add_move(move)
        else:
            journal.do_now(move)
        return True


def _writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or "out" in kwargs or name in _WRITERS


_EXPOSES = {
    "numpy",
    "untyped_storage",
    "storage",
    "data_ptr",
    "__dlpack__",
    "__array__",
}
_INPLACE = "add sub mul truediv floordiv mod pow and or xor lshift rshift"
_WRITERS = {"__set__", "__setitem__", *(f"__i{op}__" for op in _INPLACE.split(" "))}


def _flat(values: tuple[Any, ...]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _flat(tuple(value))


def _restore_tensor(
    tensor: Tensor, data: Tensor, content: Tensor, requires_grad: bool
) -> None:
    tensor.data = data
    tensor.copy_(content)
    tensor.requires_grad_(requires_grad)


def _restore_module(
    module: Module,
    cls: type[Module],
    state: dict[str, Any],
    contents: list[tuple[Any, Any]],
) -> None:
    if type(module) is not cls:
        module.__class__ = cls
    for container, content in contents:
        container.clear()
        (container.extend if isinstance(container, list) else container.update)(content)
    module.__dict__.clear()
    module.__dict__.update(state)
