# Owner(s): ["module: serialization"]
"""A file that torch.load(lazy=True) has mapped may be changed by anybody: what was loaded keeps its values.

Each test is a process of its own, since without a lease it ends with SIGBUS.
"""

import fcntl
import gc
import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from test_load_lazy_save_over import forked
from torch import nn
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    IS_LINUX,
    parametrize,
    run_tests,
    TestCase,
)
from torch.utils.serialization import config


FOLDERS = ["/tmp", "/dev/shm"]  # of which the latter is a tmpfs
# What another process, or this one, does to the file ``p``.
CHANGES = {
    "open for writing": "open(p, 'wb').write(b'x' * 100)",
    "open for update": "with open(p, 'r+b') as f: f.write(b'x' * 100_000)",
    "append": "with open(p, 'ab') as f: f.write(b'x' * 100_000)",
    "truncate": "import os; os.truncate(p, 10)",
    "rename over": "import os; open(p + '2', 'wb').close(); os.replace(p + '2', p)",
    "remove": "import os; os.remove(p)",
}


def by_file_object(p):
    with open(p, "wb") as f:
        torch.save({"other": torch.zeros(3)}, f)


def by_buffer(p):
    buffer = io.BytesIO()
    torch.save({"other": torch.zeros(3)}, buffer)
    with open(p, "wb") as f:
        f.write(buffer.getvalue())


def in_another_process(change):
    def do(p):
        code = f"p = {p!r}\n{CHANGES[change]}"
        subprocess.run([sys.executable, "-c", code], check=True)

    return do


def in_a_forked_child(p):
    pid = os.fork()
    if not pid:
        open(p, "wb").close()
        os._exit(0)
    os.waitpid(pid, 0)


def in_a_spawned_child(p):
    child = multiprocessing.get_context("spawn").Process(
        target=os.truncate, args=(p, 10)
    )
    child.start()
    child.join()


WRITERS = {
    **{f"another process, {name}": in_another_process(name) for name in CHANGES},
    **{
        name: lambda p, code=code: exec(code, {"p": p})
        for name, code in CHANGES.items()
    },
    "torch.save to a path": lambda p: torch.save({"other": torch.zeros(3)}, p),
    "torch.save to a file object": by_file_object,
    "write of a buffer": by_buffer,
    "a forked child": in_a_forked_child,
    "a spawned child": in_a_spawned_child,
}


def state():
    return {
        "weight": torch.arange(2.0**20).reshape(1024, -1),
        "bias": torch.arange(1024.0),
    }


def mapped(path):
    return torch.load(path, lazy=True)


def adopted(path):
    with torch.device("meta"):
        module = nn.Linear(1024, 1024)
    module.load_state_dict(torch.load(path, lazy=True), reuse_tensors=True)
    return dict(module.named_parameters())


def deferred(path):
    return torch.load(path, lazy=True, mmap=False)


def descriptors():
    return set(os.listdir("/proc/self/fd"))


def watchers():
    return [t for t in threading.enumerate() if "leases" in t.name]


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.01)


def anonymous():
    with open("/proc/self/status") as status:
        return int(status.read().split("RssAnon:")[1].split()[0]) << 10


