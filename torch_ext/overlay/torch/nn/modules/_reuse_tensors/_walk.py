"""``Module.load_state_dict``'s walk over modules and keys, in linear time.

Keys are dealt out to the children level by level instead of being filtered for each
child. A module with nothing out of the ordinary is planned; for any other (a pre-hook,
an override, an odd tensor, an error) its own ``_load_from_state_dict`` runs, watched by
the journal, on the very dict that ``Module.load_state_dict`` would give it. So each
error text is upstream's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules._reuse_tensors._journal import Journal
from torch.nn.modules._reuse_tensors._plan import Move, Plan
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX


class Walk:
    """What was found on the way.

    ``post_hooks`` has each module with some, and how many missing and unexpected keys
    were known when upstream would have called them.
    """

    def __init__(
        self, plan: Plan, journal: Journal, state_dict: Mapping[str, Any]
    ) -> None:
        self.missing_keys: list[str] = []
        self.unexpected_keys: list[str] = []
        self.error_msgs: list[str] = []
        self.post_hooks: list[tuple[Module, int, int]] = []
        self._plan = plan
        self._journal = journal
        self._is_stock_type: dict[type, bool] = {}
        # NB: hooks and overrides may edit this one; the caller's stays as it is.
        self._state_dict: OrderedDict[str, Any] = OrderedDict(state_dict)
        metadata = getattr(state_dict, "_metadata", None)
        self._has_metadata = metadata is not None
        self._metadata: Mapping[str, dict[str, Any]] = metadata or {}
        self._metadata_is_ours = False

    def run(self, module: Module) -> None:
        """Plan the load of ``module`` and its children, or do it in part."""
        self._visit(module, "", self._state_dict, list(self._state_dict))

    def _visit(
        self, module: Module, prefix: str, state_dict: dict[str, Any], keys: list[str]
    ) -> None:
        by_child, own = _deal(keys, len(prefix)) if module._modules else ({}, keys)
        if not self._plan_module(module, prefix, state_dict, keys, own, by_child):
            if prefix:
                state_dict = {key: state_dict[key] for key in keys}
            self._run_module(module, prefix, state_dict)
            keys = [key for key in state_dict if key.startswith(prefix)]
            by_child, own = _deal(keys, len(prefix))
        for name, child in module._modules.items():
            if child is not None:
                child_prefix = f"{prefix}{name}."
                child_keys = by_child.get(name, [])
                if "." in name:  # possible only by writing to _modules
                    child_keys = [key for key in keys if key.startswith(child_prefix)]
                self._visit(child, child_prefix, state_dict, child_keys)
        if module._load_state_dict_post_hooks:
            known = (len(self.missing_keys), len(self.unexpected_keys))
            self.post_hooks.append((module, *known))

    def _plan_module(
        self,
        module: Module,
        prefix: str,
        state_dict: Mapping[str, Any],
        keys: list[str],
        own: list[str],
        by_child: Mapping[str, list[str]],
    ) -> bool:
        """Plan the tensors of this module; false, and no trace, if it has to load itself."""
        if module._load_state_dict_pre_hooks or not self._loads_as_stock(module):
            return False
        moves: list[Move] = []
        missing: list[tuple[str, Tensor]] = []
        for name, tensor in _persistent(module).items():
            key = prefix + name
            if tensor is None:
                continue
            if key not in state_dict:
                missing.append((key, tensor))
                continue
            move = self._plan.propose(key, tensor, state_dict[key])
            if move is None:
                return False
            moves.append(move)
        children = module._modules
        if len(moves) < len(own) or any(name not in children for name in by_child):
            if prefix + _EXTRA_STATE_KEY_SUFFIX in state_dict:
                return False
            self.unexpected_keys += _unexpected(module, prefix, keys)
        self._plan.add(moves)
        for key, tensor in missing:
            self.missing_keys.append(key)
            self._plan.leave(key, tensor)
        if module._non_persistent_buffers_set:
            for name, tensor in module._buffers.items():
                if tensor is not None and name in module._non_persistent_buffers_set:
                    self._plan.leave(prefix + name, tensor)
        return True

    def _loads_as_stock(self, module: Module) -> bool:
        cls = type(module)
        stock = self._is_stock_type.get(cls)
        if stock is None:
            stock = self._is_stock_type[cls] = (
                cls._load_from_state_dict is Module._load_from_state_dict
                and cls.set_extra_state is Module.set_extra_state
                and not issubclass(cls, torch.jit.ScriptModule)
            )
        return stock and "_load_from_state_dict" not in module.__dict__

    def _run_module(
        self, module: Module, prefix: str, state_dict: dict[str, Any]
    ) -> None:
        """Let the module load itself, at once but undoably."""
        own, errors = _own(module), len(self.error_msgs)
        # NB: TorchScript refers to the TensorImpl, so tell it when that was exchanged.
        is_script = isinstance(module, torch.jit.ScriptModule)
        if is_script:
            self._journal.undo.append((_set_own, (own,)))
        with self._journal.loading(module, prefix, state_dict):
            module._load_from_state_dict(
                state_dict,
                prefix,
                self._metadata_of(prefix),
                True,
                self.missing_keys,
                self.unexpected_keys,
                self.error_msgs,
            )
        if is_script:
            _set_own(own)
        persistent = _persistent(module)
        for _, name, tensor in _own(module):
            key = prefix + name
            self._plan.leave(key, tensor)
            if name in persistent and key in state_dict:
                self._plan.loaded.append((key, tensor, state_dict[key]))
                if tensor.is_meta and len(self.error_msgs) == errors:
                    self._plan.not_loaded.append(key)

    def _metadata_of(self, prefix: str) -> dict[str, Any]:
        if not self._metadata_is_ours:
            self._metadata_is_ours = True
            self._metadata = OrderedDict(
                (key, dict(value)) for key, value in self._metadata.items()
            )
            if self._has_metadata:
                self._state_dict._metadata = self._metadata  # type: ignore[attr-defined]
        metadata = self._metadata.get(prefix[:-1], {})
        # NB: an earlier assign=True load leaves this in the metadata (pytorch #188166).
        metadata.pop("assign_to_params_buffers", None)
        return metadata


def _own(module: Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    return [
        (tensors, name, tensor)
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]


def _set_own(own: list[tuple[dict[str, Any], str, Tensor]]) -> None:
    for tensors, name, tensor in own:
        tensors[name] = tensor


def _persistent(module: Module) -> Mapping[str, Tensor | None]:
    if not module._buffers:
        return module._parameters
    skip = module._non_persistent_buffers_set
    buffers = {name: t for name, t in module._buffers.items() if name not in skip}
    return {**module._parameters, **buffers}


def _deal(keys: list[str], n: int) -> tuple[dict[str, list[str]], list[str]]:
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


def _unexpected(module: Module, prefix: str, keys: list[str]) -> Iterator[str]:
    expected = {name for name, t in _persistent(module).items() if t is not None}
    for key in keys:
        name, dot, _ = key[len(prefix) :].partition(".")
        if name not in (module._modules if dot else expected):
            yield key
