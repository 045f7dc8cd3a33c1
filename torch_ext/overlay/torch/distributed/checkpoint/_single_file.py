"""Writes what a ``StorageReader`` reads to one file, a tensor at a time.

Law: a file of torch.save is that of ``dcp_to_torch_save``, byte for byte; a file takes its name
when it is complete, and until then the name leads to what was there before. Memory is that of
the largest tensor, and what the reader holds besides it.

Not here: ties. A DCP checkpoint does not tell which of its tensors were one.
"""

import json
import os
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch._load_lazy import _live, _memory
from torch._load_lazy._deferred_bytes import memory_of
from torch._load_lazy._safetensors import _DTYPES
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.checkpoint.torch_save_reader import _copy_piece
from torch.futures import Future


__all__ = ["dcp_to_safetensors", "save", "save_safetensors"]

_OWN_PAGES = 1 << 20
_SHORT = 500  # characters of a list of names


def dcp_to_safetensors(
    dcp_checkpoint_dir: str | os.PathLike[str], safetensors_path: str | os.PathLike[str]
) -> None:
    """
    Given a directory containing a DCP checkpoint of tensors, writes one safetensors file.

    No more than one full tensor is in memory at a time. Nested names are joined by dots, as DCP
    does it.

    Args:
        dcp_checkpoint_dir: Directory containing the DCP checkpoint.
        safetensors_path: Filename of the file, which is replaced if it is there.

    Raises:
        ValueError: If the checkpoint has values that are no tensors, or of a dtype that the
            format lacks.
        RuntimeError: If the checkpoint is damaged; the text names the key.
    """
    save_safetensors(ChunkReader(dcp_checkpoint_dir), safetensors_path)


# Where it is public.
dcp_to_safetensors.__module__ = "torch.distributed.checkpoint.format_utils"


