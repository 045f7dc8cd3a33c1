"""Tensors on meta that are tied by their storage: share memory of the state dict as one.

Law: afterwards they are tied as they were, and each is as if it had been copied to, in
the order of the moves. That is so where the last source that fills all of their common
memory lies just as they do, and what comes after it would write what is there already.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules._reuse_tensors._memory import is_dense
from torch.nn.modules._reuse_tensors._plan import Move


def find_cover(group: list[Tensor], moves: list[Move]) -> Move | None:
    """The move whose source can become the memory of all of ``group``.

    Args:
        group: tensors that share a storage
        moves: those of them that are loaded, in this order
    """
    start = min(_start(tensor) for tensor in group)
    end = max(_end(tensor) for tensor in group)
    for i in reversed(range(len(moves))):
        target, source = moves[i].target, moves[i].source
        if not _is_alike(target, source):
            return None
        if (_start(target), _end(target)) == (start, end):
            later = all(_lies_alike(moves[i], move) for move in moves[i + 1 :])
            by = _start(source) - start
            fits = all((_start(t) + by) % t.itemsize == 0 for t in group)
            return moves[i] if later and fits and is_dense(target) else None
    return None


def views_like(group: list[Tensor], cover: Move) -> list[Tensor]:
    """Tensors over the memory of the cover's source, tied as ``group`` is."""
    storage = cover.source.untyped_storage()
    by = _start(cover.source) - _start(cover.target)
    return [
        torch.empty(0, dtype=t.dtype, device=cover.source.device).set_(
            storage, (_start(t) + by) // t.itemsize, t.size(), t.stride()
        )
        for t in group
    ]


def _is_alike(target: Tensor, source: Tensor) -> bool:
    return target.dtype is source.dtype and target.stride() == source.stride()


def _lies_alike(cover: Move, move: Move) -> bool:
    by = _start(move.target) - _start(cover.target)
    same_device = move.source.device == cover.source.device
    return same_device and move.source.data_ptr() - cover.source.data_ptr() == by


def _start(tensor: Tensor) -> int:
    """Offset of the first byte in the storage."""
    return int(tensor.storage_offset()) * tensor.itemsize


def _end(tensor: Tensor) -> int:
    """Offset of the byte after the last one in the storage."""
    if not tensor.numel():
        return _start(tensor)
    steps = zip(tensor.size(), tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return _start(tensor) + (last + 1) * tensor.itemsize
