# Owner(s): ["module: serialization"]
"""torch.load(f, lazy=True) is torch.load(f), without reading the tensors' data."""

import collections
import contextlib
import gc
import io
import os
import pickle
import struct
import tempfile
import textwrap
import threading
import unittest
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.serialization import skip_data
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    IS_LINUX,
    parametrize,
    run_tests,
    TestCase,
)
from torch.utils.serialization import config as serialization_config


DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz),
    *(torch.complex64, torch.complex128, torch.complex32),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]


class Unlisted:
    """A class that no one has allowed."""

    def __init__(self, value):
        self.value = value


class Subclass(torch.Tensor):
    pass


class Commands:
    """Pickles as a call of os.system."""

    def __reduce__(self):
        return os.system, ("touch was_here",)


def describe(value, storages=None):
    """All that there is to see of a loaded object, as plain values."""
    storages = {} if storages is None else storages
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        name = storages.setdefault(storage._cdata, len(storages))
        place = value.size(), value.stride(), value.storage_offset(), value.dtype
        state = value.requires_grad, value.is_leaf, value._is_view(), value._version
        extra = value._backward_hooks, value.is_conj(), value.is_neg(), vars(value)
        data = torch.empty(0, dtype=torch.uint8).set_(storage).tolist()
        memory = name, storage.nbytes(), storage.resizable(), data
        return type(value), value.device, place, state, extra, memory
    if isinstance(value, dict):
        attributes = describe(dict(vars(value)), storages) if vars_of(value) else None
        items = [(type(k), k, describe(v, storages)) for k, v in value.items()]
        return type(value), items, attributes
    if isinstance(value, (list, tuple)):
        return type(value), [describe(v, storages) for v in value]
    return type(value), repr(value) if isinstance(value, (float, complex)) else value


def vars_of(value):
    return getattr(value, "__dict__", {})


@st.composite
def tensors(draw, roots):
    """A tensor over one of ``roots``, or one that becomes a root itself."""
    if roots and draw(st.booleans()):
        root = draw(st.sampled_from(roots))
        kind = draw(st.sampled_from(["same", "t", "row", "flat", "expand", "detach"]))
        if kind == "same":
            return root
        with torch.no_grad():
            if kind == "detach" or not root.dim():
                return root.detach()
            if kind == "t":
                return root.transpose(0, -1)
            if kind == "row":
                return root[draw(st.integers(0, root.size(0))) :]
            if kind == "expand":
                return root.unsqueeze(0).expand(3, *root.shape)
            return root.reshape(-1)[::2]
    dtype = draw(st.sampled_from(DTYPES))
    size = draw(st.lists(st.integers(0, 4), max_size=5))
    nbytes = torch.Size(size).numel() * dtype.itemsize
    data = torch.arange(nbytes) * 37 % (2 if dtype is torch.bool else 251)
    root = torch.empty(size, dtype=dtype)
    torch.empty(0, dtype=torch.uint8).set_(root.untyped_storage()).copy_(data)
    if dtype.is_floating_point and dtype.itemsize > 1 and draw(st.booleans()):
        root.requires_grad_()
    if draw(st.booleans()):
        root = torch.nn.Parameter(root.detach(), requires_grad=root.requires_grad)
    roots.append(root)
    return root


plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True),
    st.text(max_size=300),
    st.binary(min_size=1, max_size=9),  # weights_only forbids b""
    st.binary(max_size=9).map(bytearray),
    st.complex_numbers(),
    st.sets(st.integers() | st.text(max_size=3), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    st.sampled_from([torch.device("cpu"), torch.device("cuda", 1), torch.Size((2, 3))]),
)
keys = (
    st.text(max_size=8) | st.integers(-9, 9) | st.tuples(st.text(max_size=2), st.none())
)


