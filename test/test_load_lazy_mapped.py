# Owner(s): ["module: serialization"]
"""torch.load(path, lazy=True) maps the file: what that costs, and what files it takes."""

import contextlib
import gc
import os
import unittest
import warnings
import zipfile
from pathlib import Path

import torch
from load_lazy_case import described, LazyTestCase
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    IS_LINUX,
    parametrize,
    run_tests,
)
from torch.utils.serialization import config as serialization_config


class TestLoadLazyMapped(LazyTestCase):
    # Memory

    def mapped(self):
        """Size and resident part in bytes of what is mapped of the file, or None."""
        with open("/proc/self/smaps") as smaps:
            text = smaps.read()
        parts = [part for part in text.split("\n") if self.path in part]
        if not parts:
            return None
        fields = text.split(parts[0])[1].split("\n")[1:]
        sizes = [f.split()[1] for f in fields if f.startswith(("Size:", "Rss:"))]
        return [1024 * int(size) for size in sizes[:2]]

    @unittest.skipIf(not IS_LINUX, "reads /proc")
    def test_reads_no_data(self):
        self.save({str(i): torch.ones(1 << 18) for i in range(16)})
        torch.load(self.path, lazy=True)
        with open("/proc/self/io") as io_:
            before = int(io_.readline().split()[1])
            lazy = torch.load(self.path, lazy=True)
            io_.seek(0)
            after = int(io_.readline().split()[1])
        self.assertLess(after - before, 100 << 10)
        size, resident = self.mapped()
        self.assertGreaterEqual(size, 16 << 20)
        self.assertEqual(resident, 0)
        self.assertEqual(lazy["7"][1000], 1)
        self.assertTrue(0 < self.mapped()[1] < 1 << 20)

    @unittest.skipIf(not IS_LINUX, "reads /proc")
    def test_mapping_ends_with_its_last_tensor(self):
        fds = set(os.listdir("/proc/self/fd"))
        lazy = torch.load(
            self.save({"x": torch.ones(9), "y": [torch.ones(9)]}), lazy=True
        )
        self.assertEqual(set(os.listdir("/proc/self/fd")), fds)
        os.unlink(self.path)
        row = lazy["y"][0][3:]
        gc.disable()
        self.addCleanup(gc.enable)
        del lazy
        self.assertIsNotNone(self.mapped())
        self.assertEqual(row, torch.ones(6))
        del row
        self.assertIsNone(self.mapped())

    @unittest.skipIf(not IS_LINUX, "needs sparse files, and MAP_NORESERVE")
    def test_larger_than_memory(self):
        with FakeTensorMode(), skip_data(materialize_fake_tensors=True):
            fake = [
                torch.empty(n, dtype=torch.int8) for n in (9, 1 << 36, 9, 1 << 33, 9)
            ]
            self.save({str(i): t for i, t in enumerate(fake)})
        with self.by_itself():
            lazy = torch.load(self.path, lazy=True)
        lazy["1"][-1] = 1
        self.assertEqual([int(t[-1]) for t in lazy.values()], [0, 1, 0, 0, 0])
        reader = torch._C.PyTorchFileReader(self.path)
        first = lazy["0"].data_ptr() - reader.get_record_offset("data/0")
        for name, tensor in lazy.items():
            offset = reader.get_record_offset(f"data/{name}")
            self.assertEqual(tensor.data_ptr() - first, offset)

    def test_writes_do_not_reach_the_file(self):
        before = Path(self.save({"x": torch.ones(9), "y": torch.ones(9)})).read_bytes()
        lazy = torch.load(self.path, lazy=True)
        lazy["x"].add_(1)
        self.assertEqual(lazy["x"], torch.full((9,), 2.0))
        self.assertEqual(torch.load(self.path, lazy=True)["x"], torch.ones(9))
        self.assertEqual(Path(self.path).read_bytes(), before)

    # Other writers

    @parametrize("alignment", [1, 4096])
    def test_alignment(self, alignment):
        with serialization_config.patch("save.storage_alignment", alignment):
            path = self.save({str(i): torch.full((i,), i) for i in range(20)})
        with self.by_itself():
            self.assertLoadsAlike(path)

    def test_rewritten_file(self):
        self.save({str(i): torch.full((i,), i) for i in range(20)})
        with self.by_itself():
            self.assertLoadsAlike(self.rewrite())

    # Bad files

    def test_records(self):
        self.save({"x": torch.ones(4)})
        self.assertExpectedInline(
            self.load_error_text(self.rewrite({"data/0": b"\0" * 20})),
            """\
RuntimeError: Expected /x.pt.zip to have 16 bytes in record 'data/0', got 20
bytes at offset 349. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            self.load_error_text(self.rewrite({"data/0": b"\0" * 9})),
            """\
RuntimeError: Expected /x.pt.zip to have 16 bytes in record 'data/0', got 9
bytes at offset 349. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            self.load_error_text(self.rewrite(without=["data/0"])),
            """\
RuntimeError: Expected /x.pt.zip to have 16 bytes in record 'data/0', got no
such record at offset 484. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            self.load_error_text(self.rewrite(without=["data.pkl"])),
            """\
RuntimeError: Expected /x.pt.zip to have a record 'x/data.pkl', got none of that
name at offset 336. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            self.load_error_text(self.rewrite({"version": b"99"})),
            """\
RuntimeError: Expected /x.pt.zip to have a record 'version' from 1 to 10, got
b'99' at offset 403. (Was it written by a newer PyTorch?)""",
        )
        self.assertExpectedInline(
            self.load_error_text(self.rewrite({".storage_alignment": b"-1"})),
            """\
RuntimeError: Expected /x.pt.zip to have a record '.storage_alignment' that is a
positive number, got b'-1' at offset 250. (Is the file damaged, or still being
written?)""",
        )
        self.assertExpectedInline(
            self.load_error_text(self.rewrite(compression=zipfile.ZIP_DEFLATED)),
            """\
RuntimeError: Expected /x.pt.zip to have record 'x/.storage_alignment' stored as
it is, got a compressed one at offset 236. (Did you mean to load without
lazy=True?)""",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = self.rewrite(twice=["data/0"])
        self.assertExpectedInline(
            self.load_error_text(path),
            """\
RuntimeError: Expected /x.pt.zip to have records of different names, got
'x/data/0' twice at offset 592. (Is the file damaged, or still being written?)""",
        )

    def test_no_files_of_tensors(self):
        Path(self.path).write_bytes(b"")
        self.assertExpectedInline(
            self.load_error_text(self.path),
            """\
RuntimeError: Expected /x.pt to have the beginning of a file that torch.save
wrote, got b'' at offset 0. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            self.load_error_text(self.folder),
            """\
IsADirectoryError: Expected  to be a file, or to hold the index of a sharded
checkpoint (model.safetensors.index.json or pytorch_model.bin.index.json) or one
of model.safetensors and pytorch_model.bin, got a folder with x.pt. (Did you
mean a file in it?)""",
        )
        os.mkfifo(self.path + ".fifo")
        self.assertExpectedInline(
            self.load_error_text(self.path + ".fifo"),
            """\
RuntimeError: Expected /x.pt.fifo to be a regular file with lazy=True, got
another kind of file. (Did you mean to load without lazy=True?)""",
        )
        self.assertExpectedInline(
            self.load_error_text("/nowhere/x.pt"),
            """FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/x.pt'""",
        )

    def test_flipped_bytes(self):
        state = {"x": torch.arange(4.0), "y": [torch.ones(2, 3), 7]}
        data = bytearray(Path(self.save(state)).read_bytes())
        original = described(torch.load(self.path))
        for at in range(0, len(data), 3):
            data[at] ^= 1 << at % 8
            Path(self.path).write_bytes(data)
            data[at] ^= 1 << at % 8
            if self.load_error(self.path) != "none":
                continue
            # What a flip leaves readable is what torch.load reads, or was not hit. (For
            # some flips in a local header torch.load reads the bytes beside the data.)
            lazy = described(torch.load(self.path, lazy=True))
            with contextlib.suppress(Exception):
                if lazy == described(torch.load(self.path)):
                    continue
            self.assertTrue(lazy == original, f"byte {at}: {lazy}")


instantiate_parametrized_tests(TestLoadLazyMapped)

if __name__ == "__main__":
    run_tests()
