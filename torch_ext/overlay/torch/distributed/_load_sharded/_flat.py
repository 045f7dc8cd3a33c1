"""Parameters of FSDP1 (``FullyShardedDataParallel``), which lie in flat parameters of which each rank has a range.

Law: what a load into the unsharded parameters would leave in this rank's range. So each rank takes of each full tensor
the flat range that its own range has of it; nothing is gathered, and padding stays as it is.

What this does not do: other state dicts than ``FULL_STATE_DICT``, parameters in ``summon_full_params``, and those that
an extension sharded before are left to FSDP1's own hooks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module


class FlatPart(Tensor):
    """Stands for a full parameter while its module is loaded: has its shape, and no data.

    Attributes:
        local: the part that this rank has, flat
        start: where it begins in the flattened parameter
    """

    local: Tensor
    start: int

    @staticmethod
    def of(shape: torch.Size, local: Tensor, start: int) -> FlatPart:
        """Returns one of a full shape."""
        full = torch.empty(shape, dtype=local.dtype, device="meta")
        part: FlatPart = full.as_subclass(FlatPart)
        part.local, part.start = local, start
        return part

    def part_of(self, full: Tensor) -> Tensor:
        """What of a tensor of this shape goes into ``local``; a view if that can be."""
        start, end = self.start, self.start + self.local.numel()
        full = full.detach()
        if not full.dim():
            return full.reshape(1)[start:end]
        row = max(full[:1].numel(), 1)
        first = start // row
        # NB: of a tensor with gaps only these rows are copied.
        rows = full[first : -(-end // row)].reshape(-1)
        return rows[start - first * row : end - first * row]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Nothing of its own; that there is one says that this is no plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class FlatParts:
    """The flat parameters of ``module`` and all below it.

    Attributes:
        groups: the ranks of each of their process groups
    """

    def __init__(self, module: Module) -> None:
        self._wrappers: dict[int, Any] = {}
        self.groups: set[tuple[int, ...]] = set()
        fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
        if fsdp is None:
            return
        for child in module.modules():
            if isinstance(child, fsdp.FullyShardedDataParallel):
                self._add(child)

    def _add(self, wrapper: Any) -> None:
        from torch.distributed import get_process_group_ranks
        from torch.distributed.fsdp.api import ShardingStrategy, StateDictType

        for name in ("process_group", "_inter_node_pg"):
            group = getattr(wrapper, name, None)
            if group is not None:
                self.groups.add(tuple(sorted(get_process_group_ranks(group))))
        is_full = wrapper._state_dict_type is StateDictType.FULL_STATE_DICT
        if not is_full and wrapper.sharding_strategy is not ShardingStrategy.NO_SHARD:
            return
        if wrapper._handle is None or _is_ordinary(wrapper._handle):
            self._wrappers[id(wrapper)] = wrapper

    def rename(self, module: Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Rename keys as FSDP1's pre-hook does."""
        if id(module) in self._wrappers:
            from torch.distributed.fsdp._common_utils import FSDP_PREFIX
            from torch.distributed.utils import _replace_by_prefix

            _replace_by_prefix(state_dict, prefix, prefix + FSDP_PREFIX)

    def clean(self, key: str) -> str:
        """As FSDP1's post-hook."""
        if not self._wrappers:
            return key
        from torch.distributed.fsdp._common_utils import clean_tensor_name

        return clean_tensor_name(key)

    @contextmanager
    def unfolded(self) -> Iterator[None]:
        """Context in which a :class:`FlatPart` is where each parameter was, and FSDP1's hooks do not run."""
        with ExitStack() as stack:
            for wrapper in self._wrappers.values():
                from torch.distributed.fsdp._runtime_utils import _lazy_init

                _lazy_init(wrapper, wrapper)
                stack.enter_context(_without_hooks(wrapper))
                if wrapper._handle is not None:
                    stack.enter_context(_unfolded(wrapper, wrapper._handle))
            yield


def _is_ordinary(handle: Any) -> bool:
    from torch.distributed.fsdp._common_utils import HandleTrainingState

    return (
        handle._training_state is HandleTrainingState.IDLE
        and all(ext is None for ext in handle.flat_param._param_extensions)
        and not handle.flat_param.is_meta
    )


@contextmanager
def _without_hooks(wrapper: Any) -> Iterator[None]:
    from torch.distributed.fsdp import _state_dict_utils as fsdp

    own = {fsdp._pre_load_state_dict_hook, fsdp._post_load_state_dict_hook}
    taken = []
    for hooks in (
        wrapper._load_state_dict_pre_hooks,
        wrapper._load_state_dict_post_hooks,
    ):
        taken.append((hooks, hooks.copy()))
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in own:
                del hooks[key]
    try:
        yield
    finally:
        for hooks, before in taken:
            hooks.update(before)


@contextmanager
def _unfolded(wrapper: Any, handle: Any) -> Iterator[None]:
    from torch.distributed.fsdp._runtime_utils import _reshard
    from torch.distributed.fsdp._unshard_param_utils import FLAT_PARAM

    if not handle.uses_sharded_strategy and handle._use_orig_params:
        yield  # each parameter is all there
        return
    if handle.uses_sharded_strategy and not handle.needs_unshard():
        _reshard(wrapper, handle, True)
    own = wrapper._fsdp_wrapped_module._parameters
    flat = own.pop(FLAT_PARAM, None)
    before: list[tuple[dict[str, Any], str, Any]] = []
    for module, name, part in _parts(handle.flat_param):
        parameters: dict[str, Any] = module._parameters
        before.append((parameters, name, parameters.get(name)))
        parameters[name] = part
    try:
        yield
    finally:
        for parameters, name, param in before:
            if param is None:
                parameters.pop(name, None)
            else:
                parameters[name] = param
        if flat is not None:
            own[FLAT_PARAM] = flat


def _parts(flat: Any) -> Iterator[tuple[Module, str, FlatPart]]:
    shard = flat._local_shard.detach()
    parts = {}
    for info, shape, at in zip(
        flat._param_infos, flat._shapes, flat._shard_param_infos, strict=True
    ):
        local, start = shard[:0], 0
        if at.in_shard:
            local = shard.narrow(0, at.offset_in_shard, at.numel_in_shard)
            start = at.intra_param_start_idx
        part = parts[info.module, info.param_name] = FlatPart.of(shape, local, start)
        yield info.module, info.param_name, part
    for tied in flat._shared_param_infos:
        part = parts[tied.prim_module, tied.prim_param_name]
        yield tied.module, tied.param_name, part
