"""``Module.load_state_dict`` without new arguments, in linear time.

Law: every module is called with the arguments that it always was, state dicts included,
which have the same keys in the same order. But these are dealt out to all children at once,
where each child used to pick its own from all keys of its parent (pytorch #61398).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch.nn import Module
from torch.nn.modules.module import _IncompatibleKeys


def load(
    module: Module, state_dict: Mapping[str, Any], *, strict: bool, assign: bool
) -> _IncompatibleKeys:
    """See :meth:`torch.nn.Module.load_state_dict`."""
    check_is_mapping(state_dict)
    job = _Load(getattr(state_dict, "_metadata", None), assign)
    local_state_dict: OrderedDict[str, Any] = OrderedDict(state_dict)
    if job.metadata is not None:
        local_state_dict._metadata = job.metadata  # type: ignore[attr-defined]
    job.visit(module, local_state_dict, "")
    raise_errors(module, job.keys, job.error_msgs, strict)
    return job.keys


def check_is_mapping(state_dict: object) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"Expected state_dict to be dict-like, got {type(state_dict)}.")


class _Load:
    def __init__(self, metadata: dict[str, Any] | None, assign: bool) -> None:
        self.metadata = metadata
        self.keys = _IncompatibleKeys([], [])
        self.error_msgs: list[str] = []
        self._assign = assign
        self._runs_of_others = 0

    def visit(self, module: Module, state_dict: dict[str, Any], prefix: str) -> None:
        metadata = {} if self.metadata is None else self.metadata.get(prefix[:-1], {})
        if self._assign:
            metadata["assign_to_params_buffers"] = self._assign
        module._load_from_state_dict(
            state_dict, prefix, metadata, True, *self.keys, self.error_msgs
        )
        self._runs_of_others += not _is_torchs_own(module)
        dealt: _Dealt | None = None
        for name, child in module._modules.items():
            if child is None:
                continue
            if dealt is None or dealt.runs_of_others != self._runs_of_others:
                # NB: a hook or override may have kept the dict and changed it by now.
                if dealt is None or dealt.keys != list(state_dict):
                    dealt = _Dealt(state_dict, prefix)
                dealt.runs_of_others = self._runs_of_others
            child_prefix = f"{prefix}{name}."
            keys = dealt.by_child.get(name, [])
            if "." in name:  # possible only by writing to _modules
                keys = [key for key in state_dict if key.startswith(child_prefix)]
            self.visit(child, {key: state_dict[key] for key in keys}, child_prefix)
        call_post_hooks(module, self.keys)


class _Dealt:
    """``state_dict`` ``keys`` as they were, and those of each child."""

    def __init__(self, state_dict: dict[str, Any], prefix: str) -> None:
        self.keys = list(state_dict)
        self.by_child, _ = deal(
            [key for key in self.keys if key.startswith(prefix)], len(prefix)
        )
        self.runs_of_others = 0


def _is_torchs_own(module: Module) -> bool:
    """Whether no code from elsewhere runs when the module is loaded."""
    cls = type(module)
    loads = (cls._load_from_state_dict, cls.set_extra_state)
    return (
        not (module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks)
        and "_load_from_state_dict" not in module.__dict__
        and all(f.__module__.startswith("torch.nn.") for f in loads)
    )


def deal(keys: list[str], n: int) -> tuple[dict[str, list[str]], list[str]]:
    """Split keys, less their first ``n`` characters, into each child's and the others."""
    by_child: dict[str, list[str]] = {}
    others: list[str] = []
    for key in keys:
        dot = key.find(".", n)
        if dot < 0:
            others.append(key)
        elif (name := key[n:dot]) in by_child:
            by_child[name].append(key)
        else:
            by_child[name] = [key]
    return by_child, others


def call_post_hooks(module: Module, keys: _IncompatibleKeys) -> None:
    """Call those of ``module``, which may change ``keys`` in place."""
    for hook in module._load_state_dict_post_hooks.values():
        check_post_hook(hook(module, keys))


def check_post_hook(out: object) -> None:
    if out is not None:
        raise AssertionError(
            "Hooks registered with ``register_load_state_dict_post_hook`` are not "
            "expected to return new values, if incompatible_keys need to be modified, "
            "it should be done inplace."
        )


def raise_errors(
    module: Module, keys: _IncompatibleKeys, error_msgs: list[str], strict: bool
) -> None:
    """All that is wrong, as one error."""
    errors = error_msgs[:]
    if strict:
        for which, listed in (
            ("Unexpected", keys.unexpected_keys),
            ("Missing", keys.missing_keys),
        ):
            if listed:
                quoted = ", ".join(f'"{key}"' for key in listed)
                errors.insert(0, f"{which} key(s) in state_dict: {quoted}. ")
    if errors:
        lines = "\n\t".join(errors)
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(module).__name__}:\n\t{lines}"
        )
