# Owner(s): ["module: serialization"]
"""torch.load(f, lazy=True) is torch.load(f) for tensors that are more than a view of one storage."""

import io
from collections import OrderedDict

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from load_lazy_case import LazyTestCase, memory_of, see, state_dicts, Subclass
from load_lazy_files import zipped
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
)


FLOATS = [torch.float32, torch.float64, torch.bfloat16]
NUMBERS = [*FLOATS, torch.int8, torch.int64, torch.bool, torch.complex64]


def numbers(draw, *size, dtypes=NUMBERS):
    """A tensor of small integers, about half of them zeros."""
    count = torch.Size(size).numel()
    values = draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count))
    kind = draw(st.sampled_from(dtypes))
    return torch.tensor(values).clamp(min=0).view(size).to(kind)


@st.composite
def sparse(draw):
    rows, columns = (2 * draw(st.integers(0, 2)) for _ in range(2))
    dense = numbers(draw, rows, columns)
    layout = draw(st.sampled_from(["coo", "uncoalesced", "csr", "csc", "bsr", "bsc"]))
    if layout == "coo":
        return dense.to_sparse()
    if layout == "uncoalesced":
        indices = torch.tensor([[0, 0, 1], [1, 1, 0]])
        return torch.sparse_coo_tensor(indices, numbers(draw, 3), (2, 2))
    block = (1, 2) if layout.startswith("b") else ()
    return getattr(dense, f"to_sparse_{layout}")(*filter(None, [block]))


@st.composite
def quantized(draw):
    dtype = draw(st.sampled_from([torch.qint8, torch.quint8, torch.qint32]))
    values = numbers(draw, 3, 2, dtypes=[torch.float32])
    if draw(st.booleans()):
        return torch.quantize_per_tensor(values, 0.5, 3, dtype)
    scales, zeros = torch.tensor([0.5, 0.25, 2.0]), torch.tensor([0, 1, 2])
    return torch.quantize_per_channel(values, scales, zeros, 0, dtype)


@st.composite
def nested(draw):
    rows = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    parts = [numbers(draw, n, 2, dtypes=[torch.float32]) for n in rows]
    layout = draw(st.sampled_from([torch.strided, torch.jagged]))
    return torch.nested.nested_tensor(parts, layout=layout)


@st.composite
def decorated(draw):
    tensor = numbers(draw, 2, 2)
    kind = draw(st.sampled_from(["conj", "neg", "noted", "subclass", "meta", "buffer"]))
    if kind in ("conj", "neg"):
        twisted = tensor.to(torch.complex64).conj()
        return twisted if kind == "conj" else twisted.imag
    if kind == "noted":
        tensor.note = ["hello", tensor[0]]
        return tensor
    if kind == "subclass":
        return tensor.as_subclass(Subclass)
    return tensor.to("meta") if kind == "meta" else torch.nn.Buffer(tensor)


others = sparse() | quantized() | nested() | decorated()


def parts_of(tensor):
    """The plain tensors that a tensor consists of, and what else there is to it."""
    if tensor.is_quantized:
        scheme = tensor.qscheme()
        if scheme is torch.per_tensor_affine:
            return [tensor.int_repr()], (
                scheme,
                tensor.q_scale(),
                tensor.q_zero_point(),
            )
        more = [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
        return [tensor.int_repr(), *more], (scheme, tensor.q_per_channel_axis())
    if tensor.is_nested:
        jagged = tensor.layout is torch.jagged
        return [
            tensor.values(),
            *([tensor.offsets()] if jagged else tensor.unbind()),
        ], ()
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()], tensor.is_coalesced()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()], ()
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()], ()


def described(value):
    """All that there is to see of a loaded object, whatever its tensors are."""
    names = {}

    def look(tensor, names=names):
        if tensor.is_meta:
            return type(tensor), tensor.size(), tensor.stride(), tensor.dtype
        if tensor.layout is torch.strided and not (
            tensor.is_quantized or tensor.is_nested
        ):
            note = see(getattr(tensor, "note", None), look)
            place, kind, (version, hooks, _), name, data = memory_of(tensor, names)
            return place, kind, version, hooks, note, name, data
        parts, more = parts_of(tensor)
        whole = type(tensor), tensor.layout, tensor.dtype, tensor.requires_grad
        # NB: a part may be a result, which shares with no one and is soon gone.
        parts = [look(part, names={}) for part in parts]
        return whole, more, [(part[0], part[-1]) for part in parts]

    return see(value, look)


class TestLoadLazyOtherTensors(LazyTestCase):
    @settings(max_examples=150, deadline=None)
    @given(state_dicts(), st.lists(others, min_size=1, max_size=4), st.booleans())
    def test_equals_load(self, state, more, weights_only):
        state["more"], state["again"] = more, more[0]
        path = self.save(state)
        eager, lazy = self.load_both(path, path, weights_only=weights_only)
        self.assertTrue(described(eager) == described(lazy), (eager, lazy))

    @settings(max_examples=50, deadline=None)
    @given(st.lists(others, min_size=1, max_size=4), st.booleans())
    def test_of_file_objects(self, state, weights_only):
        # NB: torch.load of the legacy format makes some of these before it has read their data.
        try:
            data = zipped(state)
        except RuntimeError:  # torch.save has no place for some of their storages
            return
        pair = self.load_both(
            io.BytesIO(data), io.BytesIO(data), weights_only=weights_only
        )
        self.assertTrue(described(pair[0]) == described(pair[1]), pair)

    @parametrize("metadata", [None, {}, {"a": 1}, torch.zeros(1), torch.ones(1)])
    def test_metadata_of_other_types(self, metadata):
        class Saved:
            def __reduce__(self):
                arguments = storage, 0, (2,), (1,), False, OrderedDict(), metadata
                return torch._utils._rebuild_tensor_v2, arguments

        storage = torch.arange(2.0)._typed_storage()
        state = [Saved(), metadata]
        for source in (self.save(state), io.BytesIO(zipped(state))):
            outcomes = [self.outcome(source, lazy) for lazy in (False, True)]
            self.assertEqual(*outcomes)

    def outcome(self, source, lazy):
        if not isinstance(source, str):
            source.seek(0)
        try:
            return torch.load(source, lazy=lazy)[0]
        except Exception:
            return "an error"

    def test_not_all_is_refused(self):
        """The laws above are about more than refusals."""
        state = [torch.eye(2).to_sparse(), torch.eye(2).to_sparse_csr()]
        state += [torch.quantize_per_tensor(torch.ones(2), 0.5, 3, torch.qint8)]
        state += [torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])]
        path = self.save(state)
        # torch 2.15 on allows no nested tensors with weights_only.
        lazy = torch.load(path, lazy=True, weights_only=False)
        self.assertEqual([type(tensor) for tensor in lazy], [torch.Tensor] * 4)
        self.assertEqual(lazy[0].to_dense(), torch.eye(2))


instantiate_parametrized_tests(TestLoadLazyOtherTensors)

if __name__ == "__main__":
    run_tests()
