# Owner(s): ["module: serialization"]
"""Where the bytes of torch.load(f, lazy=True) come from, and what may happen to it meanwhile."""

import gzip
import io
import os
import pickle
import re
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from load_lazy_case import LazyTestCase
from load_lazy_files import OBJECTS, Opened, zipped
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
)


class TestLoadLazySource(LazyTestCase):
    def setUp(self):
        super().setUp()
        self.path = Opened(self.folder).path_(zipped({"x": torch.arange(1000.0)}))
        self.expected = torch.arange(1000.0)

    def read_error(self, lazy):
        with self.assertRaises(RuntimeError) as caught:
            lazy["x"] + 1
        text = str(caught.exception).replace(self.folder, "")
        return re.sub(r"offset \d+", "offset N", text)

    def test_changed_files(self):
        data = Path(self.path).read_bytes()

        def rewrite():
            with open(self.path, "r+b") as file:
                file.write(data)
            os.utime(self.path, ns=(1, 1))

        def replace():
            Path(self.path + ".new").write_bytes(data)
            os.replace(self.path + ".new", self.path)

        def error(change):
            Path(self.path).write_bytes(data)
            lazy = torch.load(self.path, lazy=True, mmap=False)
            change()
            return self.read_error(lazy)

        for change, got in (
            (rewrite, "a later one"),
            (replace, "another file"),
            (lambda: os.truncate(self.path, 700), "a later one"),
            (lambda: os.unlink(self.path), "no file of that name"),
        ):
            self.assertEqual(
                error(change),
                f"Expected /x.pt to be as it was when it was opened, got {got} at offset "
                "N. (Was it changed, moved or closed while tensors of it were unread?)",
            )

    def test_changed_objects(self):
        file = io.BytesIO(Path(self.path).read_bytes())
        lazy = torch.load(file, lazy=True)
        file.truncate(700)
        self.assertRegex(self.read_error(lazy), "Expected <BytesIO> .* got its end at ")
        file.close()
        self.assertRegex(
            self.read_error(lazy), "Expected <BytesIO> .* a closed file at"
        )

    def test_other_working_folder(self):
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(self.folder)
        lazy = torch.load("x.pt", lazy=True, mmap=False)
        os.chdir(here)
        self.assertEqual(lazy["x"], self.expected)

    @parametrize("give", OBJECTS)
    def test_threads(self, give):
        state = {f"{i}": torch.full((5000,), i) for i in range(40)}
        f = give(Opened(self.folder), zipped(state))
        lazy = torch.load(f, lazy=True)
        with ThreadPoolExecutor(4) as pool:
            sums = list(pool.map(lambda i: int(lazy[f"{i}"].sum()), range(40)))
        self.assertEqual(sums, [5000 * i for i in range(40)])

    @unittest.skipIf(not hasattr(os, "fork"), "needs os.fork")
    @parametrize("give", [Opened.bytes_io, Opened.raw_file_at_7, Opened.path_])
    def test_fork(self, give):
        f = give(Opened(self.folder), zipped({"x": self.expected}))
        mmap = {"mmap": False} if give is Opened.path_ else {}
        lazy = torch.load(f, lazy=True, **mmap)
        child = os.fork()
        if not child:
            os._exit(int(float(lazy["x"][999]) != 999))
        self.assertEqual(lazy["x"], self.expected)
        self.assertEqual(os.waitpid(child, 0)[1], 0)

    def test_position_of_a_local_file(self):
        """Forked processes share it, and so a read must not move it."""
        with tempfile.TemporaryFile() as file:
            file.write(zipped({"x": self.expected}))
            file.seek(0)
            lazy = torch.load(file, lazy=True)
            file.seek(7)
            self.assertEqual(lazy["x"], self.expected)
            self.assertEqual(os.lseek(file.fileno(), 0, os.SEEK_CUR), 7)

    def test_buffered_reader_of_other_bytes(self):
        """Its descriptor is that of the compressed file."""
        with gzip.open(self.path + ".gz", "wb") as file:
            file.write(zipped({"x": self.expected}))
        with io.BufferedReader(gzip.open(self.path + ".gz")) as file:
            lazy = torch.load(file, lazy=True)
            self.assertEqual(lazy["x"], self.expected)

    def test_pickling_a_source(self):
        from torch._load_lazy._source import FileSource, ObjectSource, read

        source = pickle.loads(pickle.dumps(FileSource(self.path)))
        self.assertEqual(read(source, 0, 4), b"PK\3\4")
        with self.assertRaisesRegex(TypeError, "Did you mean to load from a path"):
            pickle.dumps(ObjectSource(io.BytesIO(b"")))


instantiate_parametrized_tests(TestLoadLazySource)

if __name__ == "__main__":
    run_tests()
