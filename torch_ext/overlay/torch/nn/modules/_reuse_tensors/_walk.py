"""The walk over modules some of which have to load themselves.

A module with nothing out of the ordinary is planned; for any other (a pre-hook, an
override, an odd tensor, an error) its own ``_load_from_state_dict`` runs, watched by the
journal, on the very dict that ``Module.load_state_dict`` would give it. So each error
text is upstream's. Before code from elsewhere runs, all that is planned by then is done,
undoably; so it sees what it would see in a copying load.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules._load_state_dict import (
    check_post_hook,
    IndexedWalk,
    runs_torchs_own,
)
from torch.nn.modules._reuse_tensors._journal import Journal
from torch.nn.modules._reuse_tensors._plain import (
    persistent_of,
    rows_of,
    StockTypes,
)
from torch.nn.modules._reuse_tensors._plan import Plan
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX, _IncompatibleKeys


class Walk(IndexedWalk):
    """Loads what it has to, plans the rest, and notes the missing and unexpected keys."""

    def __init__(
        self,
        plan: Plan,
        journal: Journal,
        state_dict: Mapping[str, Any],
        metadata: Mapping[str, dict[str, Any]] | None,
        keys: _IncompatibleKeys,
    ) -> None:
        super().__init__()
        self._keys = keys
        self._plan = plan
        self._journal = journal
        self._is_stock_type = StockTypes()
        # NB: hooks and overrides may edit this one; the caller's stays as it is.
        self._state_dict: OrderedDict[str, Any] = OrderedDict(state_dict)
        self._has_metadata = metadata is not None
        self._metadata = metadata or {}
        self._metadata_is_ours = False

    def run(self, module: Module) -> None:
        """Plan the load of ``module`` and its children, or do it in part."""
        self.visit_all(module, self._state_dict)

    def load_own(self, module: Module, state_dict: dict[str, Any], prefix: str) -> None:
        if self._plan.sharding is not None:
            self._plan.sharding.rename(module, state_dict, prefix)
        if not self._plan_module(module, state_dict, prefix):
            self._run_module(module, state_dict, prefix)

    def after(self, module: Module) -> None:
        keys = _IncompatibleKeys(*self._keys)
        for hook in module._load_state_dict_post_hooks.values():
            self._journal.commit()
            with self._journal.watching(module):
                check_post_hook(hook(module, keys))

    def _plan_module(
        self, module: Module, state_dict: dict[str, Any], prefix: str
    ) -> bool:
        """Plan the tensors of this module; false, and no trace, if it has to load itself."""
        if prefix + _EXTRA_STATE_KEY_SUFFIX in state_dict:
            return False
        rows = rows_of(module, prefix, state_dict, self._is_stock_type, recurse=False)
        if rows is None or not self._plan.propose_all(rows):
            return False
        self._plan.add(rows)
        self._keys.missing_keys.extend(rows.missing)
        if module._modules or len(rows.keys) < len(state_dict):
            found = _unexpected(module, prefix, state_dict)
            self._keys.unexpected_keys.extend(found)
        return True

    def _run_module(
        self, module: Module, state_dict: dict[str, Any], prefix: str
    ) -> None:
        """Let the module load itself, undoably."""
        own = _own(module)
        is_torchs_own = runs_torchs_own(module)
        if not is_torchs_own:
            self._journal.commit()
        # NB: TorchScript refers to the TensorImpl, so tell it when that was exchanged.
        is_script = isinstance(module, torch.jit.ScriptModule)
        if is_script:
            self._journal.undo.append((_set_own, (own,)))
        with self._journal.loading(module, prefix, state_dict, plans=is_torchs_own):
            module._load_from_state_dict(
                state_dict,
                prefix,
                self._metadata_of(prefix),
                True,
                *self._keys,
                self.error_msgs,
            )
        if is_script:
            _set_own(own)
        persistent = _persistent(module)
        for _, name, tensor in _own(module):
            key = prefix + name
            plan = self._plan
            plan.left.append((key, plan.local_of(tensor), name in persistent))
            if name in persistent and key in state_dict:
                pair = plan.parts.get(id(tensor), (tensor, state_dict[key]))
                plan.keys.append(key)
                plan.targets.append(pair[0])
                plan.sources.append(pair[1])

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


def _persistent(module: Module) -> Mapping[str, Tensor | None]:
    return persistent_of(
        module._parameters, module._buffers, module._non_persistent_buffers_set
    )


def _set_own(own: list[tuple[dict[str, Any], str, Tensor]]) -> None:
    for tensors, name, tensor in own:
        tensors[name] = tensor


def _unexpected(
    module: Module, prefix: str, state_dict: dict[str, Any]
) -> Iterator[str]:
    expected = {name for name, t in _persistent(module).items() if t is not None}
    n, children = len(prefix), module._modules
    for key in state_dict:
        if key.startswith(prefix):
            name, dot, _ = key[n:].partition(".")
            if name not in (children if dot else expected):
                yield key
