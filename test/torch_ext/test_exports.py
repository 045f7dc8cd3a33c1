"""Public names that a seam file gives to an upstream module, in a graft; ``test_tree.py`` compares with a tree."""

import ast
from pathlib import Path

import pytest
from processes import python

import torch_ext
from torch_ext._drift import seams_of
from torch_ext._seam import read_seam_file
from torch_ext._series import series
from torch_ext._splice import splice
from torch_ext._upstream import installed


FILE = "torch/nn/utils/__init__.py"
NAMES = {
    "deferred_init",
    "is_deferred",
    "materialize_module",
    "materialize_tensor",
    "meta_init",
}


def exports():
    (patch,) = (p for p in series if p.name == "deferred_init")
    return [seam for seam in seams_of(patch) if seam.file == FILE]


def test_names_come_and_go():
    # In a process of its own, since in a tree they are there from the beginning.
    python("-c", f"NAMES = {NAMES}\n{COME_AND_GO}", check=True)


COME_AND_GO = """
import torch.nn.utils, torch_ext

before = list(torch.nn.utils.__all__)
for _ in range(2):
    with torch_ext.enable("deferred_init"):
        assert set(torch.nn.utils.__all__) - set(before) == NAMES
        assert torch.nn.utils.is_deferred(torch.ones(1)) is False
        with torch_ext.enable("deferred_init"):
            pass
        assert torch.nn.utils.deferred_init.__module__.startswith("torch.nn.utils")
    assert torch.nn.utils.__all__ == before
    assert not any(hasattr(torch.nn.utils, name) for name in NAMES)
"""


def test_the_patched_text_has_them():
    tree = ast.parse(splice(installed().source(FILE), exports()))
    (names,) = (
        ast.literal_eval(stmt.value)
        for stmt in tree.body
        if isinstance(stmt, ast.Assign) and stmt.targets[0].id == "__all__"
    )
    imported = {
        a.name for s in tree.body if isinstance(s, ast.ImportFrom) for a in s.names
    }
    assert set(names) >= NAMES
    assert imported >= NAMES


def test_a_name_that_is_not_imported_is_refused(tmp_path: Path):
    file = tmp_path / "seams.py"
    file.write_text('from torch import nn\n\nexports("patch", "missing")\n')
    with pytest.raises(torch_ext.PatchError, match="of names that the file imports"):
        read_seam_file(file, FILE)
