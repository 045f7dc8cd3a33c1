# Owner(s): ["oncall: distributed checkpointing"]
"""DCP checkpoints to one file: the file of stock conversion, one tensor in memory at a time."""

import importlib.util
import os
import tempfile
import unittest
import warnings
import weakref
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import format_utils
from torch.distributed.checkpoint.metadata import Metadata
from torch.testing._internal.common_utils import run_tests, TestCase


HAS_SAFETENSORS = importlib.util.find_spec("safetensors") is not None
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64)
MORE = (torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2)


class Case(TestCase):
    def setUp(self):
        super().setUp()
        self.folder = self.enterContext(tempfile.TemporaryDirectory())
        self.dcp = self.at("dcp")
        self.enterContext(warnings.catch_warnings())
        warnings.simplefilter("ignore", UserWarning)

    def at(self, *names):
        path = os.path.join(self.folder, *names)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def save(self, state_dict):
        dcp.save(state_dict, checkpoint_id=self.dcp, no_dist=True)

    def cut(self):
        """Makes the checkpoint a damaged one."""
        os.truncate(os.path.join(self.dcp, "__0_0.distcp"), 3000)

    @staticmethod
    def contents(path):
        with open(path, "rb") as file:
            return file.read()


tensors = st.builds(
    lambda size, dtype, step: (
        torch.arange(2 * torch.Size(size).numel())
        .view(2, *size)[1]
        .to(dtype)[..., ::step]
    ),
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.sampled_from(DTYPES + MORE),
    st.integers(1, 2),
)
objects = st.none() | st.integers() | st.text(max_size=3) | st.tuples(tensors)
values = st.recursive(
    tensors | objects,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=8,
)
state_dicts = st.dictionaries(st.sampled_from("abcde"), values, max_size=4)


class TestDcpToTorchSave(Case):
    @settings(max_examples=60, deadline=None)
    @given(state_dicts)
    def test_is_the_file_of_the_stock_conversion(self, state_dict):
        self.save(state_dict)
        stock, streamed = self.at("stock", "f.pt"), self.at("streamed", "f.pt")
        try:
            format_utils.dcp_to_torch_save(self.dcp, stock)
        except dcp.api.CheckpointException:
            reject()  # a list that begins with an empty container is too much for it
        format_utils.dcp_to_torch_save(self.dcp, streamed, stream=True)
        self.assertEqual(self.contents(streamed), self.contents(stock))

    def test_opens_by_all_ways(self):
        state_dict = {"a": {"b": torch.randn(5, 3)}, "n": 1, "s": torch.tensor(2)}
        self.save(state_dict)
        path = self.at("f.pt")
        format_utils.dcp_to_torch_save(self.dcp, path, stream=True)
        for arguments in ({}, {"weights_only": True}, {"mmap": True}, {"lazy": True}):
            self.assertEqual(torch.load(path, **arguments), state_dict)

    def test_one_tensor_at_a_time(self):
        self.save({str(i): torch.randn(1000) for i in range(5)})
        alive = []
        tensor = torch.distributed.checkpoint._single_file._Checkpoint.tensor

        def noting(checkpoint, fqn):
            self.assertEqual([ref for ref in alive if ref() is not None], [])
            made = tensor(checkpoint, fqn)
            alive.append(weakref.ref(made.untyped_storage()))
            return made

        name = "torch.distributed.checkpoint._single_file._Checkpoint.tensor"
        with mock.patch(name, noting):
            format_utils.dcp_to_torch_save(self.dcp, self.at("f.pt"), stream=True)
        self.assertEqual(len(alive), 5)

    def test_old_file_stays_until_the_new_one_is_complete(self):
        path = self.at("out", "f.pt")
        torch.save({"old": 1}, path)
        os.chmod(path, 0o640)
        self.save({"a": torch.randn(1000), "b": torch.randn(1000)})
        format_utils.dcp_to_torch_save(self.dcp, path, stream=True)
        self.assertEqual(set(torch.load(path)), {"a", "b"})
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o640)
        before = self.contents(path)
        self.cut()
        with self.assertRaisesRegex(RuntimeError, "Could not read 'a' of .*dcp: "):
            format_utils.dcp_to_torch_save(self.dcp, path, stream=True)
        self.assertEqual(self.contents(path), before)
        self.assertEqual(os.listdir(self.at("out", "")), ["f.pt"])

    def test_file_that_is_lazily_open_keeps_its_values(self):
        path = self.at("f.pt")
        torch.save({"a": torch.ones(3)}, path)
        mapped, deferred = (
            torch.load(path, lazy=True, mmap=mmap)["a"] for mmap in (True, False)
        )
        self.save({"a": torch.zeros(1000)})
        format_utils.dcp_to_torch_save(self.dcp, path, stream=True)
        self.assertEqual(mapped, torch.ones(3))
        self.assertEqual(deferred, torch.ones(3))

    def test_missing_chunk(self):
        self.save({"a": torch.randn(6, 4)})
        read = dcp.FileSystemReader.read_metadata

        def incomplete(reader, *args, **kwargs) -> Metadata:
            metadata = read(reader, *args, **kwargs)
            metadata.state_dict_metadata["a"].size = torch.Size([8, 4])
            return metadata

        with (
            mock.patch.object(dcp.FileSystemReader, "read_metadata", incomplete),
            self.assertRaises(RuntimeError) as caught,
        ):
            format_utils.dcp_to_torch_save(self.dcp, self.at("f.pt"), stream=True)
        self.assertExpectedInline(
            str(caught.exception).replace(self.folder, "DIR"),
            """Could not read 'a' of DIR/dcp: Expected the chunks of 'a' to have its 32 elements, got 24. (Is the checkpoint complete?)""",  # noqa: E501
        )


