"""python -m torch_ext convert, from each format to each."""

import errno
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from test_verify import Tools
from torch.testing._internal.common_utils import run_tests
from torch.testing._internal.two_tensor import TwoTensor

import torch_ext


class ConvertCase(Tools):
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

    def refused(self, dst, *args, path=None):
        """Text of an error, after which all is as it was."""
        before = sorted(os.listdir(self.folder))
        status, text = self.convert(path or self.path, dst, *args)
        self.assertEqual(status, 1, text)
        self.assertEqual(sorted(os.listdir(self.folder)), before)
        return text


class TestConvert(ConvertCase):
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
            (self.path, "none/x.pt"),
            (self.folder / "full", "x.pt"),
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
model.pt: Expected values that a safetensors file can hold, got 'epoch' (int). (Did you mean to write a .pt file?)
model.pt: Expected full to be empty, or no folder, got files in it.
model.pt: Expected DST to be another file than SRC, got the same.
dcp: Expected DST to be a file, since SRC is a DCP checkpoint, got other.
none.pt: no such file or folder
model.pt: Expected the folder of DST to exist, got none of the name none.
full: Expected full to be a file, or to hold the index of a sharded checkpoint (model.safetensors.index.json or pytorch_model.bin.index.json) or one of model.safetensors and pytorch_model.bin, got a folder with none of them. (Did you mean a file in it?)
""",  # noqa: E501
        )

    def test_weights_only(self):
        torch.save({"a": torch.ones(3), "path": Path("x")}, self.path)
        status, text = self.convert(self.path, "x.pt")
        self.assertEqual(status, 1)
        self.assertIn("Weights only load failed", text)
        path = self.done(self.path, "x.pt", "--no-weights-only")
        self.assertEqual(torch.load(path, weights_only=False)["path"], Path("x"))

    def test_torchscript(self):
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(self.path))
        for dst in TARGETS:
            self.assertExpectedInline(
                self.refused(dst),
                """\
torch_ext: model.pt: Expected a file of weights, got a TorchScript archive. (Did you mean torch.jit.load?)
""",
            )


TARGETS = ("x.pt", "x.safetensors", "x")
NAMED = TARGETS[1:]  # whose values have names


class TestRefusals(ConvertCase):
    """What a format cannot hold is named, and nothing is written."""

    def texts(self, cases, targets):
        found = []
        for value in cases:
            torch.save(value, self.path)
            found += [self.refused(dst, "--no-weights-only") for dst in targets]
        return "".join(found).replace("torch_ext: model.pt: ", "")

    def test_tensors(self):
        q = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
        nested = [torch.ones(2), torch.ones(3)]
        values = {
            "quantized": q,
            "sparse": torch.eye(3).to_sparse(),
            "compressed": torch.eye(3).to_sparse_csr(),
            "nested": torch.nested.nested_tensor(nested),
            "jagged": torch.nested.nested_tensor(nested, layout=torch.jagged),
            "meta": torch.ones(3, device="meta"),
            "class": TwoTensor(torch.ones(3), torch.ones(3)),
            "bits": torch.zeros(3, dtype=torch.uint8).view(torch.bits8),
        }
        # Each is refused for itself, and all of them in one text.
        for name, value in values.items():
            torch.save({"good": torch.ones(3), "m": {name: value}}, self.path)
            for dst in NAMED:
                self.assertIn(
                    f"got 'm.{name}' (", self.refused(dst, "--no-weights-only")
                )
        self.assertExpectedInline(
            self.texts([values], NAMED),
            """\
