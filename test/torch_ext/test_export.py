"""Export: a mailbox that git takes on a checkout of the installed torch, and that leaves there what a tree holds."""

import shutil
import subprocess
from pathlib import Path

import pytest
from torch.testing._internal.common_utils import run_tests, TestCase

import torch_ext
from torch_ext import _queue, PatchError
from torch_ext._export import export
from torch_ext._tree import patched_files
from torch_ext._upstream import installed


def git(root, *args):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *args]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A git tree made of the installed torch's Python files."""
    root = tmp_path_factory.mktemp("pytorch")

    def skip(folder, names):
        return [n for n in names if not (n.endswith(".py") or Path(folder, n).is_dir())]

    shutil.copytree(installed().root / "torch", root / "torch", ignore=skip)
    for args in (
        ["init", "-q"],
        ["add", "-A"],
        ["commit", "-qm", "torch"],
        ["tag", "stock"],
    ):
        assert git(root, *args).returncode == 0
    return root


class TestExport(TestCase):
    @pytest.fixture(autouse=True)
    def _fixtures(self, checkout, tmp_path, test_series):
        self.checkout, self.mailbox, self.test_series = (
            checkout,
            tmp_path / "out.mbox",
            test_series,
        )
        yield
        git(checkout, "am", "--abort")
        git(checkout, "reset", "-q", "--hard", "stock")

    def check(self, patches):
        export(self.mailbox, patches, installed())
        done = git(self.checkout, "apply", "--check", str(self.mailbox))
        self.assertEqual(done.returncode, 0, done.stderr)
        done = git(self.checkout, "am", "--keep-non-patch", str(self.mailbox))
        self.assertEqual(done.returncode, 0, done.stderr)
        for file, text in patched_files(patches, installed()).items():
            self.assertEqual((self.checkout / file).read_text(), text)
        subjects = git(
            self.checkout, "log", "--reverse", "--format=%s", "stock.."
        ).stdout
        self.assertEqual(subjects.splitlines(), [patch.subject for patch in patches])

    def test_the_series_applies(self):
        self.check(_queue.select())
        for patch in torch_ext.series:
            for test in patch.tests:
                self.assertTrue((self.checkout / test).exists(), test)

    def test_every_kind_of_seam_applies(self):
        self.check(self.test_series)
        self.assertTrue((self.checkout / "test/test_it.py").exists())

    def test_docs_and_rfc_ride_along(self):
        export(self.mailbox, self.test_series, installed())
        text = self.mailbox.read_text()
        self.assertIn(
            '+            only (str): which gradients are cleared. Default: ``"all"``\n',
            text,
        )
        self.assertIn(
            "+        >>> parameters_to_vector(model.parameters(), order=[1, 0])\n",
            text,
        )
        first = text.split("\nFrom ")[0]
        above, _, below = first.partition("\n---\n")
        self.assertNotIn("Because.", above)
        self.assertIn("    Because.\n", below)

    def test_missing_test_file(self):
        (patch, *_) = self.test_series
        (patch.root.parent / "test/test_it.py").rename(patch.root / "moved")
        try:
            with self.assertRaisesRegex(
                PatchError, "Did you mean to export from a checkout"
            ):
                export(self.mailbox, [patch], installed())
        finally:
            (patch.root / "moved").rename(patch.root.parent / "test/test_it.py")
        self.assertFalse(self.mailbox.exists())


if __name__ == "__main__":
    run_tests()
