"""Optimizer state of full tensors, for parameters that are DTensors.

Law: after ``Optimizer.load_state_dict`` each rank has the part of each state that it has of the parameter, and the
next step is that of the unsharded optimizer. Nothing is sent: each rank is given all of the state dict, as it is by
``torch.load``, and of a tensor of ``torch.load(lazy=True)`` it reads its own part.

Not here: state of another shape than its parameter (Adafactor's rows and columns), which stays as it is, and FSDP1,
whose parameters are flat.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch.distributed.tensor import DTensor

__all__ = ["like_param"]


def like_param(param: torch.Tensor, value: torch.Tensor, key: Hashable) -> torch.Tensor:
    """Returns ``value`` sharded as ``param`` is, in memory of its own, or as it is if that cannot be.

    Args:
        param: a parameter of the optimizer
        value: of its state in the state dict
        key: the name of the value in that state
    """
    # NB: without it there are no DTensors, and torch.optim is not to import it.
    tensor_module = sys.modules.get("torch.distributed.tensor")
    if tensor_module is None or not isinstance(param, tensor_module.DTensor):
        return value
    # A step is a number for all of the parameter, also where that is a scalar.
    if (
        key == "step"
        or isinstance(value, tensor_module.DTensor)
        or value.shape != param.shape
    ):
        return value
    return _sharded(param, value)


def _sharded(param: DTensor, value: torch.Tensor) -> torch.Tensor:
    from torch.distributed._load_sharded._part import part_of
    from torch.distributed.tensor import DTensor

    local = param._local_tensor
    if local.is_meta or not _is_told_by_placements(param):
        return value
    part = part_of(value, param, False)
    if part is None or part.shape != local.shape:
        return value
    dtype = param.dtype if param.is_floating_point() else value.dtype
    with torch.no_grad():
        own = torch.empty_like(local, dtype=dtype, requires_grad=False).copy_(part)
    return DTensor.from_local(
        own,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def _is_told_by_placements(param: DTensor) -> bool:
    """Whether the placements tell which part a rank has, whoever made the DTensor."""
    from torch.distributed.tensor.placement_types import _StridedShard

    # Where sizes are uneven, fully_shard on top of tensor parallelism cuts otherwise than distribute_tensor does.
    mesh, placements = param.device_mesh, param.placements
    for strided in placements:
        if isinstance(strided, _StridedShard):
            counts = [
                mesh.size(i)
                for i, p in enumerate(placements)
                if getattr(p, "dim", None) == strided.dim
            ]
            if param.size(strided.dim) % torch.Size(counts).numel():
                return False
    return True
