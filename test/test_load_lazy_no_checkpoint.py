# Owner(s): ["module: serialization"]
"""torch.load(f, lazy=True) of what is no checkpoint, or no file, says what it is and what to do."""

import bz2
import gzip
import io
import lzma
import os
import textwrap
from pathlib import Path

import fsspec
import torch
from load_lazy_case import LazyTestCase
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
)


HTML = b'\n<!DOCTYPE html>\n<html lang="en"><head><title>Sign in</title></head></html>'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456789\n"
ZSTD = b"\x28\xb5\x2f\xfd\x24\x00" + bytes(64)


class TestLoadLazyNoCheckpoint(LazyTestCase):
    def setUp(self):
        super().setUp()
        self.state = {"weight": torch.arange(6.0)}
        self.path = os.path.join(self.folder, "model.pt")
        torch.save(self.state, self.path)

    def text(self, data, name="x.pt"):
        path = Path(self.folder, name)
        path.write_bytes(data)
        of_object = self.load_error(io.BytesIO(data))
        of_path = self.load_error(str(path))
        end = "to have the beginning"
        self.assertEqual(of_object.partition(end)[2], of_path.partition(end)[2])
        return textwrap.fill(of_path, 80)

    @parametrize("name", ["gzip", "bz2", "xz", "zstd"])
    def test_compressed(self, name):
        pack = {"gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
        data = pack.get(name, lambda data: ZSTD)(Path(self.path).read_bytes())
        kind = {"bz2": "bzip2"}.get(name, name)
        text = " ".join(self.text(data).split())
        self.assertRegex(text, f"got data compressed with {kind} at offset 0")
        self.assertRegex(
            text, r"Decompress it first, for example with (gunzip|bunzip2|unxz|unzstd)"
        )

    def test_a_reader_that_decompresses(self):
        packed = os.path.join(self.folder, "model.pt.gz")
        Path(packed).write_bytes(gzip.compress(Path(self.path).read_bytes()))
        with gzip.open(packed) as f:
            self.assertEqual(torch.load(f, lazy=True), self.state)

    def test_page_pointer_and_zeros(self):
        self.assertExpectedInline(
            self.text(HTML),
            """\
RuntimeError: Expected /x.pt to have the beginning of a file that torch.save
wrote, got an HTML or XML page at offset 0. (Was an error or login page saved in
place of the file?)""",
        )
        self.assertExpectedInline(
            self.text(LFS),
            """\
RuntimeError: Expected /x.pt to have the beginning of a file that torch.save
wrote, got a Git LFS pointer at offset 0. (Fetch the file that it stands for
with `git lfs pull`.)""",
        )
        self.assertExpectedInline(
            self.text(bytes(1000)),
            """\
RuntimeError: Expected /x.pt to have the beginning of a file that torch.save
wrote, got 512 zeros at offset 0. (Was the download or the copy interrupted?)""",
        )

    @parametrize("data", [LFS, HTML, bytes(1000)])
    def test_named_safetensors(self, data):
        path = Path(self.folder, "model.safetensors")
        path.write_bytes(data)
        self.assertRegex(
            self.load_error(str(path)), "got (a Git LFS pointer|an HTML|512 zeros)"
        )

    @parametrize("data", [LFS, HTML, bytes(1000), gzip.compress(b"x")])
    def test_asked_to_map_it(self, data):
        path = Path(self.folder, "x.pt")
        path.write_bytes(data)
        expected = self.load_error(str(path))
        with self.assertRaises(RuntimeError) as raised:
            torch.load(str(path), lazy=True, mmap=True)
        self.assertIn(str(raised.exception).partition(" to have ")[2], expected)

    @parametrize("data", [LFS, HTML])
    def test_in_place_of_an_index(self, data):
        path = Path(self.folder, "model.safetensors.index.json")
        path.write_bytes(data)
        kind = "a Git LFS pointer" if data is LFS else "an HTML or XML page"
        remedy = r"\((Fetch|Was an error)"
        self.assertRegex(
            self.load_error(self.folder), f"an index in JSON, got {kind}. {remedy}"
        )

    @parametrize("data", [LFS, HTML])
    def test_contents_that_are_no_checkpoint(self, data):
        with self.assertRaisesRegex(ValueError, "bytes that are no path.*BytesIO"):
            torch.load(data, lazy=True)

    def test_contents_instead_of_a_path(self):
        data = Path(self.path).read_bytes()
        with self.assertRaisesRegex(
            ValueError, r"got \d+ bytes that are no path.*BytesIO"
        ):
            torch.load(data, lazy=True)
        self.assertEqual(torch.load(io.BytesIO(data), lazy=True), self.state)
        self.assertEqual(
            torch.load(os.fsencode(self.path), lazy=True), self.state
        )  # a path

    @parametrize(
        "url", ["https://host/model.pt", "s3://bucket/m.pt", Path("gs://b/m.pt")]
    )
    def test_a_url(self, url):
        with self.assertRaisesRegex(ValueError, "got the URL .*fsspec.open"):
            torch.load(url, lazy=True)
        from torch._load_lazy import load_deferred

        with self.assertRaisesRegex(ValueError, "got the URL .*fsspec.open"):
            load_deferred(url)

    def test_a_file_object_of_fsspec(self):
        url = "memory://folder/model.pt"
        with fsspec.open(url, "wb") as f:
            f.write(Path(self.path).read_bytes())
        with fsspec.open(url) as f:
            self.assertEqual(torch.load(f, lazy=True), self.state)

    def test_a_path_that_looks_like_a_url(self):
        folder = Path(self.folder, "ab:", "x")
        folder.mkdir(parents=True)
        torch.save(self.state, folder / "m.pt")
        before = os.getcwd()
        os.chdir(self.folder)
        try:
            self.assertEqual(torch.load("ab:/x/m.pt", lazy=True), self.state)
        finally:
            os.chdir(before)

    @parametrize("lazy", ["yes", 1, 0, None, "", "mmap"])
    def test_lazy_is_a_bool(self, lazy):
        with self.assertRaisesRegex(TypeError, "Expected lazy to be True or False"):
            torch.load(self.path, lazy=lazy)


instantiate_parametrized_tests(TestLoadLazyNoCheckpoint)

if __name__ == "__main__":
    run_tests()
