"""Makes the objects of a state dict over the records of its file.

``Builder`` gives the inert reader its globals and calls: tensors, Parameters, ordered
dicts, sizes, dtypes, devices, sets, bytes and complex numbers, a subset of what
``weights_only`` allows. Law: an object is what torch's own unpickler would make, and a
tensor lies inside its record, whatever the pickle says: that is checked before the tensor
is made. Anything else is ``Unsupported``, and so for torch's own unpickler.

(One thing differs that has no effect: where torch's unpickler gives a tensor a dict of hooks, which
is always empty, here it has none, as has any new tensor.)
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from operator import itemgetter
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch._load_lazy._deferred import DeferredStorage
from torch._load_lazy._globals import CALLS, GLOBALS
from torch._load_lazy._inert import Row, Unsupported
from torch._load_lazy._places import Places
from torch._load_lazy._zip import Extent
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
    plain: int  # bytes, if the tensor is contiguous, and all of its record; else 0


_PLAIN_NBYTES = itemgetter(7)


def record_of(storage_type: Any, location: Any, numel: Any) -> Record:
    """Returns the storage that parts of a persistent id name."""
    if storage_type is torch.UntypedStorage:
        dtype = torch.uint8
    elif type(storage_type) is StorageType:
        dtype = storage_type.dtype
    else:
        raise Unsupported("storage type")
    if type(location) is not str or type(numel) is not int:
        raise Unsupported("storage")
    return Record(dtype, location, numel)


class Records(Protocol):
    """Where the bytes of storages lie, by key. See ``_zip.Archive``."""

    starts: dict[str, int]
    sizes: dict[str, int]

    def extent(self, key: str, nbytes: int | None = None) -> Extent: ...
    def bad_record(self, record: str, expected: str, got: str) -> NoReturn: ...


class Builder:
    """The objects of one file.

    Args:
        archive: the file's records
        places: where storages go
    """

    globals: Mapping[bytes, Any] = GLOBALS

    def __init__(self, archive: Records, places: Places) -> None:
        self._archive = archive
        self._places = places
        # Of each record that has a tensor, by key: its storage, or such a tensor.
        self._used: dict[str, tuple[Record, Any]] = {}
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
        return Storage(key, record_of(storage_type, location, numel))

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
        if type(size) is not tuple or type(stride) is not tuple:
            raise Unsupported("tensor")
        if any(type(x) is not dict or x for x in metadata if x is not None):
            raise Unsupported("tensor")
        if not {int}.issuperset(map(type, (offset, *size, *stride))):
            raise Unsupported("tensor")
        if type(requires_grad) is not bool or type(hooks) is not OrderedDict or hooks:
            raise Unsupported("tensor")
        self.pending -= 1
        key, record = storage
        layout = self._layout(record, dtype, offset, size, stride, requires_grad)
        return self._place(layout, key)

    def layout(self, row: Row) -> Layout:
        """Returns how the tensor of a row lies in its record."""
        if row.rebuild is not _rebuild_tensor_v2 or row.hooks is not OrderedDict:
            raise Unsupported("row")
        if row.tag != "storage" or row.rest:
            raise Unsupported("row")
        record = record_of(row.storage_type, row.location, row.numel)
        return self._layout(
            record, record.dtype, row.offset, row.size, row.stride, row.requires_grad
        )

    def tensors(self, layouts: Sequence[Layout], keys: list[str]) -> list[torch.Tensor]:
        """Returns a tensor for each layout, in the record of the key beside it."""
        archive, used = self._archive, self._used
        sizes = list(map(_PLAIN_NBYTES, layouts))
        plain = sizes == list(map(archive.sizes.get, keys)) and 0 not in sizes
        new = used.keys().isdisjoint(keys) and len({*keys}) == len(keys)
        if not (plain and new):
            return list(map(self._place, layouts, keys))
        starts = map(archive.starts.__getitem__, keys)
        tensors = self._plain_tensors(layouts, starts, sizes)
        records = map(itemgetter(0), layouts)
        used.update(zip(keys, zip(records, tensors, strict=True), strict=True))
        return tensors

    def _plain_tensors(
        self, layouts: Sequence[Layout], starts: Iterable[int], sizes: Iterable[int]
    ) -> list[torch.Tensor]:
        # NB: the inner loop of a load. A tensor over a buffer of its own has a storage of
        # its own; resize_as_ is the cheapest way to give it a shape.
        assert self._places.mapping is not None  # else no layout is plain
        buffer = self._places.mapping.buffer
        frombuffer, shaped = torch.frombuffer, self._shaped
        parts, tensors, flat = [], [], []
        for layout, start, nbytes in zip(layouts, starts, sizes, strict=True):
            (dtype, _, _), _, _, size, _, _, _, _ = layout
            part = buffer[start : start + nbytes]
            parts.append(part)
            tensor = frombuffer(part, dtype=dtype)
            if len(size) == 1:
                flat.append(tensor)
            elif size in shaped:
                tensor.resize_as_(shaped[size])
            else:
                shaped[size] = tensor.resize_(size)
            tensors.append(tensor)
        self._places.mapping.use(parts)
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
        if requires_grad and not (dtype.is_floating_point or dtype.is_complex):
            raise Unsupported("requires_grad")
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
        plain = plain and self._places.are_mapped(record.location)
        return Layout(
            record,
            dtype,
            offset,
            size,
            stride,
            requires_grad,
            fits,
            plain=record.nbytes if plain else 0,
        )

    def _place(self, layout: Layout, key: str) -> torch.Tensor:
        """Makes a tensor, of any layout."""
        if not layout.fits:
            self._archive.bad_record(
                f"data/{key}",
                "every tensor inside its storage",
                f"size {_short(layout.size)}, stride {_short(layout.stride)} and offset "
                f"{layout.offset} of {layout.dtype} in {layout.record.nbytes} bytes",
            )
        storage = self._storage(layout.record, key)
        if isinstance(storage, DeferredStorage):
            tensor = storage.tensor(*layout[1:6])
        else:
            tensor = torch.empty((0,), dtype=layout.dtype, device=storage.device)
            tensor.set_(storage, layout.offset, layout.size, layout.stride)
            tensor.requires_grad = layout.requires_grad
        return tensor

    def _storage(
        self, record: Record, key: str
    ) -> torch.UntypedStorage | DeferredStorage:
        if key not in self._used:
            extent = self._archive.extent(key, record.nbytes)
            storage = self._places.storage(key, extent, record.dtype, record.location)
            self._used[key] = record, storage
            return storage
        before, used = self._used[key]
        # What torch makes of a record that is named in two ways, or of an empty one that
        # is named twice, differs from release to release.
        if before != record or not record.nbytes:
            raise Unsupported("record")
        return used.untyped_storage() if type(used) is torch.Tensor else used


def _short(values: tuple[int, ...]) -> str:
    text = str(values[:8])
    return text if len(values) <= 8 else f"{text[:-1]}, ...) of {len(values)}"
