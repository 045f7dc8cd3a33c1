"""``TorchSaveReader``: ``dcp.load`` from files of torch.save and safetensors.

The file is opened as ``torch.load(lazy=True)`` does it, on every rank. Each rank then reads
what its plan asks for, in the order of the file, straight into the target's memory. Law: the
state dict is as if ``torch.load`` had brought the whole file, and each target had copied its
part of it, in the dtype that the target has.

Nothing is sent between ranks but what ``dcp.load`` itself sends: the plans, and errors.

Limits: a piece that is no block of rows is read with the gaps between its rows where these are
short, up to 16 KiB each. Names are flattened, so that a planner with
``flatten_state_dict=False`` finds those of a flat state dict only.
"""

import io
import os
from collections.abc import Iterator
from glob import escape, glob
from typing import Any

import torch
from torch._load_lazy import load_deferred
from torch._load_lazy._deferred import place_of
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    STORAGE_TYPES,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
)
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from torch.futures import Future


__all__ = ["TorchSaveReader"]

_AT_ONCE = 16 << 20  # bytes that a block spans in the file


class TorchSaveReader(StorageReader):
    """Reads files of :func:`torch.save` and safetensors, of which each rank reads its pieces only.

    A tensor of the file is a full tensor, and may be loaded into a plain tensor, a ``DTensor``
    or a ``ShardedTensor``; of these each rank reads what it has of them. No rank holds more than
    its state dict and a block of 16 MiB. Other values (a number of epochs, an optimizer's
    ``param_groups``) go into the state dict as objects. Names are those of
    :func:`torch.distributed.checkpoint.save`: nested state dicts are flattened.

    Args:
        path: a file of ``torch.save`` or safetensors, the index of a sharded one
            (``*.index.json``), or the folder that holds an index or ``*.safetensors`` files. All
            ranks must be able to read it.
        weights_only: as for :func:`torch.load`. Default: as for :func:`torch.load`

    Raises:
        CheckpointException: by ``dcp.load``, on all ranks, if the file of any rank is damaged
            or lacks a key, or if a size differs; the text names file and key.

    .. note::
        A file whose pickle has objects of other classes than ``weights_only`` allows by itself is
        mapped instead, and reading ahead is left to the system.

    Example:
        >>> # xdoctest: +SKIP("undefined vars")
        >>> state_dict = {"model": get_model_state_dict(fsdp_model)}
        >>> dcp.load(state_dict, storage_reader=TorchSaveReader("model_and_optim.pt"))
        >>> set_model_state_dict(fsdp_model, state_dict["model"])
    """

    def __init__(
        self, path: str | os.PathLike[str], *, weights_only: bool | None = None
    ) -> None:
        super().__init__()
        self.path = os.fspath(path)
        self.weights_only = weights_only
        self._values: dict[str, Any] = {}

    @property
    def checkpoint_id(self) -> str:
        """The path that is read."""
        return self.path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """See :meth:`StorageReader.reset`."""
        if checkpoint_id is not None:
            self.path = os.fspath(checkpoint_id)
        self._values = {}

    # NB: without `**kwargs`, which would say that there is metadata of single ranks, too.
    def read_metadata(self) -> Metadata:
        """Opens the file, and tells what it holds; no tensor's data are read."""
        self._values = {}
        loaded = _load(self.path, self.weights_only)
        if not isinstance(loaded, dict):
            raise RuntimeError(
                f"Expected {self.path} to hold a state dict, got a {type(loaded).__name__}. "
                "(Did you mean to save the module's state_dict()?)"
            )
        try:
            self._values, mappings = flatten_state_dict(loaded)
        except ValueError as error:
            raise RuntimeError(
                f"Expected the names in {self.path} to differ once they are flattened, got "
                f"{error}."
            ) from error
        described = {fqn: _describe(value) for fqn, value in self._values.items()}
        return Metadata(described, planner_data=mappings)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """See :meth:`StorageReader.set_up_storage_reader`."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """See :meth:`StorageReader.prepare_local_plan`."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """See :meth:`StorageReader.prepare_global_plan`."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads the items of ``plan``, in the order in which the file has them."""
        pieces = []
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, _serialized(self._values[_fqn(item)]))
            else:
                pieces.append((item, self._piece(item)))
        pieces.sort(key=lambda piece: _place(piece[1]))
        # What is tied in the file and in the state dict is read once, unless a planner does
        # more to it afterwards. NB: the last target stays alive, so that its place is its own.
        plain = type(planner).commit_tensor is DefaultLoadPlanner.commit_tensor
        last: tuple[Any, ...] = ()
        for item, piece in pieces:
            target = planner.resolve_tensor(item)
            if target.layout is torch.strided:  # else it would not get what is copied
                target = target.detach()
            copy = _place(piece), _layout(piece), _place(target), _layout(target)
            if not (plain and copy == last[:4]):
                self._read(item, piece, target)
            last = *copy, target
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _piece(self, item: ReadItem) -> torch.Tensor:
        tensor = self._values[_fqn(item)]
        if isinstance(tensor, DTensor):
            raise RuntimeError(
                f"Expected {_fqn(item)!r} of {self.path} to be a full tensor, got a DTensor. "
                "(Did you mean to save what get_model_state_dict(..., options="
                "StateDictOptions(full_state_dict=True)) returns?)"
            )
        if tensor.size() == item.lengths:  # which some layouts can't be narrowed to
            whole: torch.Tensor = tensor.detach()
            return whole
        piece: torch.Tensor = narrow_tensor_by_index(
            tensor.detach(), item.storage_offsets, item.lengths
        )
        return piece

    def _read(self, item: ReadItem, piece: torch.Tensor, target: torch.Tensor) -> None:
        if target.size() != piece.size():
            raise RuntimeError(
                f"Expected the target of {_fqn(item)!r} to have the size "
                f"{tuple(piece.size())} that is planned, got {tuple(target.size())}."
            )
        try:
            _copy_piece(target, piece)
        except Exception as error:
            raise RuntimeError(
                f"Could not load {_fqn(item)!r} of {self.path}: {error}"
            ) from error

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """See :meth:`StorageReader.validate_checkpoint_id`."""
        return os.path.exists(checkpoint_id)


