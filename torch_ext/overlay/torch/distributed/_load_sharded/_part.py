"""Which part of a full tensor a rank has of a DTensor.

Law: the part is what ``distribute_tensor`` gives the rank, as a view wherever it lies in one piece along each
dimension. Of a parameter that ``fully_shard`` has sharded on top of tensor parallelism it is what that gives the rank,
which may be another one where the sizes are uneven.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard, Placement


def part_of(full: Tensor, whole: DTensor, is_fsdp: bool) -> Tensor | None:
    """The part of ``full`` that this rank has of ``whole``.

    Args:
        full: of the shape of ``whole``; not read, unless the part is in pieces
        whole: the DTensor
        is_fsdp: whether ``fully_shard`` made it

    Returns:
        ``None`` where the placements do not tell.
    """
    mesh, placements = whole.device_mesh, whole.placements
    if not all(isinstance(p, (Shard, _StridedShard, Replicate)) for p in placements):
        return None
    # NB: a view that requires gradients would not be a leaf.
    part, coordinate = full.detach(), mesh.get_coordinate()
    if coordinate is None:
        return part.reshape(-1)[:0]
    if not any(isinstance(p, _StridedShard) for p in placements):
        size, start = compute_local_shape_and_global_offset(
            full.shape, mesh, placements
        )
        for dim in range(full.dim()):
            if size[dim] != full.size(dim):
                part = part.narrow(dim, start[dim], size[dim])
        return part
    for dim in range(full.dim()):
        steps: list[Step] = [
            (p, mesh.size(i), coordinate[i])
            for i, p in enumerate(placements)
            if isinstance(p, (Shard, _StridedShard)) and p.dim == dim
        ]
        if steps:
            part = _take(part, dim, _indices(full.size(dim), steps, is_fsdp))
    return part


Step = tuple[Placement, int, int]  # how, into how many parts, and which of them


def _indices(length: int, steps: list[Step], is_fsdp: bool) -> Tensor:
    """Which indices of a dimension this rank has."""
    indices = torch.arange(length, device="cpu")
    # NB: fully_shard comes after tensor parallelism, but stands before it in the mesh.
    for placement, count, which in reversed(steps) if is_fsdp else steps:
        along: Shard | _StridedShard = Shard(0)
        if isinstance(placement, _StridedShard) and not is_fsdp:
            along = _StridedShard(0, split_factor=placement.split_factor)
        parts, _ = along._split_tensor(
            indices, count, with_padding=False, contiguous=False
        )
        indices = parts[which]
    return indices


def _take(part: Tensor, dim: int, indices: Tensor) -> Tensor:
    if not len(indices):
        return part.narrow(dim, 0, 0)
    first, last = int(indices[0]), int(indices[-1])
    if last - first + 1 == len(indices):
        return part.narrow(dim, first, len(indices))
    return part.index_select(dim, indices.to(part.device))
