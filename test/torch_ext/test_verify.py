"""python -m torch_ext verify, on files that torch and others wrote, whole and damaged."""

import os
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.testing._internal.common_utils import run_tests, TestCase
from torch.utils.serialization import config

from torch_ext import __main__ as cli
from torch_ext._tools import crc, verify


REPOSITORY = Path(cli.__file__).parent.parent


class Stream:
    """A file that cannot seek, so that sizes come in descriptors."""

    def __init__(self, file):
        self.write, self.flush = file.write, file.flush


class Tools(TestCase):
    @pytest.fixture(autouse=True)
    def _fixtures(self, tmp_path, capsys):
        self.folder, self.capsys = tmp_path, capsys
        self.path = tmp_path / "model.pt"

    def run_tool(self, *args, path=None):
        """Exit status and output of the command line, without the folder's name."""
        path = self.path if path is None else path
        status = cli.main([args[0], str(path), *args[1:]])
        out, err = self.capsys.readouterr()
        return status, (out + err).replace(f"{self.folder}/", "")

    def verify(self, path=None):
        return self.run_tool("verify", path=path)

    def inspect(self, *args):
        return self.run_tool("inspect", *args)

    def flip(self, offset, bit=0):
        data = bytearray(self.path.read_bytes())
        data[offset] ^= 1 << bit
        self.path.write_bytes(data)


class TestCrc(TestCase):
    @given(st.binary(), st.binary(max_size=100_000))
    def test_combine(self, first, second):
        together = crc.combine(zlib.crc32(first), zlib.crc32(second), len(second))
        self.assertEqual(together, zlib.crc32(first + second))

    def test_combine_with_much(self):
        first, second = b"\1\2\3", bytes(range(256)) * (9 << 12)
        self.test_combine.hypothesis.inner_test(self, first, second)


