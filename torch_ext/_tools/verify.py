"""``python -m torch_ext verify FILE...``: whether files of weights, or folders of them, hold what was written.

Of a zip file of ``torch.save``, the CRC32 of every record, which torch writes and never looks at, by all cores. Other
formats have no checksums: of these, and of a file that was saved without, only the index is checked, and the line
that is printed says so.
"""

import os
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import rich.filesize
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from torch_ext._tools.crc import combine
from torch_ext._tools.folder import files_of, is_dcp, verify_dcp
from torch_ext._tools.records import Problem, read_records, Record


_PART = 8 << 20  # of a record, for one thread
# Read at a time, so that it is still in the processor's cache when it is summed up.
_BUFFER = 256 << 10

_local = threading.local()


def main(paths: Sequence[str]) -> int:
    """Verify ``paths``, print a line for each bad record and for each file; returns the exit status."""
    status = 0
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        for path in paths:
            try:
                files = files_of(path)
            except OSError as e:
                print(f"{path}: cannot be read: {e.strerror or e}")
                status = 1
                continue
            for file in files:
                status |= _report(file, bar)
    return status


def _report(path: str, bar: Progress) -> int:
    task = bar.add_task(Path(path).name, total=None)
    status = 0
    try:
        problems, summary = verify(path, partial(_show, bar, task))
    except OSError as e:
        problems, summary = [], f"cannot be read: {e.strerror or e}"
        status = 1
    bar.remove_task(task)
    for line in (*problems, summary):
        print(f"{path}: {line}")
    return status | bool(problems)


def _show(bar: Progress, task: TaskID, advance: int, total: int) -> None:
    bar.update(task, advance=advance, total=total)


def verify(
    path: str, advance: Callable[[int, int], object] = lambda *_: None
) -> tuple[list[Problem], str]:
    """The problems of ``path``, and what was looked at, in one line.

    Args:
        path: of a file, or of the folder of a DCP checkpoint
        advance: called from several threads with numbers of bytes: that have been looked at since it was called
            before, and that there are
    """
    if is_dcp(path):
        return verify_dcp(path, advance)
    with open(path, "rb", buffering=0) as file:
        if file.read(2) != b"PK":
            return _verify_index(path)
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as e:
            size = os.fstat(file.fileno()).st_size
            what = f"no directory of a zip file, as if cut off ({e})"
            return [Problem(None, size, what)], "1 bad"
        with archive:
            return _verify_zip(file.fileno(), archive, advance)


def _verify_zip(
    fd: int, archive: zipfile.ZipFile, advance: Callable[[int, int], object]
) -> tuple[list[Problem], str]:
    records, problems = read_records(fd, archive)
    contents = [record for record in records if _size(record)]
    # NB: of what is saved with config.save.compute_crc32 off, all are 0.
    has_checksums = any(r.info.CRC for r in contents) or not contents
    if has_checksums:
        problems += _verify_data(fd, archive, contents, advance)
    summary = f"{len(archive.infolist()):,} records, {_text(sum(map(_size, contents)))}"
    if problems:
        bad = len({problem.record for problem in problems})
        return sorted(problems, key=lambda p: p.offset or 0), f"{summary}, {bad:,} bad"
    if has_checksums:
        return [], f"{summary}, all checksums are right"
    return [], f"{summary}, without checksums: their headers alone are right"


def _verify_index(path: str) -> tuple[list[Problem], str]:
    """Check what has no checksums, by loading it without its data."""
    import torch

    import torch_ext

    with torch_ext.enable("load_lazy"):
        try:
            torch.load(path, map_location="meta", lazy=True)
        except Exception as e:
            return [Problem(None, None, str(e).partition("\n")[0])], "1 bad"
    return [], "a format without checksums: its index alone is right"


def _verify_data(
    fd: int,
    archive: zipfile.ZipFile,
    records: Sequence[Record],
    advance: Callable[[int, int], object],
) -> list[Problem]:
    """The records whose data have another checksum than the directory says."""
    total = sum(map(_size, records))

    def check(parts: Sequence[tuple[Record, int, int]]) -> list[int | Problem]:
        found = [_crc_of(fd, archive, *part) for part in parts]
        advance(sum(size for _, _, size in parts), total)
        return found

    problems: list[Problem] = []
    work = list(_work(records))
    crc = 0
    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        for parts, found in zip(work, threads.map(check, work), strict=True):
            for (record, start, size), part in zip(parts, found, strict=True):
                if isinstance(part, Problem):
                    problems.append(part)
                    continue
                crc = combine(crc, part, size) if start else part
                if start + size == _size(record) and crc != record.info.CRC:
                    what = f"its data have the checksum {crc:08x}, and should have {record.info.CRC:08x}"
                    problems.append(record.problem(what))
    finally:
        threads.shutdown(cancel_futures=True)  # after Ctrl-C, the rest is not read
    return problems


def _work(records: Sequence[Record]) -> Iterator[list[tuple[Record, int, int]]]:
    """Parts of records (where each begins in its record, its size), about as much at a time as a thread is to take."""
    batch: list[tuple[Record, int, int]] = []
    room = _PART
    for record in records:
        size = _size(record)
        # NB: what is compressed can only be read in order.
        step = _PART if record.is_stored else size
        for start in range(0, size, step):
            batch.append((record, start, min(step, size - start)))
            room -= batch[-1][2]
            if room <= 0 or len(batch) == 1000:
                yield batch
                batch, room = [], _PART
    if batch:
        yield batch


def _crc_of(
    fd: int, archive: zipfile.ZipFile, record: Record, start: int, size: int
) -> int | Problem:
    if not record.is_stored or record.info.flag_bits & 1:
        return _crc_of_compressed(archive, record)
    if not hasattr(_local, "buffer"):
        _local.buffer = memoryview(bytearray(_BUFFER))
    crc, at, end = 0, record.start + start, record.start + start + size
    while at < end:
        count = os.preadv(fd, [_local.buffer[: end - at]], at)
        if not count:
            return record.problem("the end of the file", at)
        crc = zlib.crc32(_local.buffer[:count], crc)
        at += count
    return crc


def _crc_of_compressed(archive: zipfile.ZipFile, record: Record) -> int | Problem:
    crc = size = 0
    try:
        with archive.open(record.info) as file:
            while data := file.read(_BUFFER):
                crc = zlib.crc32(data, crc)
                size += len(data)
    # NB: each decompressor, and the lack of one, has errors of its own.
    except Exception as e:
        return record.problem(str(e))
    if size != record.info.file_size:
        return record.problem(
            f"{size} bytes in it, and should be {record.info.file_size}"
        )
    return crc


def _size(record: Record) -> int:
    return record.info.file_size


def _text(size: int) -> str:
    return rich.filesize.decimal(size)
