"""Files in each format that torch.load opens, and ways to hand them to it."""

import io
import os
import tempfile
import zipfile
from pathlib import Path

import torch
from torch.utils.serialization import config as serialization_config


def zipped(state, alignment=64):
    with serialization_config.patch("save.storage_alignment", alignment):
        file = io.BytesIO()
        torch.save(state, file)
    return file.getvalue()


def rewritten(state, byteorder=b"little"):
    """The zip file as another writer makes it."""
    target = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(zipped(state))) as source,
        zipfile.ZipFile(target, "w") as archive,
    ):
        for name in source.namelist():
            data = byteorder if name.endswith("/byteorder") else source.read(name)
            archive.writestr(name, data)
    return target.getvalue()


def swapped(state):
    return rewritten(state, b"big")


def legacy(state):
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


FORMATS = [zipped, lambda state: zipped(state, 4096), rewritten, swapped, legacy]


class Minimal:
    """A file object with no more than torch.load asks for, which counts what is read."""

    def __init__(self, data):
        self._file = io.BytesIO(data)
        self.count = 0

    def read(self, size=-1):
        data = self._file.read(size)
        self.count += len(data)
        return data

    def readline(self):
        data = self._file.readline()
        self.count += len(data)
        return data

    def seek(self, *args):
        return self._file.seek(*args)

    def tell(self):
        return self._file.tell()


class ShortReads(io.BytesIO):
    """A raw file may return less than it is asked for."""

    def readinto(self, buffer):
        return super().readinto(memoryview(buffer)[: 1 + len(buffer) // 2])


class Opened:
    """Ways to hand the bytes of a file to torch.load, below a folder."""

    def __init__(self, folder):
        self.path = os.path.join(folder, "x.pt")

    def path_(self, data):
        Path(self.path).write_bytes(data)
        return self.path

    def pathlike(self, data):
        return Path(self.path_(data))

    def bytes_io(self, data):
        return io.BytesIO(data)

    def minimal(self, data):
        return Minimal(data)

    def short_reads(self, data):
        return ShortReads(data)

    def file(self, data):
        return open(self.path_(data), "rb")

    def raw_file_at_7(self, data):
        file = open(self.path_(b"another" + data), "rb", buffering=0)
        file.seek(7)
        return file

    def bytes_io_at_7(self, data):
        file = io.BytesIO(b"another" + data)
        file.seek(7)
        return file

    def unnamed_file(self, data):
        file = tempfile.TemporaryFile()
        file.write(data)
        file.seek(0)
        return file

    def zip_member(self, data):
        outer = io.BytesIO()
        with zipfile.ZipFile(outer, "w") as archive:
            archive.writestr("x.pt", data)
        return zipfile.ZipFile(outer).open("x.pt")


PATHS = [Opened.path_, Opened.pathlike]
OBJECTS = [
    *(Opened.bytes_io, Opened.minimal, Opened.file),
    *(Opened.raw_file_at_7, Opened.bytes_io_at_7, Opened.unnamed_file),
    Opened.zip_member,
]


class Counted:
    """Counts what is read of a file object."""

    def __init__(self, file):
        self._file = file
        self.count = 0
        self.seek, self.tell, self.readline = file.seek, file.tell, file.readline

    def read(self, size=-1):
        data = self._file.read(size)
        self.count += len(data)
        return data
