# Owner(s): ["module: serialization"]
"""torch.load(f, lazy=True) is torch.load(f) for every f that torch.load opens."""

import io
import pickle
import tempfile
import unittest
from pathlib import Path

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from load_lazy_case import deferred_tensor, LazyTestCase, state_dicts, Unlisted
from load_lazy_files import (
    Counted,
    FORMATS,
    legacy,
    OBJECTS,
    Opened,
    PATHS,
    ShortReads,
    swapped,
    zipped,
)
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
)


try:
    import fsspec
except ImportError:
    fsspec = None


class TestLoadLazyFormats(LazyTestCase):
    @settings(max_examples=80, deadline=None)
    @given(
        state_dicts(),
        st.booleans(),
        st.sampled_from([f for f in FORMATS if f is not swapped]),
        st.sampled_from(PATHS),
    )
    def test_paths_are_mapped(self, state, weights_only, write, give):
        with tempfile.TemporaryDirectory() as folder:
            path = give(Opened(folder), write(state))
            self.assertPlainAlike(
                *self.load_both(path, path, weights_only=weights_only)
            )

    @settings(max_examples=80, deadline=None)
    @given(
        state_dicts(),
        st.booleans(),
        st.sampled_from(FORMATS),
        st.sampled_from(OBJECTS + PATHS),
    )
    def test_what_cannot_be_mapped_is_deferred(self, state, weights_only, write, give):
        with tempfile.TemporaryDirectory() as folder:
            data = write(state)
            kwargs = {"mmap": False} if give in PATHS else {}
            f = give(Opened(folder), data)
            pair = self.load_both(
                io.BytesIO(data), f, weights_only=weights_only, **kwargs
            )
            self.assertActsAlike(*pair)

    def test_short_reads(self):
        for write in FORMATS:
            data = write({"x": torch.arange(1000.0)})
            lazy = torch.load(ShortReads(data), lazy=True)
            self.assertActsAlike(torch.load(io.BytesIO(data)), lazy)

    @unittest.skipIf(fsspec is None, "needs fsspec")
    def test_remote_file(self):
        system = fsspec.filesystem("memory")
        state = {"x": torch.arange(1000.0), "y": torch.ones(3)}
        for write in FORMATS:
            with system.open("/load_lazy.pt", "wb") as file:
                file.write(write(state))
            with system.open("/load_lazy.pt", "rb") as file:
                lazy = torch.load(file, lazy=True)
                self.assertActsAlike(torch.load(io.BytesIO(write(state))), lazy)

    @parametrize("give", OBJECTS)
    @parametrize("write", FORMATS)
    def test_reads_the_index_alone(self, write, give):
        state = {f"{i}": torch.full((1 << 18,), i) for i in range(16)}
        data = write(state)
        file = give(Opened(self.folder), data)
        counted = Counted(file)
        lazy = torch.load(counted, lazy=True)
        self.assertLess(counted.count, 200 << 10)
        self.assertIs(type(lazy["3"]), deferred_tensor())
        expected = torch.load(io.BytesIO(data))
        self.assertEqual(lazy["3"][7], expected["3"][7])
        self.assertLess(counted.count, 400 << 10)
        self.assertEqual(lazy["5"], expected["5"])

    def test_outlives_a_local_file_object(self):
        for write in FORMATS:
            with Opened(self.folder).raw_file_at_7(write({"x": torch.ones(3)})) as f:
                lazy = torch.load(f, lazy=True)
            expected = torch.load(io.BytesIO(write({"x": torch.ones(3)})))
            self.assertEqual(lazy["x"], expected["x"])

    def test_position_afterwards(self):
        state = {"x": torch.ones(3)}
        file = io.BytesIO(b"another" + legacy(state) + legacy([2]) + b"more")
        file.seek(7)
        self.assertEqual(torch.load(file, lazy=True), state)
        self.assertEqual(torch.load(file, lazy=True), [2])
        self.assertEqual(file.read(), b"more")
        with self.assertRaises(EOFError):
            torch.load(file, lazy=True)
        file = io.BytesIO(zipped(state))
        torch.load(file, lazy=True)
        self.assertEqual(file.read(), b"")

    def test_file_object_with_other_objects(self):
        state = {"s": torch.eye(3).to_sparse(), "u": Unlisted(5), "x": torch.ones(3)}
        for write in (zipped, legacy):
            lazy = torch.load(io.BytesIO(write(state)), lazy=True, weights_only=False)
            self.assertEqual(lazy["s"], state["s"])
            self.assertEqual(lazy["u"].value, 5)
            with self.assertRaisesRegex(pickle.UnpicklingError, "Unlisted"):
                torch.load(io.BytesIO(write(state)), lazy=True)

    def test_not_files(self):
        for f in (5, None, object()):
            with self.assertRaises(AttributeError) as stock:
                torch.load(f)
            with self.assertRaises(AttributeError) as ours:
                torch.load(f, lazy=True)
            self.assertEqual(str(ours.exception), str(stock.exception))

    def test_mmap(self):
        path = Opened(self.folder).path_(zipped({"x": torch.ones(3)}))
        self.assertIs(type(torch.load(path, lazy=True, mmap=True)["x"]), torch.Tensor)
        lazy = torch.load(path, lazy=True, mmap=False)
        self.assertIs(type(lazy["x"]), deferred_tensor())
        self.assertEqual(lazy["x"], torch.ones(3))
        Path(path).write_bytes(legacy({"x": torch.ones(3)}))
        for f, error in (
            (io.BytesIO(zipped([])), ValueError),
            (io.BytesIO(legacy([])), RuntimeError),
            (path, RuntimeError),
            (Path(path), RuntimeError),
        ):
            with self.assertRaises(error) as stock:
                torch.load(f, mmap=True)
            if isinstance(f, io.BytesIO):
                f.seek(0)
            with self.assertRaises(error) as ours:
                torch.load(f, mmap=True, lazy=True)
            self.assertEqual(str(ours.exception), str(stock.exception))

    def test_torchscript(self):
        module = torch.jit.script(torch.nn.Linear(2, 2))
        file = io.BytesIO()
        torch.jit.save(module, file)
        for f in (file, Opened(self.folder).path_(file.getvalue())):
            file.seek(0)
            with self.assertWarnsRegex(UserWarning, "TorchScript archive"):
                loaded = torch.load(f, lazy=True, weights_only=False)
            self.assertEqual(loaded.weight, module.weight)
            file.seek(0)
            with self.assertRaisesRegex(RuntimeError, "TorchScript archives"):
                torch.load(f, lazy=True)

    @parametrize("encoding", ["latin1", "bytes"])
    def test_encoding(self, encoding):
        for write in (zipped, legacy):
            f = Opened(self.folder).path_(write({"x": torch.ones(3), "y": "z"}))
            kwargs = {"encoding": encoding, "weights_only": False}
            eager = torch.load(f, **kwargs)
            self.assertPlainAlike(eager, torch.load(f, lazy=True, **kwargs))


instantiate_parametrized_tests(TestLoadLazyFormats)

if __name__ == "__main__":
    run_tests()