class ChunkReader(FileSystemReader):
    """A ``FileSystemReader`` that reads chunks straight to where they go."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """See :meth:`StorageReader.read_data`."""
        others = []
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            if item.type != LoadItemType.TENSOR or info.transform_descriptors:
                others.append(item)
                continue
            path = self.fs.concat_path(self.path, info.relative_path)
            with self.fs.create_stream(path, "rb") as stream:
                chunk = torch.load(
                    self._slice_file(stream, info),
                    map_location="cpu",
                    weights_only=True,
                    lazy=True,
                )
                target = planner.resolve_tensor(item).detach()
                piece = narrow_tensor_by_index(
                    chunk, item.storage_offsets, item.lengths
                )
                _copy_piece(target, piece)
            planner.commit_tensor(item, target)
        return super().read_data(replace(plan, items=others), planner)


def save(reader: StorageReader, path: str | os.PathLike[str]) -> None:
    """Writes what ``reader`` reads to ``path``, as torch.save does it."""
    checkpoint = _Checkpoint(reader)
    values = checkpoint.objects()
    state_dict: dict[str, Any] = {}
    mappings = checkpoint.metadata.planner_data or {}
    for fqn in checkpoint.metadata.state_dict_metadata:
        value = values[fqn] if fqn in values else _Unread(checkpoint, fqn)
        set_element(state_dict, mappings.get(fqn, (fqn,)), value)
    with replacing(path) as new:
        torch.save(state_dict, new)


def save_safetensors(reader: StorageReader, path: str | os.PathLike[str]) -> None:
    """Writes what ``reader`` reads to ``path``, in the safetensors format."""
    checkpoint = _Checkpoint(reader)
    header, order = _header(checkpoint)
    with replacing(path) as new, open(new, "wb") as file:
        file.write(header)
        for fqn in order:
            tensor = checkpoint.tensor(fqn)
            if sys.byteorder == "big":
                tensor.untyped_storage().byteswap(tensor.dtype)
            file.write(memory_of(tensor))


class _Checkpoint:
    """What a reader reads, value by value."""

    def __init__(self, reader: StorageReader) -> None:
        self._reader = reader
        self.metadata = reader.read_metadata()
        reader.set_up_storage_reader(self.metadata, True)

    def of(self, fqn: str) -> TensorStorageMetadata:
        """Returns what there is to know of a tensor."""
        found = self.metadata.state_dict_metadata[fqn]
        assert isinstance(found, TensorStorageMetadata)
        return found

    def objects(self) -> dict[str, Any]:
        """Returns all that are no tensors."""
        kinds = self.metadata.state_dict_metadata.items()
        values: dict[str, Any] = {
            fqn: None
            for fqn, kind in kinds
            if not isinstance(kind, TensorStorageMetadata)
        }
        self._read(values)
        return values

    def tensor(self, fqn: str) -> torch.Tensor:
        """Returns a tensor, in memory of its own and contiguous."""
        known = self.of(fqn)
        dtype, numel = known.properties.dtype, prod(known.size)
        # NB: pages of its own. What malloc gets back, with small pieces in between, it neither
        # gives back to the system nor has room in for the next tensor.
        if numel * dtype.itemsize >= _OWN_PAGES:
            pages = _memory.own(numel * dtype.itemsize)
            tensor = torch.frombuffer(pages, dtype=dtype).view(known.size)
        else:
            tensor = torch.empty(known.size, dtype=dtype, device="cpu")
        try:
            self._read({fqn: tensor})
        except Exception as error:
            where = getattr(self._reader, "checkpoint_id", "the checkpoint")
            raise RuntimeError(f"Could not read {fqn!r} of {where}: {error}") from error
        return tensor

    def _read(self, values: dict[str, Any]) -> None:
        planner = DefaultLoadPlanner(
            flatten_state_dict=False, flatten_sharded_tensors=False
        )
        planner.set_up_planner(values, self.metadata, True)
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        (plan,) = self._reader.prepare_global_plan(planner.create_global_plan([plan]))
        plan = planner.finish_plan(plan)
        found = [item for item in plan.items if item.type == LoadItemType.TENSOR]
        for fqn, value in values.items():
            count = sum(prod(i.lengths) for i in found if i.dest_index.fqn == fqn)
            if isinstance(value, torch.Tensor) and count != value.numel():
                raise RuntimeError(
                    f"Expected the chunks of {fqn!r} to have its {value.numel()} elements, "
                    f"got {count}. (Is the checkpoint complete?)"
                )
        self._reader.read_data(plan, planner).wait()


class _Unread:
    """Stands for a tensor in what torch.save saves, and is read when its bytes are written."""

    def __init__(self, checkpoint: _Checkpoint, fqn: str) -> None:
        self._checkpoint = checkpoint
        self._fqn = fqn

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        known = self._checkpoint.of(self._fqn)
        dtype, size = known.properties.dtype, known.size
        # As torch reduces such a tensor, but for the storage and what follows from the size.
        empty = torch.empty((0,), dtype=dtype, device="cpu")
        like = torch.empty(size, dtype=dtype, device="meta")
        rebuild, (_, _, _, _, *rest) = empty._reduce_ex_internal(protocol)
        storage = torch.UntypedStorage(like.nbytes, device="meta")
        # NB: what torch.save does with a storage that is not on the CPU, when it comes to it.
        storage.cpu = self._storage  # type: ignore[method-assign]
        typed: Any = storage
        if rebuild is torch._utils._rebuild_tensor_v2:
            typed = torch.storage.TypedStorage(
                wrap_storage=storage, dtype=dtype, _internal=True
            )
        typed._fake_device = "cpu"  # where the file is to say that it was
        return rebuild, (typed, 0, tuple(size), like.stride(), *rest)

    def _storage(self) -> torch.UntypedStorage:
        return self._checkpoint.tensor(self._fqn).untyped_storage()


def _header(checkpoint: _Checkpoint) -> tuple[bytes, list[str]]:
    """Returns the head of a safetensors file, and the names of its tensors in their order."""
    described = checkpoint.metadata.state_dict_metadata
    others = [
        fqn
        for fqn, kind in described.items()
        if not isinstance(kind, TensorStorageMetadata)
    ]
    if others:
        raise ValueError(
            "Expected all values to be tensors, which are what safetensors files hold, got "
            f"objects for {_listed(others)}. (Did you mean to write a .pt file?)"
        )
    names = {dtype: name for name, dtype in _DTYPES.items() if name != "F4"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Wide elements come first, so that each tensor starts at a multiple of its own.
    order = sorted(
        described, key=lambda fqn: (-checkpoint.of(fqn).properties.dtype.itemsize, fqn)
    )
    start = 0
    for fqn in order:
        dtype, size = checkpoint.of(fqn).properties.dtype, checkpoint.of(fqn).size
        if dtype not in names:
            raise ValueError(
                f"Expected {fqn!r} to be of a dtype of safetensors, got {dtype}. (Did you "
                "mean to write a .pt file?)"
            )
        end = start + prod(size) * dtype.itemsize
        offsets = [start, end]
        header[fqn] = {
            "dtype": names[dtype],
            "shape": list(size),
            "data_offsets": offsets,
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def _listed(names: list[str]) -> str:
    text = ", ".join(map(repr, names))
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}... ({len(names)} names)"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """Context with the path of a new file, which takes the name ``path`` if nothing raises."""
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    # NB: up to its last dot a file's name is the name of the folder in its zip archive.
    stem = name[: name.rfind(".")] if "." in name else name
    mode = _mode(target)
    file, new = tempfile.mkstemp(prefix=f"{stem}.", dir=folder)
    try:
        os.close(file)
        yield new
        os.chmod(new, mode)
        # NB: else, after a loss of power, the name may lead to a file without contents.
        with open(new, "rb") as written:
            os.fsync(written.fileno())
        with suppress(FileNotFoundError):
            _live.keep(os.stat(target))
        os.replace(new, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise


def _mode(target: str) -> int:
    """Returns the mode of the file that is there, or of a new one."""
    with suppress(FileNotFoundError):
        return os.stat(target).st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
