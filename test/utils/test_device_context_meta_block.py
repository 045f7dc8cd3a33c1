# Owner(s): ["module: python frontend"]
"""``with torch.device("meta"):`` is ``meta_init``: the same laws, and the same decision for each way to escape."""

import gc
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    subtest,
    TestCase,
)


def load(name):
    path = Path(__file__).parents[1] / "nn" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


case, escapes = load("meta_block_case"), load("escapes")


class TestDeviceContext(case.MetaBlockLaws, TestCase):
    def block(self):
        return torch.device("meta")

    @parametrize(
        "name", [subtest(n, name=re.sub(r"\W+", "_", n)) for n in escapes.ESCAPES]
    )
    def test_decides_as_meta_init(self, name):
        def outcome(block):
            given = escapes.inputs()
            try:
                with block:
                    made = escapes.ESCAPES[name](*given)
            except Exception as e:
                return type(e)
            return bool(escapes.off_meta(made))

        got = outcome(torch.device("meta"))
        self.assertEqual(got, outcome(nn.utils.meta_init()))
        self.assertEqual(
            got if isinstance(got, bool) else name in escapes.RAISES,
            name in {**escapes.STAYS, **escapes.RAISES},
        )

    def test_a_block_of_a_real_device_inside(self):
        for outer in (torch.device("meta"), nn.utils.meta_init()):
            with outer:
                constant = torch.arange(3)
                with torch.device("cpu"):
                    real = [torch.empty(1), torch.Tensor(1), nn.Linear(1, 1).weight]
                    self.assertEqual((constant + 1).tolist(), [1, 2, 3])
                    with torch.device("meta"):
                        inner = torch.empty(1, device="cpu")
                module = nn.Module()
                module.register_buffer("real", real[0])
            self.assertEqual([t.device.type for t in real], ["cpu"] * 3)
            self.assertTrue(inner.is_meta and module.real.is_meta)

    def test_a_real_block_in_a_meta_block_in_deferred_init_is_deferred(self):
        def make():
            with torch.device("meta"), torch.device("cpu"):
                return nn.Linear(2, 2)

        torch.manual_seed(0)
        eager = make()
        torch.manual_seed(0)
        module = nn.utils.deferred_init(make)
        self.assertTrue(nn.utils.is_deferred(module))
        self.assertEqual(nn.utils.materialize_module(module).weight, eager.weight)

    def test_a_context_that_somebody_holds_has_no_effect_after_its_end(self):
        with torch.device("meta"):
            held = torch.overrides._get_current_function_mode_stack()
            torch.empty(1)
        self.assertEqual(torch.Tensor(1).device.type, "cpu")
        self.assertEqual(torch.empty(1, device="cpu").device.type, "cpu")
        module = nn.Module()
        module.register_buffer("real", torch.empty(1))
        self.assertFalse(module.real.is_meta)
        del held
        gc.collect()
        self.assertOutside()

    def test_a_dispatch_mode_that_outlives_the_block(self):
        from torch.utils._python_dispatch import TorchDispatchMode

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {}))

        mode = Mode()
        with torch.device("meta"):
            mode.__enter__()
        self.assertEqual(torch.Tensor(1).device.type, "cpu")
        mode.__exit__(None, None, None)
        self.assertEqual(torch.Tensor(1).device.type, "cpu")
        with torch.device("meta"):
            pass
        self.assertOutside()

    def test_it_does_not_import_dynamo(self):
        code = (
            "import torch, sys, torch_ext; torch_ext.enable();\n"
            "with torch.device('meta'): torch.nn.Linear(2, 2), torch.Tensor(2)\n"
            "assert 'torch._dynamo' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


instantiate_parametrized_tests(TestDeviceContext)

if __name__ == "__main__":
    run_tests()
