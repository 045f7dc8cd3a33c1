"""The format of torch.save before PyTorch 0.1.10: a tar file of three members.

``storages`` has pickles of key, location and type, each followed by the storage's number of
elements and bytes, and after all of them the views of storages; ``tensors`` has pickles
of key and storage, each followed by size, stride and offset; ``pickle`` is what was saved,
which refers to tensors by their keys. Law: as of zip files; like torch.load, this
takes the format from real files alone, and not with ``weights_only``.

A pickle that the inert reader doesn't know is for torch.load, which reads everything, as are
views of storages that can't be mapped.
"""

import struct
import sys
import tarfile
from collections.abc import Mapping
from typing import Any

import torch
from torch._load_lazy._build import Builder, Record, record_of
from torch._load_lazy._globals import GLOBALS
from torch._load_lazy._inert import Reader, Unsupported
from torch._load_lazy._legacy import Storages, Survey
from torch._load_lazy._open import OpenFile
from torch._load_lazy._pickles import Pickles
from torch._load_lazy._places import Places
from torch._load_lazy._zip import Extent
from torch.serialization import _should_read_directly, StorageType


_MAX_NDIM = 64


def is_tar(file: OpenFile) -> bool:
    """Whether torch.load would take the file as a tar file."""
    if not _should_read_directly(file.file) or file.rewound().tell():
        return False
    try:
        with _open(file):
            return True
    except tarfile.TarError:
        return False


def _open(file: OpenFile) -> tarfile.TarFile:
    return tarfile.open(fileobj=_Clipped(file), mode="r:")  # type: ignore[call-overload, no-any-return]


class _Clipped:
    """The file for ``tarfile``, which asks for as many bytes as a header says there are."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._at = 0

    def tell(self) -> int:
        return self._at

    def seek(self, at: int) -> None:
        self._at = at

    def read(self, size: int) -> bytes:
        size = min(size, self._file.size - self._at)
        data = self._file.read(self._at, size) if size > 0 else b""
        self._at += len(data)
        return data


def load(file: OpenFile) -> Any:
    """Returns what the file holds."""
    if file.request.weights_only:
        return file.eager()  # raises: this format can't be read safely by torch.load
    try:
        with torch._C.DisableTorchFunction():
            return _TarFile(file).read()
    except Unsupported:
        return file.eager()
    except (LookupError, TypeError, ValueError) as error:
        got = f"what makes no sense ({type(error).__name__}: {error})"
        file.bad("storages and tensors, as torch.save wrote them", got, 0)


class _TarFile(Builder):
    def __init__(self, file: OpenFile) -> None:
        swapped = sys.byteorder == "big"
        self._file = file
        self._storages = Storages(file)
        places = Places(file.source, file.mapping, file.request.map_location, swapped)
        super().__init__(self._storages, places)
        self._records: dict[str, Record] = {}
        self._tensors: dict[int, torch.Tensor] = {}

    def read(self) -> Any:
        """Returns what was saved."""
        storages, tensors, (start, size) = self._members()
        self._read_storages(storages)
        self._read_tensors(tensors)
        result = Reader(self._file.read(start, size), self).read()
        self._file.leave_at(self._file.size)
        return result

    def persistent(self, pid: Any) -> Any:
        """Returns the tensor of a key."""
        if type(pid) is not int or pid not in self._tensors:
            raise Unsupported("persistent id")
        return self._tensors[pid]

    def _members(self) -> list[Extent]:
        extents = []
        try:
            with _open(self._file) as tar:
                for name in ("storages", "tensors", "pickle"):
                    member = tar.getmember(name)
                    if not member.isreg() or member.issparse():
                        raise KeyError(f"member {name!r} is no plain file")
                    extents.append((member.offset_data, member.size))
        except (KeyError, tarfile.TarError) as error:
            self._file.bad("three members, as torch.save wrote them", f"{error}", 0)
        return extents

    def _read_storages(self, extent: Extent) -> None:
        pickles = self._pickles(extent)
        for _ in range(_count(self._next(pickles))):
            at, values = pickles.at, self._next(pickles)
            if type(values) is not tuple or len(values) != 3:
                self._file.bad(
                    "key, location and type of a storage", _short(values), at
                )
            key, location, storage_type = values
            at, numel = (
                pickles.at,
                int.from_bytes(pickles.take(8), "little", signed=True),
            )
            self._add(_key(key), record_of(storage_type, location, numel), at)
            pickles.skip(self._storages.sizes[_key(key)])
        for view in self._next(pickles):
            self._add_view(*map(_count, view))

    def _add(self, key: str, record: Record, at: int) -> None:
        self._records[key] = record
        self._storages.add(key, record, at)

    def _add_view(self, target: int, root: int, offset: int, numel: int) -> None:
        if not self._places.are_mapped(self._records[_key(root)].location):
            raise Unsupported("view")
        record = self._records[_key(root)]
        if offset + numel > record.numel:
            self._storages.bad_record(
                _key(root), f"{record.numel} elements", f"a view of {offset}+{numel}"
            )
        # As of a storage with its number before it.
        at = self._storages.starts[_key(root)] - 8 + offset * record.dtype.itemsize
        self._add(_key(target), record._replace(numel=numel), at)

    def _read_tensors(self, extent: Extent) -> None:
        pickles = self._pickles(extent)
        for _ in range(_count(self._next(pickles))):
            key, storage, _ = self._next(pickles)
            record = self._records[_key(storage)]
            at, (ndim, _) = pickles.at, struct.unpack("<2i", pickles.take(8))
            if not 0 <= ndim <= _MAX_NDIM:
                self._file.bad(f"at most {_MAX_NDIM} dimensions", f"{ndim}", at)
            numbers = struct.unpack(f"<{2 * ndim + 1}q", pickles.take(16 * ndim + 8))
            size, stride = numbers[:ndim], numbers[ndim : 2 * ndim]
            layout = self._layout(
                record, record.dtype, numbers[-1], size, stride, False
            )
            self._tensors[_count(key)] = self._place(layout, _key(storage))

    def _pickles(self, extent: Extent) -> Pickles:
        start, size = extent
        return Pickles(self._file, start, start + size)

    def _next(self, pickles: Pickles) -> Any:
        return Reader(pickles.next(), _Types()).read()


class _Types(Survey):
    # What a tensor was is told by its storage.
    globals: Mapping[bytes, Any] = {
        **GLOBALS,
        **{
            key.replace(b"Storage", b"Tensor"): type(None)
            for key, value in GLOBALS.items()
            if isinstance(value, StorageType)
        },
    }


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise Unsupported("number")
    return value


def _key(value: Any) -> str:
    return str(_count(value))


def _short(value: Any) -> str:
    return f"{value!r:.80}"
