"""Tree: a copy of torch in which only the patched files are real runs what graft runs, in children too."""

import importlib
import json
import os
import unittest
from pathlib import Path
from unittest import mock

import pytest
from kinds_of_seams import GRAFTED, NAMES
from processes import python
from torch.testing._internal.common_utils import run_tests, TestCase

import torch_ext
from torch_ext import _drift, _graft, _queue
from torch_ext._tree import cached_tree, make_tree
from torch_ext._upstream import installed, TREE_RECORD


def find_stock_code(seam):
    stock = compile(installed().source(seam.file).text, seam.file, "exec")
    return _graft.find_code(stock, seam.qualname)


def run(root, code):
    return python("-c", code, root=root, check=True).stdout


class TestTree(TestCase):
    @pytest.fixture(autouse=True)
    def _make(self, test_series, tmp_path, monkeypatch):
        self.series = test_series
        self.root = tmp_path / "tree"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def test_every_kind_of_seam_in_a_child_of_a_child(self):
        make_tree(self.root, self.series, installed())
        code = """
import torch, sys, subprocess
from torch.nn.utils import clip_grad_norm_, parameters_to_vector
m = torch.nn.Linear(1, 1)
print(m.zero_grad(only="none"))
print(parameters_to_vector([torch.zeros(1), torch.ones(1)], order=[1, 0]).tolist())
print(torch.nn.utils.convert_parameters._check_param_device(1, 2))
print(torch.distributions.Distribution.set_default_validate_args(7, dry_run=True))
print(torch.nn.Embedding.from_pretrained(None, describe=True))
print(clip_grad_norm_([], 1.0, measure_only=True))
print(torch.nn.Identity()(5))
from torch.utils.serialization import config
print(config.save.level, config.get_type("save.names"))
print("only (str)" in torch.nn.Module.zero_grad.__doc__)
print(torch.nn.utils._convert.__name__)
"""
        child = (
            f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
        )
        self.assertExpectedInline(
            run(self.root, child).strip(),
            """\
kept
[1.0, 0.0]
replaced
7
Embedding
measured
5
3 list[str]
True
torch.nn.utils._convert""",
        )

    def test_only_patched_and_new_files_are_real(self):
        make_tree(self.root, self.series, installed())
        real = {
            path.relative_to(self.root).as_posix()
            for folder, _, files in os.walk(self.root)
            for path in (Path(folder, name) for name in files)
            if not path.is_symlink()
        }
        seams = {seam.file for patch in self.series for seam in _drift.seams_of(patch)}
        self.assertEqual(real, seams | {"torch/nn/utils/_convert.py", TREE_RECORD})

    def check_equal_code(self, patches):
        make_tree(self.root, patches, installed())
        with (
            mock.patch.object(_queue, "series", patches),
            torch_ext.enable(*(patch.name for patch in patches)),
        ):
            seams = [seam for patch in patches for seam in _drift.seams_of(patch)]
            for seam in (seam for seam in seams if not seam.is_class):
                path = self.root / seam.file
                tree = compile(path.read_text(), str(path), "exec", dont_inherit=True)
                if seam.is_exports:
                    continue
                importlib.import_module(_graft.module_name(seam.file))
                grafted = _graft._grafted[seam.file, seam.qualname].function.__code__
                self.assertEqual(grafted, _graft.find_code(tree, seam.qualname))
                self.assertNotEqual(grafted, find_stock_code(seam))

    def test_graft_and_tree_have_equal_code_objects(self):
        self.check_equal_code([p for p in self.series if p.name in GRAFTED])

    @unittest.skipIf("TORCH_EXT_TREE" in os.environ, "a tree has nothing to graft")
    def test_graft_and_tree_of_the_series_have_equal_code_objects(self):
        self.check_equal_code(_queue.select())

    def test_cached_tree_is_made_once_for_one_content(self):
        first = cached_tree(self.series, installed())
        self.assertEqual(cached_tree(self.series, installed()), first)
        self.assertNotEqual(cached_tree(self.series[:1], installed()), first)
        self.assertEqual(
            json.loads((first / TREE_RECORD).read_text())["patches"], list(NAMES)
        )


class TestSeriesInTree(TestCase):
    """The real series: in a tree its patches are on, enabling them changes nothing, and more can be grafted on top."""

    def test_enable_in_a_tree(self):
        patches = [p for p in torch_ext.series if p.name == "device_context_meta"]
        root = cached_tree(patches, installed())
        out = run(
            root,
            """
import torch, torch.utils._device, torch_ext
f, g = torch.utils._device.DeviceContext.__torch_function__, torch.load
code = f.__code__, g.__code__
print(torch_ext.enabled())
handle = torch_ext.enable()
print(len(torch_ext.enabled()) == len(torch_ext.series), f.__code__ is code[0], g.__code__ is code[1])
handle.remove()
print(torch_ext.enabled(), f.__code__ is code[0], g.__code__ is code[1])
""",
        )
        self.assertExpectedInline(
            out,
            """\
('device_context_meta',)
True True False
('device_context_meta',) True True
""",
        )


if __name__ == "__main__":
    run_tests()
