"""``load_state_dict(reuse_tensors=True)`` of a sharded module from full tensors: each rank takes its own part.

Law: the module is afterwards as after ``set_model_state_dict`` with ``full_state_dict=True``, but that its tensors,
and who refers to them, stay. No tensor is sent, none is gathered, and none is read but for the rank's part; if any rank
fails, none of them loads.

For DTensors (``fully_shard``, ``distribute_tensor``, ``parallelize_module``) and for ``FullyShardedDataParallel`` with
``FULL_STATE_DICT``. A DTensor of the state dict, of the same mesh and placements, goes to its like, part to part.

What this does not do: Partial placements, and DTensors of other placements, are left to ``DTensor.copy_``; parts of
FSDP1 that were sharded in another way before, to FSDP1. Hooks of others that look at a module while it loads see the
parts of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, ExitStack
from typing import Any

from torch import Tensor
from torch.distributed import errors
from torch.distributed._load_sharded._flat import FlatPart, FlatParts
from torch.distributed._load_sharded._hooks import FSDPHooks
from torch.distributed._load_sharded._part import part_of
from torch.distributed.tensor import DTensor, Partial
from torch.nn import Module
from torch.nn.modules._reuse_tensors._sharding import Shard


def sharding_of(module: Module) -> Sharding | None:
    """How ``module`` is sharded; ``None`` if it is not."""
    sharding = Sharding(module)
    return sharding if sharding.is_any else None


class Sharding:
    """See :class:`torch.nn.modules._reuse_tensors._sharding.Sharding`."""

    def __init__(self, module: Module) -> None:
        self._flat = FlatParts(module)
        self._hooks = FSDPHooks(module)
        tensors = [*module.parameters(), *module.buffers(), *self._hooks.params]
        meshes = {t.device_mesh for t in tensors if isinstance(t, DTensor)}
        groups = {tuple(sorted(mesh.mesh.flatten().tolist())) for mesh in meshes}
        groups |= self._flat.groups
        self.is_any = bool(groups)
        # NB: the largest first, so that smaller ones hear of its errors.
        self._groups = sorted(groups, key=lambda ranks: (-len(ranks), ranks))

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """See the protocol."""
        with ExitStack() as stack:
            stack.enter_context(self._hooks.held_back())
            stack.enter_context(self._flat.unfolded())
            yield

    def shard_of(self, whole: Tensor, source: Any) -> Shard | None:
        """See the protocol."""
        if not isinstance(source, Tensor) or whole.shape != source.shape:
            return None
        if isinstance(whole, FlatPart):
            if isinstance(source, DTensor):
                return None
            return Shard(whole, whole.local, whole.part_of(source), whole.local.device)
        if not isinstance(whole, DTensor):
            return None
        local = whole._local_tensor
        if isinstance(source, DTensor):
            same = (source.device_mesh, source.placements) == (
                whole.device_mesh,
                whole.placements,
            )
            part = source._local_tensor.detach() if same else None
        else:
            part = part_of(source, whole, id(whole) in self._hooks.param_ids)
        if part is None or part.shape != local.shape:
            return None
        return Shard(whole, local, part, self._hooks.device_of(whole))

    def check(self, whole: Tensor, source: Any) -> None:
        """See the protocol."""
        if isinstance(whole, DTensor) and not isinstance(source, DTensor):
            partial = any(isinstance(p, Partial) for p in whole.placements)
            got = "Partial" if partial else "another local shape"
            raise RuntimeError(
                f"Expected a DTensor whose placements are Shard or Replicate, got {got}: placements "
                f"{whole.placements}, local shape {tuple(whole._local_tensor.shape)}. (Did you mean to redistribute() "
                "it first?)"
            )
        if isinstance(whole, FlatPart):
            raise RuntimeError(
                f"Expected a tensor that converts to {whole.dtype} on {whole.local.device} for a parameter of "
                f"FullyShardedDataParallel, got {type(source).__name__} of {source.dtype}."
            )

    def local_of(self, tensor: Tensor) -> Tensor:
        """See the protocol."""
        if isinstance(tensor, FlatPart):
            return tensor.local
        return tensor._local_tensor if isinstance(tensor, DTensor) else tensor

    def over(self, whole: Tensor, local: Tensor) -> Tensor | None:
        """See the protocol."""
        if not isinstance(whole, DTensor) or whole.device == local.device:
            return None
        return DTensor(local, whole._spec, requires_grad=whole.requires_grad)

    def rename(self, module: Module, state_dict: dict[str, Any], prefix: str) -> None:
        """See the protocol."""
        self._hooks.rename(module, state_dict, prefix)
        self._flat.rename(module, state_dict, prefix)

    def clean(self, key: str) -> str:
        """See the protocol."""
        return self._flat.clean(key)

    def agree(self, error: BaseException | None = None) -> None:
        """See the protocol; once a load, since the ranks meet once."""
        groups, self._groups = self._groups, []
        # NB: in a context that holds several of them, the groups meet as one.
        for meeting in dict.fromkeys(map(errors._meeting_of, groups)):
            try:
                meeting.agree(error)
            except errors.RankError as failure:
                error = error or failure
        if isinstance(error, errors.RankError):
            raise error

    def finish(self) -> None:
        """See the protocol."""
        self._hooks.run_after()
