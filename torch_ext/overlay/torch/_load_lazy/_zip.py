"""The records of a zip file, by its central directory alone.

``Archive`` reads the directory once and gives each record's extent: where its bytes
start and how many there are. Law: an extent lies inside the file and overlaps no other
one, and the bytes it names are the bytes that torch's own reader would return for the
record; whatever does not fit raises an error that names file, record and offset before
anything is mapped. The records' data are not touched.

Not here: compressed or encrypted records, archives in several parts.
"""

import mmap
import struct
from collections.abc import Iterable
from itertools import pairwise, repeat
from operator import itemgetter
from typing import Any, NoReturn

from torch._load_lazy._zip_directory import Directory, Entry, REMEDY, U32


Extent = tuple[int, int]  # offset in the file, and size

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_LOCAL_START = struct.Struct("<4s22x2H")  # magic, sizes of name and extra field
_MAGIC = b"PK\3\4"
_ENCRYPTED = 0x2041  # in one of three ways
_TORCH = 0x808  # flags (a descriptor follows the data; the name is UTF-8), method 0
_SAMPLES = 8
_FEW = 1024  # storages, and
_SMALL = 16 << 20  # bytes of a file, up to which all local headers are looked at
# Versions of the record layout that torch reads (caffe2/serialize/versions.h).
_VERSIONS = range(1, 11)


