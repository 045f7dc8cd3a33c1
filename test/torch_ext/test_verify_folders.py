"""python -m torch_ext verify of folders: small models, sharded ones, DCP checkpoints."""

import json
import os
import pickle
import warnings

import torch
import torch.distributed.checkpoint as dcp
from test_verify import Tools
from torch.testing._internal.common_utils import run_tests


class Call:
    """A pickle of it calls a function."""

    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, ()


class TestFolders(Tools):
    def setUp(self):
        super().setUp()
        self.folder = self.folder / "m"
        self.folder.mkdir()

    def flip_last(self, path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def texts(self):
        status, text = self.verify(self.folder)
        return status, text.replace(str(self.folder), "m")

    def test_one_file(self):
        path = self.folder / "pytorch_model.bin"
        torch.save({"x": torch.ones(1000)}, path)
        status, text = self.texts()
        self.assertEqual(status, 0)
        self.assertRegex(text, "^pytorch_model.bin: .*all checksums are right\n$")
        self.flip_last(path)
        status, text = self.texts()
        self.assertEqual(status, 1)
        self.assertIn("its data have the checksum", text)

    def test_shards(self):
        shards = {"a": "1.bin", "b": "2.bin"}
        for key, name in shards.items():
            torch.save({key: torch.ones(1000)}, self.folder / name)
        index = json.dumps({"weight_map": shards})
        (self.folder / "pytorch_model.bin.index.json").write_text(index)
        self.assertExpectedInline(
            "{} {}".format(*self.texts()),
            """\
0 pytorch_model.bin.index.json: a format without checksums: its index alone is right
1.bin: 7 records, 4.2 kB, all checksums are right
2.bin: 7 records, 4.2 kB, all checksums are right
""",
        )
        self.flip_last(self.folder / "2.bin")
        (self.folder / "1.bin").unlink()
        self.assertExpectedInline(
            "{} {}".format(*self.texts()),
            """\
1 pytorch_model.bin.index.json: [Errno 2] No such shard, which pytorch_model.bin.index.json lists: '1.bin'
pytorch_model.bin.index.json: 1 bad
1.bin: cannot be read: No such file or directory
2.bin: record '2/data/0' at offset 576: its data have the checksum b9182d7e, and should have 11a9b816
2.bin: 7 records, 4.2 kB, 1 bad
""",
        )
        (self.folder / "pytorch_model.bin.index.json").write_text("{}")
        self.assertExpectedInline(
            "{} {}".format(*self.texts()),
            """\
1 pytorch_model.bin.index.json: Expected pytorch_model.bin.index.json to have an object 'weight_map', got None. (Are the files of one checkpoint, and complete?)
pytorch_model.bin.index.json: 1 bad
""",  # noqa: E501
        )

    def test_dcp(self):
        state = {"w": torch.arange(1000.0), "epoch": 3}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state, checkpoint_id=self.folder, no_dist=True)
        self.assertExpectedInline(
            "{} {}".format(*self.texts()),
            """\
0 m: 2 pieces, 6.8 kB, all checksums are right
""",
        )
        (data,) = self.folder.glob("*.distcp")
        whole = data.read_bytes()
        self.flip_last(data)
        self.assertExpectedInline(
            "{} {}".format(*self.texts()),
            """\
1 m: record 'w of __0_0.distcp' at offset 1261: record 'archive/data/0' has another checksum
m: 2 pieces, 6.8 kB, 1 bad
""",
        )
        for cut in (b"", whole[:-100]):
            data.write_bytes(cut)
            status, text = self.texts()
            self.assertEqual(status, 1)
            self.assertRegex(text, "record '(w|epoch) of __0_0.distcp' at offset")
        data.unlink()
        self.assertIn("No such file", self.texts()[1])
        (self.folder / ".metadata").write_bytes(b"?")
        status, text = self.texts()
        self.assertEqual(status, 1)
        self.assertRegex(text, "record '.metadata' cannot be read: ")

    def test_dcp_runs_nothing(self):
        for function in (exit, os.system, dcp.filesystem.os.abort):
            call = pickle.dumps(Call(function))
            (self.folder / ".metadata").write_bytes(call)
            status, text = self.texts()
            self.assertEqual(status, 1)
            self.assertRegex(text, "it names .*, which DCP does not write")

    def test_no_checkpoint(self):
        self.assertExpectedInline(
            "{} {}".format(*self.texts()),
            """\
1 m: cannot be read: Expected m to be a file, or to hold the index of a sharded checkpoint (model.safetensors.index.json or pytorch_model.bin.index.json) or one of model.safetensors and pytorch_model.bin, got a folder with none of them. (Did you mean a file in it?)
""",  # noqa: E501
        )


if __name__ == "__main__":
    run_tests()
