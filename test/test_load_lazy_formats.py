# Owner(s): ["module: serialization"]
"""torch.load(f, lazy=True) is torch.load(f) for every f that torch.load opens."""

import collections
import ctypes
import io
import json
import os
import pickle
import pickletools
import re
import struct
import tarfile
import tempfile
import textwrap
import unittest
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from test_load_lazy import state_dicts, Unlisted
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    TestCase,
)
from torch.utils.serialization import config as serialization_config


try:
    import safetensors.torch as safetensors
except ImportError:
    safetensors = None

try:
    import fsspec
except ImportError:
    fsspec = None


# Files


def zipped(state, alignment=64):
    with serialization_config.patch("save.storage_alignment", alignment):
        file = io.BytesIO()
        torch.save(state, file)
    return file.getvalue()


def rewritten(state, byteorder=b"little"):
    """The zip file as another writer makes it."""
    target = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(zipped(state))) as source,
        zipfile.ZipFile(target, "w") as archive,
    ):
        for name in source.namelist():
            data = byteorder if name.endswith("/byteorder") else source.read(name)
            archive.writestr(name, data)
    return target.getvalue()


def swapped(state):
    return rewritten(state, b"big")


def legacy(state):
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


FORMATS = [zipped, lambda state: zipped(state, 4096), rewritten, swapped, legacy]


class Minimal:
    """A file object with no more than torch.load asks for, which counts what is read."""

    def __init__(self, data):
        self._file = io.BytesIO(data)
        self.count = 0

    def read(self, size=-1):
        data = self._file.read(size)
        self.count += len(data)
        return data

    def readline(self):
        data = self._file.readline()
        self.count += len(data)
        return data

    def seek(self, *args):
        return self._file.seek(*args)

    def tell(self):
        return self._file.tell()


