# Owner(s): ["module: serialization"]
"""torch.load(f, lazy=True) that reads the file instead of mapping it."""

import gc
import os
import tempfile
import threading
import unittest
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    IS_LINUX,
    IS_WINDOWS,
    parametrize,
    run_tests,
    TestCase,
)
from torch.utils.serialization import config


class TestRead(TestCase):
    def setUp(self):
        super().setUp()
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = os.path.join(self.folder.name, "x.pt")
        base = torch.arange(99_999.0)
        self.state = {
            "base": base,
            "row": base[5:10],
            **{str(i): torch.full((i,), i) for i in range(100)},
        }
        torch.save(self.state, self.path)

    def load(self):
        with config.patch("load.lazy_mode", "read"):
            return torch.load(self.path, lazy=True)

    def assertHolds(self, loaded):
        self.assertEqual(list(loaded), list(self.state))
        for name, value in self.state.items():
            self.assertTrue(torch.equal(loaded[name], value))
        self.assertEqual(loaded["row"].data_ptr(), loaded["base"][5:].data_ptr())

    @contextmanager
    def reading(self, **replaced):
        """Context in which parts of the reader are others."""
        import torch._load_lazy._map

        module = torch._load_lazy._map._read_whole
        with mock.patch.multiple(module, **replaced):
            yield

    # The law

    def test_equals_load(self):
        self.assertHolds(self.load())

    @parametrize("piece", [4096, 12288])
    def test_in_pieces(self, piece):
        with self.reading(_PIECE=piece):
            self.assertHolds(self.load())

    @parametrize("size", [1, 4095, 4096, 4097])
    def test_ends_of_pieces(self, size):
        torch.save(torch.arange(size).to(torch.uint8), self.path)
        with self.reading(_PIECE=4096):
            self.assertEqual(self.load(), torch.load(self.path))

    def test_sizes_of_pages(self):
        def asked(huge, small, is_large=True):
            """Which of eight pieces are huge, if a piece takes so long in pages of either size."""
            found, now = [], 0
            with (
                self.reading(
                    _memory=mock.Mock(
                        ask_for_huge_pages=lambda _, start, end: found.append(start)
                    )
                ),
                mock.patch("time.perf_counter", lambda: now),
            ):
                pages = torch._load_lazy._map._read_whole._Pages(None, is_large)
                for i in range(8):
                    with pages.of(i, i + 1):
                        now += (huge if i in found else small)[i]
            return found

        self.assertEqual(asked([1] * 8, [2] * 8), [0, 2, 3, 4, 5, 6, 7])
        self.assertEqual(asked([2] * 8, [1] * 8), [0])
        # Either may be faster for a while only.
        self.assertEqual(asked([1] * 4 + [9] * 4, [2] * 8), [0, 2, 3, 4])
        self.assertEqual(asked([2] * 8, [1] * 5 + [9] * 3), [0, 6, 7])
        self.assertEqual(asked([1] * 8, [2] * 8, is_large=False), [])

    def test_large_file(self):
        with self.reading(_PIECE=1 << 15, _LARGE=0, _has_room_for_huge_pages=bool):
            self.assertHolds(self.load())

    @unittest.skipIf(not hasattr(os, "preadv"), "reads in order")
    def test_short_reads(self):
        preadv = os.preadv
        short = lambda fd, buffers, *args: preadv(fd, [buffers[0][:1000]], *args)
        with mock.patch("os.preadv", short), self.reading(_PIECE=1 << 16):
            self.assertHolds(self.load())

    def test_in_order(self):
        with mock.patch("os.preadv", create=True):
            del os.preadv
            self.assertHolds(self.load())

    @unittest.skipIf(not IS_LINUX, "reads past the page cache")
    @parametrize("works", [True, False])
    def test_past_the_page_cache(self, works):
        preadv, seen = os.preadv, set()

        def aligned(fd, buffers, offset):
            direct = os.readlink(f"/proc/self/fd/{fd}") == self.path + ".direct"
            if threading.current_thread() is not threading.main_thread():
                seen.add(direct)  # else it is the index
            if direct and not works:
                raise OSError(22, "Invalid argument")
            if direct:
                self.assertEqual((offset % 4096, len(buffers[0]) % 4096), (0, 0))
            return preadv(fd, buffers, offset)

        # A second file tells the descriptors apart, whether or not this file system can.
        os.link(self.path, self.path + ".direct")
        with (
            self.reading(
                _is_cached=lambda *_: False,
                _open_direct=lambda _: os.open(self.path + ".direct", os.O_RDONLY),
                _PIECE=1 << 16,
            ),
            mock.patch("os.preadv", aligned),
        ):
            self.assertHolds(self.load())
        self.assertEqual(seen, {True} if works else {True, False})

    @unittest.skipIf(not IS_LINUX, "reads past the page cache")
    def test_past_the_page_cache_for_real(self):
        with self.reading(_is_cached=lambda *_: False):
            self.assertHolds(self.load())

    def test_threads(self):
        results = []
        threads = [
            threading.Thread(target=lambda: results.append(self.load()))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            self.assertHolds(result)
        self.assertEqual(len(results), 4)

    # What happens to the file afterwards

    def test_file_is_of_no_concern_afterwards(self):
        for change in (
            lambda: os.truncate(self.path, 0),
            lambda: Path(self.path).write_bytes(b"\1" * 900_000),
            lambda: os.unlink(self.path),
        ):
            torch.save(self.state, self.path)
            loaded = self.load()
            change()
            self.assertHolds(loaded)

    def test_writes_do_not_reach_the_file(self):
        before = Path(self.path).read_bytes()
        self.load()["base"].zero_()
        self.assertTrue(Path(self.path).read_bytes() == before)

    @unittest.skipIf(not IS_LINUX, "reads /proc")
    def test_memory_ends_with_the_last_tensor(self):
        def own():
            fields = dict(line.split(":") for line in open("/proc/self/status"))
            return int(fields["RssAnon"].split()[0]) << 10

        torch.save({"x": torch.ones(64 << 18), "y": torch.ones(1)}, self.path)
        self.load()
        descriptors, before = set(os.listdir("/proc/self/fd")), own()
        loaded = self.load()
        self.assertEqual(set(os.listdir("/proc/self/fd")), descriptors)
        self.assertNotIn(self.path, Path("/proc/self/maps").read_text())
        self.assertGreaterEqual(own() - before, 60 << 20)
        gc.disable()
        self.addCleanup(gc.enable)
        y = loaded["y"]
        del loaded
        self.assertGreaterEqual(own() - before, 60 << 20)
        del y
        self.assertLess(own() - before, 30 << 20)

    # Errors

    def error(self):
        with self.assertRaises((RuntimeError, ValueError)) as raised:
            self.load()
        return str(raised.exception).replace(self.folder.name, "")

    @unittest.skipIf(IS_WINDOWS, "an open file cannot be truncated")
    def test_changes_while_it_is_read(self):
        def during(change):
            def is_cached(*_):
                change()
                return True

            return self.reading(_is_cached=is_cached, _PIECE=1 << 16)

        def append():
            with open(self.path, "ab") as file:
                file.write(b"more")

        with during(append):
            error = self.error().replace(str(os.path.getsize(self.path)), "SIZE")
        self.assertExpectedInline(
            error,
            """\
Expected /x.pt to stay as it is while it is read, got a change, to SIZE bytes, at \
offset 0. (Is the file damaged, or still being written?)""",
        )
        torch.save(self.state, self.path)
        with during(lambda: os.truncate(self.path, 1 << 16)):
            error = self.error()
        self.assertExpectedInline(
            error,
            """\
Expected /x.pt to stay as it is while it is read, got the end of the file at \
offset 65536. (Is the file damaged, or still being written?)""",
        )

    def test_error_of_the_disk(self):
        broken = mock.patch("os.preadv", side_effect=OSError(5, "Input/output error"))
        with (
            broken,
            self.reading(_is_cached=lambda *_: True),
            self.assertRaises(OSError),
        ):
            self.load()

    def test_unknown_mode(self):
        with config.patch("load.lazy_mode", "reed"), self.assertRaises(ValueError) as e:
            torch.load(self.path, lazy=True)
        self.assertExpectedInline(
            str(e.exception),
            """\
Expected torch.utils.serialization.config.load.lazy_mode to be 'map' or 'read', \
got 'reed'.""",
        )

    def test_default_maps(self):
        self.assertEqual(config.load.lazy_mode, "map")
        with self.reading(read=mock.Mock(side_effect=AssertionError)):
            self.assertHolds(torch.load(self.path, lazy=True))

    def test_mmap_insists(self):
        unread = self.reading(read=mock.Mock(side_effect=AssertionError))
        with config.patch("load.lazy_mode", "read"), unread:
            self.assertHolds(torch.load(self.path, lazy=True, mmap=True))


instantiate_parametrized_tests(TestRead)

if __name__ == "__main__":
    run_tests()
