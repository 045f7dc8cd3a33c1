# Owner(s): ["module: serialization"]
"""torch.save onto a file that torch.load(lazy=True) has open.

Each test is a process of its own, since without the patch it ends with SIGBUS.
"""

import errno
import functools
import gc
import os
import pickle
import signal
import stat
import tempfile
import traceback
import unittest
import zipfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from unittest import mock

import torch
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    IS_WINDOWS,
    parametrize,
    run_tests,
    TestCase,
)


def status_of(run):
    """Runs ``run()`` in a forked process; returns its exit code, or the negative of a signal, and its errors."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)
            gc.collect()  # what other tests left open, under a number that a new file may have
            run()
            os._exit(0)
        except BaseException:
            os.write(writer, traceback.format_exc().encode()[-60_000:])
            os._exit(1)
    os.close(writer)
    with open(reader) as errors:
        text = errors.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def forked(test):
    @functools.wraps(test)
    def run(self, *args, **kwargs):
        status, errors = status_of(lambda: test(self, *args, **kwargs))
        self.assertEqual(status, 0, errors)

    return run


class Raises:
    """Cannot be pickled."""

    def __reduce__(self):
        raise ZeroDivisionError("in the middle")


class Kills:
    """Is the end of whoever pickles it."""

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)


@unittest.skipIf(IS_WINDOWS, "a mapped file cannot be truncated")
class TestSaveOver(TestCase):
    def setUp(self):
        super().setUp()
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = os.path.join(self.folder.name, "model.v1.pt")
        self.state = {
            "a": torch.arange(9.0),
            "b": torch.arange(1 << 18),
            "c": torch.ones(0),
        }
        torch.save(self.state, self.path)
        # The first use imports much: once here, not in each process.
        self.assertHolds(self.path, self.state)

    def assertHolds(self, path, state):
        loaded = torch.load(path)
        self.assertEqual(list(loaded), list(state))
        for name, value in state.items():
            self.assertEqual(loaded[name], value)

    def assertFiles(self, *names):
        self.assertEqual(sorted(os.listdir(self.folder.name)), sorted(names))

    def assertOldAndNew(self, lazy, path=None):
        """Saves ``lazy``, changed in place, and looks at what it and the file are then."""
        lazy["a"].add_(1)
        lazy["new"] = torch.zeros(2)
        torch.save(lazy, path or self.path)
        changed = {**self.state, "a": self.state["a"] + 1, "new": torch.zeros(2)}
        self.assertHolds(path or self.path, changed)
        for name, value in changed.items():
            self.assertEqual(lazy[name], value)
        lazy["b"].zero_()  # has its own pages still
        self.assertHolds(path or self.path, changed)

    # What becomes of the file

    @parametrize("zip_format", [True, False])
    @forked
    def test_own_path(self, zip_format):
        lazy = torch.load(self.path, lazy=True)
        torch.save(lazy, self.path, _use_new_zipfile_serialization=zip_format)
        self.assertEqual(zipfile.is_zipfile(self.path), zip_format)
        self.assertHolds(self.path, self.state)
        self.assertHolds(self.path, lazy)
        self.assertFiles("model.v1.pt")

    @forked
    def test_modified_in_place(self):
        self.assertOldAndNew(torch.load(self.path, lazy=True))
        self.assertFiles("model.v1.pt")

    @forked
    def test_again_and_again(self):
        lazies = []
        for i in range(3):
            lazies.append(torch.load(self.path, lazy=True))
            lazies[i]["a"].add_(1)
            torch.save(lazies[i], self.path)
        self.assertEqual([int(lazy["a"][0]) for lazy in lazies], [1, 2, 3])

    @forked
    def test_something_else(self):
        lazy = torch.load(self.path, lazy=True)
        torch.save({"x": torch.ones(1)}, Path(self.path))
        self.assertHolds(self.path, {"x": torch.ones(1)})
        for name, value in self.state.items():
            self.assertEqual(lazy[name], value)

    @forked
    def test_deferred(self):
        lazy = torch.load(self.path, lazy=True, mmap=False)
        row, other = lazy["b"][7:9], torch.load(self.path, lazy=True, mmap=False)
        self.assertOldAndNew(lazy)
        self.assertEqual(row, torch.zeros(2, dtype=torch.int64))
        self.assertFiles("model.v1.pt")
        for name, value in self.state.items():
            self.assertEqual(other[name], value)

    @forked
    def test_deferred_from_another_process(self):
        lazy = torch.load(self.path, lazy=True, mmap=False)
        sent = {name: bytes(ForkingPickler.dumps(lazy[name])) for name in lazy}
        del lazy
        self.assertOldAndNew({name: pickle.loads(sent[name]) for name in sent})
        self.assertFiles("model.v1.pt")

    @forked
    def test_deferred_of_a_moved_file(self):
        lazy = torch.load(self.path, lazy=True, mmap=False)
        moved = os.path.join(self.folder.name, "moved.pt")
        os.rename(self.path, moved)
        torch.save({"x": torch.ones(1)}, moved)
        self.assertHolds(moved, {"x": torch.ones(1)})
        with self.assertRaisesRegex(RuntimeError, "got no file of that name"):
            lazy["a"] + 1

    @forked
    def test_files_forgotten_meanwhile(self):
        from torch._load_lazy import _live

        class Owner:
            pass

        status = os.stat(self.path)
        owners = [Owner() for _ in range(5000)]  # more than Python keeps tuples for
        for owner in owners:
            _live.add(owner, status)
        garbage = Owner()
        garbage.itself = garbage
        _live.add(garbage, status)
        del garbage
        gc.set_threshold(100)
        self.assertTrue(_live.is_live(status))

    @parametrize("save_by", ["link", "target"])
    @forked
    def test_symbolic_links(self, save_by):
        target, link = self.path, os.path.join(self.folder.name, "latest")
        os.makedirs(link)
        for name, to in (("x", "../model.v1.pt"), ("y", "x")):
            os.symlink(to, os.path.join(link, name))
        link = os.path.join(link, "y")
        load, save = (target, link) if save_by == "link" else (link, target)
        self.assertOldAndNew(torch.load(load, lazy=True), save)
        self.assertEqual(os.readlink(link), "x")
        self.assertEqual(os.path.realpath(link), os.path.realpath(target))
        self.assertFiles("model.v1.pt", "latest")

    @forked
    def test_other_spelling_of_the_path(self):
        lazy = torch.load(self.path, lazy=True)
        os.chdir(self.folder.name)
        self.assertOldAndNew(
            lazy, "./../" + os.path.basename(os.getcwd()) + "/model.v1.pt"
        )
        self.assertFiles("model.v1.pt")

    @forked
    def test_hard_links_stay(self):
        link = self.path + ".link"
        os.link(self.path, link)
        before = os.stat(link)
        self.assertOldAndNew(torch.load(self.path, lazy=True), link)
        self.assertTrue(os.path.samestat(os.stat(self.path), before))
        self.assertTrue(os.path.samestat(os.stat(link), before))
        self.assertFiles("model.v1.pt", "model.v1.pt.link")

    @forked
    def test_mode_and_owner_stay(self):
        os.chmod(self.path, 0o640)
        if os.geteuid() == 0:
            os.chown(self.path, 1234, 5678)
        try:
            os.setxattr(self.path, "user.note", b"kept")
        except (AttributeError, OSError):
            pass
        before = os.stat(self.path)
        notes = getattr(os, "listxattr", lambda _: [])
        noted = notes(self.path)
        self.assertOldAndNew(torch.load(self.path, lazy=True))
        after = os.stat(self.path)
        self.assertNotEqual(after.st_ino, before.st_ino)
        self.assertEqual(stat.S_IMODE(after.st_mode), 0o640)
        self.assertEqual(after.st_uid, before.st_uid)
        self.assertEqual(after.st_gid, before.st_gid)
        self.assertEqual(notes(self.path), noted)

    @parametrize("name", ["model.v1.pt", "plain", "naïve.pt"])
    @forked
    def test_writes_what_it_would_write_elsewhere(self, name):
        path = os.path.join(self.folder.name, name)
        elsewhere = os.path.join(self.folder.name, "elsewhere", name)
        os.mkdir(os.path.dirname(elsewhere))
        torch.save(self.state, path)
        lazy = torch.load(path, lazy=True)
        torch.save(lazy, path)
        torch.save(lazy, elsewhere)
        same = Path(path).read_bytes() == Path(elsewhere).read_bytes()
        self.assertTrue(same)

    # When it cannot be replaced

    @parametrize("call", ["tempfile.mkstemp", "os.fchmod", "os.replace"])
    @forked
    def test_in_place(self, call):
        before = os.stat(self.path)
        lazy = torch.load(self.path, lazy=True)
        with mock.patch(call, side_effect=OSError(errno.EBUSY, "a mount point")):
            self.assertOldAndNew(lazy)
        self.assertTrue(os.path.samestat(os.stat(self.path), before))
        self.assertFiles("model.v1.pt")

    @forked
    def test_neither(self):
        with mock.patch("torch._load_lazy._memory.CAN_DETACH", False):
            lazy = torch.load(self.path, lazy=True)
        os.link(self.path, self.path + ".link")
        with self.assertRaises(RuntimeError) as raised:
            torch.save(lazy, self.path)
        self.assertExpectedInline(
            str(raised.exception).replace(self.folder.name, ""),
            """\
