"""What ``verify`` looks at where it is given a folder: the files of the checkpoint in it.

A DCP checkpoint's files hold a zip file of ``torch.save`` for each piece of a tensor, one behind the other, which
``.metadata`` tells apart; of these, too, every checksum is looked at. ``.metadata`` is a pickle, of which only the
classes that DCP itself writes are made: to verify a checkpoint runs nothing of it.
"""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import rich.filesize

from torch_ext._tools.records import Problem


_KNOWN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("pathlib._local", "WindowsPath"),
}


def files_of(path: str) -> list[str]:
    """The files of the checkpoint in the folder ``path``; a DCP checkpoint, or what is no folder, is itself."""
    if not os.path.isdir(path) or is_dcp(path):
        return [path]
    import torch_ext

    with torch_ext.enable("load_lazy"):
        from torch._load_lazy._sharded import (  # type: ignore[import-not-found]
            find_checkpoint,
        )

        found: str = find_checkpoint(path)
    return [found, *_shards(found)]


def _shards(index: str) -> list[str]:
    """The files that an index names, also where they are not there."""
    if not index.endswith(".index.json"):
        return []
    try:
        with open(index, "rb") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
        folder = os.path.dirname(index)
        # NB: what leads out of the folder, the check of the index itself refuses.
        return [os.path.join(folder, n) for n in names if n == os.path.basename(n)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []  # likewise


def is_dcp(path: str) -> bool:
    """Whether ``path`` is the folder of a DCP checkpoint."""
    return os.path.exists(os.path.join(path, ".metadata"))


def verify_dcp(
    path: str, advance: Callable[[int, int], object]
) -> tuple[list[Problem], str]:
    """The problems of the DCP checkpoint ``path``, and what was looked at, in one line."""
    try:
        with open(os.path.join(path, ".metadata"), "rb") as file:
            entries: dict[Any, Any] = _Unpickler(file).load().storage_data
        pieces = sorted(
            entries.items(), key=lambda item: (item[1].relative_path, item[1].offset)
        )
    except Exception as e:  # it is a pickle, and of any class
        return [Problem(".metadata", None, f"cannot be read: {e}")], "1 bad"
    total = sum(info.length for _, info in pieces)
    problems: list[Problem] = []
    for index, info in pieces:
        what = _problem_of(path, info)
        if what:
            where = f"{index.fqn} of {info.relative_path}"
            problems.append(Problem(where, info.offset, what))
        advance(info.length, total)
    summary = f"{len(pieces):,} pieces, {rich.filesize.decimal(total)}"
    if problems:
        return problems, f"{summary}, {len(problems):,} bad"
    return [], f"{summary}, all checksums are right"


def _problem_of(path: str, info: Any) -> str | None:
    if info.transform_descriptors:
        return None  # compressed or the like; its bytes alone do not tell
    try:
        with (
            open(os.path.join(path, info.relative_path), "rb") as file,
            zipfile.ZipFile(io.BufferedReader(_Part(file, info))) as archive,
        ):
            bad = archive.testzip()
            return None if bad is None else f"record {bad!r} has another checksum"
    # NB: zipfile has errors of several classes for what is no zip file.
    except Exception as e:
        return str(e)


class _Unpickler(pickle.Unpickler):
    """Makes the classes of DCP's metadata, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        import torch
        from torch.distributed.checkpoint import filesystem, metadata

        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _KNOWN:
            return super().find_class(module, name)
        # NB: by the class's own module, since these two import others.
        for home in (filesystem, metadata):
            found = vars(home).get(name)
            if isinstance(found, type) and found.__module__ == module == home.__name__:
                return found
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which DCP does not write"
        )


class _Part(io.RawIOBase):
    """One piece of a file, as a file."""

    def __init__(self, file: BinaryIO, info: Any) -> None:
        self._fd, self._start, self._size = file.fileno(), info.offset, info.length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}
        self._at = max(0, start[whence] + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)[: max(0, self._size - self._at)]
        count = os.preadv(self._fd, [room], self._start + self._at) if room else 0
        self._at += count
        return count