@st.composite
def state_dicts(draw):
    """A state dict, with an optimizer's state and the like."""
    roots = []
    values = st.recursive(
        tensors(roots) | plain,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.lists(inner, max_size=4).map(tuple)
            | st.dictionaries(keys, inner, max_size=4)
            | st.dictionaries(keys, inner, max_size=4).map(collections.OrderedDict)
        ),
        max_leaves=12,
    )
    state = collections.OrderedDict(draw(st.dictionaries(keys, values, max_size=8)))
    # More than the 256 entries after which tensors come in rows.
    for i in range(draw(st.sampled_from([0, 0, 50]))):
        state[f"layers.{i}.weight"] = draw(tensors(roots))
    if draw(st.booleans()):
        state._metadata = collections.OrderedDict({"": {"version": 1}})
    return state, any(not root.numel() for root in roots)


class TestLoadLazy(TestCase):
    def setUp(self):
        super().setUp()
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = os.path.join(self.folder.name, "x.pt")

    def save(self, value, **kwargs):
        torch.save(value, self.path, **kwargs)
        return self.path

    def by_itself(self):
        """Context in which torch's own unpickler is not to be had."""
        return mock.patch(
            "torch._load_lazy._torch_unpickler.load", side_effect=AssertionError
        )

    def assertLoadsAlike(self, path, **kwargs):
        eager = torch.load(path, **kwargs)
        lazy = torch.load(path, lazy=True, **kwargs)
        self.assertTrue(describe(eager) == describe(lazy), f"{eager}\n{lazy}")

    # The law

    @settings(max_examples=100, deadline=None)
    @given(state_dicts(), st.booleans())
    def test_equals_load(self, state_and_empty, weights_only):
        state, has_empty = state_and_empty
        self.save(state)
        # Several tensors over one empty record are left to torch's own unpickler.
        with contextlib.nullcontext() if has_empty else self.by_itself():
            self.assertLoadsAlike(self.path, weights_only=weights_only)

    def test_empty_tensors(self):
        state = {str(i): torch.empty(0, i) for i in range(80)}
        with self.by_itself():
            self.assertLoadsAlike(self.save(state))
        self.assertLoadsAlike(self.save([state["1"], state["1"].t()]))

    @parametrize("dtype", DTYPES)
    def test_dtypes(self, dtype):
        state = {str(i): torch.ones(2, 3).to(dtype) for i in range(80)}
        with self.by_itself():
            self.assertLoadsAlike(self.save(state))

    @parametrize("ndim", range(6))
    def test_rows(self, ndim):
        size = (2, 3, 1, 2, 2)[:ndim]
        state = {str(i): torch.full(size, i) for i in range(600)}
        with self.by_itself():
            self.assertLoadsAlike(self.save(state))
            self.assertLoadsAlike(self.save([{"x": t} for t in state.values()]))
            self.assertLoadsAlike(self.save(list(state.values())))

    def test_ties_and_views(self):
        base = torch.arange(64.0).view(8, 8)
        more = {f"more.{i}": torch.full((i % 5,), i) for i in range(100)}
        state = {"a": base, **more, "same": base, "t": base.t(), "row": base[2:3, 1:]}
        self.save(state)
        with self.by_itself():
            lazy = torch.load(self.path, lazy=True)
            self.assertLoadsAlike(self.path)
        self.assertIs(lazy["a"], lazy["same"])
        self.assertEqual(lazy["t"].data_ptr(), lazy["a"].data_ptr())
        lazy["row"].zero_()
        self.assertEqual(lazy["a"][2, 1:], torch.zeros(7))
        self.assertEqual(lazy["a"]._version, 1)

    def test_model_and_optimizer(self):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        with self.by_itself():
            self.assertLoadsAlike(self.save(state))
            lazy = torch.load(self.path, lazy=True)
        model.load_state_dict(lazy["model"], assign=True)
        optimizer.load_state_dict(lazy["optimizer"])

    def test_cycles_and_depth(self):
        nested = shared = [torch.ones(2)]
        for _ in range(5000):
            nested = [nested]
        shared.append(shared)
        # torch.save itself recurses, so that depth is written by hand.
        data = b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."
        with self.by_itself():
            lazy = torch.load(self.save({"x": shared, "y": shared}), lazy=True)
            self.assertIs(lazy["x"], lazy["y"])
            self.assertIs(lazy["x"][1], lazy["x"])
            deep = torch.load(self.rewrite({"data.pkl": data}), lazy=True)
        for _ in range(4999):
            (deep,) = deep
        self.assertEqual(deep, [])

    # What torch's own unpickler does

    @parametrize("weights_only", [True, False])
    def test_other_tensors(self, weights_only):
        state = {
            "sparse": torch.eye(3).to_sparse(),
            "conj": torch.ones(2, dtype=torch.complex64).conj(),
            "named": torch.ones(2),
            "plain": torch.ones(2),
            "meta": torch.ones(2, device="meta"),
        }
        state["named"].note = "hello"
        path = self.save(state)
        eager = torch.load(path, weights_only=weights_only)
        lazy = torch.load(path, lazy=True, weights_only=weights_only)
        for name in ("sparse", "conj"):
            self.assertEqual(eager.pop(name), lazy.pop(name))
        self.assertEqual(lazy["named"].note, "hello")
        self.assertFalse(lazy["plain"].untyped_storage().resizable())
        self.assertEqual(lazy.pop("meta").device.type, "meta")
        eager.pop("meta")
        self.assertEqual(describe(eager), describe(lazy))

    def test_storage_in_the_result(self):
        path = self.save({"s": torch.arange(3.0).untyped_storage()})
        with warnings.catch_warnings(record=True):
            lazy = torch.load(path, lazy=True)["s"].tolist()
            self.assertEqual(lazy, torch.load(path)["s"].tolist())

    def test_classes(self):
        path = self.save(
            {"x": Unlisted(torch.ones(2)), "y": torch.ones(2).as_subclass(Subclass)}
        )
        lazy = torch.load(path, lazy=True, weights_only=False)
        self.assertEqual(lazy["x"].value, torch.ones(2))
        self.assertIs(type(lazy["y"]), Subclass)
        with torch.serialization.safe_globals([Unlisted, Subclass]):
            lazy = torch.load(path, lazy=True)
        self.assertIs(type(lazy["y"]), Subclass)

    def test_refusals_are_torchs(self):
        for value in (
            Unlisted(1),
            Commands(),
            {"x": [Commands()]},
            torch.ones(1).as_subclass(Subclass),
        ):
            path = self.save(value)
            with self.assertRaises(pickle.UnpicklingError) as stock:
                torch.load(path)
            with self.assertRaises(pickle.UnpicklingError) as lazy:
                torch.load(path, lazy=True)
            self.assertEqual(str(lazy.exception), str(stock.exception))
        self.assertFalse(os.path.exists("was_here"))

    @parametrize("protocol", [2, 3, 4, 5])
    def test_protocols(self, protocol):
        path = self.save({"x": [torch.ones(3)], "y": "z"}, pickle_protocol=protocol)
        self.assertLoadsAlike(path, weights_only=False)

    # Memory

    def mapped(self):
        """Size and resident part in bytes of what is mapped of the file, or None."""
        with open("/proc/self/smaps") as smaps:
            text = smaps.read()
        parts = [part for part in text.split("\n") if self.path in part]
        if not parts:
            return None
        fields = text.split(parts[0])[1].split("\n")[1:]
        sizes = [f.split()[1] for f in fields if f.startswith(("Size:", "Rss:"))]
        return [1024 * int(size) for size in sizes[:2]]

    @unittest.skipIf(not IS_LINUX, "reads /proc")
    def test_reads_no_data(self):
        self.save({str(i): torch.ones(1 << 18) for i in range(16)})
        torch.load(self.path, lazy=True)
        with open("/proc/self/io") as io_:
            before = int(io_.readline().split()[1])
            lazy = torch.load(self.path, lazy=True)
            io_.seek(0)
            after = int(io_.readline().split()[1])
        self.assertLess(after - before, 100 << 10)
        size, resident = self.mapped()
        self.assertGreaterEqual(size, 16 << 20)
        self.assertEqual(resident, 0)
        self.assertEqual(lazy["7"][1000], 1)
        self.assertTrue(0 < self.mapped()[1] < 1 << 20)

    @unittest.skipIf(not IS_LINUX, "reads /proc")
    def test_mapping_ends_with_its_last_tensor(self):
        fds = set(os.listdir("/proc/self/fd"))
        lazy = torch.load(
            self.save({"x": torch.ones(9), "y": [torch.ones(9)]}), lazy=True
        )
        self.assertEqual(set(os.listdir("/proc/self/fd")), fds)
        os.unlink(self.path)
        row = lazy["y"][0][3:]
        gc.disable()
        self.addCleanup(gc.enable)
        del lazy
        self.assertIsNotNone(self.mapped())
        self.assertEqual(row, torch.ones(6))
        del row
        self.assertIsNone(self.mapped())

    @unittest.skipIf(not IS_LINUX, "needs sparse files, and MAP_NORESERVE")
    def test_larger_than_memory(self):
        with FakeTensorMode(), skip_data(materialize_fake_tensors=True):
            fake = [
                torch.empty(n, dtype=torch.int8) for n in (9, 1 << 36, 9, 1 << 33, 9)
            ]
            self.save({str(i): t for i, t in enumerate(fake)})
        with self.by_itself():
            lazy = torch.load(self.path, lazy=True)
        lazy["1"][-1] = 1
        self.assertEqual([int(t[-1]) for t in lazy.values()], [0, 1, 0, 0, 0])
        reader = torch._C.PyTorchFileReader(self.path)
        first = lazy["0"].data_ptr() - reader.get_record_offset("data/0")
        for name, tensor in lazy.items():
            offset = reader.get_record_offset(f"data/{name}")
            self.assertEqual(tensor.data_ptr() - first, offset)

    def test_writes_do_not_reach_the_file(self):
        before = Path(self.save({"x": torch.ones(9), "y": torch.ones(9)})).read_bytes()
        lazy = torch.load(self.path, lazy=True)
        lazy["x"].add_(1)
        self.assertEqual(lazy["x"], torch.full((9,), 2.0))
        self.assertEqual(torch.load(self.path, lazy=True)["x"], torch.ones(9))
        self.assertEqual(Path(self.path).read_bytes(), before)

    # Arguments and surroundings

    @parametrize("kind", [str, Path, os.fsencode])
    def test_paths(self, kind):
        self.save({"x": torch.ones(2)})
        self.assertEqual(torch.load(kind(self.path), lazy=True)["x"], torch.ones(2))

    def test_arguments(self):
        path = self.save({"x": torch.ones(2)})
        for kwargs in (
            {"mmap": True},
            {"map_location": "cpu"},
            {"map_location": torch.device("cpu")},
        ):
            with self.by_itself():
                self.assertLoadsAlike(path, **kwargs)
        for f, kwargs, message in (
            (io.BytesIO(), {}, "Expected f to be a path with lazy=True, got BytesIO."),
            (path, {"mmap": False}, "Expected mmap to be None or True with lazy=True"),
            (
                path,
                {"map_location": "cuda"},
                "Expected map_location to be None or 'cpu'",
            ),
            (
                path,
                {"map_location": lambda s, _: s},
                "Expected map_location to be None or",
            ),
        ):
            with self.assertRaisesRegex(ValueError, message):
                torch.load(f, lazy=True, **kwargs)
        with self.assertRaisesRegex(RuntimeError, "explicit pickle_module"):
            torch.load(path, pickle_module=pickle, weights_only=True, lazy=True)

    def test_environment(self):
        path = self.save(Unlisted(3))
        environment = mock.patch.dict(os.environ, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
        with (
            environment,
            self.assertWarnsRegex(UserWarning, "forcing weights_only=False"),
        ):
            self.assertEqual(torch.load(path, lazy=True).value, 3)
        environment = mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1")
        with environment, self.assertRaises(pickle.UnpicklingError):
            torch.load(path, lazy=True, weights_only=False)

    def test_contexts(self):
        path = self.save({"x": torch.ones(2)})
        with torch.device("meta"):
            self.assertEqual(torch.load(path, lazy=True)["x"].device.type, "cpu")
        with torch.inference_mode():
            self.assertTrue(torch.load(path, lazy=True)["x"].is_inference())
        with FakeTensorMode():
            self.assertIsInstance(torch.load(path, lazy=True)["x"], FakeTensor)

    def test_global_state(self):
        good, bad = self.save({"x": torch.eye(2).to_sparse()}), self.path + "bad"
        torch.save({"x": torch.ones(1).as_subclass(Subclass)}, bad)

        def state():
            local = torch.serialization._serialization_tls
            return (
                gc.isenabled(),
                local.map_location,
                torch.get_default_device(),
                torch.is_grad_enabled(),
            )

        before = state()
        for path in (good, bad):
            with contextlib.suppress(pickle.UnpicklingError):
                torch.load(path, lazy=True, map_location="cpu")
            self.assertEqual(state(), before)

    def test_threads(self):
        path = self.save({str(i): torch.full((9,), i) for i in range(300)})
        results = []

        def load():
            for _ in range(20):
                lazy = torch.load(path, lazy=True)
                results.append(all(t[3] == int(k) for k, t in lazy.items()))

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(results, [True] * 80)
        self.assertTrue(gc.isenabled())

    # Other writers

    @parametrize("alignment", [1, 4096])
    def test_alignment(self, alignment):
        with serialization_config.patch("save.storage_alignment", alignment):
            path = self.save({str(i): torch.full((i,), i) for i in range(20)})
        with self.by_itself():
            self.assertLoadsAlike(path)

    def rewrite(self, records=(), without=(), twice=(), **kwargs):
        """Writes the file anew with Python's zipfile, some records changed."""
        path = self.path + ".zip"
        with (
            zipfile.ZipFile(self.path) as source,
            zipfile.ZipFile(path, "w", **kwargs) as target,
        ):
            for record in source.infolist():
                name = record.filename.partition("/")[2]
                data = dict(records).get(name, source.read(record))
                for _ in range((name not in without) + (name in twice)):
                    target.writestr(record.filename, data)
        return path

    def test_rewritten_file(self):
        self.save({str(i): torch.full((i,), i) for i in range(20)})
        with self.by_itself():
            self.assertLoadsAlike(self.rewrite())

    # Bad files

    def load_error(self, path=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                torch.load(path or self.path, lazy=True)
            except Exception as error:
                message = str(error).replace(self.folder.name, "")
                return textwrap.fill(f"{type(error).__name__}: {message}", 80)
        return "none"

    def test_records(self):
        self.save({"x": torch.ones(4)})
        self.assertExpectedInline(
            self.load_error(self.rewrite({"data/0": b"\0" * 20})),
            """\
RuntimeError: Expected /x.pt.zip to have 16 bytes in record 'data/0', got 20
bytes at offset 349. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            self.load_error(self.rewrite({"data/0": b"\0" * 9})),
            """\
RuntimeError: Expected /x.pt.zip to have 16 bytes in record 'data/0', got 9
bytes at offset 349. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            self.load_error(self.rewrite(without=["data/0"])),
            """\
RuntimeError: Expected /x.pt.zip to have 16 bytes in record 'data/0', got no
such record at offset 484. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            self.load_error(self.rewrite(without=["data.pkl"])),
            """\
RuntimeError: Expected /x.pt.zip to have a record 'x/data.pkl', got none of that
name at offset 336. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            self.load_error(self.rewrite({"version": b"99"})),
            """\
RuntimeError: Expected /x.pt.zip to have a record 'version' from 1 to 10, got
b'99' at offset 403. (Was it written by a newer PyTorch?)""",
        )
        self.assertExpectedInline(
            self.load_error(self.rewrite({"byteorder": b"big"})),
            """\
RuntimeError: Expected /x.pt.zip to have 'little' in record 'byteorder', got
'big' at offset 302. (Did you mean to load without lazy=True?)""",
        )
        self.assertExpectedInline(
            self.load_error(self.rewrite({".storage_alignment": b"-1"})),
            """\
RuntimeError: Expected /x.pt.zip to have a record '.storage_alignment' that is a
positive number, got b'-1' at offset 250. (Is the file damaged, or still being
written?)""",
        )
        self.assertExpectedInline(
            self.load_error(self.rewrite(compression=zipfile.ZIP_DEFLATED)),
            """\
RuntimeError: Expected /x.pt.zip to have record 'x/.storage_alignment' stored as
it is, got a compressed one at offset 236. (Did you mean to load without
lazy=True?)""",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = self.rewrite(twice=["data/0"])
        self.assertExpectedInline(
            self.load_error(path),
            """\
RuntimeError: Expected /x.pt.zip to have records of different names, got
'x/data/0' twice at offset 592. (Is the file damaged, or still being written?)""",
        )

    def test_formats(self):
        Path(self.path).write_bytes(b"")
        self.assertExpectedInline(
            self.load_error(),
            """\
RuntimeError: Expected /x.pt to be a zip file written by torch.save with
lazy=True, got b'' at offset 0: a damaged file, or one of another format. (Did
you mean to load without lazy=True?)""",
        )
        self.save({"x": torch.ones(4)}, _use_new_zipfile_serialization=False)
        self.assertExpectedInline(
            self.load_error(),
            """\
RuntimeError: Expected /x.pt to be a zip file written by torch.save with
lazy=True, got b'\\x80\\x02\\x8a\\n' at offset 0: a damaged file, or one of another
format. (Did you mean to load without lazy=True?)""",
        )
        self.assertExpectedInline(
            self.load_error(self.folder.name),
            """\
RuntimeError: Expected  to be a regular file with lazy=True, got another kind of
file. (Did you mean to load without lazy=True?)""",
        )
        os.mkfifo(self.path + ".fifo")
        self.assertExpectedInline(
            self.load_error(self.path + ".fifo"),
            """\
RuntimeError: Expected /x.pt.fifo to be a regular file with lazy=True, got
another kind of file. (Did you mean to load without lazy=True?)""",
        )
        self.assertExpectedInline(
            self.load_error("/nowhere/x.pt"),
            """FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/x.pt'""",
        )

    def test_truncated_anywhere(self):
        data = Path(self.save({"x": torch.ones(4)})).read_bytes()
        for size in range(0, len(data), 7):
            Path(self.path).write_bytes(data[:size])
            self.assertRegex(self.load_error(), "^RuntimeError: Expected /x.pt to ")

    def test_flipped_bytes(self):
        state = {"x": torch.arange(4.0), "y": [torch.ones(2, 3), 7]}
        data = bytearray(Path(self.save(state)).read_bytes())
        original = describe(torch.load(self.path))
        for at in range(0, len(data), 3):
            data[at] ^= 1 << at % 8
            Path(self.path).write_bytes(data)
            data[at] ^= 1 << at % 8
            if self.load_error() != "none":
                continue
            # What a flip leaves readable is what torch.load reads, or was not hit. (For
            # some flips in a local header torch.load reads the bytes beside the data.)
            lazy = describe(torch.load(self.path, lazy=True))
            with contextlib.suppress(Exception):
                if lazy == describe(torch.load(self.path)):
                    continue
            self.assertTrue(lazy == original, f"byte {at}: {lazy}")

    def pickled(self, body):
        """Writes a file whose pickle is ``body``, with F, V for a FloatStorage and rebuild_v2."""
        self.save({"x": torch.ones(4)})
        return self.rewrite({"data.pkl": b"\x80\x02" + body + b"."})

    def tensor(self, numel=4, offset=0, size=(4,), stride=(1,), key="0"):
        """Instructions that make a tensor."""
        long = lambda n: b"\x8a\x09" + n.to_bytes(9, "little", signed=True)
        ints = lambda values: b"(" + b"".join(map(long, values)) + b"t"
        text = lambda s: b"X" + struct.pack("<I", len(s)) + s.encode()
        storage = text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
        return (
            b"ctorch._utils\n_rebuild_tensor_v2\n(("
            + storage
            + long(numel)
            + b"tQ"
            + long(offset)
            + ints(size)
            + ints(stride)
            + b"\x89ccollections\nOrderedDict\n)RtR"
        )

    @parametrize(
        "lie",
        [
            {"numel": 5},
            {"numel": -1},
            {"numel": 1 << 62},
            {"offset": 1},
            {"offset": -1},
            {"offset": 1 << 62},
            {"size": (5,)},
            {"size": (-4,)},
            {"size": (1 << 62, 1 << 62), "stride": (0, 0)},
            {"size": (1 << 63,), "stride": (0,)},
            {"stride": (2,)},
            {"stride": (-1,)},
            {"stride": (1 << 62,)},
            {"stride": (1, 1)},
            {"size": (), "stride": (), "offset": 4},
            {"key": "1"},
            {"key": "../0"},
        ],
    )
    def test_lies_about_a_tensor(self, lie):
        path = self.pickled(self.tensor(**lie))
        error = self.load_error(path)
        self.assertRegex(
            error,
            r"(?s)^RuntimeError: Expected /x.pt.zip to have .*\sat\soffset\s\d+\.",
        )

    def test_expanded_tensor(self):
        path = self.pickled(self.tensor(size=(1 << 40,), stride=(0,)))
        self.assertEqual(torch.load(path, lazy=True).size(), torch.load(path).size())

    @parametrize(
        "body",
        [
            b"Nr\xff\xff\xff\x7f",  # a memo of 2**31
            b"j\xff\xff\xff\x7f",
            b"X\xff\xff\xff\xffabc",
            b"\x8a\xff1",
            b"\x8b\xff\xff\xff\x7f1",
            b"\x8e" + b"\xff" * 8,
            b"\x96" + b"\xff" * 7 + b"\x00",
            b"\x82\x01",
            b"cos\nsystem\n(X\x04\0\0\0falstR",
            b"\x8c\x02os\x8c\x06system\x93(X\x04\0\0\0falstR",
            b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x40\x85R",
            b"ctorch\nSize\n(KtR",
            b"ccollections\nOrderedDict\n}X\x01\0\0\0aNsb",
            b"ccollections\nOrderedDict\n)RN}X\x05\0\0\0__doc__Ns\x86b",
            b"]NNs",
            b"N)R",
            b"N}b",
            b"]K\x01K\x02s",
            b"(((",
            b"Q",
            b"K\x01Q",
            b"",
        ],
    )
    def test_bad_pickles(self, body):
        path = self.pickled(body)
        try:
            expected = torch.load(path)
        except Exception:
            self.assertNotEqual(self.load_error(path), "none")
        else:
            self.assertEqual(torch.load(path, lazy=True), expected)

    def test_deep_key(self):
        # Hashing it overruns C's stack, in torch's own unpickler, too.
        path = self.pickled(b"})" + b"\x85" * 2_000_000 + b"Ns")
        self.assertExpectedInline(
            self.load_error(path),
            """\
UnpicklingError: Expected keys of a pickle to be nested less than 1000 deep, got
a tuple whose hash would overrun the stack. (Is the file damaged?)""",
        )


instantiate_parametrized_tests(TestLoadLazy)

if __name__ == "__main__":
    run_tests()