def _copy_piece(target: torch.Tensor, piece: torch.Tensor) -> None:
    """Copies a deferred tensor, with no more than a block of it in memory besides."""
    with torch.no_grad():
        for block, part in _blocks(target, piece):
            # NB: a copy of a deferred tensor that is not read straight to where it goes
            # leaves what it reads in the storage; a clone does not.
            straight = block.is_contiguous() and block.dtype == part.dtype
            block.copy_(part if straight else part.clone())


def _load(path: str, weights_only: bool | None) -> Any:
    try:
        return load_deferred(path, weights_only=weights_only)
    except IsADirectoryError:
        shards = sorted(glob(os.path.join(escape(path), "*.safetensors")))
        if not shards:
            raise
    result: dict[str, Any] = {}
    for shard in shards:
        tensors = load_deferred(shard)
        twice = result.keys() & tensors.keys()
        if twice:
            raise RuntimeError(
                f"Expected each tensor of {path} to be in one file, got {min(twice)!r} in "
                f"{shard}, too. (Did you mean HuggingFaceStorageReader, for what a process "
                "group has saved?)"
            )
        result |= tensors
    return result


def _describe(value: Any) -> STORAGE_TYPES:
    if not isinstance(value, torch.Tensor):
        return BytesStorageMetadata()
    size = value.size()
    whole = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    return TensorStorageMetadata(TensorProperties(value.dtype), size, [whole])


def _serialized(value: Any) -> io.BytesIO:
    # NB: planners unpickle this without weights_only. It is this process's own pickle, of what
    # the file's was allowed to make.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def _fqn(item: ReadItem) -> str:
    return item.storage_index.fqn


def _place(tensor: torch.Tensor) -> tuple[str, int]:
    """Returns where a tensor begins, in a file or in memory."""
    if tensor.layout is not torch.strided:
        return "", id(tensor)
    return place_of(tensor) or ("", tensor.data_ptr())


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    strided = tensor.layout is torch.strided
    return tensor.dtype, tensor.size(), tensor.stride() if strided else None


def _blocks(
    target: torch.Tensor, piece: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cuts both, alike, into blocks that lie close together in the file."""
    if piece.layout is not torch.strided or piece.numel() <= 1:
        yield target, piece
        return
    steps = [
        step * (n > 1) for step, n in zip(piece.stride(), piece.size(), strict=True)
    ]
    span = sum(step * (n - 1) for step, n in zip(steps, piece.size(), strict=True)) + 1
    if span * piece.itemsize <= _AT_ONCE:
        yield target, piece
        return
    # NB: not the largest step, since strides may overlap.
    reach = [step * (n - 1) for step, n in zip(steps, piece.size(), strict=True)]
    dim = reach.index(max(reach))
    rows = max(1, _AT_ONCE // (steps[dim] * piece.itemsize))
    rows = min(rows, -(-piece.size(dim) // 2))
    parts = target.split(rows, dim), piece.split(rows, dim)
    for block, part in zip(*parts, strict=True):
        yield from _blocks(block, part)
