"""Makes the objects of a state dict over the records of its file.

``Builder`` gives the inert reader its globals and calls: tensors, Parameters, ordered
dicts, sizes, dtypes, devices, sets, bytes and complex numbers, a subset of what
``weights_only`` allows. Law: an object is what torch's own unpickler would make, and a
tensor lies inside its record, whatever the pickle says: that is checked before the tensor
is made. Anything else is ``Unsupported``, and so for torch's own unpickler.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch._load_lazy._globals import CALLS, GLOBALS
from torch._load_lazy._inert import Row, Unsupported
from torch._load_lazy._map import Mapping
from torch._load_lazy._zip import Archive
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3
from torch.autograd.graph import increment_version
from torch.serialization import StorageType


_INT64_MAX = (1 << 63) - 1
_MAX_NDIM = 64  # more are for torch's own unpickler


class Record(NamedTuple):
    """A storage as the pickle names it, but for its key."""

    dtype: torch.dtype
    location: str
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Storage(NamedTuple):
    """What a persistent id stands for."""

    key: str
    record: Record


class Layout(NamedTuple):
    """How a tensor lies in a record, whichever record it is."""

    record: Record
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    fits: bool  # into the record, if that has the size that the pickle says
    plain: int  # numel, if the tensor is contiguous, and all of its record; else 0


class Builder:
    """The objects of one file.

    Args:
        archive: the file's records
        mapping: the file's bytes
        cpu: whether storages come to the CPU wherever they were saved from
    """

    globals = GLOBALS

    def __init__(self, archive: Archive, mapping: Mapping, cpu: bool) -> None:
        self._archive = archive
        self._mapping = mapping
        self._cpu = cpu
        # Of each record that has a tensor, by key: such a tensor and its layout.
        self._used: dict[str, tuple[Layout, torch.Tensor]] = {}
        self._shaped: dict[tuple[int, ...], torch.Tensor] = {}
        # How many storages the pickle named and a tensor has not taken yet.
        self.pending = 0

    # What the pickle says

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Returns what ``function`` makes of ``arguments``."""
        if function is _rebuild_tensor_v2:
            return self._tensor_v2(*arguments)
        if function is _rebuild_tensor_v3:
            return self._tensor_v3(*arguments)
        # By id, since what a pickle calls may not be hashable.
        return CALLS[id(function)](*arguments)

    def persistent(self, pid: Any) -> Storage:
        """Returns the storage that a persistent id stands for."""
        if type(pid) is not tuple or len(pid) != 5:
            raise Unsupported("persistent id")
        tag, storage_type, key, location, numel = pid
        if type(tag) is not str or type(key) is not str or tag != "storage":
            raise Unsupported("persistent id")
        self.pending += 1
        return Storage(key, self._record(storage_type, location, numel))

    def _record(self, storage_type: Any, location: Any, numel: Any) -> Record:
        if storage_type is torch.UntypedStorage:
            dtype = torch.uint8
        elif type(storage_type) is StorageType:
            dtype = storage_type.dtype
        else:
            raise Unsupported("storage type")
        if type(location) is not str or type(numel) is not int:
            raise Unsupported("storage")
        if location == "meta":
            raise Unsupported("location")
        if location != "cpu" and not self._cpu:
            raise RuntimeError(
                f"Expected all storages of {self._archive.name} to be on the CPU with "
                f"lazy=True, got one on {location!r}. (Did you mean map_location='cpu'?)"
            )
        return Record(dtype, location, numel)

    def _tensor_v2(self, storage: Any, *arguments: Any) -> torch.Tensor:
        if type(storage) is not Storage or not 5 <= len(arguments) <= 6:
            raise Unsupported("tensor")
        offset, size, stride, requires_grad, hooks, *metadata = arguments
        return self._tensor(
            storage,
            storage.record.dtype,
            offset,
            size,
            stride,
            requires_grad,
            hooks,
            metadata,
        )

    def _tensor_v3(self, storage: Any, *arguments: Any) -> torch.Tensor:
        if type(storage) is not Storage or not 6 <= len(arguments) <= 7:
            raise Unsupported("tensor")
        offset, size, stride, requires_grad, hooks, dtype, *metadata = arguments
        if type(dtype) is not torch.dtype or storage.record.dtype is not torch.uint8:
            raise Unsupported("tensor")
        return self._tensor(
            storage, dtype, offset, size, stride, requires_grad, hooks, metadata
        )

    def _tensor(
        self,
        storage: Storage,
        dtype: torch.dtype,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any,
        hooks: Any,
        metadata: list[Any],
    ) -> torch.Tensor:
        if type(size) is not tuple or type(stride) is not tuple or any(metadata):
            raise Unsupported("tensor")
        if not {int}.issuperset(map(type, (offset, *size, *stride))):
            raise Unsupported("tensor")
        if type(requires_grad) is not bool or type(hooks) is not OrderedDict or hooks:
            raise Unsupported("tensor")
        self.pending -= 1
        key, record = storage
        layout = self._layout(record, dtype, offset, size, stride, requires_grad)
        return self._place(layout, key, hooks)

    def layout(self, row: Row) -> Layout:
        """Returns how the tensor of a row lies in its record."""
        if row.rebuild is not _rebuild_tensor_v2 or row.hooks is not OrderedDict:
            raise Unsupported("row")
        if row.tag != "storage":
            raise Unsupported("row")
        record = self._record(row.storage_type, row.location, row.numel)
        return self._layout(
            record, record.dtype, row.offset, row.size, row.stride, row.requires_grad
        )

    def tensors(self, layouts: Sequence[Layout], keys: list[str]) -> list[torch.Tensor]:
        """Returns a tensor for each layout, in the record of the key beside it."""
        archive, used = self._archive, self._used
        sizes = [layout.plain * layout.dtype.itemsize for layout in layouts]
        plain = sizes == list(map(archive.sizes.get, keys)) and 0 not in sizes
        if not plain or len(set(keys).difference(used)) != len(keys):
            pairs = zip(layouts, keys, strict=True)
            return [self._place(layout, key, OrderedDict()) for layout, key in pairs]
        tensors = self._plain_tensors(layouts, map(archive.starts.__getitem__, keys))
        used.update(zip(keys, zip(layouts, tensors, strict=True), strict=True))
        return tensors

    def _plain_tensors(
        self, layouts: Sequence[Layout], starts: Iterable[int]
    ) -> list[torch.Tensor]:
        # NB: the inner loop of a load. A tensor over a buffer of its own has a storage of
        # its own; resize_as_ is the cheapest way to give it a shape.
        frombuffer, buffer, shaped = (
            torch.frombuffer,
            self._mapping.buffer,
            self._shaped,
        )
        tensors, flat = [], []
        for layout, start in zip(layouts, starts, strict=True):
            _, dtype, _, size, _, _, _, numel = layout
            tensor = frombuffer(buffer, dtype=dtype, count=numel, offset=start)
            if len(size) == 1:
                flat.append(tensor)
            elif size in shaped:
                tensor.resize_as_(shaped[size])
            else:
                shaped[size] = tensor.resize_(size)
            # See Note [Don't serialize hooks] in torch/_utils.py.
            tensor._backward_hooks = OrderedDict()
            tensors.append(tensor)
        # What torch.load makes is of version 1: it was given a storage.
        increment_version(flat)
        return tensors

    # What becomes of it

    def _layout(
        self,
        record: Record,
        dtype: torch.dtype,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool,
    ) -> Layout:
        if len(size) > _MAX_NDIM:
            raise Unsupported("size")
        fits = (
            len(size) == len(stride)
            and min((record.numel, offset, *size, *stride)) >= 0
            and max((record.nbytes, offset, prod(size), *size, *stride)) <= _INT64_MAX
        )
        if fits and 0 not in size:
            steps = zip(size, stride, strict=True)
            last = offset + sum((n - 1) * step for n, step in steps)
            fits = (last + 1) * dtype.itemsize <= record.nbytes
        whole = offset == 0 < record.numel == prod(size) and dtype is record.dtype
        contiguous = tuple(prod(size[i + 1 :]) for i in range(len(size)))
        plain = fits and whole and stride == contiguous and not requires_grad
        return Layout(
            record,
            dtype,
            offset,
            size,
            stride,
            requires_grad,
            fits,
            plain=record.numel if plain else 0,
        )

    def _place(
        self, layout: Layout, key: str, hooks: OrderedDict[int, Any]
    ) -> torch.Tensor:
        """Makes a tensor, of any layout."""
        if not layout.fits:
            self._archive.bad_record(
                f"data/{key}",
                "every tensor inside its storage",
                f"size {_short(layout.size)}, stride {_short(layout.stride)} and offset "
                f"{layout.offset} of {layout.dtype} in {layout.record.nbytes} bytes",
            )
        storage = self._storage(layout, key)
        tensor = torch.empty((0,), dtype=layout.dtype, device="cpu")
        tensor.set_(storage, layout.offset, layout.size, layout.stride)
        tensor.requires_grad = layout.requires_grad
        tensor._backward_hooks = hooks
        return tensor

    def _storage(self, layout: Layout, key: str) -> torch.UntypedStorage:
        record = layout.record
        if key in self._used:
            before, tensor = self._used[key]
            # What torch makes of a record that is named in two ways, or of an empty
            # one that is named twice, differs from release to release.
            if before.record != record or not record.nbytes:
                raise Unsupported("record")
            return tensor.untyped_storage()
        storage = self._mapping.storage(self._archive.extent(key, record.nbytes))
        whole = torch.empty((0,), dtype=torch.uint8, device="cpu").set_(storage)
        self._used[key] = layout, whole
        return storage


def _short(values: tuple[int, ...]) -> str:
    text = str(values[:8])
    return text if len(values) <= 8 else f"{text[:-1]}, ...) of {len(values)}"
