"""python -m torch_ext convert, from each format to each."""

import os
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from test_verify import Tools
from torch.testing._internal.common_utils import run_tests


class TestConvert(Tools):
    def setUp(self):
        super().setUp()
        tied = torch.randn(4, 3)
        self.tensors = {"a": tied, "b": tied, "c": torch.randn(5).half()}

    def convert(self, src, dst, *args):
        return self.run_tool("convert", str(self.folder / dst), *args, path=src)

    def done(self, src, dst, *args):
        status, text = self.convert(src, dst, *args)
        self.assertEqual(status, 0, text)
        self.assertTrue(text.startswith(f"{dst}: "), text)
        return self.folder / dst

    def test_round_trip(self):
        torch.save({"model": self.tensors, "epoch": 3}, self.path)
        folder = self.done(self.path, "dcp")
        self.assertTrue((folder / ".metadata").exists())
        back = self.done(folder, "back.pt")
        self.assertEqual(torch.load(back), {"model": self.tensors, "epoch": 3})

    def test_file_to_file_keeps_ties(self):
        torch.save(self.tensors, self.path, _use_new_zipfile_serialization=False)
        loaded = torch.load(self.done(self.path, "new.pt"))
        self.assertEqual(loaded, self.tensors)
        self.assertEqual(loaded["a"].data_ptr(), loaded["b"].data_ptr())

    def test_safetensors(self):
        torch.save({"model": self.tensors}, self.path)
        flat = {f"model.{key}": t for key, t in self.tensors.items()}
        path = self.done(self.path, "m.safetensors")
        self.assertEqual(load_file(path), flat)
        self.assertEqual(
            load_file(self.done(self.done(path, "d"), "n.safetensors")), flat
        )
        self.assertEqual(torch.load(self.done(path, "n.pt")), flat)

    def test_what_cannot_be(self):
        torch.save({"epoch": 3}, self.path)
        (self.folder / "full").mkdir()
        (self.folder / "full" / "file").touch()
        dcp.save({"a": torch.ones(3)}, checkpoint_id=self.folder / "dcp", no_dist=True)
        cases = [
            (self.path, "x.safetensors"),
            (self.path, "full"),
            (self.path, "model.pt"),
            (self.folder / "dcp", "other"),
            (self.folder / "none.pt", "x.pt"),
        ]
        before = sorted(os.listdir(self.folder))
        texts = []
        for src, dst in cases:
            status, text = self.convert(src, dst)
            self.assertEqual(status, 1)
            texts.append(
                text.removeprefix("torch_ext: ").replace(str(self.folder), "DIR")
            )
        self.assertEqual(sorted(os.listdir(self.folder)), before)
        self.assertExpectedInline(
            "".join(texts),
            """\
model.pt: Expected all values to be tensors, which are what safetensors files hold, got objects for 'epoch'. (Did you mean to write a .pt file?)
model.pt: Expected full to be empty, or no folder, got files in it.
model.pt: Expected DST to be another file than SRC, got the same.
dcp: Expected DST to be a file, since SRC is a DCP checkpoint, got other.
none.pt: no such file or folder
""",  # noqa: E501
        )

    def test_weights_only(self):
        torch.save({"a": torch.ones(3), "path": Path("x")}, self.path)
        status, text = self.convert(self.path, "x.pt")
        self.assertEqual(status, 1)
        self.assertIn("Weights only load failed", text)
        path = self.done(self.path, "x.pt", "--no-weights-only")
        self.assertEqual(torch.load(path, weights_only=False)["path"], Path("x"))


if __name__ == "__main__":
    run_tests()
