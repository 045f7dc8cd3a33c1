# Owner(s): ["module: serialization"]
"""torch.load(f, lazy=True) of a sharded checkpoint is one dict."""

import json
import os
import pickle
import textwrap
import unittest
from pathlib import Path

import torch
from load_lazy_case import LazyTestCase, Unlisted
from torch.testing._internal.common_utils import (
    run_tests,
)


try:
    import safetensors.torch as safetensors
except ImportError:
    safetensors = None


class TestLoadLazySharded(LazyTestCase):
    def setUp(self):
        super().setUp()
        self.state = {"c": torch.ones(3), "a": torch.zeros(2, 2), "b": torch.ones(1)}
        self.index = os.path.join(self.folder, "pytorch_model.bin.index.json")
        self.shards = {"1.bin": ["a", "c"], "2.bin": ["b"]}
        for name, keys in self.shards.items():
            self.save(name, {key: self.state[key] for key in keys})
        self.write({"c": "1.bin", "a": "1.bin", "b": "2.bin"})

    def save(self, name, state):
        torch.save(state, os.path.join(self.folder, name))

    def write(self, weight_map, **more):
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
        Path(self.index).write_text(text)

    def test_is_one_dict(self):
        for f in (self.folder, self.index, Path(self.folder), os.fsencode(self.index)):
            lazy = torch.load(f, lazy=True)
            self.assertIs(type(lazy), dict)
            self.assertEqual(list(lazy), ["c", "a", "b"])
            self.assertEqual(lazy, self.state)
            self.assertIs(type(lazy["a"]), torch.Tensor)

    def test_arguments_reach_the_shards(self):
        lazy = torch.load(self.folder, lazy=True, map_location="meta")
        self.assertEqual(lazy["a"].device.type, "meta")
        self.save("2.bin", {"b": Unlisted(3)})
        self.assertEqual(
            torch.load(self.folder, lazy=True, weights_only=False)["b"].value, 3
        )
        with self.assertRaisesRegex(pickle.UnpicklingError, "Unlisted"):
            torch.load(self.folder, lazy=True)

    @unittest.skipIf(safetensors is None, "needs safetensors")
    def test_safetensors_come_first(self):
        path = os.path.join(self.folder, "model.safetensors")
        safetensors.save_file({"x": torch.ones(5)}, path)
        Path(path + ".index.json").write_text(
            '{"weight_map": {"x": "model.safetensors"}}'
        )
        self.assertEqual(torch.load(self.folder, lazy=True), {"x": torch.ones(5)})

    def test_a_folder_without_an_index(self):
        os.remove(self.index)
        self.save("pytorch_model.bin", self.state)
        self.save("training_args.bin", {})
        self.assertEqual(torch.load(self.folder, lazy=True), self.state)
        Path(self.folder, "model.safetensors").write_bytes(b"")
        self.assertExpectedInline(
            textwrap.fill(self.load_error(self.folder), 80),
            """\
IsADirectoryError: Expected  to be a file, or to hold the index of a sharded
checkpoint (model.safetensors.index.json or pytorch_model.bin.index.json) or one
of model.safetensors and pytorch_model.bin, got a folder with model.safetensors
and pytorch_model.bin. (Did you mean a file in it?)""",
        )
        os.remove(os.path.join(self.folder, "pytorch_model.bin"))
        os.remove(os.path.join(self.folder, "model.safetensors"))
        self.assertExpectedInline(
            textwrap.fill(self.load_error(self.folder), 80),
            """\
IsADirectoryError: Expected  to be a file, or to hold the index of a sharded
checkpoint (model.safetensors.index.json or pytorch_model.bin.index.json) or one
of model.safetensors and pytorch_model.bin, got a folder with 1.bin and 2.bin
and training_args.bin. (Did you mean a file in it?)""",
        )

    @unittest.skipIf(safetensors is None, "needs safetensors")
    def test_a_folder_with_one_safetensors_file(self):
        os.remove(self.index)
        path = os.path.join(self.folder, "model.safetensors")
        safetensors.save_file(self.state, path)
        self.assertEqual(torch.load(Path(self.folder), lazy=True), self.state)

    def test_keys_that_are_not_listed_come_last(self):
        self.save("1.bin", {"extra": 5, "a": self.state["a"], "c": self.state["c"]})
        lazy = torch.load(self.folder, lazy=True)
        self.assertEqual(list(lazy), ["c", "a", "b", "extra"])

    def test_ties_within_a_shard(self):
        self.save("1.bin", {"a": self.state["a"], "c": self.state["a"]})
        lazy = torch.load(self.folder, lazy=True)
        self.assertIs(lazy["a"], lazy["c"])

    def error(self, weight_map):
        self.write(weight_map)
        return self.load_error(self.folder)

    def error_text(self, weight_map):
        return textwrap.fill(self.error(weight_map), 80)

    def test_bad_shards(self):
        self.assertExpectedInline(
            self.error_text({"a": "1.bin", "b": "3.bin"}),
            """\
FileNotFoundError: [Errno 2] No such shard, which /pytorch_model.bin.index.json
lists: '/3.bin'""",
        )
        self.assertExpectedInline(
            self.error_text({"a": "1.bin", "b": "1.bin"}),
            """\
RuntimeError: Expected /1.bin to have 'b', as /pytorch_model.bin.index.json
says, got no such key. (Are the files of one checkpoint, and complete?)""",
        )
        self.assertExpectedInline(
            self.error_text({"c": "1.bin", "a": "1.bin", "x": "2.bin"}),
            """\
RuntimeError: Expected /2.bin to have 'x', as /pytorch_model.bin.index.json
says, got no such key. (Are the files of one checkpoint, and complete?)""",
        )
        self.save("2.bin", {"a": self.state["a"], "b": self.state["b"]})
        self.assertExpectedInline(
            self.error_text({"a": "1.bin", "b": "2.bin"}),
            """\
RuntimeError: Expected /pytorch_model.bin.index.json to have 'a' in shard
'1.bin' alone, got it in '2.bin', too. (Are the files of one checkpoint, and
complete?)""",
        )
        self.save("2.bin", [self.state["b"]])
        self.assertExpectedInline(
            self.error_text({"a": "1.bin", "b": "2.bin"}),
            """\
RuntimeError: Expected /2.bin to have a dict, as a shard has, got a list. (Are
the files of one checkpoint, and complete?)""",
        )

    def test_shards_outside_of_the_folder(self):
        inner = os.path.join(self.folder, "inner")
        os.mkdir(inner)
        path = os.path.join(inner, "model.safetensors.index.json")
        absolute = os.path.join(self.folder, "1.bin")
        for name in (
            "../1.bin",
            absolute,
            "..",
            ".",
            "",
            "a/../../1.bin",
            "..\\1.bin",
            "C:1",
        ):
            Path(path).write_text(json.dumps({"weight_map": {"a": name}}))
            self.assertRegex(
                self.load_error(inner), "^RuntimeError: .* names of files beside"
            )
        os.symlink(absolute, os.path.join(inner, "link.bin"))
        Path(path).write_text(json.dumps({"weight_map": {"a": "link.bin"}}))
        self.assertEqual(torch.load(inner, lazy=True)["a"], self.state["a"])

    def test_shards_that_are_no_files(self):
        name = os.path.basename(self.index)
        self.assertRegex(
            self.error({"a": name}), "^RuntimeError: Expected /pytorch_model"
        )
        os.mkdir(os.path.join(self.folder, "folder"))
        self.assertRegex(self.error({"a": "folder"}), "^RuntimeError: .* regular file")

    def test_bad_indices(self):
        for text in (
            *(
                "",
                "[]",
                "{}",
                "nonsense",
                '{"weight_map": []}',
                '{"weight_map": {"a": 1}}',
            ),
            *(
                '{"weight_map": {"a": null}}',
                "[" * 200_000,
                '{"weight_map": {}, "weight_map": {}}',
            ),
            '{"weight_map": {"a": "1.bin", "a": "2.bin"}}',
        ):
            Path(self.index).write_text(text)
            message = self.load_error(self.index)
            self.assertRegex(
                message, "^RuntimeError: Expected /pytorch_model.* to have "
            )
            self.assertLess(len(message), 400)
        Path(self.index).write_bytes(b"\xff\xfe")
        self.assertRegex(self.load_error(self.index), "an index in JSON")
        os.unlink(self.index)
        self.assertRegex(self.load_error(self.index), "^FileNotFoundError")
        self.assertRegex(
            self.load_error(self.folder), "^IsADirectoryError: .* the index of"
        )
        os.mkfifo(self.index)
        self.assertRegex(self.load_error(self.index), "^RuntimeError: .* regular file")


if __name__ == "__main__":
    run_tests()