@unittest.skipIf(not IS_LINUX, "leases are Linux's")
class TestLease(TestCase):
    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.object(config.load, "lazy_leases", 128))

    def path(self, where="/dev/shm"):
        folder = tempfile.TemporaryDirectory(dir=where)
        self.addCleanup(folder.cleanup)
        path = os.path.join(folder.name, "model.pt")
        torch.save(state(), path)
        return path

    @parametrize("where", FOLDERS)
    @parametrize("get", [mapped, adopted, deferred])
    @parametrize("who", list(WRITERS))
    @forked
    def test_values_outlive_a_change(self, who, get, where):
        path = self.path(where)
        tensors, expected = get(path), state()
        if get is not deferred:
            with torch.no_grad():
                for tensor in (tensors["bias"], expected["bias"]):
                    tensor.add_(1)
        WRITERS[who](path)
        for name, value in expected.items():
            try:
                actual = tensors[name].clone()
            except RuntimeError as error:  # of a deferred tensor
                self.assertIs(get, deferred)
                self.assertRegex(str(error), f"Expected {path} to be as it was when")
            else:
                self.assertEqual(actual, value)

    @forked
    def test_a_forked_child_keeps_its_values(self):
        path = self.path()
        tensors = mapped(path)
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.write(writer, b"x")
            wait_for(lambda: os.path.getsize(path) == 100)
            os._exit(0 if torch.equal(tensors["weight"], state()["weight"]) else 9)
        os.read(reader, 1)
        in_another_process("open for writing")(path)
        self.assertEqual(os.waitpid(pid, 0)[1], 0)
        self.assertEqual(tensors, state())

    @forked
    def test_what_is_written_meanwhile(self):
        path = self.path()
        torch.save({"weight": torch.zeros(16 << 20)}, path)
        weight, steps, ended = mapped(path)["weight"], 0, threading.Event()

        def change():
            time.sleep(0.05)
            os.truncate(path, 0)
            ended.set()

        thread = threading.Thread(target=change)
        thread.start()
        while steps < 5 or not ended.is_set():
            weight.add_(1)
            steps += 1
        thread.join()
        self.assertEqual((weight == steps).sum(), weight.numel())

    @forked
    def test_who_does_not_wait_is_told_to_try_again(self):
        path = self.path()
        tensors = mapped(path)
        with self.assertRaises(BlockingIOError):
            os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK)
        wait_for(lambda: not watchers())
        os.close(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK))
        self.assertEqual(tensors, state())

    @forked
    def test_two_loads_of_one_file(self):
        path = self.path()
        one, other = mapped(path), mapped(path)
        before = len(descriptors())
        del one
        gc.collect()
        self.assertEqual(len(descriptors()), before)
        os.truncate(path, 0)
        self.assertEqual(other, state())

    @forked
    def test_nothing_is_left(self):
        path = self.path()
        self.assertEqual(watchers(), [])
        before, handlers = (
            descriptors(),
            [signal.getsignal(s) for s in signal.valid_signals()],
        )
        tensors = mapped(path)
        self.assertEqual(len(watchers()), 1)
        self.assertEqual(len(descriptors() - before), 1)
        del tensors
        gc.collect()
        wait_for(lambda: not watchers())
        self.assertEqual(descriptors(), before)
        self.assertEqual(
            [signal.getsignal(s) for s in signal.valid_signals()], handlers
        )

    @parametrize("limit", [0, 2])
    @forked
    def test_descriptors_are_bounded(self, limit):
        config.load.lazy_leases = limit
        paths = [self.path() for _ in range(4)]
        before = len(descriptors())
        tensors = [mapped(path) for path in paths]
        self.assertEqual(len(descriptors()), before + limit)
        self.assertEqual(len(watchers()), min(limit, 1))
        self.assertEqual(tensors, [state()] * 4)

    @forked
    def test_what_is_in_use_is_moved(self):
        path = self.path()
        size = 16 << 20
        torch.save({n: torch.ones(size, dtype=torch.uint8) for n in "abcd"}, path)
        tensors = mapped(path)
        kept = tensors.pop("b")
        del tensors
        before = anonymous()
        os.truncate(path, 0)
        self.assertEqual(int(kept.sum()), size)
        self.assertLess(anonymous() - before, 1.5 * size)

    @forked
    def test_no_lease_on_a_file_that_is_open_for_writing(self):
        path = self.path()
        with open(path, "r+b"):
            before = descriptors()
            tensors = mapped(path)
            wait_for(lambda: not watchers())
            self.assertEqual(descriptors(), before)
            self.assertEqual(tensors, state())

    @unittest.skipIf(not IS_LINUX or os.geteuid(), "needs root")
    @forked
    def test_no_lease_on_a_file_of_another_owner(self):
        path = self.path()
        os.chmod(os.path.dirname(path), 0o755)
        # NB: another user may not be able to read where torch is; so all is imported first.
        self.assertEqual(mapped(self.path()), state())
        wait_for(lambda: not watchers())
        os.seteuid(65534)
        before = descriptors()
        tensors = mapped(path)
        wait_for(lambda: not watchers())
        self.assertEqual(descriptors(), before)
        self.assertEqual(tensors, state())

    @forked
    def test_many_changes_at_once(self):
        paths = [self.path() for _ in range(8)]
        tensors = [mapped(path) for path in paths]
        code = "\n".join(
            f"threading.Thread(target=os.truncate, args=({p!r}, 0)).start()"
            for p in paths
        )
        subprocess.run(
            [sys.executable, "-c", f"import os, threading\n{code}"], check=True
        )
        self.assertEqual(tensors, [state()] * 8)

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    def test_interleavings(self):
        path = self.path()
        pids = []
        for seed in range(3):
            pid = os.fork()
            if not pid:
                torch.set_num_threads(1)
                status = 1
                try:
                    interleave(path, seed, steps=200)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            pids.append(pid)
        self.assertEqual([os.waitpid(pid, 0)[1] for pid in pids], [0, 0, 0])


@contextmanager
def locked(path, kind):
    """No load meets a file that is half written; what was loaded stays mapped without a lock."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, kind)
        yield


def interleave(path, seed, steps):
    """Load, train, save over, and check, in an order of chance; every file has one number everywhere."""
    chance = random.Random(seed)
    loaded = []  # tensors, and the number that they have to be full of

    def load():
        with locked(path, fcntl.LOCK_SH):
            tensors = torch.load(path, lazy=True, mmap=chance.choice([None, True]))
            number = float(tensors["bias"][0])
        loaded.append([tensors, number])

    def train():
        for one in loaded:
            for tensor in one[0].values():
                tensor.add_(1)
            one[1] += 1

    def save():
        full = {k: torch.full_like(v, chance.randrange(99)) for k, v in STATE.items()}
        full["weight"].fill_(full["bias"][0])
        with locked(path, fcntl.LOCK_EX):
            how = chance.choice(["path", "object", "buffer", "truncated"])
            if how == "path":
                torch.save(full, path)
                return
            if how == "truncated":
                os.truncate(path, chance.randrange(1000))
            buffer = io.BytesIO()
            torch.save(full, buffer)
            with open(path, "wb") as f:
                f.write(buffer.getvalue())

    def check():
        for tensors, number in loaded:
            for tensor in tensors.values():
                assert bool((tensor == number).all()), (seed, number, tensor)

    def drop():
        if loaded:
            loaded.pop(chance.randrange(len(loaded)))

    save()
    for _ in range(steps):
        chance.choice([load, load, train, save, check, drop])()
        if len(loaded) > 4:
            drop()
    check()


STATE = state()

instantiate_parametrized_tests(TestLease)

if __name__ == "__main__":
    run_tests()
