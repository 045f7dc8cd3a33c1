"""Modules that are not imported yet are not imported by a graft, and get their seams when they are."""

from processes import python
from torch.testing._internal.common_utils import run_tests, TestCase


HEAD = """
import sys, torch, torch_ext

NAME = "torch.distributed.checkpoint.format_utils"
LAZY = "torch.distributed.checkpoint"

def is_patched():
    from torch.distributed.checkpoint import format_utils
    found = hasattr(format_utils, "dcp_to_safetensors")
    assert found == ("stream" in (format_utils.dcp_to_torch_save.__kwdefaults__ or {}))
    assert found == ("dcp_to_safetensors" in format_utils.__all__)
    assert found == hasattr(sys.modules[LAZY], "TorchSaveReader")
    return found
"""


class TestOnImport(TestCase):
    def check(self, code):
        # In a process of its own, since a module is imported once, and apart from a tree.
        python("-c", HEAD + code, check=True)

    def test_import_behind_enable(self):
        self.check("""
import importlib.util, inspect
torch_ext.enable()
assert LAZY not in sys.modules
assert is_patched()
# The module is like any other.
from torch.distributed.checkpoint import format_utils
assert format_utils.__spec__.name == format_utils.__name__ == NAME
assert type(format_utils.__loader__).__name__ == "SourceFileLoader"
assert "dcp_to_torch_save" in inspect.getsource(format_utils)
assert importlib.util.find_spec(NAME) is format_utils.__spec__
torch_ext.disable()
assert not is_patched()
""")

    def test_import_behind_disable(self):
        self.check("""
with torch_ext.enable():
    pass
assert not is_patched()
with torch_ext.enable():
    assert is_patched()
assert not is_patched()
""")

    def test_import_that_fails_is_tried_again(self):
        self.check("""
torch_ext.enable()
sys.modules["torch.futures"] = None
try:
    is_patched()
except ImportError:
    pass
else:
    raise AssertionError
del sys.modules["torch.futures"]
for name in [name for name in sys.modules if name.startswith(LAZY)]:
    del sys.modules[name]
assert is_patched()
""")


if __name__ == "__main__":
    run_tests()