Expected /model.v1.pt to be a file that can be replaced, since tensors of it are \
lazily loaded, got one with 2 hard links. (Did you mean to save to another file?)""",
        )
        self.assertHolds(self.path, self.state)
        self.assertHolds(self.path, lazy)

    # When it is interrupted

    def writing(self, action):
        """Context in which ``action`` is called after the first tensor was written."""
        calls = []
        nbytes = torch.UntypedStorage.nbytes

        def count(storage):
            if calls:
                action()
            calls.append(storage)
            return nbytes(storage)

        return mock.patch.object(torch.UntypedStorage, "nbytes", count)

    @parametrize("zip_format", [True, False])
    @forked
    def test_that_raises(self, zip_format):
        lazy = torch.load(self.path, lazy=True)
        before = os.stat(self.path)
        with self.assertRaisesRegex(ZeroDivisionError, "in the middle"):
            torch.save(
                [lazy, Raises()],
                self.path,
                _use_new_zipfile_serialization=zip_format,
            )
        self.assertTrue(os.path.samestat(os.stat(self.path), before))
        self.assertHolds(self.path, self.state)
        self.assertHolds(self.path, lazy)
        self.assertFiles("model.v1.pt")

    @forked
    def test_by_the_keyboard(self):
        lazy = torch.load(self.path, lazy=True)
        # NB: SIGINT is ignored from the start in a background job of a shell.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, before)
        interrupt = lambda: signal.raise_signal(signal.SIGINT)
        with self.writing(interrupt), self.assertRaises(KeyboardInterrupt):
            torch.save(lazy, self.path)
        self.assertHolds(self.path, self.state)
        self.assertFiles("model.v1.pt")

    @parametrize("when", ["pickling", "writing", "syncing"])
    def test_by_a_kill(self, when):
        kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

        def run():
            lazy = torch.load(self.path, lazy=True)
            lazy["a"].add_(1)
            if when == "pickling":
                torch.save([lazy, Kills()], self.path)
            elif when == "writing":
                with self.writing(kill):
                    torch.save(lazy, self.path)
            else:
                with mock.patch("os.fsync", kill):
                    torch.save(lazy, self.path)

        self.assertEqual(status_of(run), (-signal.SIGKILL, ""))
        self.assertHolds(self.path, self.state)

    # Otherwise nothing changes

    @forked
    def test_a_file_that_is_not_open_is_written_over(self):
        other = self.path + ".other"
        torch.save(self.state, other)
        before = os.stat(other), os.stat(self.path)
        lazy = torch.load(self.path, lazy=True)
        torch.save(lazy, other)
        self.assertTrue(os.path.samestat(os.stat(other), before[0]))
        del lazy
        torch.save(self.state, self.path)
        self.assertTrue(os.path.samestat(os.stat(self.path), before[1]))

    @forked
    def test_what_was_loaded_otherwise_is_not_open(self):
        from torch.utils.serialization import config

        loaded = [torch.load(self.path), torch.load(self.path, lazy=True)]
        with config.patch("load.lazy_mode", "read"):
            loaded[1] = torch.load(self.path, lazy=True)
        before = os.stat(self.path)
        torch.save(loaded, self.path)
        self.assertTrue(os.path.samestat(os.stat(self.path), before))

    @forked
    def test_what_cannot_be_saved_to(self):
        lazy = torch.load(self.path, lazy=True)
        for f in (self.folder.name, "/nowhere/x.pt", "\0", None):
            with self.assertRaises((RuntimeError, AttributeError, ValueError, OSError)):
                torch.save(lazy, f)
        self.assertHolds(self.path, lazy)


instantiate_parametrized_tests(TestSaveOver)

if __name__ == "__main__":
    run_tests()
