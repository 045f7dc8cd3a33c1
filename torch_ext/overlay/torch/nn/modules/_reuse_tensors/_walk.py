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
from torch.nn.modules._reuse_tensors._plain import (
    persistent_of,
    plan_module,
    StockModules,
)
from torch.nn.modules._reuse_tensors._plan import Move, Plan, WRITE
from torch.nn.modules._reuse_tensors._stock import deal
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
        self._is_stock = StockModules()
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
        by_child, own = deal(keys, len(prefix)) if module._modules else ({}, keys)
        if not self._plan_module(module, prefix, state_dict, keys, own, by_child):
            if prefix:
                state_dict = {key: state_dict[key] for key in keys}
            self._run_module(module, prefix, state_dict)
            keys = [key for key in state_dict if key.startswith(prefix)]
            by_child, own = deal(keys, len(prefix))
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
        if (
            not self._is_stock(module, module.__dict__)
            or prefix + _EXTRA_STATE_KEY_SUFFIX in state_dict
        ):
            return False
        moves: list[Move] = []
        left: list[tuple[str, Tensor, bool]] = []
        if not plan_module(
            self._plan, module.__dict__, prefix, state_dict, moves, left
        ):
            return False
        self._plan.add(moves)
        self._plan.left += left
        self.missing_keys += [key for key, _, persistent in left if persistent]
        children = module._modules
        if len(moves) < len(own) or any(name not in children for name in by_child):
            self.unexpected_keys += _unexpected(module, prefix, keys)
        return True

    def _run_module(
        self, module: Module, prefix: str, state_dict: dict[str, Any]
    ) -> None:
        """Let the module load itself, at once but undoably."""
        own = _own(module)
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
            self._plan.left.append((key, tensor, name in persistent))
            if name in persistent and key in state_dict:
                self._plan.loaded.append(Move(key, tensor, state_dict[key], WRITE))

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


def _persistent(module: Module) -> dict[str, Tensor | None]:
    return persistent_of(
        module._parameters, module._buffers, module._non_persistent_buffers_set
    )


def _set_own(own: list[tuple[dict[str, Any], str, Tensor]]) -> None:
    for tensors, name, tensor in own:
        tensors[name] = tensor


def _unexpected(module: Module, prefix: str, keys: list[str]) -> Iterator[str]:
    expected = {name for name, t in _persistent(module).items() if t is not None}
    for key in keys:
        name, dot, _ = key[len(prefix) :].partition(".")
        if name not in (module._modules if dot else expected):
            yield key
