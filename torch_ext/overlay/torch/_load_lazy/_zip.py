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

from torch._load_lazy._source import ObjectSource, read


Extent = tuple[int, int]  # offset in the file, and size

# What the directory says of a record: name, offset of the local header, size, stored size,
# and flags and method as one number. (A plain tuple: there may be 100,000 of them.)
Entry = tuple[bytes, int, int, int, int]

_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_LOCAL_START = struct.Struct("<4s22x2H")  # magic, sizes of name and extra field
_MAGIC = b"PK\3\4"
_FIXED = "<4s4xI8xII6s4xII"  # a directory entry up to its name
_FIXED_SIZE = struct.calcsize(_FIXED)

_U32 = 0xFFFFFFFF
_FOLDER = 0x10
_ENCRYPTED = 0x2041  # in one of three ways
_TORCH = 0x808  # flags (a descriptor follows the data; the name is UTF-8), method 0
_MAX_COMMENT = 0xFFFF
_SAMPLES = 8
_FEW = 1024  # storages, and
_SMALL = 16 << 20  # bytes of a file, up to which all local headers are looked at
# Versions of the record layout that torch reads (caffe2/serialize/versions.h).
_VERSIONS = range(1, 11)

REMEDY = "Is the file damaged, or still being written?"


class Archive:
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
        self.name = name
        self._source = ObjectSource(file, name)
        self.size = self._source.size
        directory, offset, count = self._find_directory()
        self._directory_offset = offset
        entries = self._entries(directory, count)
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

    def bad(
        self, expected: str, got: str, offset: int, remedy: str = REMEDY
    ) -> NoReturn:
        """Raises the error that says what is wrong with the file at ``offset``."""
        raise RuntimeError(
            f"Expected {self.name} to have {expected}, got {got} at offset {offset}. "
            f"({remedy})"
        )

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
            offset = entry[1] if entry else self._directory_offset
        self.bad(f"{expected} in record {record!r}", got, offset, remedy)

    # The directory

    def _pread(self, offset: int, size: int) -> bytes:
        if not 0 <= offset <= offset + size <= self.size:
            self.bad(
                f"{size} bytes from offset {offset} on",
                f"a file of {self.size} bytes",
                offset,
            )
        return read(self._source, offset, size)

    def _find_directory(self) -> tuple[bytes, int, int]:
        """Returns the central directory, its offset and its number of entries."""
        tail_start = max(0, self.size - _MAX_COMMENT - _END.size)
        tail = self._pread(tail_start, self.size - tail_start)
        at = tail.rfind(b"PK\5\6", 0, len(tail) - _END.size + 4)
        if at < 0:
            self.bad("the directory of a zip file", "none", self.size)
        end = tail_start + at
        _, disk, first, here, count, size, offset, _ = _END.unpack_from(tail, at)
        if at >= _END64_LOCATOR.size and tail.startswith(
            b"PK\6\7", at - _END64_LOCATOR.size
        ):
            _, disk, at64, disks = _END64_LOCATOR.unpack_from(
                tail, at - _END64_LOCATOR.size
            )
            end = at64
            magic, rest, _, _, here_disk, first, here, count, size, offset = (
                _END64.unpack(self._pread(at64, _END64.size))
            )
            if magic != b"PK\6\6" or rest < _END64.size - 12:
                self.bad("a zip64 directory end", f"{magic!r} of {rest} bytes", at64)
            disk = disk or here_disk or disks != 1
        if disk or first or here != count:
            self.bad("one part", f"part {disk} of several", end)
        if offset + size > end or count * _FIXED_SIZE > size:
            self.bad(
                f"a directory of {count} records before offset {end}",
                f"one of {size} bytes",
                offset,
            )
        if offset >= tail_start:
            skip = offset - tail_start
            return tail[skip : skip + size], offset, count
        return self._pread(offset, size), offset, count

    def _entries(self, directory: bytes, count: int) -> list[Entry]:
        # NB: neighbours mostly have names of equal length, so that one struct reads a
        # whole run of entries; this is what makes the directory cheap.
        entries: list[Entry] = []
        at = 0
        while len(entries) < count:
            before, sizes = len(entries), directory[at + 28 : at + 34].ljust(6)
            name_size, extra_size, comment_size = struct.unpack("<3H", sizes)
            row = struct.Struct(f"{_FIXED}{name_size}s{extra_size}s{comment_size}x")
            rows = min(count - before, (len(directory) - at) // row.size)
            run = memoryview(directory)[at : at + rows * row.size]
            for values in row.iter_unpack(run):
                magic, kind, stored, size, same, external, header, name, extra = values
                if same != sizes or magic != b"PK\1\2":
                    break
                if external & _FOLDER:
                    self.bad(f"a record {name!r} that is no folder", "one", header)
                if extra and _U32 in (stored, size, header):
                    size, stored, header = self._wide(extra, size, stored, header)
                entries.append((name, header, size, stored, kind))
            if len(entries) == before:
                self.bad(
                    f"{count - before} more directory entries",
                    f"{directory[at : at + 4]!r}",
                    self._directory_offset + at,
                )
            at += (len(entries) - before) * row.size
        return entries

    def _wide(self, extra: bytes, *values: int) -> list[int]:
        """Returns size, stored size and header offset, from zip64's field if too wide."""
        at, wide = 0, b""
        while not wide and at + 4 <= len(extra):
            tag, length = struct.unpack_from("<2H", extra, at)
            if len(extra) < at + 4 + length:
                break
            if tag == 1:
                wide = extra[at + 4 : at + 4 + length]
            at += 4 + length
        numbers = []
        for value in values:
            if value == _U32:
                if len(wide) < 8:
                    self.bad(
                        "64-bit sizes", f"{len(wide)} bytes", self._directory_offset
                    )
                value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
            numbers.append(value)
        return numbers

    # Records

    def __contains__(self, record: str) -> bool:
        return self._folder + record.encode() in self._entry

    def read(self, record: str) -> bytes:
        """Returns the bytes of a record."""
        entry = self._get(self._folder + record.encode())
        return self._pread(self._local_start(entry), entry[2])

    def _get(self, name: bytes) -> Entry:
        entry = self._entry.get(name)
        if entry is None:
            self.bad(
                f"a record {_text(name)!r}", "none of that name", self._directory_offset
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
        alignment = self._alignment()
        entries = sorted(self._entry.values(), key=itemgetter(1))
        ends = [entry[1] for entry in entries[1:]] + [self._directory_offset]
        folder = self._folder + b"data/"
        skip = len(folder)
        for entry, end in zip(entries, ends, strict=True):
            name, header, size, stored, kind = entry
            if not name.startswith(folder):
                continue
            start = end - size - 16
            self._headers.append(header)
            if (
                kind != _TORCH
                or size != stored
                or start % alignment
                or not 0 <= start - header - 34 - len(name) < alignment
                or end >= _U32
            ):
                start = self._odd_start(entry, end, alignment)
            key = name[skip:].decode(errors="surrogateescape")
            self.starts[key], self.sizes[key] = start, size
        keys = list(self.starts)
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
        if size >= _U32 or header >= _U32:
            start = end - size - 24
            least = header + 38 + len(name) + 16 * (size >= _U32) + 8 * (header >= _U32)
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
        fixed = self._pread(header, _LOCAL.size)
        magic, _, _, method, *_, name_size, extra_size = _LOCAL.unpack(fixed)
        local_name = self._pread(header + _LOCAL.size, name_size)
        if magic != b"PK\3\4" or local_name != name or method != kind >> 16:
            got = f"{fixed + local_name[:50]!r}"
            self.bad(f"the local header of record {name!r}", got, header)
        start: int = header + _LOCAL.size + name_size + extra_size
        if start + size > self._directory_offset:
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
