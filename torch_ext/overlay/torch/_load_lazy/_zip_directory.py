"""The central directory of a zip file.

Law: what it says of the archive as a whole fits the file, or an error names file and offset;
what it says of a record is only told, and for the reader of records to judge.

Not here: archives in several parts, folders.
"""

import struct
from typing import Any, NoReturn

from torch._load_lazy._source import ObjectSource, read


# What the directory says of a record: name, offset of the local header, size, stored size,
# and flags and method as one number. (A plain tuple: there may be 100,000 of them.)
Entry = tuple[bytes, int, int, int, int]

_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_FIXED = "<4s4xI8xII6sH2xII"  # a directory entry up to its name
_FIXED_SIZE = struct.calcsize(_FIXED)
_MAGIC = b"PK\1\2"

U32 = 0xFFFFFFFF  # says that the number is elsewhere
_FOLDER = 0x10
_MAX_COMMENT = 0xFFFF

REMEDY = "Is the file damaged, or still being written?"


class Directory:
    """The entries of the zip file ``file``, which errors call ``name``.

    Args:
        file: a seekable file object, at the start of the zip file
        name: what errors call the file

    Attributes:
        size: of the file
        entries: in the directory's order
        directory_offset: where the directory starts

    Raises:
        RuntimeError: if the file is not a zip file
    """

    def __init__(self, file: Any, name: str) -> None:
        self.name = name
        self._source = ObjectSource(file, name)
        self.size = self._source.size
        directory, self.directory_offset, count = self._find()
        self.entries = self._read(directory, count)

    def bad(
        self, expected: str, got: str, offset: int, remedy: str = REMEDY
    ) -> NoReturn:
        """Raises the error that says what is wrong with the file at ``offset``."""
        raise RuntimeError(
            f"Expected {self.name} to have {expected}, got {got} at offset {offset}. "
            f"({remedy})"
        )

    def pread(self, offset: int, size: int) -> bytes:
        """Returns ``size`` bytes from offset ``offset`` on."""
        if not 0 <= offset <= offset + size <= self.size:
            self.bad(
                f"{size} bytes from offset {offset} on",
                f"a file of {self.size} bytes",
                offset,
            )
        return read(self._source, offset, size)

    def _find(self) -> tuple[bytes, int, int]:
        """Returns the central directory, its offset and its number of entries."""
        tail_start = max(0, self.size - _MAX_COMMENT - _END.size)
        tail = self.pread(tail_start, self.size - tail_start)
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
                _END64.unpack(self.pread(at64, _END64.size))
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
        return self.pread(offset, size), offset, count

    def _read(self, directory: bytes, count: int) -> list[Entry]:
        # NB: neighbours mostly have names of equal length, so that one struct reads a
        # whole run of entries; this is what makes the directory cheap.
        entries: list[Entry] = []
        at = 0
        while len(entries) < count:
            before, lengths = len(entries), directory[at + 28 : at + 34].ljust(6)
            name_size, extra_size, comment_size = struct.unpack("<3H", lengths)
            row = struct.Struct(f"{_FIXED}{name_size}s{extra_size}s{comment_size}x")
            rows = min(count - before, (len(directory) - at) // row.size)
            run = memoryview(directory)[at : at + rows * row.size]
            for values in row.iter_unpack(run):
                magic, kind, stored, size, same, disk, external, header, name, extra = (
                    values
                )
                if same != lengths or magic != _MAGIC:
                    break
                if external & _FOLDER or disk > 1:
                    what = "a folder" if disk <= 1 else f"one in part {disk} of several"
                    self.bad(f"a record {name!r} of bytes in this file", what, header)
                if extra and U32 in (stored, size, header):
                    size, stored, header = self._wide(extra, size, stored, header)
                entries.append((name, header, size, stored, kind))
            if len(entries) == before:
                self.bad(
                    f"{count - before} more directory entries",
                    f"{directory[at : at + 4]!r}",
                    self.directory_offset + at,
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
            if value == U32:
                if len(wide) < 8:
                    self.bad(
                        "64-bit sizes", f"{len(wide)} bytes", self.directory_offset
                    )
                value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
            numbers.append(value)
        return numbers
