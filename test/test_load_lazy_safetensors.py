# Owner(s): ["module: serialization"]
"""torch.load(f, lazy=True) of safetensors files is safetensors.torch.load_file."""

import io
import json
import os
import pickle
import struct
import unittest
from pathlib import Path

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from load_lazy_case import LazyTestCase, place_of, see
from load_lazy_files import Counted
from torch.testing._internal.common_utils import (
    run_tests,
)


try:
    import safetensors.torch as safetensors
except ImportError:
    safetensors = None

SAFE_DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]
SAFE_NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6
)


@st.composite
def safe_dicts(draw):
    """A state dict that safetensors writes, with at most one empty tensor."""
    result = {}
    for name in draw(st.sets(SAFE_NAMES, max_size=8)):
        size = draw(st.lists(st.integers(1, 4), max_size=4))
        data = torch.arange(torch.Size(size).numel() * 8, dtype=torch.uint8)
        dtype = draw(st.sampled_from(SAFE_DTYPES))
        if dtype is torch.bool:
            data = data % 2
        tensor = data.view(dtype)[: torch.Size(size).numel()].clone()
        result[name] = tensor.view(size)
    if draw(st.booleans()):
        result["empty"] = torch.ones(3, 0)
    return result


def header(text, data=b"", pad=b""):
    """A safetensors file of any header."""
    text = json.dumps(text).encode() if isinstance(text, dict) else text
    return struct.pack("<Q", len(text + pad)) + text + pad + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


@unittest.skipIf(safetensors is None, "needs safetensors")
class TestLoadLazySafetensors(LazyTestCase):
    def write(self, data):
        path = os.path.join(self.folder, "x.safetensors")
        Path(path).write_bytes(data)
        return path

    @settings(max_examples=100, deadline=None)
    @given(
        safe_dicts(), st.none() | st.dictionaries(SAFE_NAMES, SAFE_NAMES, min_size=1)
    )
    def test_equals_load_file(self, state, metadata):
        path = self.write(safetensors.save(state, metadata))
        eager = safetensors.load_file(path)
        self.assertPlainAlike(eager, torch.load(path, lazy=True))
        for f in (open(path, "rb"), io.BytesIO(Path(path).read_bytes())):
            self.assertActsAlike(safetensors.load_file(path), torch.load(f, lazy=True))
        lazy = torch.load(path, lazy=True, mmap=False, map_location="cpu")
        self.assertActsAlike(safetensors.load_file(path), lazy)

    def test_is_torch_load(self):
        path = self.write(safetensors.save({"x": torch.ones(2)}))
        try:
            eager = torch.load(path)
        except pickle.UnpicklingError:
            self.skipTest("torch.load does not open safetensors")
        self.assertPlainAlike(eager, torch.load(path, lazy=True))

    def test_other_locations(self):
        path = self.write(safetensors.save({"x": torch.ones(2), "y": torch.ones(0)}))
        lazy = torch.load(path, lazy=True, map_location="meta")
        self.assertEqual(place_of(lazy["x"]), place_of(torch.ones(2, device="meta")))
        for map_location in ({"cpu": "cpu"}, lambda s, _: s):
            with self.assertRaisesRegex(RuntimeError, "map_location is not supported"):
                torch.load(path, lazy=True, map_location=map_location)
        with self.assertRaisesRegex(RuntimeError, "Torch not compiled|CUDA device"):
            torch.load(path, lazy=True, map_location="cuda:77")

    def test_reads_the_header_alone(self):
        data = safetensors.save({f"{i}": torch.ones(1 << 18) for i in range(16)})
        file = Counted(io.BytesIO(data))
        lazy = torch.load(file, lazy=True)
        self.assertLess(file.count, 2 * (len(data) % (1 << 20)) + 100)
        self.assertEqual(lazy["7"][5:7], torch.ones(2))

    def test_accepted_by_safetensors(self):
        for data in (
            header({}),
            header({"__metadata__": None}),
            header({"x": entry(more=1)}, bytes(8)),
            header({"x": entry()}, bytes(8), b" \n"),
            header(b" " + json.dumps({"x": entry()}).encode(), bytes(8)),
            header({"x": entry(shape=(0, 1 << 62, 1 << 62), offsets=(0, 0))}),
            header({"x": entry(shape=[1] * 70 + [2])}, bytes(8)),
            header({"x": entry("F4", (2, 8))}, bytes(8)),
        ):
            path = self.write(data)
            eager = safetensors.load_file(path)
            lazy = torch.load(path, lazy=True)
            self.assertEqual(
                see(lazy, lambda t: (t.size(), t.stride(), t.dtype)),
                see(eager, lambda t: (t.size(), t.stride(), t.dtype)),
            )

    def test_texts_of_errors(self):
        self.assertExpectedInline(
            self.load_error_text(self.write(header({"x": entry()}, bytes(9)))),
            """\
RuntimeError: Expected /x.safetensors to have 77 bytes, got 78 bytes at offset
77. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            self.load_error_text(
                self.write(header({"x": entry(shape=(3,))}, bytes(8)))
            ),
            """\
RuntimeError: Expected /x.safetensors to have dtype, shape and data_offsets of
tensor 'x' that fit each other, got {'data_offsets': [0, 8], 'dtype': 'F32',
'shape': [3]} at offset 8. (Is it a dtype that torch 2.13.0+cpu lacks, or is the
file damaged?)""",
        )
        self.assertExpectedInline(
            self.load_error_text(
                self.write(
                    header({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12))
                )
            ),
            """\
RuntimeError: Expected /x.safetensors to have the bytes of tensor 'y' right
after those before, got an overlap of 4 bytes at offset 135. (Is the file
damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            self.load_error_text(self.write(header(b"[]"))),
            """\
RuntimeError: Expected /x.safetensors to have a header that is a JSON object,
got [] at offset 8. (Is the file damaged, or still being written?)""",
        )
        self.assertExpectedInline(
            self.load_error_text(self.write(b"PK")),
            """\
RuntimeError: Expected /x.safetensors to have a header of at most 0 bytes, got
one of 19280 at offset 0. (Is the file damaged, or still being written?)""",
        )

    def test_flipped_bytes(self):
        data = bytearray(safetensors.save({"x": torch.ones(2, 3), "y": torch.ones(1)}))
        for at in range(len(data) - 28):
            for bit in (1, 5):
                data[at] ^= 1 << bit
                path = self.write(data)
                try:
                    eager = safetensors.load_file(path)
                except Exception:
                    eager = None
                try:
                    lazy = torch.load(path, lazy=True)
                except RuntimeError:
                    self.assertIsNone(eager)
                else:
                    self.assertPlainAlike(eager, lazy)
                data[at] ^= 1 << bit


if __name__ == "__main__":
    run_tests()