class Archive(Directory):
    """The records of the zip file ``file``, which errors call ``name``.

    Args:
        file: a seekable file object, at the start of the zip file
        name: what errors call the file

    Attributes:
        starts: of each storage's key, the offset of its bytes
        sizes: of each storage's key, the number of its bytes

    Raises:
        RuntimeError: if the file is not a zip file that torch.save could have written
    """

    def __init__(self, file: Any, name: str) -> None:
        super().__init__(file, name)
        entries, offset = self.entries, self.directory_offset
        folder, slash, _ = entries[0][0].partition(b"/") if entries else (b"",) * 3
        if not slash:
            self.bad("a record in a folder", f"{_text(folder)!r}", offset)
        self._folder = folder + b"/"
        self._check_names([entry[0] for entry in entries], offset)
        self._entry = {entry[0]: entry for entry in entries}
        if len(self._entry) != len(entries):
            names = sorted(entry[0] for entry in entries)
            twice = next(a for a, b in pairwise(names) if a == b)
            self.bad("records of different names", f"{_text(twice)!r} twice", offset)
        self.starts: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self._headers: list[int] = []  # of each storage, in the order of starts
        self._locate()

    def _check_names(self, names: list[bytes], offset: int) -> None:
        if not all(map(bytes.startswith, names, repeat(self._folder))):
            stray = next(name for name in names if not name.startswith(self._folder))
            self.bad(f"all records in folder {self._folder!r}", f"{stray!r}", offset)
        try:
            b"".join(names).decode()
        except UnicodeDecodeError as error:
            self.bad("names in UTF-8", f"{error.object[error.start :][:20]!r}", offset)

    def bad_record(
        self,
        record: str,
        expected: str,
        got: str,
        offset: int | None = None,
        remedy: str = REMEDY,
    ) -> NoReturn:
        """Raises the error that says what is wrong with a record."""
        if offset is None:
            name = self._folder + record.encode(errors="surrogateescape")
            entry = self._entry.get(name)
            offset = entry[1] if entry else self.directory_offset
        self.bad(f"{expected} in record {record!r}", got, offset, remedy)

    # Records

    def __contains__(self, record: str) -> bool:
        return self._folder + record.encode() in self._entry

    def read(self, record: str) -> bytes:
        """Returns the bytes of a record."""
        entry = self._get(self._folder + record.encode())
        return self.pread(self._local_start(entry), entry[2])

    def _get(self, name: bytes) -> Entry:
        entry = self._entry.get(name)
        if entry is None:
            self.bad(
                f"a record {_text(name)!r}", "none of that name", self.directory_offset
            )
        _, header, size, stored, kind = entry
        if kind >> 16 or size != stored or kind & _ENCRYPTED:
            self.bad(
                f"record {_text(name)!r} stored as it is",
                "an encrypted one" if kind & _ENCRYPTED else "a compressed one",
                header,
                "Did you mean to load without lazy=True?",
            )
        return entry

    def extent(self, key: str, nbytes: int | None = None) -> Extent:
        """Returns where the bytes of a storage are.

        Raises:
            RuntimeError: if there is no such record, or it is not of ``nbytes``
        """
        size = self.sizes.get(key)
        if size is None:
            self.bad_record(f"data/{key}", f"{nbytes} bytes", "no such record")
        if nbytes is not None and size != nbytes:
            self.bad_record(f"data/{key}", f"{nbytes} bytes", f"{size} bytes")
        return self.starts[key], size

    def _locate(self) -> None:
        """Finds where each storage's bytes start. See Note [Where data starts]."""
        folder, alignment = self._folder + b"data/", self._alignment()
        entries = sorted(self.entries, key=itemgetter(1))
        ends = [entry[1] for entry in entries[1:]] + [self.directory_offset]
        names, starts, sizes = [], [], []
        for entry, end in zip(entries, ends, strict=True):
            name, header, size, stored, kind = entry
            if not name.startswith(folder):
                continue
            start = end - size - 16
            if (
                kind != _TORCH
                or size != stored
                or start % alignment
                or not 0 <= start - header - 34 - len(name) < alignment
                or end >= U32
            ):
                start = self._odd_start(entry, end, alignment)
            names.append(name)
            self._headers.append(header)
            starts.append(start)
            sizes.append(size)
        skip = len(folder)
        keys = [name[skip:].decode(errors="surrogateescape") for name in names]
        self.starts = dict(zip(keys, starts, strict=True))
        self.sizes = dict(zip(keys, sizes, strict=True))
        self._check({*keys[:: max(1, len(keys) // _SAMPLES)], *keys[-1:]})

    def _alignment(self) -> int:
        if ".storage_alignment" not in self:
            return 64
        text = self.read(".storage_alignment")
        if len(text) > 20 or not text.isdigit() or not 0 < int(text) <= 1 << 30:
            self.bad(
                "a record '.storage_alignment' that is a positive number",
                f"{text[:20]!r}",
                self._get(self._folder + b".storage_alignment")[1],
            )
        return int(text)

    def _odd_start(self, entry: Entry, end: int, alignment: int) -> int:
        name, header, size, _, kind = self._get(entry[0])
        if size >= U32 or header >= U32:
            start = end - size - 24
            least = header + 38 + len(name) + 16 * (size >= U32) + 8 * (header >= U32)
            if (
                kind == _TORCH
                and start % alignment == 0
                and 0 <= start - least < alignment
            ):
                return start
        start = self._local_start(entry)
        if start + size > end:
            self.bad(
                f"record {_text(name)!r} end before offset {end}",
                f"an end at {start + size}",
                header,
            )
        return start

    def _local_start(self, entry: Entry) -> int:
        """Returns where the data start, by the record's own (local) header."""
        name, header, size, _, kind = entry
        fixed = self.pread(header, _LOCAL.size)
        magic, _, _, method, *_, name_size, extra_size = _LOCAL.unpack(fixed)
        local_name = self.pread(header + _LOCAL.size, name_size)
        if magic != b"PK\3\4" or local_name != name or method != kind >> 16:
            got = f"{fixed + local_name[:50]!r}"
            self.bad(f"the local header of record {name!r}", got, header)
        start: int = header + _LOCAL.size + name_size + extra_size
        if start + size > self.directory_offset:
            self.bad(
                f"record {_text(name)!r} end before its directory",
                f"{size} bytes from {start} on",
                header,
            )
        return start

    def check_starts(self, fileno: int) -> None:
        """Compares all starts with the local headers, if that costs little.

        Args:
            fileno: of the file, if it is a local one

        Raises:
            RuntimeError: if a storage's bytes start elsewhere than where they were found
        """
        if self.size > _SMALL and len(self._headers) > _FEW:
            return
        with mmap.mmap(fileno, self.size, access=mmap.ACCESS_READ) as data:
            if self.size > _SMALL and hasattr(data, "madvise"):
                data.madvise(mmap.MADV_RANDOM)  # of each header its page, and no more
            read = map(_LOCAL_START.unpack_from, repeat(data), self._headers)
            starts = [
                header + _LOCAL.size + name_size + extra_size if magic == _MAGIC else -1
                for header, (magic, name_size, extra_size) in zip(
                    self._headers, read, strict=True
                )
            ]
        if starts != list(self.starts.values()):
            pairs = zip(self.starts, starts, strict=True)
            self._check(key for key, at in pairs if at != self.starts[key])

    def _check(self, keys: Iterable[str]) -> None:
        for key in keys:
            start = self._local_start(
                self._get(
                    self._folder + b"data/" + key.encode(errors="surrogateescape")
                )
            )
            if start != self.starts[key]:
                self.bad_record(
                    f"data/{key}",
                    f"data from offset {self.starts[key]} on",
                    f"data from offset {start} on",
                    remedy="Did you mean to load without lazy=True?",
                )

    def check_version(self) -> None:
        """Raises unless torch's own reader would take this version of the layout."""
        for record in (".format_version", ".data/serialization_id"):
            if record in self and not self.read(record).isascii():
                self.bad_record(record, "text", "other bytes")
        record = ".data/version" if ".data/version" in self else "version"
        text = self.read(record)
        if len(text) > 20 or not text.strip().isdigit() or int(text) not in _VERSIONS:
            self.bad(
                f"a record {record!r} from 1 to 10",
                f"{text[:20]!r}",
                self._get(self._folder + record.encode())[1],
                "Was it written by a newer PyTorch?",
            )


def _text(name: bytes) -> str:
    return name[:80].decode(errors="replace")


# Note [Where data starts]
# ~~~~~~~~~~~~~~~~~~~~~~~~
# Where a record's bytes start is written only in its local header, next to the bytes
# themselves. Reading 10,000 local headers costs more than all the rest of an open, and
# on a cold disk each is a read of its own (with read-ahead: megabytes). But torch's
# writer leaves no choice: it pads the local header such that the data start at the
# first multiple of the alignment, and puts a 16-byte descriptor (24 bytes where zip64 is
# needed) and then the next header right after the data. So the start is known twice,
# from the front and from the next header's offset, and where both agree, on a record with
# the flags that torch's writer sets, it is taken without a read. The local header then has
# the last word: of all records in a local file of few records or little data, else of
# some (``_SAMPLES``). They are read one by one for each record that does not fit
# the pattern: files of other writers and repacked ones are right too, only slower.
#
# What remains: a large file made on purpose, in which data not in the sample start elsewhere
# *between* a header and the next one. One reads other bytes of that gap, and none outside.
