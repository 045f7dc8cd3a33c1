# Owner(s): ["module: serialization"]
"""torch.load(f, lazy=True) of the formats before the zip format."""

import collections
import io
import pickle
import pickletools
import struct
import tarfile
import textwrap

import torch
from load_lazy_case import (
    bytes_of,
    LazyTestCase,
    see,
    Unlisted,
)
from load_lazy_files import (
    legacy,
    Opened,
)
from torch.testing._internal.common_utils import (
    run_tests,
)


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

    def test_texts_of_errors(self):
        parts = self.parts([torch.ones(4)])
        # NB: a key is an address, of any length.
        key = pickle.loads(parts[4])[0].encode()
        text = lambda key: b"X" + struct.pack("<I", len(key)) + key
        good = b"".join(parts).replace(text(key), text(b"KEY"))
        error = lambda data: textwrap.fill(self.error(data), 80)
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
'KEY', got a file of 334 bytes at offset 311. (Is the file damaged, or still
being written?)""",
        )
        self.assertExpectedInline(
            error(good[: len(parts[0] + parts[1]) + 7]),
            """\
RuntimeError: Expected /x.pt to have the end of a pickle, got the end of the
file at offset 28. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            error(good.replace(b"K\x04\x85", b"K\x05\x85")),
            """\
RuntimeError: Expected /x.pt to have every tensor inside its storage in storage
'KEY', got size (5,), stride (1,) and offset 0 of torch.float32 in 16 bytes at
offset 319. (Is the file damaged, or still being written?)""",
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


if __name__ == "__main__":
    run_tests()
