"""DTensors on meta: give one memory while it stays the same object, and know which part of what it is.

A DTensor is a shell around the tensor with this rank's part. :func:`follow_local` brings the shell to where its local
tensor is, by an exchange of impls as in ``_swap_meta.py``. :func:`distribute` and :func:`note_fsdp_shard` remember,
with the storage of a local tensor on meta and for as long as that lives, the whole tensor on meta that it was cut from
and the view of it that the rank has. Law: the values of the shard are those of that view.

Remembered are shards that ``distribute_tensor`` and ``fully_shard`` cut, also one from what the other cut, in whatever
order, even or not. Not remembered are those of ``DTensor.from_local`` and of ``redistribute``, explicit
``_StridedShard`` and ``Partial`` placements, and ranks outside of the mesh. Nothing here imports ``torch.distributed``
before the user does.
"""

import dataclasses
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.modules.module import Module
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._swap_meta import has_plain_keys, swap_all, undisturbed


if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


_NAME = "_part_of_whole"
_noting: ContextVar[bool] = ContextVar("distribute_tensor_is_noted", default=False)


class Part(NamedTuple):
    """What a shard was cut from: two tensors on meta, of which ``view`` is a view of ``whole``.

    ``cuts`` are the ``(dim, start, length)`` of the cuts, one after the other.
    """

    whole: Tensor
    view: Tensor
    cuts: tuple[tuple[int, int, int], ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that has the shape of the whole one."""
        for cut in self.cuts:
            tensor = tensor.narrow(*cut)
        return tensor

    def chunk(self, dim: int, chunks: int, index: int) -> "Part":
        """The part of this part that ``torch.chunk`` makes the ``index``-th; empty if it makes less."""
        size = self.view.size(dim)
        length = -(-size // chunks)
        start = min(index * length, size)
        cut = (dim, start, min(length, size - start))
        with undisturbed():
            return Part(self.whole, self.view.narrow(*cut), (*self.cuts, cut))


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """The tensor with this rank's part of a DTensor; any other tensor itself."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def follow_local(tensor: Any) -> Tensor:
    """Let ``tensor``, a DTensor, be on the device that its local tensor is on.

    Returns:
        Tensor: what :func:`~torch.utils._swap_meta.swap_all` exchanges it with to undo it.
    """
    shell: Tensor = shell_for(tensor, tensor._local_tensor)
    swap_all([tensor], [shell])
    return shell


def shell_for(tensor: Any, local: Tensor) -> Any:
    """A DTensor around ``local`` that is sharded as the DTensor ``tensor`` is."""
    spec = tensor._spec
    if spec.tensor_meta is not None and spec.tensor_meta.dtype != local.dtype:
        meta = spec.tensor_meta._replace(dtype=local.dtype)
        spec = dataclasses.replace(spec, tensor_meta=meta)
    return type(tensor)(local, spec, requires_grad=tensor.requires_grad)


def tell_fsdp(module: Module) -> None:
    """Let ``fully_shard`` take note that parameters of ``module`` were exchanged."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    if loaded is not None:
        for submodule in module.modules():
            if isinstance(submodule, loaded.FSDPModule):
                submodule._apply(_Nothing(), recurse=False)


class _Nothing:
    """For ``_apply``: what it does around it is done."""

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor

    def _apply_to_module(self, module: Module, recurse: bool) -> Module:
        return module


def part_of(tensor: Tensor) -> Part | None:
    """What ``tensor``, on meta, was cut from; None if that is not known."""
    try:
        local = local_of(tensor)
        note = local.untyped_storage().__dict__.get(_NAME)
        if isinstance(note, dict):
            with undisturbed():
                return _within_one_storage(local, note)
        part: Part | None = note
    except (NotImplementedError, RuntimeError):  # sparse, nested, wrapped ...
        return None
    return part


_Layout = tuple[int, torch.Size, tuple[int, ...]]


def _layout(tensor: Tensor) -> _Layout:
    return int(tensor.storage_offset()), tensor.size(), tensor.stride()


def _within_one_storage(local: Tensor, notes: dict[_Layout, Any]) -> Part | None:
    """The part of a tensor that lies in the storage of ``local`` itself."""
    if _layout(local) not in notes:
        return None
    layout, cuts = notes[_layout(local)]
    whole = torch.empty(0, dtype=local.dtype, device="meta")
    whole.set_(local.untyped_storage(), *layout)
    return Part(whole, local.detach(), cuts)


def distribute(
    tensor: Tensor,
    device_mesh: "DeviceMesh | None",
    placements: "Sequence[Placement] | None",
    src_data_rank: int | None,
) -> "DTensor | None":
    """``distribute_tensor`` of a tensor on meta; None if there is nothing to remember."""
    from torch.distributed.tensor import distribute_tensor

    if _noting.get() or not (tensor.is_leaf and has_plain_keys(tensor)):
        return None
    token = _noting.set(True)
    try:
        sharded = distribute_tensor(
            tensor, device_mesh, placements, src_data_rank=src_data_rank
        )
    finally:
        _noting.reset(token)
    local = getattr(sharded, "_local_tensor", None)
    if isinstance(local, Tensor) and has_plain_keys(local):
        with undisturbed(), _disable_current_modes():
            part = _cut(tensor.detach(), sharded)
            _note(local, part)
        if part is None or part.view.shape != local.shape:
            return sharded
        if not _has_storage_of(local, part.whole):
            with torch.no_grad():  # NB: a meta block knows the values then
                local.copy_(part.view)
    return sharded


def _cut(whole: Tensor, sharded: "DTensor") -> Part | None:
    """The part of ``whole`` that this rank has, if its placements are plain."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, part = sharded.device_mesh, Part(whole, whole)
    here = mesh.get_coordinate()
    for dim, placement in enumerate(sharded.placements):
        if here is not None and type(placement) is Shard:
            part = part.chunk(placement.dim, mesh.size(dim), here[dim])
        elif here is None or type(placement) is not Replicate:
            return None
    return part


def note_fsdp_shard(fsdp_param: Any, sharded: "DTensor") -> None:
    """Remember what ``fully_shard`` cuts ``sharded`` from: the parameter that the module has so far."""
    module_info = fsdp_param._module_info
    before = getattr(module_info.module, module_info.param_name)
    if before is sharded or not before.is_meta:
        return
    part = part_of(before)
    if part is None:
        if is_sharded(before):
            return
        part = Part(before.detach(), before.detach())
    mesh = fsdp_param.mesh_info
    # NB: one that only replicates has no shards.
    chunks, index = (
        getattr(mesh, "shard_mesh_size", 1),
        getattr(mesh, "shard_mesh_rank", 0),
    )
    part = part.chunk(fsdp_param.fsdp_placement.dim, chunks, index)
    _note(sharded._local_tensor, part)


def _note(local: Tensor, part: Part | None) -> None:
    storage = local.untyped_storage()
    notes = storage.__dict__
    if part is not None and _has_storage_of(local, part.whole):
        # NB: a note that refers to the storage it is kept with would keep both for ever.
        kept = notes.get(_NAME)
        kept = kept if isinstance(kept, dict) else {}
        if part.view.shape == local.shape:
            kept[_layout(local)] = (_layout(part.whole), part.cuts)
        notes[_NAME] = kept
        return
    notes.pop(_NAME, None)
    if part is not None and part.view.shape == local.shape:
        notes[_NAME] = part


def _has_storage_of(one: Tensor, other: Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
