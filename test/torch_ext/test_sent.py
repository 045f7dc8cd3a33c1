"""What new files send to processes that were spawned, and know of no patch, arrives there."""

import os
import tempfile
from pathlib import Path

from processes import python
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    TestCase,
)


REPOSITORY = Path(__file__).parents[2]

SCRIPT = """
import multiprocessing
import sys

import torch
import torch.multiprocessing


def work(x, connection):
    import torch_ext

    assert torch_ext.enabled() == (), torch_ext.enabled()
    kind = type(x).__name__
    connection.send((kind, x[1:]))  # back, still deferred
    connection.recv()


def hand_on(x, context, connection):
    child = multiprocessing.get_context(context).Process(target=work, args=(x, connection))
    child.start()
    child.join()


if __name__ == "__main__":
    import torch_ext

    context, library, target, path = sys.argv[1:]
    with torch_ext.enable("load_lazy"):
        torch.save({"x": torch.arange(10.0)}, path)
        with open(path, "rb") as f:
            x = torch.load(f, lazy=True)["x"]
    context_of = sys.modules[library].get_context(context)
    here, there = context_of.Pipe()
    args = {"work": (x, there), "hand_on": (x, context, there)}[target]
    child = context_of.Process(target=globals()[target], args=args)
    child.start()
    there.close()
    kind, rest = here.recv()
    here.send(None)
    child.join()
    print(kind, type(rest).__name__, float(rest.sum()), child.exitcode)
"""


class TestSent(TestCase):
    @parametrize("context", ["spawn", "forkserver"])
    @parametrize("library", ["multiprocessing", "torch.multiprocessing"])
    def test_a_deferred_tensor_goes_there_and_back(self, context, library):
        self.assertEqual(
            self.run_script(context, library, "work"),
            "DeferredTensor DeferredTensor 45.0 0\n",
        )

    def test_it_is_handed_on_by_a_process_that_knows_of_no_patch(self):
        self.assertEqual(
            self.run_script("spawn", "multiprocessing", "hand_on"),
            "DeferredTensor DeferredTensor 45.0 0\n",
        )

    def run_script(self, *args):
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, "script.py")
            script.write_text(SCRIPT)
            path = os.path.join(folder, "x.pt")
            done = python(str(script), *args, path, root=REPOSITORY, check=True)
        return done.stdout


instantiate_parametrized_tests(TestSent)

if __name__ == "__main__":
    run_tests()
