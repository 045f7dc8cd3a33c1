"""The records of a zip file as its directory and, once more, as their own headers tell of them.

The directory is read by Python's ``zipfile``, on purpose not by the reader that loads lazily: who checks a file should
not share the mistakes of who reads it. Law: of a file that is a zip file at all, each record is judged by itself, so
that one bad record does not hide the next.
"""

import os
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


_LOCAL = struct.Struct("<4s5H3I2H")
_HAS_DESCRIPTOR, _ENCRYPTED = 1 << 3, 1
_COMPARED = _HAS_DESCRIPTOR | _ENCRYPTED
_U32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file, and where."""

    record: str | None
    offset: int | None
    what: str

    def __str__(self) -> str:
        record = f"record {self.record!r} " if self.record is not None else ""
        offset = f"at offset {self.offset}: " if self.offset is not None else ""
        return f"{record}{offset}{self.what}"


@dataclass(frozen=True)
class Record:
    """One record: what the directory says of it, and where its data start."""

    info: zipfile.ZipInfo
    start: int

    def problem(self, what: str, offset: int | None = None) -> Problem:
        """The problem ``what`` of this record."""
        return Problem(
            self.info.orig_filename, self.start if offset is None else offset, what
        )

    @property
    def is_stored(self) -> bool:
        """Whether the record's data are its contents."""
        return self.info.compress_type == zipfile.ZIP_STORED


def read_records(
    fd: int, archive: zipfile.ZipFile
) -> tuple[list[Record], list[Problem]]:
    """The records whose headers agree with the directory, and the problems of the others.

    Args:
        fd: the open file
        archive: the same file
    """
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    ends = [info.header_offset for info in infos[1:]] + [archive.start_dir]
    records, problems = [], list(_problems_of_names(infos))
    for info, end in zip(infos, ends, strict=True):
        found = _read_record(fd, info, end)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            records.append(found)
    return records, problems


def _problems_of_names(infos: Sequence[zipfile.ZipInfo]) -> Iterator[Problem]:
    by_name = sorted(infos, key=lambda info: (info.filename, info.header_offset))
    for one, other in pairwise(by_name):
        if one.filename == other.filename:
            what = f"a second record of the name at offset {one.header_offset}"
            yield Problem(other.filename, other.header_offset, what)


def _read_record(fd: int, info: zipfile.ZipInfo, end: int) -> Record | Problem:
    at = info.header_offset
    # NB: not all that a directory can say is an offset to the system.
    fixed = os.pread(fd, _LOCAL.size, at) if 0 <= at < end else b""
    if len(fixed) < _LOCAL.size or not fixed.startswith(b"PK\3\4"):
        return Problem(info.orig_filename, at, f"no header there, but {fixed[:4]!r}")
    _, _, flags, method, _, _, *sizes = _LOCAL.unpack(fixed)
    crc, stored, size, name_size, extra_size = sizes
    start = at + _LOCAL.size + name_size + extra_size
    record = Record(info, start)
    name = os.pread(fd, name_size, at + _LOCAL.size)
    encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
    if name.decode(encoding, "replace") != info.orig_filename:
        return record.problem(f"its header has the name {name!r}", at)
    if (flags & _COMPARED, method) != (info.flag_bits & _COMPARED, info.compress_type):
        return record.problem("its header has other flags, or another method", at)
    if record.is_stored and info.compress_size != info.file_size:
        what = f"it is stored as it is, {info.compress_size} bytes for {info.file_size}"
        return record.problem(what)
    if start + info.compress_size > end:
        return record.problem(
            f"its {info.compress_size} bytes go beyond offset {end}, where the next one begins"
        )
    if flags & _HAS_DESCRIPTOR:
        after = start + info.compress_size
        if not _has_descriptor(os.pread(fd, 24, after), info):
            return record.problem(
                "no descriptor behind it that fits the directory", after
            )
    elif crc != info.CRC or not (
        _is_same(stored, info.compress_size) and _is_same(size, info.file_size)
    ):
        return record.problem("its header has another size or checksum", at)
    return record


def _is_same(short: int, size: int) -> bool:
    return short in (size, _U32)  # the latter stands for a field of 64 bits


def _has_descriptor(data: bytes, info: zipfile.ZipInfo) -> bool:
    # The signature is optional, and sizes may have 64 bits.
    body = data.removeprefix(b"PK\7\x08")
    sizes = info.compress_size, info.file_size
    return any(
        body[: 4 + 2 * width]
        == b"".join(
            [
                info.CRC.to_bytes(4, "little"),
                *(n.to_bytes(width, "little") for n in sizes),
            ]
        )
        for width in (4, 8)
        if max(sizes) < 1 << 8 * width
    )