class TestVerify(Tools):
    def save(self, **kwargs):
        self.state = {"x": torch.arange(1000.0), "y": torch.ones(7), "z": torch.ones(0)}
        torch.save(self.state, self.path, **kwargs)

    def starts(self):
        """Where each record's data start."""
        with zipfile.ZipFile(self.path) as archive:
            opened = [(info, archive.open(info)) for info in archive.infolist()]
            return {
                info.filename: info.header_offset
                + 30
                + sum(self.lengths(info.header_offset))
                for info, _ in opened
            }

    def lengths(self, header):
        data = self.path.read_bytes()[header + 26 : header + 30]
        return int.from_bytes(data[:2], "little"), int.from_bytes(data[2:], "little")

    def test_whole(self):
        self.save()
        status, text = self.verify()
        self.assertEqual(status, 0)
        self.assertExpectedInline(
            text,
            """\
model.pt: 9 records, 4.4 kB, all checksums are right
""",
        )

    def test_every_record_is_looked_at(self):
        self.save()
        whole = self.path.read_bytes()
        for name, start in self.starts().items():
            if name == "model/data/2":
                continue  # has no bytes
            self.path.write_bytes(whole)
            self.flip(start, bit=3)
            status, text = self.verify()
            self.assertEqual(status, 1)
            self.assertRegex(
                text,
                rf"\Amodel.pt: record '{name}' at offset {start}: its data have the "
                r"checksum \w{8}, and should have \w{8}\nmodel.pt: 9 records, .*, 1 bad\n\Z",
            )

    def test_large_records_are_shared_by_threads(self):
        torch.save(
            [torch.arange(1 << 14), torch.ones(3), torch.zeros(99999)], self.path
        )
        with mock.patch.object(verify, "_PART", 4096):
            self.assertEqual(self.verify()[0], 0)
            start = self.starts()["model/data/2"]
            self.flip(start + 99_999)
            status, text = self.verify()
            self.assertIn(f"record 'model/data/2' at offset {start}:", text)
            self.assertEqual((status, text.count("\n")), (1, 2))

    def test_all_bad_records_are_named(self):
        self.save()
        starts = self.starts()
        for key in "01":
            self.flip(starts[f"model/data/{key}"])
        self.assertIn("2 bad", self.verify()[1])
        self.assertIn("record 'model/data/0'", self.verify()[1])
        self.assertIn("record 'model/data/1'", self.verify()[1])

    def test_headers(self):
        self.save()
        whole = self.path.read_bytes()
        start = self.starts()["model/data/0"]
        header = whole.rindex(b"PK\3\4", 0, start)
        texts = []
        for offset in (
            header,
            header + 6,
            header + 8,
            header + 30,
            start + 4000,
            start + 4008,
        ):
            self.path.write_bytes(whole)
            self.flip(offset, bit=3)
            status, text = self.verify()
            self.assertEqual(status, 1)
            texts.append(text.split("\n")[0])
        self.assertExpectedInline(
            "\n".join(texts),
            """\
model.pt: record 'model/data/0' at offset 726: no header there, but b'XK\\x03\\x04'
model.pt: record 'model/data/0' at offset 726: its header has other flags, or another method
model.pt: record 'model/data/0' at offset 726: its header has other flags, or another method
model.pt: record 'model/data/0' at offset 726: its header has the name b'eodel/data/0'
model.pt: record 'model/data/0' at offset 4832: no descriptor behind it that fits the directory
model.pt: record 'model/data/0' at offset 4832: no descriptor behind it that fits the directory""",
        )

    def test_directory(self):
        self.save()
        whole = self.path.read_bytes()
        entry = whole.index(b"model/data/0", whole.index(b"PK\1\2")) - 46
        texts = []
        for offset in (
            entry,
            entry + 10,
            entry + 16,
            entry + 20,
            entry + 24,
            entry + 42,
        ):
            self.path.write_bytes(whole)
            self.flip(offset, bit=1)
            status, text = self.verify()
            self.assertEqual(status, 1, text)
            texts.append(text.split("\n")[0])
        self.assertExpectedInline(
            "\n".join(texts),
            """\
model.pt: at offset 5967: no directory of a zip file, as if cut off (Bad magic number for central directory)
model.pt: record 'model/data/0' at offset 726: its header has other flags, or another method
model.pt: record 'model/data/0' at offset 4832: no descriptor behind it that fits the directory
model.pt: record 'model/data/0' at offset 832: it is stored as it is, 4002 bytes for 4000
model.pt: record 'model/data/0' at offset 832: it is stored as it is, 4000 bytes for 4002
model.pt: record 'model/data/0' at offset 724: no header there, but b'\\x00\\x00PK'""",
        )

    def test_offsets_outside_of_the_file(self):
        """Not of each of them can the system be asked what is there."""
        self.save()
        whole = self.path.read_bytes()
        with zipfile.ZipFile(self.path, "a") as archive:
            archive.infolist()[3].header_offset = (1 << 64) - 16
            archive.comment = b"so that the directory is written"
        beyond = self.verify()[1]
        self.path.write_bytes(b"PK" + whole[300:])
        self.assertExpectedInline(
            beyond + self.verify()[1],
            """\
model.pt: record 'model/byteorder' at offset 18446744073709551600: no header there, but b''
model.pt: 9 records, 4.4 kB, 1 bad
model.pt: record 'model/data.pkl' at offset -298: no header there, but b''
model.pt: 9 records, 4.1 kB, 1 bad
""",
        )

    def test_every_flipped_bit_of_a_record_is_found(self):
        self.save()
        whole = self.path.read_bytes()
        start = self.starts()["model/data/0"]
        for offset in range(whole.rindex(b"PK\3\4", 0, start), start + 64, 5):
            self.path.write_bytes(whole)
            self.flip(offset, bit=offset % 8)
            # But for versions, times, and the fill before the data, which say nothing.
            where = offset - whole.rindex(b"PK\3\4", 0, start)
            if where in range(4, 6) or where in range(8, 26) or 42 <= offset < start:
                continue
            self.assertEqual(self.verify()[0], 1, str(offset))

    def test_truncated(self):
        self.save()
        self.path.write_bytes(self.path.read_bytes()[:-100])
        status, text = self.verify()
        self.assertEqual(status, 1)
        self.assertExpectedInline(
            text,
            """\
model.pt: at offset 5867: no directory of a zip file, as if cut off (File is not a zip file)
model.pt: 1 bad
""",
        )

    def test_foreign(self):
        self.path.write_bytes(b"# a program\n" * 99)
        status, text = self.verify()
        self.assertEqual(status, 1)
        self.assertExpectedInline(
            text,
            """\
model.pt: Expected model.pt to have the beginning of a file that torch.save wrote, got \
b'# a program\\n# a ' at offset 0. (Is the file damaged, or still being written?)
model.pt: 1 bad
""",
        )
        self.path.write_bytes(b"")
        self.assertEqual(self.verify()[0], 1)
        status, text = self.verify(self.folder / "nowhere.pt")
        self.assertEqual(status, 1)
        self.assertExpectedInline(
            text,
            """\
nowhere.pt: cannot be read: No such file or directory
""",
        )
        self.assertEqual(self.verify(self.folder)[0], 1)

    def test_other_zip_files(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with zipfile.ZipFile(self.path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("a/stored", b"1" * 999, zipfile.ZIP_STORED)
                archive.writestr("a/bzip2", b"2" * 999, zipfile.ZIP_BZIP2)
                archive.writestr("a/deflated", os.urandom(3000))
        self.assertEqual(self.verify()[0], 0)
        whole = self.path.read_bytes()
        for name, start in self.starts().items():
            self.path.write_bytes(whole)
            self.flip(start + 20)
            status, text = self.verify()
            self.assertEqual(status, 1)
            self.assertIn(f"record '{name}' at offset", text)

    def test_streamed_zip64_file(self):
        with (
            open(self.path, "wb") as file,
            zipfile.ZipFile(Stream(file), "w") as archive,
        ):
            for name in ("a/x", "a/y"):
                with archive.open(name, "w", force_zip64=True) as record:
                    record.write(b"12345")
        self.assertEqual(self.verify()[0], 0)
        self.flip(self.starts()["a/x"] + 5 + 12)  # in the descriptor
        self.assertIn("no descriptor behind it", self.verify()[1])

    def test_lies_about_a_size(self):
        for write_to in (lambda file: file, Stream):
            with (
                open(self.path, "wb") as file,
                zipfile.ZipFile(write_to(file), "w") as archive,
            ):
                with archive.open("a/x", "w", force_zip64=True) as record:
                    record.write(b"1" * 9)
                archive.getinfo("a/x").file_size = 1 << 60
            status, text = self.verify()
            self.assertEqual(status, 1)
            self.assertIn(
                "it is stored as it is, 9 bytes for 1152921504606846976", text
            )

    def test_names_twice(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with zipfile.ZipFile(self.path, "w") as archive:
                archive.writestr("a/x", b"1")
                archive.writestr("a/x", b"2")
        status, text = self.verify()
        self.assertEqual(status, 1)
        self.assertExpectedInline(
            text,
            """\
model.pt: record 'a/x' at offset 34: a second record of the name at offset 0
model.pt: 2 records, 2 bytes, 1 bad
""",
        )

    def test_saved_without_checksums(self):
        with config.patch("save.compute_crc32", False):
            self.save()
        status, text = self.verify()
        self.assertEqual(status, 0)
        self.assertExpectedInline(
            text,
            """\
model.pt: 9 records, 4.4 kB, without checksums: their headers alone are right
""",
        )
        start = self.starts()["model/data/0"]
        self.flip(self.path.read_bytes().rindex(b"PK\3\4", 0, start) + 30)
        self.assertEqual(self.verify()[0], 1)

    def test_formats_without_checksums(self):
        self.save(_use_new_zipfile_serialization=False)
        right = (0, "model.pt: a format without checksums: its index alone is right\n")
        self.assertEqual(self.verify(), right)
        self.path.write_bytes(self.path.read_bytes()[:-9])
        self.assertEqual(self.verify()[0], 1)

    def test_safetensors(self):
        safetensors = pytest.importorskip("safetensors.torch")
        path = self.folder / "model.safetensors"
        safetensors.save_file({"x": torch.ones(9)}, path)
        right = (
            "model.safetensors: a format without checksums: its index alone is right\n"
        )
        self.assertEqual(self.verify(path), (0, right))
        path.write_bytes(path.read_bytes()[:-1])
        status, text = self.verify(path)
        self.assertEqual(status, 1)
        self.assertExpectedInline(
            text,
            """\
model.safetensors: Expected model.safetensors to have 100 bytes, got 99 bytes at \
offset 99. (Is the file damaged, or still being written?)
model.safetensors: 1 bad
""",
        )

    def test_many_files_one_bad(self):
        self.save()
        good = self.folder / "good.pt"
        torch.save(self.state, good)
        self.flip(self.starts()["model/data/1"])
        status = cli.main(["verify", str(good), str(self.path), str(good)])
        out = self.capsys.readouterr().out
        self.assertEqual(status, 1)
        self.assertEqual(out.count("all checksums are right"), 2)

    @pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal")
    def test_bar_on_a_terminal_only(self):
        import pty

        self.save()
        command = [sys.executable, "-m", "torch_ext", "verify", str(self.path)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        ours, theirs = pty.openpty()
        environ = {**os.environ, "TERM": "xterm"}
        subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            check=True,
        )
        os.close(theirs)
        shown = os.read(ours, 100_000).decode()
        os.close(ours)
        self.assertIn("model.pt", shown)
        self.assertIn("━", shown)


if __name__ == "__main__":
    run_tests()
