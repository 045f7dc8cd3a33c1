"""What is no checkpoint at all: other formats, and what a path may lead to besides a file."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle as python_pickle
import random
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from load_lazy_corpus.build import archive, dictionary, pickle, tensor
from load_lazy_corpus.case import (
    Case,
    either,
    LOADS,
    records,
    WEIGHTS_ONLY,
    zipped,
)


FOREIGN = (
    "the beginning of a file that torch.save wrote|the directory of a zip file|"
    f"legacy .tar|TorchScript|{WEIGHTS_ONLY}|^RuntimeError: Expected|EOFError|"
    "Invalid magic number"
)


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name, data in files.items():
            target.writestr(name, data)
    return buffer.getvalue()


def _tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as target:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            target.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


GOOD = zipped(pickle(dictionary(w=tensor())))
CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "one_zero": b"\0",
    "zeros": bytes(100_000),
    "ones": b"\xff" * 100_000,
    "random": random.Random(0).randbytes(100_000),
    "newline": b"\n",
    "text": b"hello, world\n" * 100,
    "html": b"<!DOCTYPE html><html>404</html>",
    "git_lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
    "json": json.dumps({"w": [1, 2]}).encode(),
    "python": b"import os\nos.system('touch was_here')\n",
    "shell": b"#!/bin/sh\ntouch was_here\n",
    "yaml": b"w:\n  - 1\n",
    "csv": b"1,2,3\n" * 100,
    "utf16": "hello".encode("utf-16"),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "jpeg": b"\xff\xd8\xff\xe0" + bytes(100),
    "pdf": b"%PDF-1.7\n" + bytes(100),
    "elf": b"\x7fELF\2\1\1" + bytes(100),
    "exe": b"MZ" + bytes(100),
    "sqlite": b"SQLite format 3\0" + bytes(100),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "gguf": b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + bytes(100),
    "npy": b"\x93NUMPY\1\0v\0"
    + b"{'descr': '<f4', 'fortran_order': False, 'shape': (4,)}"
    + bytes(99),
    "protobuf": b"\x08\x07\x12\x07pytorch" + bytes(100),
    "parquet": b"PAR1" + bytes(100) + b"PAR1",
    "arrow": b"ARROW1\0\0" + bytes(100),
    "gzip": gzip.compress(GOOD, mtime=0),
    "bzip2": bz2.compress(GOOD),
    "xz": lzma.compress(GOOD),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(100),
    "seven_zip": b"7z\xbc\xaf\x27\x1c" + bytes(100),
    "rar": b"Rar!\x1a\7\1\0" + bytes(100),
    "zip_magic": b"PK\3\4",
    "zip_magic_and_zeros": b"PK\3\4" + bytes(1000),
    "zip_empty": b"PK\5\6" + bytes(18),
    "zip_spanned": b"PK\7\10" + GOOD,
    "zip_of_text": zip_of({"a.txt": b"hello"}),
    "zip_in_folder": zip_of({"a/b.txt": b"hello"}),
    "zip_of_pickle": zip_of({"a/data.pkl": b"\x80\2}."}),
    "zip_of_version": zip_of({"a/version": b"3\n"}),
    "npz": zip_of({"w.npy": b"\x93NUMPY\1\0"}),
    "docx": zip_of({"[Content_Types].xml": b"<x/>", "word/document.xml": b"<x/>"}),
    "jar": zip_of({"META-INF/MANIFEST.MF": b"Manifest-Version: 1.0"}),
    "torchscript_cut": zip_of({"a/constants.pkl": b"\x80\2).", "a/version": b"3\n"}),
    "torchscript_no_code": archive([*records().values(), *records(b"").values()][:7]),
    "tar_empty": _tar_of({}),
    "tar_of_text": _tar_of({"a.txt": b"hello"}),
    "tar_of_members": _tar_of({"storages": b"", "tensors": b"", "pickle": b""}),
    "tar_parent": _tar_of({"../storages": b"", "tensors": b"", "pickle": b""}),
    "tar_gz": _tar_of({"storages": b"", "tensors": b"", "pickle": b""}, "w:gz"),
    "safetensors_empty": struct.pack("<Q", 2) + b"{}",
    "raw_storage": torch.arange(64.0).numpy().tobytes(),
}


def _contents() -> Iterator[Case]:
    for what, data in CONTENTS.items():
        stock = not what.startswith("safetensors")  # torch.load goes by the name
        yield Case(f"foreign/{what}", data, either(FOREIGN), stock)
        error = f"{FOREIGN}|UnpicklingError|ValueError|KeyError|PytorchStreamReader"
        yield Case(f"foreign_trusted/{what}", data, either(error), stock, False)


def _named(name: str, data: bytes) -> Callable[[Path], object]:
    def write(path: Path) -> str:
        path = path.with_name(name)
        path.write_bytes(data)
        return str(path)

    return write


def _fifo(path: Path) -> str:
    os.mkfifo(path)
    return str(path)


def _socket(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)  # in the present folder: a path may be too long
    return str(path)


def _folder(path: Path) -> str:
    path.mkdir()
    return str(path)


def _link(target: str) -> Callable[[Path], object]:
    def write(path: Path) -> str:
        path.symlink_to(target)
        return str(path)

    return write


def _linked(path: Path) -> str:
    path.write_bytes(GOOD)
    link = path.with_name("link.pt")
    link.symlink_to(path)
    return str(link)


def _sparse(path: Path) -> str:
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    return str(path)


def _sparse_after(path: Path) -> str:
    path.write_bytes(GOOD)
    with open(path, "r+b") as file:
        file.truncate(1 << 40)
    return str(path)


NO_FILE = "regular file|got a folder without|FileNotFoundError|IsADirectoryError"
PATHS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (str, "^FileNotFoundError"),
    "empty_name": (lambda path: "", "^FileNotFoundError"),
    "nul": (lambda path: f"{path}\0x", "^ValueError: embedded null"),
    "too_long": (lambda path: f"{path}{'x' * 5000}", "^OSError: .*too long"),
    "folder": (_folder, NO_FILE),
    "file_as_folder": (lambda path: f"{_linked(path)}/x.pt", "^NotADirectoryError"),
    "folder_slash": (lambda path: f"{_folder(path)}/", NO_FILE),
    "fifo": (_fifo, "regular file"),
    "socket": (_socket, "regular file"),
    "null": (lambda path: "/dev/null", "regular file"),
    "zero": (lambda path: "/dev/zero", "regular file"),
    "random": (lambda path: "/dev/urandom", "regular file"),
    "proc": (lambda path: "/proc/self/status", "the beginning of a file|^OSError"),
    "proc_memory": (
        lambda path: "/proc/self/mem",
        "the beginning of a file|EOFError|OSError",
    ),
    "link_to_nothing": (_link("nothing"), "^FileNotFoundError"),
    "link_to_itself": (_link("bad.pt"), "^OSError: .*symbolic links"),
    "link_to_null": (_link("/dev/null"), "regular file"),
    "link_to_good": (_linked, LOADS),
    "hole_of_1_tib": (_sparse, "the beginning of a file|legacy .tar"),
    "hole_after_good": (_sparse_after, "the directory of a zip file"),
    "named_safetensors": (_named("x.safetensors", GOOD), "a header"),
    "named_index": (_named("x.index.json", GOOD), "an index in JSON"),
}
# On these torch.load waits, or reads until memory ends.
_WAITS = ("fifo", "zero", "random", "hole_of_1_tib", "hole_after_good")
_NO_STOCK = (*_WAITS, "named_index")


def cases() -> Iterator[Case]:
    """Yields what is no checkpoint."""
    yield from _contents()
    for what, (write, error) in PATHS.items():
        yield Case(f"path/{what}", write, error, what not in _NO_STOCK)
    for protocol in range(6):
        raw = python_pickle.dumps({"w": [1, 2.5, "x"]}, protocol)
        yield Case(f"raw_pickle/{protocol}", raw, either(FOREIGN))
