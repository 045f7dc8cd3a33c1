# Owner(s): ["module: serialization"]
"""torch.load(f, lazy=True) in threads, in forked and in spawned processes."""

import gc
import io
import os
import sys
import tempfile
import threading
import unittest
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.multiprocessing as mp
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    IS_MACOS,
    IS_WINDOWS,
    parametrize,
    run_tests,
    TestCase,
)
from torch.utils.data import DataLoader, TensorDataset


HAS_FORK = not (IS_WINDOWS or IS_MACOS)
CONTEXTS = ["fork", "spawn"] if HAS_FORK else ["spawn"]
SOURCES = ["path", "file", "bytes", "object"]


class Blocks(io.BytesIO):
    """A file that, once asked to, does not answer until it is allowed to."""

    def __init__(self, data):
        super().__init__(data)
        self.allowed, self.asked = threading.Event(), threading.Event()
        self.allowed.set()

    def readinto(self, buffer):
        self.asked.set()
        self.allowed.wait(60)
        return super().readinto(buffer)


class TestProcesses(TestCase):
    def setUp(self):
        super().setUp()
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = os.path.join(self.folder.name, "x.pt")
        x = torch.arange(64.0 * 9).view(64, 9)
        self.state = {"x": x, "y": torch.arange(64), "t": x.t()}
        torch.save(self.state, self.path)

    def load(self, source):
        if source == "path":
            return torch.load(self.path, lazy=True)
        if source == "file":
            with open(self.path, "rb") as file:
                return torch.load(file, lazy=True)
        kind = {"bytes": io.BytesIO, "object": Blocks}[source]
        return torch.load(kind(self.data()), lazy=True)

    def data(self):
        with open(self.path, "rb") as file:
            return file.read()

    # Processes

    @parametrize("context", CONTEXTS)
    @parametrize("source", SOURCES)
    def test_data_loader(self, source, context):
        lazy = self.load(source)
        loader = DataLoader(
            TensorDataset(lazy["x"], lazy["y"]),
            batch_size=16,
            num_workers=2,
            multiprocessing_context=context,
            persistent_workers=True,
        )
        for _ in range(2):
            batches = list(loader)
            self.assertEqual(torch.cat([x for x, _ in batches]), self.state["x"])
            self.assertEqual(torch.cat([y for _, y in batches]), self.state["y"])
        self.assertEqual(lazy, self.state)

    @parametrize("context", CONTEXTS)
    @parametrize("source", ["path", "file"])
    def test_sent_to_a_pool(self, source, context):
        lazy = self.load(source)
        with mp.get_context(context).Pool(1) as pool:
            self.assertEqual(pool.apply(torch.sum, (lazy["x"],)), self.state["x"].sum())
            back = pool.apply(torch.clone, (lazy["t"],))
            self.assertEqual(back, self.state["t"])
        self.assertEqual(lazy, self.state)

    @parametrize("source", SOURCES)
    @unittest.skipIf(not HAS_FORK, "needs fork")
    def test_writes_of_a_forked_process_stay_there(self, source):
        lazy = self.load(source)
        process = mp.get_context("fork").Process(target=lazy["x"].zero_)
        process.start()
        process.join()
        self.assertEqual(process.exitcode, 0)
        self.assertEqual(lazy["x"], self.state["x"])
        self.assertEqual(torch.load(self.path), self.state)

    @parametrize("source", SOURCES)
    @unittest.skipIf(not HAS_FORK, "needs fork")
    def test_loaded_in_a_forked_process(self, source):
        self.load(source)  # whatever the first load leaves behind

        def run():
            os._exit(not torch.equal(self.load(source)["t"], self.state["t"]))

        process = mp.get_context("fork").Process(target=run)
        process.start()
        process.join()
        self.assertEqual(process.exitcode, 0)

    @unittest.skipIf(not HAS_FORK, "needs fork")
    def test_forked_while_another_thread_reads(self):
        file = Blocks(self.data())
        lazy = torch.load(file, lazy=True)
        file.asked.clear()
        file.allowed.clear()
        with ThreadPoolExecutor() as threads:
            read = threads.submit(lazy["x"].sum)
            try:
                self.assertTrue(file.asked.wait(60))
                # The child has no thread that could ever release what is held here.
                process = mp.get_context("fork").Process(
                    target=self.read_in_child, args=(file, lazy)
                )
                process.start()
                process.join(60)
                exitcode = process.exitcode
                process.kill()
            finally:
                file.allowed.set()
            self.assertEqual(read.result(), self.state["x"].sum())
        self.assertEqual(exitcode, 0)

    @unittest.skipIf(not HAS_FORK, "needs fork")
    def test_forked_while_another_thread_loads(self):
        called, may_return = threading.Event(), threading.Event()

        def map_location(storage, _):
            called.set()
            may_return.wait(60)
            return storage

        kwargs = {"lazy": True, "map_location": map_location}
        thread = threading.Thread(target=torch.load, args=(self.path,), kwargs=kwargs)
        thread.start()
        try:
            self.assertTrue(called.wait(60))
            pid = os.fork()
            if not pid:
                self.load("path")
                # The pause of the other thread would never end here.
                os._exit(not gc.isenabled())
            self.assertEqual(os.waitpid(pid, 0)[1], 0)
        finally:
            may_return.set()
            thread.join()
        self.assertTrue(gc.isenabled())

    def read_in_child(self, file, lazy):
        file.allowed = threading.Event()  # its lock, too, may be held
        file.allowed.set()
        file.asked = threading.Event()
        same = all(torch.equal(lazy[name], self.state[name]) for name in "yx")
        os._exit(not same)

    # Threads

    @parametrize("source", SOURCES)
    def test_threads_that_load(self, source):
        with ThreadPoolExecutor(4) as threads:
            for lazy in threads.map(lambda _: self.load(source), range(40)):
                self.assertTrue(torch.equal(lazy["t"], self.state["t"]))
                self.assertTrue(torch.equal(lazy["y"], self.state["y"]))

    @parametrize("source", SOURCES)
    def test_threads_that_read_one_tensor(self, source):
        x = self.state["x"]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        self.addCleanup(sys.setswitchinterval, interval)

        def is_same(tensor, index, value):
            return torch.equal(tensor[index], value)

        places = [
            *(("x", i, x[i]) for i in range(64)),
            *(("x", (slice(None), i), x[:, i]) for i in range(9)),
            *(("t", i, x[:, i]) for i in range(9)),
        ]
        with ThreadPoolExecutor(4) as threads:
            for _ in range(5):
                lazy = self.load(source)
                tensors = [lazy[name] for name, _, _ in places]
                _, indices, values = zip(*places, strict=True)
                found = list(threads.map(is_same, tensors, indices, values))
                self.assertEqual(found, [True] * len(places))
                # One storage for all of them.
                self.assertEqual(lazy["x"].data_ptr(), lazy["t"].data_ptr())
                lazy["x"][3].fill_(-1)
                self.assertEqual(lazy["t"][:, 3], torch.full((9,), -1.0))


instantiate_parametrized_tests(TestProcesses)

if __name__ == "__main__":
    run_tests()
