"""What convert wrote reads back as it was: from each format to each, and every kind of value."""

import copy
import re
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from test_convert import ConvertCase, TARGETS
from torch.distributed.checkpoint import state_dict_saver
from torch.testing._internal.common_utils import run_tests

import torch_ext
from torch_ext._tools import read_back


@contextmanager
def changed_writes():
    """Context in which one value of a checkpoint is written as another one."""
    save, dcp_save = torch.save, state_dict_saver.save

    def other(values):
        # NB: DCP saves each tensor by torch.save.
        is_all = isinstance(values, dict)
        return {**values, "c": torch.zeros(5).half()} if is_all else values

    with (
        torch_ext.enable("load_lazy", "dcp_torch_reader"),
        mock.patch("torch.save", lambda x, f: save(other(x), f)),
        mock.patch.object(
            state_dict_saver, "save", lambda x, **kw: dcp_save(other(x), **kw)
        ),
        mock.patch(
            "torch.distributed.checkpoint._single_file.memory_of",
            lambda tensor: bytes(tensor.nbytes),
        ),
    ):
        yield


class TestReadBack(ConvertCase):
    """Each source and target: what reads back otherwise is an error that names it, and takes no name."""

    def sources(self):
        for name in ("s.pt", "s.safetensors", "s"):
            torch.save(self.tensors, self.path)
            yield self.done(self.path, name)

    def test_every_pair(self):
        for src in list(self.sources()):
            for dst in TARGETS if src.suffix else TARGETS[:2]:
                with self.subTest(src=src.name, dst=dst):
                    with changed_writes():
                        text = self.refused(dst, path=src)
                    self.assertRegex(text, "Expected '[abc]' to read back from DST")
                    # Not without reading back; and the writes were changed at all.
                    with changed_writes():
                        self.done(src, f"no{src.suffix}{dst}", "--no-verify")
                    self.done(src, f"yes{src.suffix}{dst}")

    def test_text(self):
        torch.save(self.tensors, self.path)
        with changed_writes():
            self.assertExpectedInline(
                self.refused("x.pt"),
                """\
torch_ext: model.pt: Expected 'c' to read back from DST as it is in SRC, got another value. Nothing was written. (Did another program change SRC meanwhile?)
""",  # noqa: E501
            )

    def assert_differ(self, a, b, text):
        with self.assertRaisesRegex(RuntimeError, re.escape(text)):
            read_back.compare({"a": a}, {"a": b})

    def test_compare(self):
        same = [
            float("nan"),
            torch.tensor([float("nan")]),
            torch.ones(2, device="meta"),
            torch.eye(3).to_sparse(),
            torch.ones(3).untyped_storage(),
            np.ones(3),
            object,
            [1, (torch.ones(2), {"b": {1}})],
        ]
        patches = torch_ext.enable("load_lazy", "dcp_torch_reader")
        self.addCleanup(patches.remove)
        for value in same:
            read_back.compare({"a": value}, {"a": copy.deepcopy(value)})
        nested = [torch.nested.nested_tensor([torch.ones(2)]) for _ in range(2)]
        read_back.compare(*nested)
        self.assert_differ(nested[0], 2 * nested[1], "'a'")
        x = torch.ones(2)
        self.assert_differ(x, x.double(), "'a'")
        self.assert_differ(x, torch.ones(1, 2), "'a'")
        self.assert_differ(x, None, "'a'")
        self.assert_differ(torch.zeros(2), -torch.zeros(2), "got another value")
        self.assert_differ(torch.eye(3).to_sparse(), torch.eye(3), "'a'")
        self.assert_differ(
            torch.eye(3).to_sparse(), (2 * torch.eye(3)).to_sparse(), "'a'"
        )
        self.assert_differ(x.untyped_storage(), (-x).untyped_storage(), "'a'")
        self.assert_differ(1, True, "got a bool instead of a int")
        self.assert_differ([1, 2], [1], "'a'")
        self.assert_differ({"b": (x, 1)}, {"b": (x, 2)}, "'a.b.1'")
        self.assert_differ({"b": 1}, {"c": 1}, "'a.b'")
        self.assert_differ(np.ones(3), np.zeros(3), "'a'")

    def test_compare_what_is_in_itself(self):
        a, b = [1], [1]
        a.append(a)
        b.append(b)
        read_back.compare(a, b)


if __name__ == "__main__":
    run_tests()
