# Owner(s): ["oncall: distributed checkpointing"]
"""``TorchSaveReader`` in one process, against ``torch.load`` and DCP's own reader."""

import argparse
import copy
import importlib.util
import os
import tempfile
import unittest
import warnings
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    TestCase,
)


# torch 2.11 does not tell why a file cannot be read.
HAS_SAFETENSORS = importlib.util.find_spec("safetensors") is not None
TELLS = torch.__version__ >= "2.12"


class Case(TestCase):
    def setUp(self):
        super().setUp()
        self.folder = self.enterContext(tempfile.TemporaryDirectory())
        self.path = os.path.join(self.folder, "file.pt")
        self.enterContext(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="torch.distributed is ")

    def saved(self, value, **arguments):
        torch.save(value, self.path, **arguments)
        return dcp.TorchSaveReader(self.path)

    def failure(self, state_dict, reader, **arguments):
        """What the only rank raised."""
        with self.assertRaises(dcp.api.CheckpointException) as caught:
            dcp.load(state_dict, storage_reader=reader, **arguments)
        return str(caught.exception.failures[0][0]).replace(self.folder, "DIR")


tensors = st.builds(
    lambda size, dtype, cut: (
        torch.arange(torch.Size(size).numel() * 2, dtype=torch.float32)
        .view(2, *size)[1]
        .to(dtype)[(...,) if cut or not size else slice(1, None)]
    ),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    st.booleans(),
)
objects = st.none() | st.integers() | st.text(max_size=3) | st.floats(allow_nan=False)
values = st.recursive(
    tensors | objects | st.tuples(objects, tensors),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=8,
)
state_dicts = st.dictionaries(st.sampled_from("abcde"), values, min_size=1, max_size=4)