class ShortReads(io.BytesIO):
    """A raw file may return less than it is asked for."""

    def readinto(self, buffer):
        return super().readinto(memoryview(buffer)[: 1 + len(buffer) // 2])


class Opened:
    """Ways to hand the bytes of a file to torch.load, below a folder."""

    def __init__(self, folder):
        self.path = os.path.join(folder, "x.pt")

    def path_(self, data):
        Path(self.path).write_bytes(data)
        return self.path

    def pathlike(self, data):
        return Path(self.path_(data))

    def bytes_io(self, data):
        return io.BytesIO(data)

    def minimal(self, data):
        return Minimal(data)

    def short_reads(self, data):
        return ShortReads(data)

    def file(self, data):
        return open(self.path_(data), "rb")

    def raw_file_at_7(self, data):
        file = open(self.path_(b"another" + data), "rb", buffering=0)
        file.seek(7)
        return file

    def bytes_io_at_7(self, data):
        file = io.BytesIO(b"another" + data)
        file.seek(7)
        return file

    def unnamed_file(self, data):
        file = tempfile.TemporaryFile()
        file.write(data)
        file.seek(0)
        return file

    def zip_member(self, data):
        outer = io.BytesIO()
        with zipfile.ZipFile(outer, "w") as archive:
            archive.writestr("x.pt", data)
        return zipfile.ZipFile(outer).open("x.pt")


PATHS = [Opened.path_, Opened.pathlike]
OBJECTS = [
    *(Opened.bytes_io, Opened.minimal, Opened.file),
    *(Opened.raw_file_at_7, Opened.bytes_io_at_7, Opened.unnamed_file),
    Opened.zip_member,
]


# What there is to see of a loaded object


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(inner)


def see(value, see_tensor):
    """A loaded object as plain values, of which one can be compared with another."""
    if isinstance(value, torch.Tensor):
        return see_tensor(value)
    if isinstance(value, dict):
        items = [(type(k), k, see(v, see_tensor)) for k, v in value.items()]
        return type(value), items, getattr(value, "_metadata", None)
    if isinstance(value, (list, tuple)):
        return type(value), [see(v, see_tensor) for v in value]
    return type(value), repr(value) if isinstance(value, (float, complex)) else value


def place_of(tensor):
    place = tensor.size(), tensor.stride(), tensor.storage_offset(), tensor.dtype
    parameter = isinstance(tensor, torch.nn.Parameter)
    return place, tensor.device, tensor.requires_grad, tensor.is_leaf, parameter


def bytes_in(storage):
    return ctypes.string_at(storage.data_ptr(), storage.nbytes())


def bytes_of(tensor):
    data = tensor.detach().clone(memory_format=torch.contiguous_format)
    return place_of(tensor), bytes_in(data.untyped_storage())


def memory_of(tensor, names):
    """All of a plain tensor: also its type, and which storage it shares."""
    storage = tensor.untyped_storage()
    name = names.setdefault(storage._cdata, len(names))
    extra = type(tensor), tensor._is_view(), tensor._version, tensor._backward_hooks
    return place_of(tensor), extra, name, bytes_in(storage), vars(tensor)


def toggle(tensor):
    """Writes to a tensor's first element."""
    with torch.no_grad():
        first = tensor.detach()[(0,) * tensor.dim()]
        value = torch.tensor(0.0 if first.to(torch.complex64) else 1.0)
        first.copy_(value.to(tensor.dtype))


def deferred_tensor():
    from torch._load_lazy._deferred import DeferredTensor

    return DeferredTensor


class Counted:
    """Counts what is read of a file object."""

    def __init__(self, file):
        self._file = file
        self.count = 0
        self.seek, self.tell, self.readline = file.seek, file.tell, file.readline

    def read(self, size=-1):
        data = self._file.read(size)
        self.count += len(data)
        return data


class LazyTestCase(TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def assertPlainAlike(self, eager, lazy):
        first, second = {}, {}
        ours = see(lazy, lambda t: memory_of(t, first))
        self.assertTrue(
            ours == see(eager, lambda t: memory_of(t, second)), (eager, lazy)
        )

    def assertActsAlike(self, eager, lazy):
        """Compares values, and by writing who shares memory with whom."""
        self.assertTrue(see(eager, bytes_of) == see(lazy, bytes_of), (eager, lazy))
        pairs = zip(tensors_in(eager), tensors_in(lazy), strict=True)
        for theirs, ours in [pair for pair in pairs if pair[0].numel()][:8]:
            toggle(ours)
            toggle(theirs)
            self.assertTrue(see(eager, bytes_of) == see(lazy, bytes_of), (eager, lazy))

    def load_both(self, eager_f, lazy_f, **kwargs):
        """Returns what torch.load makes of a file without, and with lazy=True."""
        mmap = {"mmap": kwargs.pop("mmap")} if "mmap" in kwargs else {}
        try:
            eager = torch.load(eager_f, **kwargs)
        except AttributeError:
            # Of a legacy file with dtypes that have no storage type of their own.
            hypothesis.reject()
        except pickle.UnpicklingError as error:
            with self.assertRaises(pickle.UnpicklingError) as ours:
                torch.load(lazy_f, lazy=True, **kwargs, **mmap)
            self.assertEqual(str(ours.exception), str(error))
            return {}, {}
        return eager, torch.load(lazy_f, lazy=True, **kwargs, **mmap)

    def load_error(self, f, **kwargs):
        try:
            torch.load(f, lazy=True, **kwargs)
        except Exception as error:
            message = str(error).replace(self.folder, "")
            return f"{type(error).__name__}: {message}"
        return "none"

    def load_error_text(self, f, **kwargs):
        return textwrap.fill(self.load_error(f, **kwargs), 80)


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
        # NB: a load that fails after a sparse tensor makes torch.load's next one fail.
        state = {"u": Unlisted(5), "x": torch.ones(3), "s": torch.eye(3).to_sparse()}
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


class TestLoadLazyLocations(LazyTestCase):
    def setUp(self):
        super().setUp()
        base = torch.arange(6.0).view(2, 3)
        self.state = {
            "x": base,
            "y": torch.nn.Parameter(torch.ones(3, dtype=torch.float64)),
            "z": torch.ones(2, dtype=torch.complex64),
            "t": base.t(),
        }

    @parametrize("give", [Opened.path_, Opened.bytes_io])
    @parametrize("write", FORMATS)
    def test_cpu(self, write, give):
        for map_location in ("cpu", torch.device("cpu"), {"cpu": "cpu"}, {"x": "y"}):
            f = give(Opened(self.folder), write(self.state))
            lazy = torch.load(f, lazy=True, map_location=map_location)
            self.assertActsAlike(torch.load(io.BytesIO(write(self.state))), lazy)

    @parametrize("give", [Opened.path_, Opened.bytes_io])
    @parametrize("write", FORMATS)
    def test_callable(self, write, give):
        for result in (lambda s: s, lambda s: s.clone(), lambda s: None):
            calls = []

            def map_location(storage, location, calls=calls, result=result):
                calls.append((storage.nbytes(), location))
                return result(storage)

            f = give(Opened(self.folder), write(self.state))
            lazy = torch.load(f, lazy=True, map_location=map_location)
            self.assertEqual(calls, [(24, "cpu"), (24, "cpu"), (16, "cpu")])
            self.assertActsAlike(torch.load(io.BytesIO(write(self.state))), lazy)

    @parametrize("give", [Opened.path_, Opened.bytes_io])
    def test_errors_of_callables(self, give):
        def map_location(storage, location):
            raise error

        for state in (self.state, {"s": torch.eye(2).to_sparse()}):
            for error in (ValueError("mine"), TypeError(3), RuntimeError(), KeyError()):
                f = give(Opened(self.folder), zipped(state))
                with self.assertRaises(type(error)) as caught:
                    torch.load(f, lazy=True, map_location=map_location)
                self.assertIs(caught.exception, error)

    def test_callable_is_called_once(self):
        state = {"x": torch.ones(2), "y": torch.ones(3), "s": torch.eye(2).to_sparse()}
        path = Opened(self.folder).path_(zipped(state))
        calls = []
        stock = []
        torch.load(path, lazy=True, map_location=lambda s, _: calls.append(s.nbytes()))
        torch.load(path, map_location=lambda s, _: stock.append(s.nbytes()))
        self.assertEqual(calls, stock)

    @parametrize("give", [Opened.path_, Opened.bytes_io])
    @parametrize("write", FORMATS)
    def test_meta(self, write, give):
        for map_location in ("meta", torch.device("meta"), {"cpu": "meta"}):
            f = give(Opened(self.folder), write(self.state))
            lazy = torch.load(f, lazy=True, map_location=map_location)
            self.assertIs(type(lazy["y"]), torch.nn.Parameter)
            for name, tensor in self.state.items():
                self.assertEqual(lazy[name].device.type, "meta")
                meta = tensor.detach().to("meta")
                self.assertEqual(place_of(lazy[name].detach()), place_of(meta))
            shared = lazy["x"].untyped_storage()._cdata
            self.assertEqual(lazy["t"].untyped_storage()._cdata, shared)

    def test_meta_has_offsets(self):
        path = Opened(self.folder).path_(zipped(self.state))
        offsets = lambda state: [
            t.untyped_storage()._checkpoint_offset for t in state.values()
        ]
        lazy = torch.load(path, lazy=True, map_location="meta")
        self.assertEqual(offsets(lazy), offsets(torch.load(path, map_location="meta")))

    @parametrize("give", [Opened.path_, Opened.bytes_io])
    @parametrize("write", FORMATS)
    @parametrize("map_location", ["cuda:77", "nowhere", b"cpu", {"cpu": "cuda:77"}])
    def test_no_such_device(self, write, give, map_location):
        errors = []
        for lazy in ({}, {"lazy": True}):
            f = give(Opened(self.folder), write(self.state))
            with self.assertRaises(Exception) as caught:
                torch.load(f, map_location=map_location, **lazy)
            errors.append((type(caught.exception), str(caught.exception)))
        self.assertEqual(*errors)

    @unittest.skipIf(not torch.cuda.is_available(), "needs CUDA")
    @parametrize("give", [Opened.path_, Opened.bytes_io])
    @parametrize("write", FORMATS)
    def test_cuda(self, write, give):
        data = write(self.state)
        for map_location in ("cuda", torch.device("cuda", 0), {"cpu": "cuda:0"}):
            f = give(Opened(self.folder), data)
            lazy = torch.load(f, lazy=True, map_location=map_location)
            self.assertIs(type(lazy["x"]), deferred_tensor())
            eager = torch.load(io.BytesIO(data), map_location=map_location)
            for name, tensor in eager.items():
                self.assertEqual(lazy[name].device, tensor.device)
                self.assertEqual(lazy[name] + 0, tensor + 0)

    def test_own_deserializer(self):
        before = list(torch.serialization._package_registry)

        def restore():
            torch.serialization._package_registry[:] = before

        self.addCleanup(restore)
        torch.serialization.register_package(
            5,
            lambda s: None,
            lambda s, location: s.clone() if location == "x" else None,
        )
        for give in (Opened.path_, Opened.bytes_io):
            f = give(Opened(self.folder), zipped(self.state))
            lazy = torch.load(f, lazy=True, map_location="x")
            self.assertTrue(lazy["x"].untyped_storage().resizable())
            self.assertEqual(lazy["x"], self.state["x"])

    @parametrize("give", [Opened.path_, Opened.bytes_io])
    @parametrize("write", [zipped, legacy])
    def test_surroundings(self, write, give):
        data = write(self.state)
        give_it = lambda: give(Opened(self.folder), data)
        with FakeTensorMode():
            lazy = torch.load(give_it(), lazy=True)
        self.assertIsInstance(lazy["x"], FakeTensor)
        self.assertEqual(lazy["x"].size(), (2, 3))
        with torch.serialization.skip_data():
            lazy = torch.load(give_it(), lazy=True)
        self.assertEqual(place_of(lazy["x"]), place_of(self.state["x"]))
        with torch.device("meta"):
            self.assertEqual(torch.load(give_it(), lazy=True)["x"].device.type, "cpu")
        with torch.inference_mode():
            self.assertTrue(torch.load(give_it(), lazy=True)["x"].is_inference())


class TestLoadLazySource(LazyTestCase):
    def setUp(self):
        super().setUp()
        self.path = Opened(self.folder).path_(zipped({"x": torch.arange(1000.0)}))
        self.expected = torch.arange(1000.0)

    def read_error(self, lazy):
        with self.assertRaises(RuntimeError) as caught:
            lazy["x"] + 1
        text = str(caught.exception).replace(self.folder, "")
        return re.sub(r"offset \d+", "offset N", text)

    def test_changed_files(self):
        data = Path(self.path).read_bytes()

        def rewrite():
            with open(self.path, "r+b") as file:
                file.write(data)
            os.utime(self.path, ns=(1, 1))

        def replace():
            Path(self.path + ".new").write_bytes(data)
            os.replace(self.path + ".new", self.path)

        def error(change):
            Path(self.path).write_bytes(data)
            lazy = torch.load(self.path, lazy=True, mmap=False)
            change()
            return self.read_error(lazy)

        for change, got in (
            (rewrite, "a later one"),
            (replace, "another file"),
            (lambda: os.truncate(self.path, 700), "a later one"),
            (lambda: os.unlink(self.path), "no file of that name"),
        ):
            self.assertEqual(
                error(change),
                f"Expected /x.pt to be as it was when it was opened, got {got} at offset "
                "N. (Was it changed, moved or closed while tensors of it were unread?)",
            )

    def test_changed_objects(self):
        file = io.BytesIO(Path(self.path).read_bytes())
        lazy = torch.load(file, lazy=True)
        file.truncate(700)
        self.assertRegex(self.read_error(lazy), "Expected <BytesIO> .* got its end at ")
        file.close()
        self.assertRegex(
            self.read_error(lazy), "Expected <BytesIO> .* a closed file at"
        )

    def test_other_working_folder(self):
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(self.folder)
        lazy = torch.load("x.pt", lazy=True, mmap=False)
        os.chdir(here)
        self.assertEqual(lazy["x"], self.expected)

    @parametrize("give", OBJECTS)
    def test_threads(self, give):
        state = {f"{i}": torch.full((5000,), i) for i in range(40)}
        f = give(Opened(self.folder), zipped(state))
        lazy = torch.load(f, lazy=True)
        with ThreadPoolExecutor(4) as pool:
            sums = list(pool.map(lambda i: int(lazy[f"{i}"].sum()), range(40)))
        self.assertEqual(sums, [5000 * i for i in range(40)])

    @unittest.skipIf(not hasattr(os, "fork"), "needs os.fork")
    @parametrize("give", [Opened.bytes_io, Opened.raw_file_at_7, Opened.path_])
    def test_fork(self, give):
        f = give(Opened(self.folder), zipped({"x": self.expected}))
        mmap = {"mmap": False} if give is Opened.path_ else {}
        lazy = torch.load(f, lazy=True, **mmap)
        child = os.fork()
        if not child:
            os._exit(int(float(lazy["x"][999]) != 999))
        self.assertEqual(lazy["x"], self.expected)
        self.assertEqual(os.waitpid(child, 0)[1], 0)

    def test_pickling_a_source(self):
        from torch._load_lazy._source import FileSource, ObjectSource, read

        source = pickle.loads(pickle.dumps(FileSource(self.path)))
        self.assertEqual(read(source, 0, 4), b"PK\3\4")
        with self.assertRaisesRegex(TypeError, "Did you mean to load from a path"):
            pickle.dumps(ObjectSource(io.BytesIO(b"")))


SAFE_DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]
SAFE_NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6
)


@st.composite
def safe_dicts(draw):
    """A state dict that safetensors writes, with at most one empty tensor."""
    result = {}
    for name in draw(st.sets(SAFE_NAMES, max_size=8)):
        size = draw(st.lists(st.integers(1, 4), max_size=4))
        data = torch.arange(torch.Size(size).numel() * 8, dtype=torch.uint8)
        dtype = draw(st.sampled_from(SAFE_DTYPES))
        if dtype is torch.bool:
            data = data % 2
        tensor = data.view(dtype)[: torch.Size(size).numel()].clone()
        result[name] = tensor.view(size)
    if draw(st.booleans()):
        result["empty"] = torch.ones(3, 0)
    return result


def header(text, data=b"", pad=b""):
    """A safetensors file of any header."""
    text = json.dumps(text).encode() if isinstance(text, dict) else text
    return struct.pack("<Q", len(text + pad)) + text + pad + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


@unittest.skipIf(safetensors is None, "needs safetensors")
class TestLoadLazySafetensors(LazyTestCase):
    def write(self, data):
        path = os.path.join(self.folder, "x.safetensors")
        Path(path).write_bytes(data)
        return path

    @settings(max_examples=100, deadline=None)
    @given(
        safe_dicts(), st.none() | st.dictionaries(SAFE_NAMES, SAFE_NAMES, min_size=1)
    )
    def test_equals_load_file(self, state, metadata):
        path = self.write(safetensors.save(state, metadata))
        eager = safetensors.load_file(path)
        self.assertPlainAlike(eager, torch.load(path, lazy=True))
        for f in (open(path, "rb"), io.BytesIO(Path(path).read_bytes())):
            self.assertActsAlike(safetensors.load_file(path), torch.load(f, lazy=True))
        lazy = torch.load(path, lazy=True, mmap=False, map_location="cpu")
        self.assertActsAlike(safetensors.load_file(path), lazy)

    def test_is_torch_load(self):
        path = self.write(safetensors.save({"x": torch.ones(2)}))
        try:
            eager = torch.load(path)
        except pickle.UnpicklingError:
            self.skipTest("torch.load does not open safetensors")
        self.assertPlainAlike(eager, torch.load(path, lazy=True))

    def test_other_locations(self):
        path = self.write(safetensors.save({"x": torch.ones(2), "y": torch.ones(0)}))
        lazy = torch.load(path, lazy=True, map_location="meta")
        self.assertEqual(place_of(lazy["x"]), place_of(torch.ones(2, device="meta")))
        for map_location in ({"cpu": "cpu"}, lambda s, _: s):
            with self.assertRaisesRegex(RuntimeError, "map_location is not supported"):
                torch.load(path, lazy=True, map_location=map_location)
        with self.assertRaisesRegex(RuntimeError, "Torch not compiled|CUDA device"):
            torch.load(path, lazy=True, map_location="cuda:77")

    def test_reads_the_header_alone(self):
        data = safetensors.save({f"{i}": torch.ones(1 << 18) for i in range(16)})
        file = Counted(io.BytesIO(data))
        lazy = torch.load(file, lazy=True)
        self.assertLess(file.count, 2 * (len(data) % (1 << 20)) + 100)
        self.assertEqual(lazy["7"][5:7], torch.ones(2))

    def test_accepted_by_safetensors(self):
        for data in (
            header({}),
            header({"__metadata__": None}),
            header({"x": entry(more=1)}, bytes(8)),
            header({"x": entry()}, bytes(8), b" \n"),
            header(b" " + json.dumps({"x": entry()}).encode(), bytes(8)),
            header({"x": entry(shape=(0, 1 << 62, 1 << 62), offsets=(0, 0))}),
            header({"x": entry(shape=[1] * 70 + [2])}, bytes(8)),
            header({"x": entry("F4", (2, 8))}, bytes(8)),
        ):
            path = self.write(data)
            eager = safetensors.load_file(path)
            lazy = torch.load(path, lazy=True)
            self.assertEqual(
                see(lazy, lambda t: (t.size(), t.stride(), t.dtype)),
                see(eager, lambda t: (t.size(), t.stride(), t.dtype)),
            )

    def test_bad_headers(self):
        one = json.dumps(entry())
        for data in (
            b"",
            b"1234567",
            header({"x": entry()}, bytes(8))[:20],
            struct.pack("<Q", 1 << 63) + b"{}",
            struct.pack("<Q", 100) + b"{}",
            header(b""),
            header(b"[]"),
            header(b"nonsense"),
            header(b'{"\xff": 1}'),
            header(b"[" * 200_000),
            header(b'{"x":' * 200_000),
            header(b"9" * 10_000),
            header(b'{"x": NaN}'),
            header(b'{"\\ud800":%b}' % one.encode(), bytes(8)),
            header(f'{{"x":{one},"x":{one}}}'.encode(), bytes(8)),
            header(f'{{"x":{one},"\\u0078":{one}}}'.encode(), bytes(8)),
            header(
                one.replace("{", '{"x":{"dtype":"I32",', 1).encode() + b"}", bytes(8)
            ),
            header({"x": entry()}, bytes(8), b"\0"),
            header({"x": entry()}, bytes(7)),
            header({"x": entry()}, bytes(9)),
            header({}, bytes(3)),
            header({"x": entry(offsets=(4, 12))}, bytes(12)),
            header({"x": entry(), "y": entry()}, bytes(8)),
            header({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12)),
            header({"x": entry(), "y": entry(offsets=(9, 17))}, bytes(17)),
            header({"x": entry(offsets=(8, 0))}, bytes(8)),
            header({"x": entry(offsets=(-8, 0))}, bytes(8)),
            header({"x": entry(offsets=(0, 8, 8))}, bytes(8)),
            header({"x": entry(offsets=(0.0, 8.0))}, bytes(8)),
            header({"x": entry(offsets=(False, 8))}, bytes(8)),
            header({"x": entry(offsets=(0, 1 << 64))}, bytes(8)),
            header({"x": entry(shape=(3,))}, bytes(8)),
            header({"x": entry(shape=(-2,))}, bytes(8)),
            header({"x": entry(shape=(-1, -2))}, bytes(8)),
            header({"x": entry(shape=(2.0,))}, bytes(8)),
            header({"x": entry(shape=(True, 2))}, bytes(8)),
            header({"x": entry(shape=("2",))}, bytes(8)),
            header({"x": entry(shape=(1 << 62, 1 << 62))}, bytes(8)),
            header({"x": entry(shape=[1 << 62] * 100_000)}, bytes(8)),
            header({"x": entry(shape=(0, 1 << 63), offsets=(0, 0))}),
            header({"x": entry("F33")}, bytes(8)),
            header({"x": entry("F6_E2M3", (4,), (0, 3))}, bytes(3)),
            header({"x": entry("F4", (3,), (0, 1))}, bytes(1)),
            header({"x": entry(3)}, bytes(8)),
            header({"x": entry(["F32"])}, bytes(8)),
            header({"x": 5}, bytes(8)),
            header({"x": None}, bytes(8)),
            header({"x": [0, 8]}, bytes(8)),
            header({"x": {"dtype": "F32", "shape": [2]}}, bytes(8)),
            header({"x": {**entry(), "shape": {"0": 2}}}, bytes(8)),
            header({"x": {**entry(), "shape": "2"}}, bytes(8)),
            header({"x": {**entry(), "data_offsets": "08"}}, bytes(8)),
            header({"__metadata__": {"a": 1}, "x": entry()}, bytes(8)),
            header({"__metadata__": ["a"], "x": entry()}, bytes(8)),
        ):
            message = self.load_error(self.write(data))
            self.assertRegex(
                message,
                r"^RuntimeError: Expected /x.safetensors to have .* offset \d+\. \(",
            )
            self.assertLess(len(message), 600)

    def test_texts_of_errors(self):
        self.assertExpectedInline(
            self.load_error_text(self.write(header({"x": entry()}, bytes(9)))),
            """\
RuntimeError: Expected /x.safetensors to have 77 bytes, got 78 bytes at offset
77. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            self.load_error_text(
                self.write(header({"x": entry(shape=(3,))}, bytes(8)))
            ),
            """\
RuntimeError: Expected /x.safetensors to have dtype, shape and data_offsets of
tensor 'x' that fit each other, got {'data_offsets': [0, 8], 'dtype': 'F32',
'shape': [3]} at offset 8. (Is it a dtype that torch 2.13.0+cpu lacks, or is the
file damaged?)""",
        )
        self.assertExpectedInline(
            self.load_error_text(
                self.write(
                    header({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12))
                )
            ),
            """\
RuntimeError: Expected /x.safetensors to have the bytes of tensor 'y' right
after those before, got an overlap of 4 bytes at offset 135. (Is the file
damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            self.load_error_text(self.write(header(b"[]"))),
            """\
RuntimeError: Expected /x.safetensors to have a header that is a JSON object,
got [] at offset 8. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            self.load_error_text(self.write(b"PK")),
            """\
RuntimeError: Expected /x.safetensors to have a header of at most 0 bytes, got
one of 19280 at offset 0. (Is the file damaged, or still being written?)""",
        )

    def test_flipped_bytes(self):
        data = bytearray(safetensors.save({"x": torch.ones(2, 3), "y": torch.ones(1)}))
        for at in range(len(data) - 28):
            for bit in (1, 5):
                data[at] ^= 1 << bit
                path = self.write(data)
                try:
                    eager = safetensors.load_file(path)
                except Exception:
                    eager = None
                try:
                    lazy = torch.load(path, lazy=True)
                except RuntimeError:
                    self.assertIsNone(eager)
                else:
                    self.assertPlainAlike(eager, lazy)
                data[at] ^= 1 << bit


class TestLoadLazySharded(LazyTestCase):
    def setUp(self):
        super().setUp()
        self.state = {"c": torch.ones(3), "a": torch.zeros(2, 2), "b": torch.ones(1)}
        self.index = os.path.join(self.folder, "pytorch_model.bin.index.json")
        self.shards = {"1.bin": ["a", "c"], "2.bin": ["b"]}
        for name, keys in self.shards.items():
            self.save(name, {key: self.state[key] for key in keys})
        self.write({"c": "1.bin", "a": "1.bin", "b": "2.bin"})

    def save(self, name, state):
        torch.save(state, os.path.join(self.folder, name))

    def write(self, weight_map, **more):
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
        Path(self.index).write_text(text)

    def test_is_one_dict(self):
        for f in (self.folder, self.index, Path(self.folder), os.fsencode(self.index)):
            lazy = torch.load(f, lazy=True)
            self.assertIs(type(lazy), dict)
            self.assertEqual(list(lazy), ["c", "a", "b"])
            self.assertEqual(lazy, self.state)
            self.assertIs(type(lazy["a"]), torch.Tensor)

    def test_arguments_reach_the_shards(self):
        lazy = torch.load(self.folder, lazy=True, map_location="meta")
        self.assertEqual(lazy["a"].device.type, "meta")
        self.save("2.bin", {"b": Unlisted(3)})
        self.assertEqual(
            torch.load(self.folder, lazy=True, weights_only=False)["b"].value, 3
        )
        with self.assertRaisesRegex(pickle.UnpicklingError, "Unlisted"):
            torch.load(self.folder, lazy=True)

    @unittest.skipIf(safetensors is None, "needs safetensors")
    def test_safetensors_come_first(self):
        path = os.path.join(self.folder, "model.safetensors")
        safetensors.save_file({"x": torch.ones(5)}, path)
        Path(path + ".index.json").write_text(
            '{"weight_map": {"x": "model.safetensors"}}'
        )
        self.assertEqual(torch.load(self.folder, lazy=True), {"x": torch.ones(5)})

    def test_keys_that_are_not_listed_come_last(self):
        self.save("1.bin", {"extra": 5, "a": self.state["a"], "c": self.state["c"]})
        lazy = torch.load(self.folder, lazy=True)
        self.assertEqual(list(lazy), ["c", "a", "b", "extra"])

    def test_ties_within_a_shard(self):
        self.save("1.bin", {"a": self.state["a"], "c": self.state["a"]})
        lazy = torch.load(self.folder, lazy=True)
        self.assertIs(lazy["a"], lazy["c"])

    def error(self, weight_map):
        self.write(weight_map)
        return self.load_error(self.folder)

    def error_text(self, weight_map):
        return textwrap.fill(self.error(weight_map), 80)

    def test_bad_shards(self):
        self.assertExpectedInline(
            self.error_text({"a": "1.bin", "b": "3.bin"}),
            """\
FileNotFoundError: [Errno 2] No such shard, which /pytorch_model.bin.index.json
lists: '/3.bin'""",
        )
        self.assertExpectedInline(
            self.error_text({"a": "1.bin", "b": "1.bin"}),
            """\
RuntimeError: Expected /1.bin to have 'b', as /pytorch_model.bin.index.json
says, got no such key. (Are the files of one checkpoint, and complete?)""",
        )
        self.assertExpectedInline(
            self.error_text({"c": "1.bin", "a": "1.bin", "x": "2.bin"}),
            """\
RuntimeError: Expected /2.bin to have 'x', as /pytorch_model.bin.index.json
says, got no such key. (Are the files of one checkpoint, and complete?)""",
        )
        self.save("2.bin", {"a": self.state["a"], "b": self.state["b"]})
        self.assertExpectedInline(
            self.error_text({"a": "1.bin", "b": "2.bin"}),
            """\
RuntimeError: Expected /pytorch_model.bin.index.json to have 'a' in shard
'1.bin' alone, got it in '2.bin', too. (Are the files of one checkpoint, and
complete?)""",
        )
        self.save("2.bin", [self.state["b"]])
        self.assertExpectedInline(
            self.error_text({"a": "1.bin", "b": "2.bin"}),
            """\
RuntimeError: Expected /2.bin to have a dict, as a shard has, got a list. (Are
the files of one checkpoint, and complete?)""",
        )

    def test_shards_outside_of_the_folder(self):
        inner = os.path.join(self.folder, "inner")
        os.mkdir(inner)
        path = os.path.join(inner, "model.safetensors.index.json")
        absolute = os.path.join(self.folder, "1.bin")
        for name in (
            "../1.bin",
            absolute,
            "..",
            ".",
            "",
            "a/../../1.bin",
            "..\\1.bin",
            "C:1",
        ):
            Path(path).write_text(json.dumps({"weight_map": {"a": name}}))
            self.assertRegex(
                self.load_error(inner), "^RuntimeError: .* names of files beside"
            )
        os.symlink(absolute, os.path.join(inner, "link.bin"))
        Path(path).write_text(json.dumps({"weight_map": {"a": "link.bin"}}))
        self.assertEqual(torch.load(inner, lazy=True)["a"], self.state["a"])

    def test_shards_that_are_no_files(self):
        name = os.path.basename(self.index)
        self.assertRegex(
            self.error({"a": name}), "^RuntimeError: Expected /pytorch_model"
        )
        os.mkdir(os.path.join(self.folder, "folder"))
        self.assertRegex(self.error({"a": "folder"}), "^RuntimeError: .* regular file")

    def test_bad_indices(self):
        for text in (
            *(
                "",
                "[]",
                "{}",
                "nonsense",
                '{"weight_map": []}',
                '{"weight_map": {"a": 1}}',
            ),
            *(
                '{"weight_map": {"a": null}}',
                "[" * 200_000,
                '{"weight_map": {}, "weight_map": {}}',
            ),
            '{"weight_map": {"a": "1.bin", "a": "2.bin"}}',
        ):
            Path(self.index).write_text(text)
            message = self.load_error(self.index)
            self.assertRegex(
                message, "^RuntimeError: Expected /pytorch_model.* to have "
            )
            self.assertLess(len(message), 400)
        Path(self.index).write_bytes(b"\xff\xfe")
        self.assertRegex(self.load_error(self.index), "an index in JSON")
        os.unlink(self.index)
        self.assertRegex(self.load_error(self.index), "^FileNotFoundError")
        self.assertRegex(
            self.load_error(self.folder), "^IsADirectoryError: .* the index of"
        )
        os.mkfifo(self.index)
        self.assertRegex(self.load_error(self.index), "^RuntimeError: .* regular file")


def tarred(state, views=(), storage_of=None, members=("storages", "tensors", "pickle")):
    """The format of the first releases.

    Views of storages, as (key, key of the whole, offset, numel), are the storages of
    those tensors that ``storage_of`` maps to them by index.
    """
    tensors, storages = [], {}

    def dump(file, value):
        pickle.dump(value, file, protocol=2)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if type(value) is not torch.Tensor:
                return None
            if not any(value is tensor for tensor in tensors):
                tensors.append(value)
            return 100 + [value is tensor for tensor in tensors].index(True)

    parts = {name: io.BytesIO() for name in ("storages", "tensors", "pickle")}
    Pickler(parts["pickle"], protocol=2).dump(state)
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages.setdefault(storage._cdata, (len(storages), tensor, storage))
    dump(parts["storages"], len(storages))
    for key, tensor, storage in storages.values():
        kind = getattr(torch, tensor.storage()._pickle_storage_type())
        dump(parts["storages"], (key, "cpu", kind))
        numel = storage.nbytes() // tensor.dtype.itemsize
        parts["storages"].write(struct.pack("<q", numel) + bytes(storage.tolist()))
    dump(parts["storages"], list(views))
    dump(parts["tensors"], len(tensors))
    for i, tensor in enumerate(tensors):
        key = (storage_of or {}).get(i, storages[tensor.untyped_storage()._cdata][0])
        dump(parts["tensors"], (100 + i, key, torch.FloatTensor))
        numbers = (*tensor.size(), *tensor.stride(), tensor.storage_offset())
        parts["tensors"].write(struct.pack("<2i", tensor.dim(), 0))
        parts["tensors"].write(struct.pack(f"<{len(numbers)}q", *numbers))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for name in members:
            info = tarfile.TarInfo(name)
            info.size = len(parts[name].getvalue())
            tar.addfile(info, io.BytesIO(parts[name].getvalue()))
    return file.getvalue()


class TestLoadLazyTar(LazyTestCase):
    def setUp(self):
        super().setUp()
        base = torch.arange(12.0).view(3, 4)
        self.state = {
            "x": base,
            "t": base.t(),
            "row": base[1],
            "same": base,
            "y": [torch.ones(2, dtype=torch.int64), "text", torch.tensor(3.0)],
            "empty": torch.ones(0, 2),
        }

    def give(self, data):
        return Opened(self.folder).path_(data)

    def test_equals_load(self):
        path = self.give(tarred(self.state))
        eager = torch.load(path, weights_only=False)
        lazy = torch.load(path, weights_only=False, lazy=True)
        self.assertPlainAlike(eager, lazy)
        self.assertIs(lazy["x"], lazy["same"])
        for f in (path, open(path, "rb")):
            kwargs = {"mmap": False} if f is path else {}
            lazy = torch.load(f, weights_only=False, lazy=True, **kwargs)
            self.assertActsAlike(torch.load(path, weights_only=False), lazy)

    def test_weights_only_is_refused(self):
        path = self.give(tarred(self.state))
        with self.assertRaisesRegex(RuntimeError, "legacy .tar format"):
            torch.load(path, lazy=True)

    def test_other_objects(self):
        path = self.give(tarred({"x": torch.ones(2), "u": Unlisted(3)}))
        lazy = torch.load(path, weights_only=False, lazy=True)
        self.assertEqual((lazy["x"], lazy["u"].value), (torch.ones(2), 3))

    def test_views_of_storages(self):
        state = [torch.arange(6.0), torch.zeros(3)]
        path = self.give(tarred(state, [(7, 0, 2, 3)], {1: 7}))
        load = lambda **kwargs: torch.load(path, weights_only=False, **kwargs)
        self.assertEqual(load(lazy=True)[1], torch.arange(2.0, 5.0))
        self.assertActsAlike(load(), load(lazy=True))
        self.assertActsAlike(load(), load(lazy=True, mmap=False))
        with self.assertRaisesRegex(
            RuntimeError, "6 elements in storage '0', got a view"
        ):
            path = self.give(tarred(state, [(7, 0, 4, 3)], {1: 7}))
            load(lazy=True)

    def test_bad_files(self):
        good = tarred(self.state)
        for data in (
            tarred(self.state, members=["storages", "pickle"]),
            tarred(self.state, members=["tensors", "pickle"]),
            tarred(self.state, members=["tensors", "storages"]),
            good[:700],
            good.replace(struct.pack("<q", 12), struct.pack("<q", 1 << 60)),
            good.replace(struct.pack("<q", 12), struct.pack("<q", -1)),
            good.replace(struct.pack("<2i", 2, 0), struct.pack("<2i", -1, 0)),
            good.replace(struct.pack("<2i", 2, 0), struct.pack("<2i", 65, 0)),
            good.replace(struct.pack("<2q", 3, 4), struct.pack("<2q", 3, 5)),
            good.replace(struct.pack("<2q", 3, 4), struct.pack("<2q", -3, 4)),
        ):
            self.assertNotEqual(data, good)
            path = self.give(data)
            self.assertRegex(
                self.load_error(path, weights_only=False),
                r"^RuntimeError: Expected /x.pt to have .* at offset \d+\. \(",
            )


class TestLoadLazyLegacy(LazyTestCase):
    def error(self, data):
        return self.load_error(Opened(self.folder).path_(data))

    def parts(self, state):
        """The pickles, and what follows them."""
        file = io.BytesIO(legacy(state))
        starts = [0]
        for _ in range(5):
            collections.deque(pickletools.genops(file), maxlen=0)
            starts.append(file.tell())
        data = file.getvalue()
        return [data[a:b] for a, b in zip(starts, starts[1:] + [None], strict=True)]

    def test_bad_files(self):
        magic, version, info, data, keys, storages = self.parts([torch.ones(4)])
        key = pickle.loads(keys)[0]
        dump = lambda value: pickle.dumps(value, protocol=2)
        for parts in (
            [magic, version, info, data, keys, storages[:-1]],
            [magic, version, info, data, keys],
            [magic, version, info, data],
            [magic, version, info, data[:-1]],
            [magic, version],
            [magic[:5]],
            [dump(5), version, info, data, keys, storages],
            [magic, dump(5), info, data, keys, storages],
            [magic, version, info, data, dump([]), storages],
            [magic, version, info, data, dump([key, key]), storages * 2],
            [magic, version, info, data, dump([key, "x"]), storages * 2],
            [magic, version, info, data, dump({}), storages],
            [magic, version, info, data, keys, struct.pack("<q", 5) + storages[8:]],
            [magic, version, info, data, keys, struct.pack("<q", -1) + storages[8:]],
            [magic, version, info, data.replace(b"K\x04", b"K\x05"), keys, storages],
            [
                magic,
                version,
                info,
                data.replace(b"K\x04N", b"J" + b"\xff" * 4 + b"N"),
                keys,
                storages,
            ],
            [
                magic,
                version,
                info,
                data.replace(b"K\x04\x85", b"K\x05\x85"),
                keys,
                storages,
            ],
            [b"nonsense" * 100],
        ):
            message = self.error(b"".join(parts))
            self.assertRegex(
                message, r"^RuntimeError: Expected /x.pt to have .* at offset \d+\. \("
            )

    def test_texts_of_errors(self):
        magic, version, info, data, keys, storages = self.parts([torch.ones(4)])
        key = pickle.loads(keys)[0]
        good = b"".join([magic, version, info, data, keys, storages])
        error = lambda data: textwrap.fill(self.error(data).replace(key, "KEY"), 80)
        self.assertExpectedInline(
            error(b""),
            """\
RuntimeError: Expected /x.pt to have the beginning of a file that torch.save
wrote, got b'' at offset 0. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            error(b"nonsense"),
            """\
RuntimeError: Expected /x.pt to have the beginning of a file that torch.save
wrote, got b'nonsense' at offset 0. (Is the file damaged, or still being
written?)""",
        )
        self.assertExpectedInline(
            error(good[:-1]),
            """\
RuntimeError: Expected /x.pt to have 4 elements of torch.float32 for storage
'KEY', got a file of 356 bytes at offset 333. (Is the file damaged, or still
being written?)""",
        )
        self.assertExpectedInline(
            error(good[: len(magic + version) + 7]),
            """\
RuntimeError: Expected /x.pt to have the end of a pickle, got the end of the
file at offset 28. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            error(good.replace(b"K\x04\x85", b"K\x05\x85")),
            """\
RuntimeError: Expected /x.pt to have every tensor inside its storage in storage
'KEY', got size (5,), stride (1,) and offset 0 of torch.float32 in 16 bytes at
offset 341. (Is the file damaged, or still being written?)""",
        )

    def test_flipped_bytes(self):
        good = legacy({"x": torch.ones(4), "y": [torch.ones(2), "text"]})
        data = bytearray(good)
        for at in range(len(data) - 40):
            data[at] ^= 4
            f = Opened(self.folder).path_(data)
            try:
                eager = torch.load(f)
            except Exception:
                eager = None
            try:
                lazy = torch.load(f, lazy=True)
            except Exception:
                pass
            else:
                if eager is not None:
                    self.assertEqual(see(eager, bytes_of), see(lazy, bytes_of))
            data[at] ^= 4

    def test_protocols(self):
        state = {"x": torch.arange(4.0), "y": "text"}
        for protocol in (2, 3, 4, 5):
            file = io.BytesIO()
            torch.save(
                state,
                file,
                pickle_protocol=protocol,
                _use_new_zipfile_serialization=False,
            )
            file.seek(0)
            lazy = torch.load(file, lazy=True, weights_only=False)
            self.assertActsAlike({**state, "x": state["x"].clone()}, lazy)

    def test_whole_module(self):
        file = io.BytesIO(legacy(torch.nn.Linear(2, 3)))
        eager = torch.load(file, weights_only=False)
        file.seek(0)
        lazy = torch.load(file, weights_only=False, lazy=True)
        self.assertEqual(eager.state_dict(), lazy.state_dict())


instantiate_parametrized_tests(TestLoadLazySource)
instantiate_parametrized_tests(TestLoadLazyFormats)
instantiate_parametrized_tests(TestLoadLazyLocations)

if __name__ == "__main__":
    run_tests()
