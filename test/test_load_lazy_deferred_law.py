# Owner(s): ["module: serialization"]
"""What a program computes from deferred tensors is what it computes from plain ones.

A random program of views, conversions, writes and uses runs on deferred tensors and, as the
reference, on plain tensors over the same bytes. After each step the two must agree in what
can be told without data, at its end in all there is.
"""

import copy
import io
import itertools
import operator
from contextlib import contextmanager, nullcontext

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    TestCase,
)


CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32]
DTYPES += [torch.int64, torch.uint8, torch.int16, torch.float8_e5m2, torch.complex64]


class BytesSource:
    """A file of these bytes, which must not be read again where it was read before."""

    name = "bytes"

    def __init__(self, data):
        self.data = data
        self.size = len(data)

    def read_into(self, start, out):
        assert 0 <= start <= start + len(out) <= self.size
        out[:] = self.data[start : start + len(out)]


def deferred_storage(*args, **kwargs):
    from torch._load_lazy._deferred import DeferredStorage

    return DeferredStorage(*args, **kwargs)


def plain_storage(data, swap):
    if swap > 1:
        parts = [data[i : i + swap][::-1] for i in range(0, len(data), swap)]
        data = b"".join(parts)
    return torch.UntypedStorage(list(data))[:]


@st.composite
def storages(draw):
    """What there is to know of storages and the tensors over each."""
    nbytes, start = 8 * draw(st.integers(1, 40)), draw(st.integers(0, 9))
    swap = draw(st.sampled_from([1, 1, 2, 4, 8]))
    return nbytes, start, swap, draw(st.lists(layouts(nbytes), min_size=1, max_size=2))


def roots(described):
    """Pairs of a deferred and a plain tensor, some of them over one storage."""
    for nbytes, start, swap, tensors in described:
        data = bytes((i * 37 + 11) % 61 for i in range(nbytes))
        file = BytesSource(bytes(start) + data + b"\xff" * 5)
        deferred = deferred_storage(file, (start, nbytes), device=CPU, swap=swap)
        storage = plain_storage(data, swap)
        for dtype, offset, size, stride, grad in tensors:
            plain = torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)
            plain.requires_grad_(grad)
            yield deferred.tensor(dtype, offset, size, stride, grad), plain


@st.composite
def layouts(draw, nbytes):
    dtype = draw(st.sampled_from(DTYPES))
    numel = nbytes // dtype.itemsize
    offset = draw(st.integers(0, numel - 1)) if draw(st.booleans()) else 0
    rows = draw(st.integers(0, 6))
    columns = (numel - offset) // max(rows, 1)
    grad = dtype.is_floating_point and draw(st.integers(0, 3)) == 3
    if draw(st.booleans()):
        return dtype, offset, (columns, rows), (1, columns), grad
    return dtype, offset, (rows, columns), (columns, 1), grad


small = st.integers(-2, 6)
dtypes = st.sampled_from(DTYPES)
index = st.one_of(
    small, st.none(), st.just(...), st.slices(8).filter(lambda s: (s.step or 1) > 0)
)
call = lambda name, *args: st.tuples(
    st.just(operator.methodcaller), st.just(name), st.tuples(*args)
)
VIEWS = st.one_of(
    st.tuples(st.just(operator.itemgetter), index, st.just(())),
    st.tuples(st.just(operator.itemgetter), st.tuples(index, index), st.just(())),
    st.tuples(
        st.just(operator.attrgetter), st.sampled_from(["T", "mT", "data"]), st.just(())
    ),
    call("t"),
    call("detach"),
    call("select", small, small),
    call("narrow", small, small, small),
    call("transpose", small, small),
    call("permute", st.permutations([0, 1])),
    call("unsqueeze", small),
    call("squeeze"),
    call("flatten"),
    call("reshape", st.just(-1)),
    call("reshape", st.just((-1, 2))),
    call("view", st.just(-1)),
    call("view", dtypes),
    call("expand", st.just((2, -1, -1))),
    call("contiguous"),
    call("diagonal"),
    call("unfold", small, st.just(2), st.just(1)),
    call("unbind", small),
    call("chunk", st.just(2), small),
    call("split", st.just([1, 2])),
    call(
        "as_strided", st.just((2, 2)), st.sampled_from([(1, 1), (2, 1), (0, 3)]), small
    ),
    call("conj"),
    call("clone"),
    call("to", dtypes),
    call("float"),
    call("bfloat16"),
    call("type", dtypes),
)
ACTIONS = st.one_of(
    call("add_", st.just(1)),
    call("zero_"),
    call("fill_", st.just(3)),
    call("__setitem__", index, st.just(2)),
    call("t_"),
    call("unsqueeze_", st.just(0)),
    call("detach_"),
    call("tolist"),
    call("sum"),
    call("untyped_storage"),
    call("data_ptr"),
    call("numpy"),
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["view", "view", "act", "copy", "use", "drop"]),
        st.integers(0, 20),
        st.integers(0, 20),
        VIEWS,
        ACTIONS,
        st.booleans(),
    ),
    max_size=12,
)


