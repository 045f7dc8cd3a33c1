# Owner(s): ["module: serialization"]
"""The tables of functions that a deferred tensor answers without data, against core's own lists."""

import op_tables
from torch import Tensor
from torch.testing._internal.common_utils import run_tests, TestCase


def tables():
    from torch._load_lazy import _deferred_ops

    names = ("METADATA", "OF_DEVICE", "SHARED", "STORAGE", "VIEWS", "MAYBE_VIEWS")
    return {name: getattr(_deferred_ops, name) for name in names}


def missing_views(known):
    views = op_tables.views()
    return {name for name, functions in views.items() if functions - known}


# Functions whose result may lie in the memory of a tensor, and which read a deferred one all the same.
READ = {
    # Of several tensors.
    "broadcast_tensors", "cartesian_prod", "meshgrid",
    # A view in some cases: of no dimensions, real, already of that dtype (see CASTS).
    "__getitem__", "atleast_1d", "atleast_2d", "atleast_3d", "conj_physical", "float", "positive",
    # Rare.
    "linalg.diagonal", "unsafe_chunk", "unsafe_split",
}  # fmt: skip

# Properties that are answered by a tensor that has been read.
READ_PROPERTIES = {
    # Of the graph, which has tensors that are read.
    "_base", "_grad", "_grad_fn", "grad_dtype", "grad_fn",
    # Addresses, and what is deprecated.
    "__cuda_array_interface__", "_cdata", "name", "volatile",
}  # fmt: skip


class TestLoadLazyDeferredTables(TestCase):
    """Each fails if a release of torch adds something: then the table or the exception above needs it."""

    def known_views(self):
        listed = tables()
        return listed["VIEWS"] | listed["MAYBE_VIEWS"] | listed["STORAGE"]

    def test_views(self):
        self.assertEqual(missing_views(self.known_views()), READ)

    def test_a_view_that_a_table_lacks_is_found(self):
        known = self.known_views() - {Tensor.narrow}
        self.assertEqual(missing_views(known) - READ, {"narrow"})

    def test_properties(self):
        listed = set().union(*tables().values())
        missing = {
            name
            for name in op_tables.properties()
            if getattr(Tensor, name).__get__ not in listed
        }
        self.assertEqual(missing, READ_PROPERTIES)

    def test_what_is_listed_is_known_to_core(self):
        for table, functions in tables().items():
            names = {f.__name__ for f in functions if not op_tables.known_to_core(f)}
            # NB: setters and torch's in-place functions are given, but not listed.
            unknown = {n for n in names if n != "__set__" and n[-1] != "_"}
            self.assertEqual(unknown, set(), table)

    def test_no_function_is_in_two_tables(self):
        listed = tables()
        for table, functions in listed.items():
            others = [f for name, f in listed.items() if name != table]
            self.assertEqual(functions & set().union(*others), set(), table)


if __name__ == "__main__":
    run_tests()
