# Owner(s): ["module: serialization"]
"""torch.load(f, lazy=True) refuses sparse, quantized and nested tensors that lead outside of their memory."""

import io
import itertools
import textwrap

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from load_lazy_case import LazyTestCase
from torch.nested._internal.nested_tensor import NestedTensor
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
)


FAR = 1 << 40
COMPRESSED = ["csr", "csc", "bsr", "bsc"]


class Saved:
    """What a pickle makes by a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def coo(*indices, size=(3, 3), coalesced=None):
    return torch.sparse_coo_tensor(
        torch.tensor(indices).view(len(indices), -1),
        torch.ones(len(indices[0])),
        size,
        check_invariants=False,
        is_coalesced=coalesced,
    )


def compressed(layout, lines, plain):
    block = (2, 2) if layout.startswith("b") else ()
    return torch.sparse_compressed_tensor(
        torch.tensor(lines, dtype=torch.int64),
        torch.tensor(plain, dtype=torch.int64),
        torch.ones(len(plain), *block),
        tuple(3 * n for n in block or (1, 1)),
        layout=getattr(torch, f"sparse_{layout}"),
        check_invariants=False,
    )


def quantized(offset, size, stride):
    tensor = torch.quantize_per_tensor(torch.ones(4), 0.5, 3, torch.qint8)
    storage = torch.storage.TypedStorage(
        wrap_storage=tensor.untyped_storage(), dtype=torch.qint8, _internal=True
    )
    scheme = torch.per_tensor_affine, 0.5, 3
    return Saved(
        *(torch._utils._rebuild_qtensor, storage, offset, size, stride),
        *(scheme, False, {}),
    )


def nested(sizes, strides, offsets):
    return Saved(
        torch._utils._rebuild_nested_tensor,
        torch.ones(4),
        *map(torch.tensor, (sizes, strides, offsets)),
    )


def jagged(offsets, lengths=None):
    lengths = None if lengths is None else torch.tensor(lengths)
    return NestedTensor(torch.ones(4, 2), torch.tensor(offsets), lengths=lengths)


BAD = {
    "coo_beyond": lambda: coo([0, FAR], [0, 1]),
    "coo_by_one": lambda: coo([0, 3], [0, 1]),
    "coo_negative": lambda: coo([0, 1], [-1, 1]),
    "coo_not_coalesced": lambda: coo([1, 0], [0, 1], coalesced=True),
    **{
        f"{layout}_{name}": lambda layout=layout, parts=parts: compressed(
            layout, *parts
        )
        for layout in COMPRESSED
        for name, parts in {
            "beyond": ([0, 1, 2, 3], [0, 1, FAR]),
            "by_one": ([0, 1, 2, 3], [0, 1, 3]),
            "negative": ([0, 1, 2, 3], [0, 1, -1]),
            "lines_beyond": ([0, 1, 2, FAR], [0, 1, 2]),
            "lines_negative": ([0, -FAR, 2, 3], [0, 1, 2]),
            "lines_back": ([0, 2, 1, 3], [0, 1, 2]),
            "lines_there_and_back": ([0, FAR, -FAR, 3], [0, 1, 2]),
        }.items()
    },
    "quantized_stride": lambda: quantized(0, (2, 2), (FAR, 1)),
    "quantized_negative": lambda: quantized(0, (2, 2), (-2, 1)),
    "quantized_offset": lambda: quantized(1, (2, 2), (2, 1)),
    "nested_size": lambda: nested([[2], [3]], [[1], [1]], [0, 2]),
    "nested_stride": lambda: nested([[2], [2]], [[1], [FAR]], [0, 2]),
    "nested_offset": lambda: nested([[2], [2]], [[1], [1]], [0, FAR]),
    "nested_negative": lambda: nested([[2], [2]], [[1], [1]], [0, -2]),
    "nested_counts": lambda: nested([[2], [2]], [[1]], [0]),
    "jagged_beyond": lambda: jagged([0, 2, FAR]),
    "jagged_by_one": lambda: jagged([0, 2, 5]),
    "jagged_negative": lambda: jagged([0, -2, 4]),
    "jagged_back": lambda: jagged([0, 3, 2, 4]),
    "jagged_lengths": lambda: jagged([0, 2, 4], [2, 3]),
    "jagged_negative_lengths": lambda: jagged([0, 2, 4], [2, -1]),
}

EYE = torch.eye(4)
GOOD = {
    "coo": lambda: EYE.to_sparse(),
    "coo_uncoalesced": lambda: coo([1, 0, 1], [0, 0, 0]),
    "coo_without_values": lambda: torch.sparse_coo_tensor(size=(3, 4)),
    "coo_without_rows": lambda: torch.sparse_coo_tensor(size=(0, 4)),
    "coo_hybrid": lambda: torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 5), (3, 5)),
    "coo_scalar": lambda: torch.sparse_coo_tensor(
        torch.zeros(0, 3, dtype=torch.long), torch.ones(3), ()
    ),
    "coo_wide": lambda: coo([0, 5], [1, 2], size=(1 << 31, 1 << 31), coalesced=True),
    "coo_parameter": lambda: torch.nn.Parameter(EYE.to_sparse()),
    "csr": lambda: EYE.to_sparse_csr(),
    "csr_batched": lambda: torch.stack([EYE, EYE]).to_sparse_csr(),
    "csr_dense": lambda: torch.ones(4, 4, 3).to_sparse_csr(dense_dim=1),
    "csr_without_values": lambda: torch.zeros(3, 3).to_sparse_csr(),
    "csr_without_rows": lambda: torch.zeros(0, 3).to_sparse_csr(),
    "csr_without_columns": lambda: torch.zeros(3, 0).to_sparse_csr(),
    "csr_int32": lambda: torch.sparse_csr_tensor(
        torch.tensor([0, 1, 2], dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.ones(2),
    ),
    "csc": lambda: EYE.to_sparse_csc(),
    "bsr": lambda: EYE.to_sparse_bsr((2, 2)),
    "bsr_batched": lambda: torch.stack([EYE, EYE]).to_sparse_bsr((2, 2)),
    "bsr_without_values": lambda: torch.zeros(4, 4).to_sparse_bsr((2, 2)),
    "bsc": lambda: EYE.to_sparse_bsc((2, 2)),
    **{
        f"{layout}_{name}": lambda layout=layout, parts=parts: compressed(
            layout, *parts
        )
        for layout in COMPRESSED
        for name, parts in {
            "unsorted": ([0, 2, 2, 3], [1, 0, 2]),
            "repeated": ([0, 4, 4, 4], [2, 2, 0, 2]),
        }.items()
    },
    "quantized_view": lambda: torch.quantize_per_tensor(EYE, 0.5, 3, torch.qint8).t(),
    "nested_view": lambda: torch.nested.nested_tensor(
        [torch.ones(2, 3), torch.ones(1, 3), torch.ones(0, 3)]
    ).transpose(1, 2),
    "nested_chunk": lambda: torch.nested.nested_tensor(
        [torch.ones(2, 3), torch.ones(1, 3)]
    ).chunk(3, dim=2)[1],
    "nested_expanded": lambda: nested([[9], [2]], [[0], [2]], [3, 1]),
    "jagged_empty_rows": lambda: jagged([0, 0, 4, 4]),
    "jagged_with_holes": lambda: jagged([0, 2, 4], [1, 1]),
    "jagged_view": lambda: torch.nested.nested_tensor(
        [torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged
    ).transpose(1, 2),
}


def is_valid_coo(tensor):
    parts = tensor._indices(), tensor._values(), tensor.size(), tensor.is_coalesced()
    try:
        torch._validate_sparse_coo_tensor_args(*parts)
    except RuntimeError:
        return False
    return True


def is_valid_compressed(tensor):
    """Whether each line is a range of the places, and each place is inside."""
    by_rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    lines = (tensor.crow_indices() if by_rows else tensor.ccol_indices()).tolist()
    places = (tensor.col_indices() if by_rows else tensor.row_indices()).tolist()
    inside = all(0 <= place < 3 for place in places)
    steps = [end - start for start, end in itertools.pairwise(lines)]
    return inside and lines[0] == 0 and lines[-1] == len(places) and min(steps) >= 0


class TestLoadLazyInvariants(LazyTestCase):
    def setUp(self):
        super().setUp()
        # TestCase switches it on, and nobody else does; torch would refuse by itself.
        torch.sparse.check_sparse_tensor_invariants.disable()

    def sources(self, state):
        """A path and file objects of a state, in both formats."""
        for zipped in (True, False):
            file = io.BytesIO()
            try:
                torch.save(state, file, _use_new_zipfile_serialization=zipped)
            except RuntimeError:  # some have no place in the legacy format
                continue
            yield self.save(state, _use_new_zipfile_serialization=zipped), zipped
            yield file, zipped

    def load(self, source, **arguments):
        if not isinstance(source, str):
            source.seek(0)
        return torch.load(source, lazy=True, **arguments)

    @parametrize("weights_only", [False, True])
    @parametrize("name", BAD)
    def test_refused(self, name, weights_only):
        for source, _ in self.sources({"layer": [BAD[name]()]}):
            file = source if isinstance(source, str) else "<BytesIO>"
            with self.assertRaisesRegex(RuntimeError, f"^Expected {file} to have "):
                self.load(source, weights_only=weights_only)

    @parametrize("name", GOOD)
    def test_loaded(self, name):
        for source, zipped in self.sources({"layer": [GOOD[name]()]}):
            # NB: of the legacy format torch makes nested tensors before it has read their sizes.
            if zipped or not name.startswith("nested"):
                self.load(source, weights_only=False)

    def test_texts(self):
        def text(name):
            path = self.save({"layer": [BAD[name]()]})
            return textwrap.fill(self.load_error(path), 80)

        self.assertExpectedInline(
            text("coo_beyond"),
            """\
