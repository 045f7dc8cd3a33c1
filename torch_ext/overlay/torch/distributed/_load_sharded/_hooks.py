"""The hooks of ``fully_shard`` and ``checkpoint_wrapper``, which need not run in the middle of a load.

Law: the parameters are sharded before the load, and FSDP knows their memory after it, as if its hooks had run; but no
one has to stop, and keep what was overwritten, for hooks that look at nothing but this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn import Module


_OF_FSDP = "torch.distributed.fsdp._fully_shard."
_OF_CHECKPOINT = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"


class FSDPHooks:
    """Those of ``module`` and all below it.

    Attributes:
        params: the sharded parameters
        param_ids: their ``id``
    """

    def __init__(self, module: Module) -> None:
        self._modules = list(module.modules())
        self._after: list[Callable[..., Any]] = []
        self.params: list[DTensor] = []
        self._on_cpu: set[int] = set()
        self._checkpointed: set[int] = set()
        for child in self._modules:
            for param in _params_of(child):
                self.params.append(param.sharded_param)
                if param.offload_to_cpu:
                    self._on_cpu.add(id(param.sharded_param))
        self.param_ids = set(map(id, self.params))

    def device_of(self, whole: DTensor) -> torch.device:
        """Where the memory of a DTensor on meta is to be."""
        if not whole._local_tensor.is_meta:
            return whole._local_tensor.device
        kind = "cpu" if id(whole) in self._on_cpu else whole.device_mesh.device_type
        return torch.empty(0, device=kind).device

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Context in which the parameters are sharded, and the hooks do not run."""
        taken = []
        try:
            for child in self._modules:
                for hooks in (
                    child._load_state_dict_pre_hooks,
                    child._load_state_dict_post_hooks,
                ):
                    own = {key: hook for key, hook in hooks.items() if _is_own(hook)}
                    if own:
                        taken.append((hooks, hooks.copy()))
                    for key, hook in own.items():
                        del hooks[key]
                        if hooks is child._load_state_dict_post_hooks:
                            self._after.append(hook)
                        elif _origin(hook) == _OF_CHECKPOINT:
                            self._checkpointed.add(id(child))
                        else:
                            hook()
            yield
        finally:
            for hooks, before in taken:
                _put_back(hooks, before)

    def rename(self, module: Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Rename keys as the pre-hook of ``checkpoint_wrapper`` does."""
        if id(module) in self._checkpointed:
            wrapper = sys.modules[_OF_CHECKPOINT]
            inner = prefix + wrapper._CHECKPOINT_PREFIX
            wrapper._replace_by_prefix(state_dict, prefix, inner)

    def run_after(self) -> None:
        """Run those that run after a load."""
        for hook in self._after:
            hook()


def _params_of(module: Module) -> Iterator[Any]:
    fsdp = sys.modules.get(f"{_OF_FSDP}_fsdp_state")
    state = None if fsdp is None else fsdp._get_module_fsdp_state(module)
    if state is not None:
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:
            if group is not None:
                yield from group.fsdp_params


def _origin(hook: Any) -> str:
    function = getattr(hook, "hook", hook)  # what _WrappedHook wraps
    return str(getattr(function, "__module__", ""))


def _is_own(hook: Any) -> bool:
    origin = _origin(hook)
    return origin.startswith(_OF_FSDP) or origin == _OF_CHECKPOINT


def _put_back(hooks: dict[int, Any], before: dict[int, Any]) -> None:
    """Where they were, while others may have come and gone."""
    now = dict(hooks)
    hooks.clear()
    hooks.update({k: h for k, h in before.items() if k in now or _is_own(h)})
    hooks.update(now)
