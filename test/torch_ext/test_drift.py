"""Drift: a patch whose upstream function has changed is refused, on torch's own files with a change made in them."""

import pytest
import torch
from processes import python
from torch.testing._internal.common_utils import run_tests, TestCase

import torch_ext
from torch_ext import _drift
from torch_ext._upstream import installed, Upstream


BY_NAME = {patch.name: patch for patch in torch_ext.series}


class TestDrift(TestCase):
    @pytest.fixture(autouse=True)
    def _tmp_path(self, tmp_path):
        self.tmp_path = tmp_path

    def torch_with(self, file, old, new):
        """A torch of links to the installed one, with one edit in ``file``."""
        from torch_ext._tree import _link

        (self.tmp_path / "torch").mkdir()
        _link(installed().root / "torch", self.tmp_path / "torch", "torch", {file})
        text = (installed().root / file).read_text()
        self.assertIn(old, text)
        (self.tmp_path / file).write_text(text.replace(old, new))
        return Upstream(self.tmp_path)

    def test_the_series_is_clean(self):
        for patch in torch_ext.series:
            self.assertEqual(str(_drift.grade(patch)), "clean", patch.name)

    def test_changed_function_is_stale_and_refused(self):
        upstream = self.torch_with(
            "torch/nn/modules/module.py",
            "lambda t: torch.empty_like(t, device=device), recurse=recurse",
            "lambda t: torch.zeros_like(t, device=device), recurse=recurse",
        )
        self.assertEqual(
            str(_drift.grade(BY_NAME["to_empty_skip_materialized"], upstream)),
            "stale: Module.to_empty",
        )
        self.assertEqual(
            str(_drift.grade(BY_NAME["load_state_dict_reuse_tensors"], upstream)),
            "clean",
        )
        code = """
import torch, torch_ext
before = torch.nn.Module.load_state_dict.__code__
try:
    torch_ext.enable()
except torch_ext.PatchError as e:
    print(e)
print(torch_ext.enabled(), torch.nn.Module.load_state_dict.__code__ is before)
torch_ext.enable(strict=False)
m = torch.nn.Linear(1, 1, device="meta")
print(m.to_empty(device="cpu", skip_materialized=True).weight.device, m.to_empty(device="cpu").weight.item())
"""
        done = python("-c", code, root=self.tmp_path, check=True)
        self.assertExpectedInline(
            done.stdout.replace(torch.__version__, "VERSION"),
            """\
Expected these functions to be as in a supported torch (2.11 to 2.15), but torch VERSION has others:
	to_empty_skip_materialized: Module.to_empty in torch/nn/modules/module.py
(Did you mean to install a supported torch? To try the patch on these functions as they are, pass strict=False.)
() True
cpu 0.0
""",
        )

    def test_removed_function_is_stale(self):
        upstream = self.torch_with(
            "torch/nn/modules/module.py", "    def to_empty(", "    def to_nothing("
        )
        self.assertEqual(
            str(_drift.grade(BY_NAME["to_empty_skip_materialized"], upstream)),
            "stale: Module.to_empty",
        )

    def test_changed_docstring_and_neighbours_are_clean(self):
        upstream = self.torch_with(
            "torch/nn/modules/module.py",
            "Move the parameters and buffers to the specified device without copying storage.",
            "Move them.",
        )
        self.assertEqual(
            str(_drift.grade(BY_NAME["to_empty_skip_materialized"], upstream)), "clean"
        )

    def test_landed_patch_is_upstream(self):
        upstream = self.torch_with(
            "torch/nn/modules/module.py",
            "def to_empty(self, *, device: DeviceLikeType | None, recurse: bool = True)",
            "def to_empty(self, *, device: DeviceLikeType | None, recurse: bool = True, skip_materialized=False)",
        )
        self.assertEqual(
            str(_drift.grade(BY_NAME["to_empty_skip_materialized"], upstream)),
            "upstream",
        )


if __name__ == "__main__":
    run_tests()
