"""What the tests of torch.load(f, lazy=True) have in common: state dicts, and a look at what was loaded."""

import collections
import ctypes
import os
import pickle
import tempfile
import textwrap
import zipfile
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import torch
from torch.testing._internal.common_utils import TestCase


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
    return state


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
        return type(value), items, see(getattr(value, "__dict__", None), see_tensor)
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
    kind = type(tensor), tensor._is_view(), tensor.is_conj(), tensor.is_neg()
    # NB: no dict of hooks is as good as an empty one.
    extra = tensor._version, tensor._backward_hooks or None, vars(tensor)
    return place_of(tensor), kind, extra, name, bytes_in(storage)


def described(value):
    """All that there is to see of a loaded object with plain tensors."""
    names = {}
    return see(value, lambda tensor: memory_of(tensor, names))


def toggle(tensor):
    """Writes to a tensor's first element."""
    with torch.no_grad():
        first = tensor.detach()[(0,) * tensor.dim()]
        value = torch.tensor(0.0 if first.to(torch.complex64) else 1.0)
        first.copy_(value.to(tensor.dtype))


def deferred_tensor():
    from torch._load_lazy._deferred import DeferredTensor

    return DeferredTensor


class LazyTestCase(TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.path = os.path.join(self.folder, "x.pt")

    def save(self, value, **kwargs):
        torch.save(value, self.path, **kwargs)
        return self.path

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

    def by_itself(self):
        """Context in which torch's own unpickler is not to be had."""
        return mock.patch(
            "torch._load_lazy._torch_unpickler.load", side_effect=AssertionError
        )

    def assertLoadsAlike(self, path, **kwargs):
        eager = torch.load(path, **kwargs)
        lazy = torch.load(path, lazy=True, **kwargs)
        self.assertPlainAlike(eager, lazy)
        self.assertEqual(
            *(
                [t.untyped_storage().resizable() for t in tensors_in(value)]
                for value in (eager, lazy)
            )
        )

    def assertPlainAlike(self, eager, lazy):
        self.assertTrue(described(eager) == described(lazy), (eager, lazy))

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