def function(described):
    make, name, args = described
    return make(name, *args)


def outcome(function, *args):
    """What a function returns, as a list; or the error that it raises."""
    try:
        out = function(*args)
    except Exception as error:
        return type(error)
    return list(out) if isinstance(out, (tuple, list)) else [out]


def metadata(tensor):
    place = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype
    state = tensor.requires_grad, tensor.is_leaf, tensor._is_view(), tensor._version
    return place, state, tensor.device, tensor.is_contiguous(), tensor.is_conj()


def bits(tensor):
    tensor = tensor.detach().resolve_conj().resolve_neg()
    flat = tensor.new_empty(tensor.numel())
    return flat.copy_(tensor.reshape(-1)).view(torch.uint8).tolist()


class TestDeferredLaw(TestCase):
    def check(self, pairs):
        for deferred, plain in pairs:
            self.assertEqual(outcome(metadata, deferred), outcome(metadata, plain))

    def run_step(self, pairs, step):
        kind, i, j, view, action, grad = step
        one, other = pairs[i % len(pairs)], pairs[j % len(pairs)]
        with torch.set_grad_enabled(grad):
            if kind == "view":
                # NB: conversions of what does not fit are up to the processor.
                out, expected = (outcome(function(view), t) for t in one)
            elif kind == "act":
                out, expected = (outcome(function(action), t) for t in one)
            elif kind == "copy":
                copy = lambda k: outcome(one[k].copy_, other[k])
                out, expected = copy(0), copy(1)
            elif kind == "use":
                self.assertEqual(bits(one[0]), bits(one[1]))
                return []
            else:
                if len(pairs) > 1:
                    del pairs[i % len(pairs)]
                return []
        if isinstance(expected, type):
            self.assertIs(out, expected)
            return []
        new = [
            pair
            for pair in zip(out, expected, strict=True)
            if isinstance(pair[1], torch.Tensor) and pair[1] is not one[1]
        ]
        self.assertEqual([t is one[0] for t in out], [t is one[1] for t in expected])
        return new

    @settings(max_examples=200, deadline=None, report_multiple_bugs=False)
    @given(st.lists(storages(), min_size=1, max_size=2), STEPS)
    def test_any_program(self, described, steps):
        pairs = list(roots(described))
        for step in steps:
            pairs += self.run_step(pairs, step)
            self.check(pairs)
        deferred, plain = zip(*pairs, strict=True)
        for one, other in zip(deferred, plain, strict=True):
            self.assertEqual(bits(one), bits(other))
        self.assertEqual(self.shares(deferred), self.shares(plain))
        self.assertEqual({type(t) for t in deferred}, {torch.Tensor})
        for one, other in zip(deferred, plain, strict=True):
            self.assertEqual(
                one.untyped_storage().tolist(), other.untyped_storage().tolist()
            )
            self.assertEqual(
                self.where(one._base, deferred), self.where(other._base, plain)
            )

    def where(self, base, tensors):
        return [base is tensor for tensor in tensors]

    def shares(self, tensors):
        known = {}
        return [
            known.setdefault(t.untyped_storage()._cdata, len(known)) for t in tensors
        ]


