"""``Module.load_state_dict`` without new arguments, in linear time.

Law: every module is called with the arguments that it always was, state dicts included,
which have the same keys in the same order. But these are dealt out to all children at once,
where each child used to pick its own from all keys of its parent (pytorch #61398).

Modules are walked without recursion, so that they may be nested as deeply as before, and
whatever a child is, only what :meth:`torch.nn.Module.load_state_dict` always used of it has
to be there.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.modules import _around_load
from torch.nn.modules.module import _IncompatibleKeys, Module


def load(
    module: Module,
    state_dict: Mapping[str, Any],
    *,
    strict: bool,
    assign: bool,
    load_own: Callable[..., None],
) -> _IncompatibleKeys:
    """See :meth:`torch.nn.Module.load_state_dict`.

    Args:
        load_own: calls ``_load_from_state_dict`` of its first argument with the others. What that
            warns of is attributed to the file of its caller, so it has to be in the file in which
            it always was.
    """
    check_is_mapping(state_dict)
    walk = _CopyingWalk(getattr(state_dict, "_metadata", None), assign, load_own)
    local_state_dict: OrderedDict[str, Any] = OrderedDict(state_dict)
    if walk.metadata is not None:
        local_state_dict._metadata = walk.metadata  # type: ignore[attr-defined]
    with _around_load.around_load(module, state_dict, False):
        walk.visit_all(module, local_state_dict)
    raise_errors(module, walk.keys, walk.error_msgs, strict)
    return _IncompatibleKeys(*walk.keys)


def check_is_mapping(state_dict: object) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"Expected state_dict to be dict-like, got {type(state_dict)}.")


_Visit = tuple[Module, dict[str, Any], str]


class IndexedWalk(ABC):
    """Takes a module and all below it to the part of the state dict that is theirs."""

    def __init__(self) -> None:
        self.error_msgs: list[str] = []
        self._runs_of_others = 0

    @abstractmethod
    def load_own(self, module: Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Load what is in ``module`` and not in a child."""

    @abstractmethod
    def after(self, module: Module) -> None:
        """``module`` and its children are loaded."""

    def visit_all(self, module: Module, state_dict: dict[str, Any]) -> None:
        """Load ``module`` and its children, depth first."""
        visits = [self._visit(module, state_dict, "")]
        while visits:
            child = next(visits[-1], None)
            if child is None:
                visits.pop()
            elif len(visits) > sys.getrecursionlimit():  # a module below itself
                raise RecursionError("maximum recursion depth exceeded")
            else:
                visits.append(self._visit(*child))

    def _visit(
        self, module: Module, state_dict: dict[str, Any], prefix: str
    ) -> Iterator[_Visit]:
        """Load what is in ``module``, let its children be loaded, and then be through with it."""
        self.load_own(module, state_dict, prefix)
        others_have_it = not runs_torchs_own(module)
        self._runs_of_others += others_have_it
        dealt: _Dealt | None = None
        for name, child in module._modules.items():
            if child is None:
                continue
            if dealt is None or (
                others_have_it and dealt.runs_of_others != self._runs_of_others
            ):
                # NB: the hook or override may have kept the dict and changed it by now.
                if dealt is None or dealt.keys != list(state_dict):
                    dealt = _Dealt(state_dict, prefix)
                dealt.runs_of_others = self._runs_of_others
            child_prefix = prefix + name + "."
            keys = dealt.by_child.get(name, [])
            if "." in name:  # possible only by writing to _modules
                keys = [key for key in state_dict if key.startswith(child_prefix)]
            yield child, {key: state_dict[key] for key in keys}, child_prefix
        self.after(module)


class _CopyingWalk(IndexedWalk):
    def __init__(
        self,
        metadata: dict[str, Any] | None,
        assign: bool,
        load_own: Callable[..., None],
    ) -> None:
        super().__init__()
        self.metadata = metadata
        self.keys: tuple[list[str], list[str]] = ([], [])
        self._assign = assign
        self._load_own = load_own

    def load_own(self, module: Module, state_dict: dict[str, Any], prefix: str) -> None:
        metadata = {} if self.metadata is None else self.metadata.get(prefix[:-1], {})
        if self._assign:
            metadata["assign_to_params_buffers"] = self._assign
        self._load_own(
            module, state_dict, prefix, metadata, True, *self.keys, self.error_msgs
        )

    def after(self, module: Module) -> None:
        keys = _IncompatibleKeys(*self.keys)
        for hook in module._load_state_dict_post_hooks.values():
            check_post_hook(hook(module, keys))


class _Dealt:
    """``state_dict``'s ``keys`` as they are now, and those of each child."""

    def __init__(self, state_dict: dict[str, Any], prefix: str) -> None:
        self.keys = list(state_dict)
        self.by_child: dict[str, list[str]] = {}
        self.runs_of_others = 0
        n = len(prefix)
        for key in self.keys:
            if key.startswith(prefix) and (dot := key.find(".", n)) >= 0:
                self.by_child.setdefault(key[n:dot], []).append(key)


def runs_torchs_own(module: Module) -> bool:
    """Whether no code from elsewhere runs when the module is loaded."""
    cls = type(module)
    if not issubclass(cls, Module) or issubclass(cls, torch.jit.ScriptModule):
        return False
    loads = (cls._load_from_state_dict, cls.set_extra_state)
    return (
        not (module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks)
        and "_load_from_state_dict" not in module.__dict__
        and all(map(_is_torchs_own, loads))
    )


def _is_torchs_own(function: object) -> bool:
    # NB: a mock has no module, and what exec() makes may have None.
    return str(getattr(function, "__module__", None)).startswith("torch.nn.")


def check_post_hook(out: object) -> None:
    if out is not None:
        raise AssertionError(
            "Hooks registered with ``register_load_state_dict_post_hook`` are not "
            "expected to return new values, if incompatible_keys need to be modified, "
            "it should be done inplace."
        )


def raise_errors(
    module: Module,
    keys: tuple[list[str], list[str]],
    error_msgs: list[str],
    strict: bool,
) -> None:
    """All that is wrong, as one error."""
    errors = error_msgs[:]
    if strict:
        missing, unexpected = keys
        for which, listed in (("Unexpected", unexpected), ("Missing", missing)):
            if listed:
                quoted = ", ".join(f'"{key}"' for key in listed)
                errors.insert(0, f"{which} key(s) in state_dict: {quoted}. ")
    if errors:
        lines = "\n\t".join(errors)
        raise RuntimeError(
            f"Error(s) in loading state_dict for {module.__class__.__name__}:\n\t{lines}"
        )