Expected values that a safetensors file can hold, got 'quantized' (a quantized tensor), 'sparse' (a tensor of layout torch.sparse_coo), 'compressed' (a tensor of layout torch.sparse_csr), 'nested' (a nested tensor), 'jagged' (a nested tensor), 'meta' (a tensor on meta, which has no data), 'class' (a tensor of the class TwoTensor), 'bits' (a tensor of torch.bits8). (Did you mean to write a .pt file?)
Expected values that a DCP checkpoint can hold, got 'quantized' (a quantized tensor), 'sparse' (a tensor of layout torch.sparse_coo), 'compressed' (a tensor of layout torch.sparse_csr), 'nested' (a nested tensor), 'jagged' (a nested tensor), 'meta' (a tensor on meta, which has no data), 'class' (a tensor of the class TwoTensor), 'bits' (a tensor of torch.bits8). (Did you mean to write a .pt file?)
""",  # noqa: E501
        )
        # A .pt file holds all of them.
        path = self.done(self.path, "y.pt", "--no-weights-only")
        loaded = torch.load(path, weights_only=False)
        self.assertEqual(loaded.keys(), values.keys())
        self.assertEqual(loaded["quantized"], q)

    def test_jagged_tensors_in_a_fresh_process(self):
        x = torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)
        torch.save({"m": x}, self.path)
        for dst, status in (("x.pt", 0), ("x", 1)):
            args = ["convert", str(self.path), str(self.folder / dst)]
            done = subprocess.run(
                [sys.executable, "-m", "torch_ext", *args], capture_output=True
            )
            self.assertEqual(done.returncode, status, done.stderr)
        self.assertIn(b"got 'm' (a nested tensor)", done.stderr)

    def test_containers(self):
        x = torch.ones(3)
        endless = {"x": x}
        endless["me"] = endless
        deep = x
        for _ in range(200):
            deep = {"d": deep}
        shared = {"x": x}
        for _ in range(30):
            shared = {"a": shared, "b": shared}
        cases = [
            [x],
            x,
            torch.nn.Linear(2, 2),
            {(1, 2): x},
            {"m": {None: x}},
            {"a.b": x, "a": {"b": x}},
            {1: x, "1": x},
            endless,
            deep,
            shared,
        ]
        self.assertEqual(self.texts(cases, ["x"]), self.texts(cases, ["x.safetensors"]))
        self.assertExpectedInline(
            self.texts(cases, ["x"])
            .replace("d." * 90, "d....")
            .replace(" (Did you mean to write a .pt file?)", " (...)"),
            """\
Expected SRC to hold a dict, whose values have names, got a list. (...)
Expected SRC to hold a dict, whose values have names, got a tensor. (...)
Expected SRC to hold a dict, whose values have names, got a module, Linear, instead of its state dict. (...)
Expected keys of dicts to be str or int, got (1, 2), a tuple, in the dict at the top. (...)
Expected keys of dicts to be str or int, got None, a NoneType, in 'm'. (...)
Expected names that differ when they are joined by dots, got 'a.b' twice. (...)
Expected names that differ when they are joined by dots, got '1' twice. (...)
Expected values in nested dicts and lists, got 'me', a container inside of itself. (...)
Expected values in nested dicts and lists, got 'd....d.d.d.d.d.d.d.d.d.d', a container in more than 100 others. (...)
Expected at most 1,048,576 values, got more. (Is a container shared again and again?)
""",
        )

    def test_names_in_safetensors(self):
        x = torch.ones(3)
        self.assertExpectedInline(
            self.texts([{"__metadata__": x, "\ud800": x}], ["x.safetensors"]),
            """\
Expected values that a safetensors file can hold, got '__metadata__' (a name that the format keeps for itself), '\\ud800' (a name that is no UTF-8). (Did you mean to write a .pt file?)
""",  # noqa: E501
        )

    def test_many(self):
        torch.save({f"s{i}": i for i in range(1000)}, self.path)
        self.assertExpectedInline(
            self.refused("x.safetensors"),
            """\
torch_ext: model.pt: Expected values that a safetensors file can hold, got 's0' (int), 's1' (int), 's2' (int), 's3' (int), 's4' (int), 's5' (int), 's6' (int), 's7' (int), 's8' (int), 's9' (int), ... (1000 of them). (Did you mean to write a .pt file?)
""",  # noqa: E501
        )

    def test_quantized_in_dcp(self):
        q = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
        # DCP itself takes it, and has lost the scale.
        dcp.save({"q": q}, checkpoint_id=self.folder / "dcp", no_dist=True)
        text = self.refused("x.pt", path=self.folder / "dcp")
        self.assertExpectedInline(
            text,
            """\
torch_ext: dcp: Expected values that a file can hold, got 'q' (a quantized tensor, torch.quint8). A DCP checkpoint does not have the scales of quantized tensors.
""",  # noqa: E501
        )


class TestLosses(ConvertCase):
    """What a format has no place for is told, and the rest is there."""

    def test_int_keys_and_empty_dicts(self):
        x = torch.ones(3)
        torch.save({"state": {0: {"m": x}, 1: {}}, "none": {}, "list": [{}]}, self.path)
        status, text = self.convert(self.path, "x")
        self.assertEqual(status, 0)
        self.assertExpectedInline(
            text,
            """\
