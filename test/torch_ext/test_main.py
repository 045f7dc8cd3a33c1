"""The command line, the autoload entry point, and what the repository says of the series."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import python
from torch.testing._internal.common_utils import run_tests, TestCase

import torch_ext
from torch_ext import __main__ as cli
from torch_ext import _drift
from torch_ext._overlay import new_files
from torch_ext._upstream import installed


REPOSITORY = Path(torch_ext.__file__).parent.parent


def run(*args):
    return python("-m", "torch_ext", "run", *args)


SHOW = """
import sys, torch
print(torch.load.__kwdefaults__.get("lazy"), "torch_ext" in sys.modules)
"""
CHILD = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {SHOW!r}]).returncode)"


class TestRun(TestCase):
    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def test_stock_without_it(self):
        # The entry point is called at every import of torch, and does nothing.
        self.assertEqual(python("-c", SHOW).stdout, "None True\n")

    def test_graft_reaches_children(self):
        self.assertEqual(run("--", sys.executable, "-c", CHILD).stdout, "False True\n")

    def test_tree_reaches_children(self):
        done = run("--tree", "--", sys.executable, "-c", CHILD)
        self.assertEqual(done.stdout, "False True\n", done.stderr)

    def test_chosen_patches(self):
        for mode in ([], ["--tree"]):
            code = "import torch_ext, torch; print(torch_ext.enabled())"
            done = run(
                *mode,
                "-p",
                "load_state_dict_reuse_tensors",
                "--",
                sys.executable,
                "-c",
                code,
            )
            self.assertEqual(
                done.stdout,
                "('to_empty_skip_materialized', 'load_state_dict_reuse_tensors')\n",
                done.stderr,
            )

    def test_exit_status_is_the_commands(self):
        self.assertEqual(
            run("--", sys.executable, "-c", "raise SystemExit(7)").returncode, 7
        )
        done = run("--", "no-such-command")
        self.assertEqual(
            (done.returncode, done.stderr),
            (127, "torch_ext: no-such-command: No such file or directory\n"),
        )

    def test_unknown_patch(self):
        done = run("-p", "load_lzay", "--", "true")
        self.assertEqual(done.returncode, 1)
        self.assertIn("(Did you mean 'load_lazy'?)", done.stderr)


class TestImport(TestCase):
    def test_import_changes_nothing_and_auto_enables_all(self):
        code = """
import torch, torch.utils._device, sys
from torch.serialization import load
from torch.utils._device import DeviceContext
functions = [load, torch.nn.Module.load_state_dict, torch.nn.Module.to_empty, DeviceContext.__torch_function__]
state = lambda: [(f.__code__, f.__defaults__, f.__kwdefaults__, f.__doc__) for f in functions]
same = lambda a, b: all(x is y for s, t in zip(a, b) for x, y in zip(s, t))
stock = state()
import torch_ext
print(same(stock, state()), torch_ext.enabled())
import torch_ext.auto
print(torch_ext.enabled() == tuple(p.name for p in torch_ext.series))
print([a[0] is b[0] for a, b in zip(stock, state())])
torch_ext.disable()
print(same(stock, state()), torch_ext.enabled())
"""
        self.assertExpectedInline(
            python("-c", code).stdout,
            """\
True ()
True
[False, False, False, False]
True ()
""",
        )


class TestSeries(TestCase):
    def test_every_patch_is_complete(self):
        names = [patch.name for patch in torch_ext.series]
        owners = {}
        for i, patch in enumerate(torch_ext.series):
            self.assertTrue(_drift.seams_of(patch) or patch.files, patch.name)
            self.assertTrue(patch.tests)
            for file in (*patch.tests, *filter(None, [patch.rfc])):
                self.assertTrue((REPOSITORY / file).is_file(), file)
            for file, path in new_files(patch).items():
                self.assertTrue(path.is_file(), file)
                self.assertFalse((installed().root / file).exists(), file)
                self.assertEqual(owners.setdefault(file, patch.name), patch.name)
            self.assertLessEqual(set(patch.requires), set(names[:i]))
            self.assertRegex(patch.subject, r"^\[[a-z]+\] \S")
            self.assertLessEqual(max(map(len, patch.rationale.splitlines())), 80)
        overlay = REPOSITORY / "torch_ext/overlay"
        files = {p.relative_to(overlay).as_posix() for p in overlay.rglob("*.py")}
        self.assertEqual(set(owners), files)

    def test_every_seam_belongs_to_a_patch(self):
        from torch_ext._seam import read_seams

        seams = read_seams(torch_ext.series[0].root / "seams")
        names = {p.name for p in torch_ext.series}
        self.assertLessEqual({s.patch for s in seams}, names)

    def test_new_files_never_import_torch_ext(self):
        for patch in torch_ext.series:
            for path in (
                *new_files(patch).values(),
                *(REPOSITORY / test for test in patch.tests),
            ):
                found = re.search(
                    r"^\s*(import|from) torch_ext", path.read_text(), re.MULTILINE
                )
                self.assertIsNone(found, str(path))

    def test_readme_shows_the_series(self):
        self.assertIn(f"\n{cli._table()}\n", (REPOSITORY / "README.md").read_text())

    def test_status_of_another_torch(self):
        done = python("-m", "torch_ext", "status", "--against", str(installed().root))
        self.assertEqual(done.returncode, 0)
        self.assertEqual(done.stdout, python("-m", "torch_ext", "status").stdout)

    @pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
    def test_built_package_has_the_seams_and_new_files(self):
        from setuptools import find_namespace_packages

        packages = {
            p.replace(".", "/")
            for p in find_namespace_packages(
                str(REPOSITORY), include=["torch_ext", "torch_ext.*"]
            )
        }
        files = subprocess.run(
            ["git", "ls-files", "torch_ext/*.py"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        folders = {os.path.dirname(file) for file in files.stdout.split()}
        self.assertLessEqual(folders, packages)


if __name__ == "__main__":
    run_tests()
