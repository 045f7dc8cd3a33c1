"""Each snippet of README, RFCs and docstrings runs as it is printed, in a process of its own."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from snippets import context_of, REPOSITORY, snippets
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    TestCase,
)


FOUND = snippets()
IMPORT = re.compile(r"^import torch\b.*", re.MULTILINE)
NAME = re.compile(r"`(torch(?:\.\w+)+)")


def write_files(folder):
    """What snippets open."""
    names = {"torch": torch}
    exec(context_of("optimizer"), names)
    model, optimizer = names["model"], names["optimizer"]
    optim = get_optimizer_state_dict(model, optimizer)
    both = {"model": model.state_dict(), "optim": optim, "epoch": 0}
    torch.save(model.state_dict(), Path(folder, "model.pt"))
    torch.save(both, Path(folder, "checkpoint.pt"))
    torch.save(both, Path(folder, "model_and_optim.pt"))
    dcp.save(model.state_dict(), checkpoint_id=Path(folder, "dcp_folder"), no_dist=True)


class TestSnippets(TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.files = tempfile.TemporaryDirectory()
        write_files(cls.files.name)

    @classmethod
    def tearDownClass(cls):
        cls.files.cleanup()
        super().tearDownClass()

    def python(self, *args, cwd):
        # NB: not those of a tree, and of a suite that has enabled patches.
        environ = {k: v for k, v in os.environ.items() if "TORCH_EXT" not in k}
        environ["PYTHONPATH"] = str(REPOSITORY)
        done = subprocess.run(
            [sys.executable, *args],
            cwd=cwd,
            env=environ,
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        return done.stdout

    @parametrize("name", FOUND)
    def test_runs(self, name):
        with tempfile.TemporaryDirectory() as parent:
            folder = shutil.copytree(self.files.name, os.path.join(parent, "files"))
            script = Path(__file__).parent / "snippets.py"
            self.python(str(script), name, cwd=folder)

    def test_all_kinds_are_found(self):
        files = {name.partition(":")[0] for name in FOUND}
        self.assertIn("README.md", files)
        self.assertIn("torch_ext/seams/torch/serialization.py", files)
        self.assertIn("rfcs/RFC-0001-lazy-torch-load.md", files)
        self.assertIn("torch_ext/overlay/torch/distributed/errors.py", files)

    def test_names_in_the_readme_are_there_after_its_imports(self):
        text = (REPOSITORY / "README.md").read_text()
        shown = [x.text for name, x in FOUND.items() if name.startswith("README.md:")]
        imports = [line for text in shown for line in IMPORT.findall(text)]
        names = sorted({*NAME.findall(text)})
        self.assertIn("torch.nn.utils.deferred_init", names)
        code = ["import torch, torch_ext", "torch_ext.enable()", *imports, *names]
        self.python("-c", "\n".join(code), cwd=self.files.name)


instantiate_parametrized_tests(TestSnippets)

if __name__ == "__main__":
    run_tests()