class TestTorchSaveReader(Case):
    @settings(max_examples=80, deadline=None)
    @given(state_dicts, st.booleans())
    def test_loads_as_dcp_loads_what_it_saved(self, state_dict, legacy):
        reader = self.saved(state_dict, _use_new_zipfile_serialization=not legacy)
        folder = os.path.join(self.folder, "dcp")
        dcp.save(state_dict, checkpoint_id=folder, no_dist=True)
        expected, got = blank(state_dict), blank(state_dict)
        kept = leaves(got)
        try:
            dcp.load(expected, checkpoint_id=folder, no_dist=True)
        except dcp.api.CheckpointException as error:  # some lists are too much for it
            (cause, _) = error.failures[0]
            self.assertEqual(self.failure(got, reader, no_dist=True), str(cause))
            return
        dcp.load(got, storage_reader=reader, no_dist=True)
        self.assertEqual(got, expected, rtol=0, atol=0)
        for before, after in zip(kept, leaves(got), strict=True):
            self.assertIs(before, after)

    def test_metadata_tells_all_and_reads_no_data(self):
        state_dict = {"a": torch.ones(3, 5), "b": {"c": torch.ones(2).half(), "d": 1}}
        reader = self.saved(state_dict)
        with mock.patch("torch._load_lazy._source.FileSource.read_into") as read:
            metadata = reader.read_metadata()
        read.assert_not_called()
        found = metadata.state_dict_metadata
        self.assertEqual(list(found), ["a", "b.c", "b.d"])
        self.assertEqual(found["a"].size, torch.Size([3, 5]))
        (chunk,) = found["a"].chunks
        self.assertEqual((chunk.offsets, chunk.sizes), ((0, 0), (3, 5)))
        self.assertEqual(found["b.c"].properties.dtype, torch.half)
        self.assertIsInstance(found["b.d"], dcp.BytesStorageMetadata)
        self.assertEqual(metadata.planner_data["b.c"], ("b", "c"))

    def test_values_without_a_state_dict(self):
        state_dict = {"a": torch.ones(3), "b": {"c": [torch.ones(2), {"d": 1}]}}
        loaded = _load_state_dict_from_keys(storage_reader=self.saved(state_dict))
        self.assertEqual(loaded, state_dict)

    def test_optimizer(self):
        model = torch.nn.Linear(3, 4)
        optimizers = [torch.optim.Adam(model.parameters(), lr=lr) for lr in (1, 2)]
        for optimizer in optimizers:
            model(torch.ones(3)).sum().backward()
            optimizer.step()
        first, second = (optimizer.state_dict() for optimizer in optimizers)
        dcp.load(second, storage_reader=self.saved(first))
        self.assertEqual(second, first)

    @parametrize("layout", ["rows", "columns", "transposed", "expanded"])
    def test_pieces_of_any_layout_in_little_memory(self, layout):
        full = torch.arange(300 * 400, dtype=torch.int32).view(300, 400)
        saved = {"transposed": full.t(), "expanded": full[:1].expand(300, 400)}.get(
            layout, full
        )
        reader = self.saved({"w": saved})
        target = torch.zeros(saved.shape, dtype=torch.float64)
        target = target.t().contiguous().t() if layout == "columns" else target
        module = "torch.distributed.checkpoint.torch_save_reader._AT_ONCE"
        sizes = []
        buffer = torch._load_lazy._deferred_bytes._buffer
        noting = lambda size: sizes.append(size) or buffer(size)
        with (
            mock.patch(module, 10_000),
            mock.patch("torch._load_lazy._deferred_bytes._buffer", noting),
        ):
            dcp.load({"w": target}, storage_reader=reader)
        self.assertEqual(target, saved.double(), rtol=0, atol=0)
        self.assertLessEqual(max(sizes, default=0), 10_000)

    def test_tied_tensors_are_read_once(self):
        x = torch.randn(1000)
        reader = self.saved({"a": x, "b": x, "c": x})
        target = torch.zeros(1000)
        targets = {"a": target, "b": target.view_as(target), "c": torch.zeros(1000)}
        read = torch._load_lazy._source.FileSource.read_into
        with mock.patch(
            "torch._load_lazy._source.FileSource.read_into", autospec=True
        ) as counted:
            counted.side_effect = read
            dcp.load(targets, storage_reader=reader)
        self.assertEqual(counted.call_count, 2)
        self.assertEqual(targets, {"a": x, "b": x, "c": x})

    def test_planner_that_makes_and_changes_its_tensors(self):
        class Planner(DefaultLoadPlanner):
            def resolve_tensor(self, item):
                return torch.empty_like(super().resolve_tensor(item))

            def commit_tensor(self, item, tensor):
                super().resolve_tensor(item).copy_(tensor.mul_(2))

        x = torch.randn(1000)
        reader = self.saved({"a": x, "b": x, "c": x})
        targets = {key: torch.zeros(1000) for key in "abc"}
        dcp.load(targets, storage_reader=reader, planner=Planner())
        self.assertEqual(targets, dict.fromkeys("abc", 2 * x))

    def test_reader_is_used_again(self):
        reader = self.saved({"a": torch.ones(3)})
        for path, value in ((self.path, 1), (self.path + "2", 2), (self.path, 3)):
            torch.save({"a": torch.full((3,), float(value))}, path)
            target = {"a": torch.zeros(3)}
            dcp.load(target, storage_reader=reader, checkpoint_id=path)
            self.assertEqual(target["a"], torch.full((3,), float(value)))

    def test_partial_load(self):
        reader = self.saved({"a": torch.ones(3), "b": torch.ones(4)})
        state_dict = {"a": torch.zeros(3), "c": torch.zeros(5)}
        planner = DefaultLoadPlanner(allow_partial_load=True)
        dcp.load(state_dict, storage_reader=reader, planner=planner)
        self.assertEqual(state_dict, {"a": torch.ones(3), "c": torch.zeros(5)})

    def test_sparse_tensor(self):
        full = torch.eye(3).to_sparse()
        state_dict = {"a": torch.zeros(3, 3).to_sparse()}
        dcp.load(state_dict, storage_reader=self.saved({"a": full}))
        self.assertEqual(state_dict["a"], full)

    # Formats

    @unittest.skipUnless(TELLS, "torch 2.11 drops the cause")
    @unittest.skipUnless(HAS_SAFETENSORS, "needs safetensors")
    def test_safetensors_without_index(self):
        from safetensors.torch import save_file

        save_file({"a": torch.ones(3)}, os.path.join(self.folder, "1.safetensors"))
        save_file({"b": torch.ones(4)}, os.path.join(self.folder, "2.safetensors"))
        state_dict = {"a": torch.zeros(3), "b": torch.zeros(4)}
        dcp.load(state_dict, storage_reader=dcp.TorchSaveReader(self.folder))
        self.assertEqual(state_dict, {"a": torch.ones(3), "b": torch.ones(4)})
        save_file({"a": torch.ones(4)}, os.path.join(self.folder, "3.safetensors"))
        self.assertExpectedInline(
            self.failure(state_dict, dcp.TorchSaveReader(self.folder)).partition(": ")[
                2
            ],
            """Expected each tensor of DIR to be in one file, got 'a' in DIR/3.safetensors, too. (Did you mean HuggingFaceStorageReader, for what a process group has saved?)""",  # noqa: E501
        )

    @unittest.skipUnless(TELLS, "torch 2.11 drops the cause")
    def test_weights_only(self):
        state_dict = {"args": argparse.Namespace(lr=1), "w": torch.randn(5)}
        self.saved(state_dict)
        target = {"w": torch.zeros(5), "args": None}
        text = self.failure(target, dcp.TorchSaveReader(self.path))
        self.assertIn("Weights only load failed", text)
        trusting = dcp.TorchSaveReader(self.path, weights_only=False)
        with mock.patch("torch._load_lazy._request.Request.eager") as eager:
            dcp.load(target, storage_reader=trusting)
        eager.assert_not_called()
        self.assertEqual(target["w"], state_dict["w"])
        self.assertEqual(target["args"], state_dict["args"])

    # Errors

    def test_missing_key(self):
        reader = self.saved({"a": torch.ones(3)})
        self.assertExpectedInline(
            self.failure({"b": torch.ones(3)}, reader),
            """Missing key in checkpoint state_dict: b.""",
        )

    def test_other_size(self):
        reader = self.saved({"a": torch.ones(3)})
        self.assertExpectedInline(
            self.failure({"a": torch.ones(4)}, reader),
            """Size mismatch between saved torch.Size([3]) and current: torch.Size([4]) for a""",
        )

    @unittest.skipUnless(TELLS, "torch 2.11 drops the cause")
    def test_not_a_state_dict(self):
        self.assertExpectedInline(
            self.failure({"a": torch.ones(4)}, self.saved([1])).partition(": ")[2],
            """Expected DIR/file.pt to hold a state dict, got a list. (Did you mean to save the module's state_dict()?)""",  # noqa: E501
        )

    @unittest.skipUnless(TELLS, "torch 2.11 drops the cause")
    def test_names_that_are_one(self):
        reader = self.saved({"a.b": torch.ones(3), "a": {"b": torch.ones(3)}})
        self.assertExpectedInline(
            self.failure({"a.b": torch.ones(3)}, reader).partition(": ")[2],
            """Expected the names in DIR/file.pt to differ once they are flattened, got duplicated flatten key a.b.""",
        )

    def test_tensor_that_cannot_be_copied(self):
        reader = self.saved(
            {"a": torch.quantize_per_tensor(torch.ones(3), 1, 0, torch.qint8)}
        )
        text = self.failure({"a": torch.ones(3, dtype=torch.int64)}, reader)
        self.assertTrue(text.startswith("Could not load 'a' of DIR/file.pt: "), text)

    @unittest.skipUnless(TELLS, "torch 2.11 drops the cause")
    def test_file_cut_off_behind_its_index(self):
        reader = self.saved({"a": torch.randn(3)}, _use_new_zipfile_serialization=False)
        size = os.path.getsize(self.path)
        os.truncate(self.path, size - 4)
        self.assertIn("DIR/file.pt", self.failure({"a": torch.ones(3)}, reader))


def blank(value):
    """The same structure, with other values."""
    if isinstance(value, torch.Tensor):
        return torch.full_like(value, 1)
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    if isinstance(value, list):
        return [blank(item) for item in value]
    return copy.copy(value)


def leaves(value):
    """The tensors that a load fills."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (dict, list)):
        items = value.values() if isinstance(value, dict) else value
        return [leaf for item in items for leaf in leaves(item)]
    return []


instantiate_parametrized_tests(TestTorchSaveReader)


if __name__ == "__main__":
    run_tests()