class TestRanges(TestCase):
    @settings(deadline=None)
    @given(
        st.integers(0, 5),
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=3),
        st.sampled_from([1, 2, 4]),
        st.integers(0, 9),
    )
    def test_of_a_layout(self, offset, dims, itemsize, gap):
        from torch._load_lazy._ranges import ranges_of

        elements = {offset}
        for n, step in dims:
            elements = {e + i * step for e in elements for i in range(n)}
        needed = {e * itemsize + i for e in elements for i in range(itemsize)}
        size, stride = [n for n, _ in dims], [step for _, step in dims]
        ranges = ranges_of(offset, size, stride, itemsize, gap)
        covered = [i for start, end in ranges for i in range(start, end)]
        self.assertLessEqual(needed, set(covered))
        for (_, end), (start, _) in itertools.pairwise(ranges):
            self.assertGreater(start - end, gap)
        longest = best = 0  # run of bytes that are read in vain
        for i in covered:
            longest = 0 if i in needed else longest + 1
            best = max(best, longest)
        self.assertLessEqual(best, gap)

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(0, 9))))
    def test_set_of_bytes(self, steps):
        from torch._load_lazy._ranges import Ranges

        ranges, expected = Ranges(), set()
        for add, start, length in steps:
            part = range(start, start + length)
            missing = ranges.missing(start, start + length)
            flat = [i for a, b in missing for i in range(a, b)]
            self.assertEqual(flat, [i for i in part if i not in expected])
            self.assertTrue(all(a < b for a, b in missing))
            if add and length:
                ranges.add(start, start + length)
                expected.update(part)


@contextmanager
def default_device():
    torch.set_default_device("cpu")
    try:
        yield
    finally:
        torch.set_default_device(None)


DEVICE_CONTEXTS = {
    "none": nullcontext,
    "default": default_device,
    "block": lambda: torch.device("cpu"),
}
STAY_DEFERRED = {
    "to": lambda t: t.to("cpu"),
    "to, dtype": lambda t: t.to("cpu", torch.float64),
    "half": lambda t: t.half(),
    "detach": lambda t: t.detach(),
    "contiguous": lambda t: t.contiguous(),
    "view": lambda t: t[1:3].T,
    "parameter": torch.nn.Parameter,
}
READS = {
    "cpu": lambda t: t.cpu(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "clone": lambda t: t.clone(),
    "to, copy": lambda t: t.to("cpu", copy=True),
    "to, other": lambda t: t.to(torch.zeros(1)),
    "stack": lambda t: torch.stack([t, t]),
    "copy_": lambda t: torch.zeros(4, 3).copy_(t),
}
# They ask no __torch_function__, so that a tensor without data looks as if it were on meta.
REFUSED = {
    "tensor": lambda t: torch.tensor(t, device="cpu"),
    "as_tensor": lambda t: torch.as_tensor(t, device="cpu"),
}


@instantiate_parametrized_tests
class TestDefaultDevice(TestCase):
    """A default device, and a block of one, change nothing of what becomes of a deferred tensor."""

    def load(self):
        file, plain = io.BytesIO(), torch.arange(12.0).view(4, 3)
        torch.save(plain, file)
        file.seek(0)
        return plain, torch.load(file, lazy=True)

    def is_deferred(self, tensor):
        return type(tensor).__name__ == "DeferredTensor"

    @parametrize("context", list(DEVICE_CONTEXTS))
    def test_copies_and_moves(self, context):
        for name, call in {**STAY_DEFERRED, **READS}.items():
            plain, tensor = self.load()
            with DEVICE_CONTEXTS[context]():
                self.assertTrue(self.is_deferred(tensor))
                got, expected = call(tensor), call(plain)
                self.assertEqual(self.is_deferred(got), name in STAY_DEFERRED, msg=name)
                self.assertEqual(got.device.type, "cpu")
            self.assertEqual(got, expected, msg=name)
            self.assertEqual(tensor, plain)

    @parametrize("context", list(DEVICE_CONTEXTS))
    def test_what_asks_no_torch_function_is_refused(self, context):
        for name, call in REFUSED.items():
            plain, tensor = self.load()
            refused = self.assertRaisesRegex(NotImplementedError, "no data!", msg=name)
            with DEVICE_CONTEXTS[context](), refused:
                call(tensor)
            self.assertEqual(tensor, plain)

    @parametrize("context", list(DEVICE_CONTEXTS))
    def test_torch_load_is_lazy(self, context):
        with DEVICE_CONTEXTS[context]():
            plain, tensor = self.load()
            self.assertTrue(self.is_deferred(tensor))
            module = torch.nn.Linear(3, 4, bias=False)
            module.load_state_dict({"weight": tensor})
        self.assertEqual(module.weight, plain)


if __name__ == "__main__":
    run_tests()
