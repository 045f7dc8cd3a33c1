"""python -m torch_ext inspect, on real files in every format."""

import json
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from test_verify import Tools
from torch.testing._internal.common_utils import run_tests

from torch_ext import __main__ as cli
from torch_ext._tools import inspect


REPOSITORY = Path(cli.__file__).parent.parent


class TestInspect(Tools):
    def save_model(self):
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(2, 3))
        model[1].bias = model[0].bias
        half = torch.zeros(4, dtype=torch.bfloat16)
        state = {"model": model.state_dict(), "half": half[1:], "epoch": 3, "none": []}
        torch.save({**state, "note": "x" * 99, "halves": half.view(2, 2)}, self.path)

    def test_tree(self):
        self.save_model()
        self.assertExpectedInline(
            self.inspect()[1],
            """\
model.pt
  model
    0
      weight  float32   [3, 2]  24 bytes
      bias    float32   [3]     12 bytes
    1
      weight  float32   [3, 2]  24 bytes
      bias    float32   [3]     12 bytes  shares model.0.bias
  half        bfloat16  [3]     6 bytes
  epoch       int 3
  none        list []
  note        str 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...
  halves      bfloat16  [2, 2]  8 bytes   shares half

6 tensors in 4 storages, 2 of them shared: 68 bytes of a file of 2.7 kB
""",
        )

    def test_names_that_cannot_be_printed(self):
        x = torch.ones(3)
        torch.save({"a\x1b[31m\n": x, "\ud800": {"b": x}}, self.path)
        self.assertExpectedInline(
            self.inspect()[1],
            """\
model.pt
  a\\x1b[31m\\n  float32  [3]  12 bytes
  \\ud800.b     float32  [3]  12 bytes  shares a\\x1b[31m\\n

2 tensors in 1 storage, 1 of them shared: 12 bytes of a file of 1.6 kB
""",
        )

    def test_json(self):
        self.save_model()
        status, text = self.inspect("--json")
        found = json.loads(text)
        self.assertEqual(status, 0)
        self.assertEqual(found["file_bytes"], self.path.stat().st_size)
        self.assertEqual(found["storage_bytes"], [24, 12, 24, 8])
        self.assertEqual(
            found["ties"],
            [
                [["model", "0.bias"], ["model", "1.bias"]],
                [["half"], ["halves"]],
            ],
        )
        self.assertEqual(
            found["tensors"][4],
            {
                "path": ["half"],
                "dtype": "bfloat16",
                "shape": [3],
                "bytes": 6,
                "storage": 3,
            },
        )
        self.assertEqual(found["others"][0], {"path": ["epoch"], "value": "int 3"})

    def test_small_parts_of_storages(self):
        large, packed = torch.zeros(1_000_000), torch.zeros(3000)
        parts = dict(zip("qkv", packed.split(1000), strict=True))
        torch.save({"row": large[:20], "last": large[-1:], **parts}, self.path)
        self.assertExpectedInline(
            self.inspect()[1],
            """\
model.pt
  row   float32  [20]    80 bytes  of a storage of 4.0 MB
  last  float32  [1]     4 bytes   shares row, of a storage of 4.0 MB
  q     float32  [1000]  4.0 kB
  k     float32  [1000]  4.0 kB    shares q
  v     float32  [1000]  4.0 kB    shares q

5 tensors in 2 storages, 2 of them shared: 4.0 MB of a file of 4.0 MB, tensors use 12.1 kB
""",
        )

    def test_one_tensor(self):
        torch.save(torch.ones(3, 0), self.path)
        self.assertExpectedInline(
            self.inspect()[1],
            """\
model.pt
  float32  [3, 0]  0 bytes

1 tensor in 1 storage: 0 bytes of a file of 1.5 kB
""",
        )

    def test_every_format(self):
        self.save_model()
        text = self.inspect()[1].split("of a file")[0]
        torch.save(
            torch.load(self.path), self.path, _use_new_zipfile_serialization=False
        )
        self.assertEqual(self.inspect()[1].split("of a file")[0], text)
        with zipfile.ZipFile(self.path, "w") as archive:
            archive.writestr("a/x", b"1")
        status, text = self.inspect()
        self.assertEqual(status, 1)
        self.assertRegex(text, r"\Atorch_ext: model.pt: Expected model.pt to have ")

    def test_other_byte_order(self):
        self.save_model()
        text = self.inspect()[1].split("of a file")[0]
        swapped = self.folder / "swapped.pt"
        with zipfile.ZipFile(self.path) as old, zipfile.ZipFile(swapped, "w") as new:
            for info in old.infolist():
                is_order = info.filename.endswith("byteorder")
                order = b"big" if sys.byteorder == "little" else b"little"
                new.writestr(info.filename, order if is_order else old.read(info))
        swapped.rename(self.path)
        self.assertEqual(self.inspect()[1].split("of a file")[0], text)

    def test_sparse_and_shared_containers(self):
        again = [1]
        again.append(again)
        value = {"a": again, "b": again, "s": torch.eye(2).to_sparse()}
        torch.save(value, self.path)
        self.assertExpectedInline(
            self.inspect()[1],
            """\
model.pt
  a
    0  int 1
    1  is a
  b    is a
  s    float32  [2, 2]  16 bytes

1 tensor in 0 storages: 0 bytes of a file of 2.0 kB
""",
        )

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_reads_no_data(self):
        torch.save({str(i): torch.ones(1 << 18) for i in range(16)}, self.path)
        inspect.read(str(self.path))

        def read():
            with open("/proc/self/io") as io:
                return int(io.readline().split()[1])

        before = read()
        found = inspect.read(str(self.path))
        self.assertLess(read() - before, 200 << 10)
        self.assertEqual(sum(found.storages), 16 << 20)

    def test_many_tensors(self):
        names = [f"layers.{i // 9}.weight{i % 9}" for i in range(10_000)]
        torch.save({name: torch.ones(1) for name in names}, self.path)
        # Each function runs a few times a tensor, at most.
        calls = 0

        def count(*_):
            nonlocal calls
            calls += 1

        sys.setprofile(count)
        try:
            text = self.inspect()[1]
        finally:
            sys.setprofile(None)
        self.assertLess(calls, 3_000_000)
        self.assertEqual(len(text.split("\n")), 1 + 1 + 1112 + 10_000 + 2)
        found = "\n  1110\n    weight0     float32  [1]  4 bytes\n" in text
        self.assertTrue(found)

    def test_refusals(self):
        torch.save(REPOSITORY, self.path)
        status, text = self.inspect()
        self.assertEqual(status, 1)
        self.assertRegex(text, r"\Atorch_ext: model.pt: Weights only load failed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(self.path))
        status, text = self.inspect()
        self.assertEqual(status, 1)
        self.assertExpectedInline(
            text,
            """\
torch_ext: model.pt: Expected a file of weights, got a TorchScript archive. (Did you mean torch.jit.load?)
""",
        )
        self.path.unlink()
        status, text = self.inspect()
        self.assertEqual(status, 1)
        self.assertExpectedInline(
            text,
            """\
torch_ext: model.pt: [Errno 2] No such file or directory: 'model.pt'
""",
        )


if __name__ == "__main__":
    run_tests()