x: 2.5 kB
torch_ext: model.pt: note: a DCP checkpoint cannot hold empty dicts, and these are lost: 'state.1', 'none', 'list.0'
torch_ext: model.pt: note: a DCP checkpoint has keys that are str, and those of these were int: 'state'
""",
        )
        status, text = self.convert(self.folder / "x", "x.pt")
        self.assertEqual(status, 0, text)
        loaded = torch.load(self.folder / "x.pt")
        self.assertEqual(loaded, {"state": {"0": {"m": x}}})


class TestNothingLeft(ConvertCase):
    """Whatever ends a conversion, what was there is there, and nothing else."""

    def setUp(self):
        super().setUp()
        torch.save(self.tensors, self.path)
        (self.folder / "x").mkdir()
        for name in ("x.pt", "x.safetensors"):
            (self.folder / name).write_bytes(b"old")

    def assert_as_before(self):
        self.assertEqual(
            sorted(os.listdir(self.folder)), ["model.pt", "x", "x.pt", "x.safetensors"]
        )
        self.assertEqual(os.listdir(self.folder / "x"), [])
        for name in ("x.pt", "x.safetensors"):
            self.assertEqual((self.folder / name).read_bytes(), b"old")

    def broken(self, dst, error):
        """The conversion while its writing raises."""
        where = {
            "x.pt": "torch.serialization._save",
            "x.safetensors": "torch.distributed.checkpoint._single_file.memory_of",
            "x": "torch.distributed.checkpoint.filesystem._write_item",
        }[dst]
        with torch_ext.enable("load_lazy", "dcp_torch_reader"):
            importlib.import_module("torch.distributed.checkpoint._single_file")
            with mock.patch(where, side_effect=error):
                return self.convert(self.path, dst)

    def test_errors(self):
        for dst in TARGETS:
            with self.subTest(dst):
                status, text = self.broken(dst, OSError(errno.ENOSPC, "No room"))
                self.assertEqual(status, 1)
                self.assertIn("No room", text)
                self.assert_as_before()

    def test_interrupts(self):
        for dst in TARGETS:
            with self.subTest(dst):
                self.assertEqual(self.broken(dst, KeyboardInterrupt), (130, ""))
                self.assert_as_before()

    def test_errors_instead_of_interrupts(self):
        def halfway(*args, **kwargs):
            # As a writer of zip files raises when it is stopped halfway.
            try:
                raise KeyboardInterrupt
            finally:
                raise RuntimeError("unexpected pos")

        for dst in TARGETS:
            with self.subTest(dst):
                self.assertEqual(self.broken(dst, halfway), (130, ""))
                self.assert_as_before()

    def test_signals(self):
        numbers = {signal.SIGINT: TARGETS, signal.SIGTERM: ["x"]}
        for number, dst in [(n, dst) for n in numbers for dst in numbers[n]]:
            with self.subTest(dst=dst, number=number):
                args = ["convert", str(self.path), str(self.folder / dst)]
                child = subprocess.Popen(
                    [sys.executable, "-c", PAUSED, *args],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                self.assertEqual(child.stdout.readline(), "written\n")
                self.assertEqual(len(os.listdir(self.folder)), 5)
                child.send_signal(number)
                self.assertEqual(child.communicate(), ("", ""))
                self.assertEqual(child.returncode, 128 + number)
                self.assert_as_before()

    def test_permissions(self):
        (self.folder / "x").chmod(0o750)
        before = os.umask(0o027)
        try:
            paths = [self.done(self.path, name) for name in ("x", "new")]
        finally:
            os.umask(before)
        modes = [path.stat().st_mode & 0o7777 for path in paths]
        self.assertEqual(modes, [0o750, 0o750])


# Converts, and stops where DST is written and about to be compared.
PAUSED = """
import signal, sys
from torch_ext import __main__ as cli
from torch_ext._tools import convert

def pause(old, new):
    print("written", flush=True)
    signal.pause()

signal.signal(signal.SIGINT, signal.default_int_handler)
convert.compare = pause
sys.exit(cli.main(sys.argv[1:]))
"""


if __name__ == "__main__":
    run_tests()
