"""Plan the load of modules in which no code but torch's own would run, in one pass.

Law: the plan, and what is reported, is that of :mod:`._walk`, which takes over wherever
a module has something of its own: a hook, an override, an odd tensor, an odd name; and
where a key of the state dict finds no tensor, since its order among the others is the
walk's business. Each key is looked up once, and no list of keys is made.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules._reuse_tensors._plan import Plan, Rows
from torch.utils._swap_meta import undisturbed


def plan_plain(
    module: Module, state_dict: Mapping[str, Any]
) -> tuple[Plan, list[str]] | None:
    """Plan all of the load.

    Returns:
        The plan and the missing keys; ``None`` if this is not a case for it.
    """
    plan = Plan(module, state_dict)
    rows = rows_of(module, "", state_dict, StockTypes(), recurse=True)
    if rows is None or len(rows.keys) < len(state_dict):
        return None
    if rows.missing and not all(plan.is_plain(tensor) for _, tensor, _ in rows.left):
        return None
    with undisturbed():
        if not plan.propose_all(rows):
            return None
    plan.add(rows)
    return plan, rows.missing


def rows_of(
    module: Module,
    prefix: str,
    state_dict: Mapping[str, Any],
    is_stock_type: StockTypes,
    *,
    recurse: bool,
) -> Rows | None:
    """The tensors of ``module`` and what is loaded into them; ``None`` if it has to load itself.

    Args:
        recurse: whether those of its children, too; then no post-hook may have to run.
    """
    rows = Rows()
    add_key, add_target, add_source = (
        column.append for column in (rows.keys, rows.targets, rows.sources)
    )
    for own in _states(module, prefix, is_stock_type, recurse):
        if own is None:
            return None
        prefix, state = own
        tensors, buffers = state["_parameters"], state["_buffers"]
        if buffers:
            hidden = state["_non_persistent_buffers_set"]
            tensors = persistent_of(tensors, buffers, hidden)
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if "." in name:  # possible only by writing to _parameters
                return None
            key = prefix + name
            try:
                add_source(state_dict[key])
            except KeyError:
                rows.missing.append(key)
                rows.left.append((key, tensor, True))
            else:
                add_key(key)
                add_target(tensor)
        if buffers:
            left = ((n, t) for n, t in buffers.items() if t is not None and n in hidden)
            rows.left += [(prefix + n, t, False) for n, t in left]
    return rows


def _states(
    module: Module, prefix: str, is_stock_type: StockTypes, recurse: bool
) -> Iterator[tuple[str, dict[str, Any]] | None]:
    """The prefix and ``__dict__`` of each module; ``None`` for one that has to load itself."""
    # NB: each module is visited, so what it has is taken from where it is. An attribute
    # of a Module takes several times as long to get.
    deepest = sys.getrecursionlimit()
    stack = [(prefix, module)]
    while stack:
        prefix, module = stack.pop()
        state = module.__dict__
        if (
            not is_stock_type[type(module)]
            or state["_load_state_dict_pre_hooks"]
            or "_load_from_state_dict" in state
            or (recurse and state["_load_state_dict_post_hooks"])
        ):
            yield None
        yield prefix, state
        if recurse and state["_modules"]:
            if prefix.count(".") > deepest:  # a module below itself: let it raise
                yield None
            for name, child in reversed(state["_modules"].items()):
                if "." in name:  # possible only by writing to _modules
                    yield None
                if child is not None:
                    stack.append((f"{prefix}{name}.", child))


class StockTypes(dict[type, bool]):
    """Which classes of modules run nothing but ``Module._load_from_state_dict``.

    Their ``__dict__`` has their tensors and children.
    """

    def __missing__(self, cls: type[Module]) -> bool:
        self[cls] = (
            cls._load_from_state_dict is Module._load_from_state_dict
            and cls.set_extra_state is Module.set_extra_state
            and not issubclass(cls, torch.jit.ScriptModule)
            and not any(hasattr(cls, name) for name in _OWN)
        )
        return self[cls]


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
    parameters: Mapping[str, Tensor | None],
    buffers: Mapping[str, Tensor | None],
    non_persistent: set[str],
) -> Mapping[str, Tensor | None]:
    """The parameters and those buffers that are in the state dict of their module."""
    if not buffers:
        return parameters
    persistent = {n: t for n, t in buffers.items() if n not in non_persistent}
    return {**parameters, **persistent}
