"""The format of torch.save before PyTorch 1.6: pickles in a row, then the storages.

Three pickles say what the file is; the fourth one is what was saved; the fifth one lists the
storages' keys, in the order in which their bytes follow, each after its number of elements.
Law: as of zip files. Where torch.load would leave memory as it was (a storage that is
not listed), this is an error.

A pickle that the inert reader doesn't know (classes, whole modules, pickles of Python 2)
is for torch.load, which reads everything. Of the numbers before the storages' bytes some
are read, to see that they are where they should be.
"""

import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch._load_lazy._build import Builder, Layout, Record, record_of, Storage
from torch._load_lazy._globals import CALLS, GLOBALS
from torch._load_lazy._inert import Reader, Row, Unsupported
from torch._load_lazy._open import OpenFile
from torch._load_lazy._pickles import Pickles
from torch._load_lazy._places import Places
from torch._load_lazy._zip import Extent
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION


_SAMPLES = 8
_FEW = 1024  # storages of a local file, of which all numbers are looked at


def load(file: OpenFile) -> Any:
    """Returns what the file holds."""
    try:
        # NB: torch function modes are off, as for zip files.
        with torch._C.DisableTorchFunction():
            return _load(file)
    except Unsupported:
        return file.eager()


def _load(file: OpenFile) -> Any:
    pickles = Pickles(file, 0, file.size)
    for expected in (MAGIC_NUMBER, PROTOCOL_VERSION):
        start, got = pickles.at, read_plain(pickles.next())
        if type(got) is not int or got != expected:
            what = f"torch.save's magic number, or version, {expected}"
            file.bad(what, _short(got), start)
    read_plain(pickles.next())  # about the system that saved it
    data = pickles.next()
    start, keys = pickles.at, read_plain(pickles.next())
    if type(keys) is not list or not {str}.issuperset(map(type, keys)):
        file.bad("a list of its storages' keys", _short(keys), start)
    survey = Survey()
    Reader(data, survey).read()
    storages = Storages(file)
    storages.add_all(keys, survey.records, pickles.at)
    # NB: bytes are in little order, whatever the system that saved them.
    places = Places(
        file.source, file.mapping, file.request.map_location, sys.byteorder == "big"
    )
    build = _LegacyBuilder(storages, places)
    result = Reader(data, build).read()
    if build.pending:
        raise Unsupported("storage")
    file.leave_at(storages.end)
    return result


def read_plain(data: bytes) -> Any:
    """Returns what a pickle without tensors holds."""
    return Reader(data, Survey()).read()


def _storage_of(pid: Any) -> Storage:
    if type(pid) is not tuple or len(pid) != 6 or pid[5] is not None:
        raise Unsupported("persistent id")
    tag, storage_type, key, location, numel, _ = pid
    if type(tag) is not str or type(key) is not str or tag != "storage":
        raise Unsupported("persistent id")
    return Storage(key, record_of(storage_type, location, numel))


def _check(row: Row) -> None:
    if row.tag != "storage" or row.rest != [None]:
        raise Unsupported("row")
    if row.rebuild is not _rebuild_tensor_v2 or row.hooks is not OrderedDict:
        raise Unsupported("row")


class Survey:
    """Finds the storages that a pickle names, and makes nothing of its tensors."""

    globals: Mapping[bytes, Any] = GLOBALS

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self._tensor = torch.empty((0,), device="cpu")

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Returns a stand-in for a tensor; anything else as it is."""
        if function is _rebuild_tensor_v2 or function is _rebuild_tensor_v3:
            return self._tensor
        return CALLS[id(function)](*arguments)

    def persistent(self, pid: Any) -> None:
        """Notes a storage."""
        self._note(*_storage_of(pid))

    def layout(self, row: Row) -> Record:
        """Returns the storage, but for its key, that a row names."""
        _check(row)
        return record_of(row.storage_type, row.location, row.numel)

    def tensors(self, layouts: Sequence[Any], keys: list[str]) -> list[Any]:
        """Notes storages, and returns stand-ins for their tensors."""
        for key, record in zip(keys, layouts, strict=True):
            self._note(key, record)
        return [self._tensor] * len(keys)

    def _note(self, key: str, record: Record) -> None:
        if self.records.setdefault(key, record) != record:
            raise Unsupported("record")


class Storages:
    """Where the storages' bytes are. See ``Records`` in ``_build.py``."""

    def __init__(self, file: OpenFile) -> None:
        self.starts: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.end = 0
        self._file = file

    def add_all(self, keys: list[str], records: dict[str, Record], at: int) -> None:
        """Adds the storages that lie one after the other from offset ``at`` on."""
        start = at
        for key in keys:
            if key not in records or key in self.starts:
                self._file.bad("each key of its storages once", _short(key), start)
            at = self.add(key, records[key], at)
        self.end = at
        missing = records.keys() - self.starts.keys()
        if missing:
            self._file.bad(f"storage {min(missing)!r} among its keys", "none", start)
        local = self._file.mapping is not None and len(keys) <= _FEW
        samples = len(keys) if local else _SAMPLES
        sample = {*keys[:: max(1, len(keys) // max(1, samples))], *keys[-1:]}
        for key in sorted(sample, key=self.starts.__getitem__):
            self.check_numel(key, records[key].numel)

    def add(self, key: str, record: Record, at: int) -> int:
        """Adds the storage whose bytes follow their number at offset ``at``; returns its end."""
        end = at + 8 + record.nbytes
        if record.numel < 0 or end > self._file.size:
            what = f"{record.numel} elements of {record.dtype} for storage {key!r}"
            self._file.bad(what, f"a file of {self._file.size} bytes", at)
        self.starts[key], self.sizes[key] = at + 8, record.nbytes
        return end

    def check_numel(self, key: str, numel: int) -> None:
        """Raises unless the file has ``numel`` before the storage's bytes."""
        at = self.starts[key] - 8
        got = int.from_bytes(self._file.read(at, 8), "little", signed=True)
        if got != numel:
            self._file.bad(f"{numel} elements for storage {key!r}", f"{got}", at)

    def extent(self, key: str, nbytes: int | None = None) -> Extent:
        """Returns where the bytes of a storage are."""
        if self.sizes.get(key) != nbytes:
            self.bad_record(key, f"{nbytes} bytes", f"{self.sizes.get(key)} bytes")
        return self.starts[key], self.sizes[key]

    def bad_record(self, record: str, expected: str, got: str) -> NoReturn:
        """Raises the error that says what is wrong with a storage."""
        key = record.removeprefix("data/")
        self._file.bad(f"{expected} in storage {key!r}", got, self.starts.get(key, 0))


class _LegacyBuilder(Builder):
    def persistent(self, pid: Any) -> Storage:
        self.pending += 1
        return _storage_of(pid)

    def layout(self, row: Row) -> Layout:
        _check(row)
        return super().layout(row._replace(rest=[]))


def _short(value: Any) -> str:
    return f"{value!r:.80}"
