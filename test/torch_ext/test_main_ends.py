"""How commands end where nobody reads their output, and by Ctrl-C: quietly, with the exit status that shells expect."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.testing._internal.common_utils import run_tests, TestCase


class EndsCase(TestCase):
    @pytest.fixture(autouse=True)
    def _fixtures(self, tmp_path):
        self.folder = tmp_path
        self.path = tmp_path / "model.pt"

    def start(self, *args, stdout, **kwargs):
        command = [sys.executable, "-m", "torch_ext", *map(str, args)]
        return subprocess.Popen(
            command, stdout=stdout, stderr=subprocess.PIPE, **kwargs
        )


class TestClosedPipe(EndsCase):
    def commands(self):
        torch.save({f"w{i}": torch.ones(2) for i in range(3000)}, self.path)
        return [
            ["status"],
            ["status", "--markdown"],
            ["inspect", self.path],
            ["inspect", "--json", self.path],
            ["verify", self.path],
            ["convert", self.path, self.folder / "x.pt"],
            ["convert", self.path, self.folder / "x.safetensors"],
            ["export", self.folder / "out"],
        ]

    def test_nobody_reads(self):
        for command in self.commands():
            with self.subTest(command=command[:2]):
                ours, theirs = os.pipe()
                os.close(ours)
                child = self.start(*command, stdout=theirs)
                os.close(theirs)
                self.assertEqual(child.communicate()[1], b"")
                self.assertEqual(child.returncode, 141)
        # The work is done all the same.
        names = ["model.pt", "out", "x.pt", "x.safetensors"]
        self.assertEqual(sorted(os.listdir(self.folder)), names)

    def test_help(self):
        ours, theirs = os.pipe()
        os.close(ours)
        child = self.start("--help", stdout=theirs)
        os.close(theirs)
        self.assertEqual(child.communicate()[1], b"")
        # argparse itself passes over what it cannot write.
        self.assertIn(child.returncode, (0, 141))

    def test_the_first_line_is_read(self):
        self.commands()
        child = self.start("inspect", self.path, stdout=subprocess.PIPE)
        self.assertEqual(child.stdout.readline(), f"{self.path}\n".encode())
        child.stdout.close()  # with most of its 90 kB unread, more than a pipe holds
        self.assertEqual(child.stderr.read(), b"")
        self.assertEqual(child.wait(), 141)
        child.stderr.close()

    def test_errors_go_there_too(self):
        ours, theirs = os.pipe()
        os.close(ours)
        command = [sys.executable, "-m", "torch_ext", "inspect", str(self.path)]
        child = subprocess.run(command, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.assertEqual(child.returncode, 141)

    def test_a_reader_of_all(self):
        self.commands()
        child = self.start("inspect", self.path, stdout=subprocess.PIPE)
        out, err = child.communicate()
        self.assertEqual((child.returncode, err), (0, b""))
        self.assertGreater(len(out), 1 << 16)


# Reads a file that has no end, until it is interrupted.
ENDLESS = """
import signal, sys, zlib
from torch_ext import __main__ as cli
from torch_ext._tools import {module}

def slow(*args, **kwargs):
    print("here", flush=True)
    signal.pause()

signal.signal(signal.SIGINT, signal.default_int_handler)
{module}.{function} = slow
sys.exit(cli.main(sys.argv[1:]))
"""


class TestInterrupt(EndsCase):
    def test_by_signal(self):
        torch.save({"w": torch.ones(2)}, self.path)
        where = {"inspect": "_contents", "verify": "read_records"}
        for name, function in where.items():
            with self.subTest(name):
                code = ENDLESS.format(module=name, function=function)
                child = subprocess.Popen(
                    [sys.executable, "-c", code, name, str(self.path)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
                self.assertEqual(child.stdout.readline(), b"here\n")
                child.send_signal(signal.SIGINT)
                self.assertEqual(child.communicate(), (b"", b""))
                self.assertEqual(child.returncode, 130)


if __name__ == "__main__":
    run_tests()
