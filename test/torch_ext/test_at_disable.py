"""What the new files of a patch have running ends when the patch is switched off."""

import os
import sys
import tempfile
import threading
import time
import unittest

import torch
from torch.testing._internal.common_utils import run_tests, TestCase
from torch.utils.serialization import config

import torch_ext


def is_watched():
    return any("leases" in thread.name for thread in threading.enumerate())


class TestAtDisable(TestCase):
    @unittest.skipIf(sys.platform != "linux", "leases are Linux's")
    @unittest.skipIf("TORCH_EXT_TREE" in os.environ, "a tree's patches stay on")
    def test_leases(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "m.pt")
            torch.save({"x": torch.ones(3)}, path)
            with torch_ext.enable("load_lazy"):
                config.load.lazy_leases = 8
                loaded = torch.load(path, lazy=True)
                self.assertTrue(is_watched())
            end = time.monotonic() + 20
            while is_watched() and time.monotonic() < end:
                time.sleep(0.01)
            self.assertFalse(is_watched())
            self.assertEqual(loaded, {"x": torch.ones(3)})


if __name__ == "__main__":
    run_tests()