class TestDcpToSafetensors(Case):
    @unittest.skipUnless(HAS_SAFETENSORS, "needs safetensors")
    @settings(max_examples=25, deadline=None)
    @given(st.dictionaries(st.sampled_from("abcde"), tensors, min_size=1))
    def test_opens_as_what_was_saved(self, state_dict):
        from safetensors.torch import load_file

        self.save({"model": state_dict})
        path = self.at("f.safetensors")
        format_utils.dcp_to_safetensors(self.dcp, path)
        expected = {f"model.{key}": t for key, t in state_dict.items()}
        for loaded in (load_file(path), torch.load(path, lazy=True)):
            self.assertEqual(loaded, expected, rtol=0, atol=0)

    @unittest.skipUnless(HAS_SAFETENSORS, "needs safetensors")
    def test_is_the_file_of_safetensors(self):
        from safetensors.torch import save_file

        state_dict = {"b": torch.randn(3, 5), "a": torch.randn(2), "h": torch.ones(3)}
        state_dict["h"] = state_dict["h"].half()
        self.save(state_dict)
        theirs, ours = self.at("theirs.safetensors"), self.at("ours.safetensors")
        save_file(state_dict, theirs, metadata={"format": "pt"})
        format_utils.dcp_to_safetensors(self.dcp, ours)
        self.assertEqual(self.contents(ours), self.contents(theirs))

    def test_what_is_no_tensor_is_refused(self):
        self.save({"a": torch.ones(3), "b": {"n": 1, "m": "x"}})
        with self.assertRaises(ValueError) as caught:
            format_utils.dcp_to_safetensors(self.dcp, self.at("f.safetensors"))
        self.assertExpectedInline(
            str(caught.exception),
            """Expected all values to be tensors, which are what safetensors files hold, got objects for 'b.n', 'b.m'. (Did you mean to write a .pt file?)""",  # noqa: E501
        )
        self.assertEqual(os.listdir(self.folder), ["dcp"])

    def test_dtype_that_the_format_lacks(self):
        self.save({"a": torch.ones(3, dtype=torch.complex128)})
        with self.assertRaises(ValueError) as caught:
            format_utils.dcp_to_safetensors(self.dcp, self.at("f.safetensors"))
        self.assertExpectedInline(
            str(caught.exception),
            """Expected 'a' to be of a dtype of safetensors, got torch.complex128. (Did you mean to write a .pt file?)""",  # noqa: E501
        )

    def test_damaged_checkpoint(self):
        self.save({"a": torch.randn(1000)})
        self.cut()
        with self.assertRaisesRegex(RuntimeError, "Could not read 'a' of .*dcp: "):
            format_utils.dcp_to_safetensors(self.dcp, self.at("f.safetensors"))
        self.assertEqual(os.listdir(self.folder), ["dcp"])


if __name__ == "__main__":
    run_tests()
