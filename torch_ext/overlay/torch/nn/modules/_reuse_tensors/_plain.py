"""Plan the load of modules in which no code but torch's own would run, in one pass.

Law: the plan, and what is reported, is that of :mod:`._walk`, which takes over wherever
a module has something of its own: a hook, an override, an odd tensor, an odd name; and
where a key of the state dict finds no tensor, since its order among the others is the
walk's business. Each key is looked up once, and no list of keys is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules._reuse_tensors._plan import Move, Plan
from torch.utils._swap_meta import undisturbed


def plan_plain(
    module: Module, state_dict: Mapping[str, Any]
) -> tuple[Plan, list[str]] | None:
    """Plan all of the load.

    Returns:
        The plan and the missing keys; ``None`` if this is not a case for it.
    """
    plan = Plan(module, state_dict)
    moves: list[Move] = []
    is_stock = StockModules()
    stack = [("", module)]
    with undisturbed():
        while stack:
            prefix, module = stack.pop()
            state = module.__dict__
            if not is_stock(module, state) or state["_load_state_dict_post_hooks"]:
                return None
            if not plan_module(plan, state, prefix, state_dict, moves, plan.left):
                return None
            if state["_modules"]:
                for name, child in reversed(state["_modules"].items()):
                    if "." in name:  # possible only by writing to _modules
                        return None
                    if child is not None:
                        stack.append((f"{prefix}{name}.", child))
    if len(moves) < len(state_dict):
        return None
    plan.add(moves)
    return plan, [key for key, _, persistent in plan.left if persistent]


def plan_module(
    plan: Plan,
    state: Mapping[str, Any],
    prefix: str,
    state_dict: Mapping[str, Any],
    moves: list[Move],
    left: list[tuple[str, Tensor, bool]],
) -> bool:
    """Add to ``moves`` and ``left`` a module's own tensors; false if one is odd.

    Args:
        state: the ``__dict__`` of the module
    """
    buffers, non_persistent = state["_buffers"], state["_non_persistent_buffers_set"]
    tensors = persistent_of(state["_parameters"], buffers, non_persistent)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        key = prefix + name
        if key in state_dict:
            move = plan.propose(key, tensor, state_dict[key])
            # NB: a name with a dot, possible only by writing to _parameters, could be
            # mistaken for another module's.
            if move is None or "." in name:
                return False
            moves.append(move)
        else:
            left.append((key, tensor, True))
    if buffers and non_persistent:
        for name, tensor in buffers.items():
            if tensor is not None and name in non_persistent:
                left.append((prefix + name, tensor, False))
    return True


class StockModules:
    """Tells which modules would run nothing but ``Module._load_from_state_dict``.

    Their ``__dict__`` is where their tensors and children are to be found; an attribute
    of a Module takes several times as long to get.
    """

    def __init__(self) -> None:
        self._is_stock_type: dict[type, bool] = {}

    def __call__(self, module: Module, state: Mapping[str, Any]) -> bool:
        cls = type(module)
        if cls not in self._is_stock_type:
            self._is_stock_type[cls] = (
                cls._load_from_state_dict is Module._load_from_state_dict
                and cls.set_extra_state is Module.set_extra_state
                and not issubclass(cls, torch.jit.ScriptModule)
                and not any(hasattr(cls, name) for name in _OWN)
            )
        return (
            self._is_stock_type[cls]
            and not state["_load_state_dict_pre_hooks"]
            and "_load_from_state_dict" not in state
        )


# What __init__ sets, and a subclass might have as properties.
_OWN = (
    "_parameters",
    "_buffers",
    "_non_persistent_buffers_set",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_modules",
)


def persistent_of(
    parameters: dict[str, Tensor | None],
    buffers: dict[str, Tensor | None],
    non_persistent: set[str],
) -> dict[str, Tensor | None]:
    """The parameters and those buffers that are in the state dict of their module."""
    if not buffers:
        return parameters
    persistent = {n: t for n, t in buffers.items() if n not in non_persistent}
    return {**parameters, **persistent}