RuntimeError: Expected /x.pt to have a valid sparse_coo tensor at ['layer'][0]
in record 'data.pkl', got one of which torch says: size is inconsistent with
indices: for dim 0, size is 3 but found index 1099511627776 at offset 0. (Is the
file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            text("csr_by_one"),
            """\
RuntimeError: Expected /x.pt to have a valid sparse_csr tensor at ['layer'][0]
in record 'data.pkl', got one of which torch says: `0 <= col_indices < ncols` is
not satisfied. at offset 0. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            text("quantized_offset"),
            """\
RuntimeError: Expected /x.pt to have a pickle of a state dict in record
'data.pkl', got one on which torch's unpickler raised RuntimeError: setStorage:
sizes [2, 2], strides [2, 1], storage offset 1, and itemsize 1 requiring a
storage size of 5 are out of bounds for storage of size 4 at offset 0. (Is the
file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            text("jagged_by_one"),
            """\
RuntimeError: Expected /x.pt to have a valid nested tensor at ['layer'][0] in
record 'data.pkl', got one with offsets or lengths outside of 4 rows at offset
0. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            text("nested_size"),
            """\
RuntimeError: Expected /x.pt to have a pickle of a state dict in record
'data.pkl', got one on which torch's unpickler raised RuntimeError: setStorage:
sizes [3], strides [1], storage offset 2, and itemsize 4 requiring a storage
size of 20 are out of bounds for storage of size 16 at offset 0. (Is the file
damaged, or still being written?)""",
        )

    @parametrize("place", ["key", "attribute", "set"])
    def test_found_wherever_it_is(self, place):
        tensor = BAD["coo_beyond"]()
        if place == "attribute":
            holder = torch.nn.Module()
            holder.inner = torch.nn.Module()
            holder.inner.register_buffer("table", tensor)
            where = r" at \.\.?_modules\['inner'\]\._buffers\['table'\]"
        else:
            holder, where = {"key": {tensor: 1}, "set": {tensor}}[place], ""
        with self.assertRaisesRegex(RuntimeError, f"sparse_coo tensor{where}"):
            torch.load(self.save(holder), lazy=True, weights_only=False)

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_refused_if_it_leads_outside(self, data):
        count = data.draw(st.integers(0, 4))
        rows = st.lists(st.integers(-1, 3), min_size=count, max_size=count)
        layout = data.draw(st.sampled_from(["coo", *COMPRESSED]))
        if layout == "coo":
            flag = data.draw(st.sampled_from([None, False, True]))
            tensor = coo(data.draw(rows), data.draw(rows), coalesced=flag)
            is_valid = is_valid_coo(tensor)
        else:
            line = st.lists(st.integers(-1, 4), min_size=4, max_size=4)
            if data.draw(st.booleans()):
                line = line.map(sorted)
            tensor = compressed(layout, data.draw(line), data.draw(rows))
            is_valid = is_valid_compressed(tensor)
        try:
            torch.load(self.save({"x": tensor}), lazy=True)
        except RuntimeError:
            self.assertFalse(is_valid)
        else:
            self.assertTrue(is_valid)

    def test_refused_by_torch_itself(self):
        path = self.save({"x": BAD["coo_beyond"]()})
        with torch.sparse.check_sparse_tensor_invariants():
            for weights_only in (False, True):
                with self.assertRaisesRegex(RuntimeError, f"^Expected {path} to have"):
                    torch.load(path, lazy=True, weights_only=weights_only)

    def test_nothing_is_checked_where_there_are_no_data(self):
        path = self.save({"x": BAD["coo_beyond"]()})
        with torch.serialization.skip_data():
            torch.load(path, lazy=True)
        self.assertTrue(torch.load(path, map_location="meta", lazy=True)["x"].is_meta)


instantiate_parametrized_tests(TestLoadLazyInvariants)

if __name__ == "__main__":
    run_tests()
