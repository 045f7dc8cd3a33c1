# Owner(s): ["module: python frontend"]
"""``with torch.device("meta"):`` overrides the device that a call names; see torch/utils/_device_meta.py."""

import threading

import numpy as np
import torch
from device_factories import by_name, FACTORIES, X
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    subtest,
    TestCase,
)
from torch.utils._device import set_device


DEVICES = ["cpu", "cuda", "cuda:1", torch.device("cpu"), torch.device("cuda", 0), 0]


class TestExplicitDevice(TestCase):
    @parametrize(
        "device", [subtest(d, name=f"device{i}") for i, d in enumerate(DEVICES)]
    )
    @parametrize("factory", by_name(FACTORIES))
    def test_is_overridden(self, factory, device):
        expected = factory(device="cpu")
        if factory is FACTORIES["as_tensor, of a tensor"] and str(device) == "cpu":
            self.skipTest("a real tensor that is where it is to be is returned itself")
        with torch.device("meta"):
            made = factory(device=device)
        self.assertEqual(made.device, torch.device("meta"))
        self.assertEqual(
            (type(made), made.shape, made.dtype, made.layout, made.requires_grad),
            (
                type(expected),
                expected.shape,
                expected.dtype,
                expected.layout,
                expected.requires_grad,
            ),
        )

    def test_module_constructors(self):
        built = 0
        for info in module_db:
            for args in self._constructor_inputs(info):
                try:
                    real = info.module_cls(*args.args, **args.kwargs, device="cpu")
                except TypeError:  # takes no device
                    continue
                with torch.device("meta"):
                    module = info.module_cls(*args.args, **args.kwargs, device="cpu")
                self.assertEqual(list(module.state_dict()), list(real.state_dict()))
                for name, value in module.state_dict(keep_vars=True).items():
                    self.assertTrue(value.is_meta, f"{info.name}: {name}")
                built += 1
        self.assertGreater(built, 100)

    @staticmethod
    def _constructor_inputs(info):
        inputs = info.module_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        )
        return [i.constructor_input for i in inputs]

    def test_positional_in_a_module_constructor(self):
        with torch.device("meta"):
            self.assertTrue(nn.Linear(2, 3, True, "cpu").weight.is_meta)
            self.assertTrue(
                nn.LayerNorm(3, 1e-5, True, True, torch.device("cpu")).bias.is_meta
            )
            self.assertTrue(nn.UninitializedParameter(True, "cpu").is_meta)

    def test_none_is_not_explicit(self):
        with torch.device("meta"):
            self.assertTrue(torch.zeros(2, device=None).is_meta)
            self.assertEqual(torch.zeros_like(X, device=None).device.type, "cpu")
            self.assertEqual(X.new_zeros(2).device.type, "cpu")

    def test_no_device_raises_as_ever(self):
        with (
            torch.device("meta"),
            self.assertRaisesRegex(RuntimeError, "device.*nonsense"),
        ):
            torch.empty(2, device="nonsense")

    def test_what_has_to_stay_stays(self):
        out = torch.empty(3)
        array = np.ones(3)
        with torch.device("meta"):
            self.assertIs(torch.zeros(3, out=out, device="cpu"), out)
            alias = torch.asarray(array, device="cpu", copy=False)
            nested = torch.nested.nested_tensor([[1.0], [2.0, 3.0]], device="cpu")
        self.assertEqual(out, torch.zeros(3))
        self.assertEqual(alias.data_ptr(), array.ctypes.data)
        self.assertEqual(nested.device.type, "cpu")

    def test_draws_no_random_numbers(self):
        before = torch.get_rng_state()
        generator = torch.Generator()
        own = generator.get_state()
        with torch.device("meta"):
            for factory in FACTORIES.values():
                factory(device="cpu")
            torch.rand(8, generator=generator, device="cpu")
            nn.Linear(4, 4, device="cpu")
        self.assertEqual(torch.get_rng_state(), before)
        self.assertEqual(generator.get_state(), own)


class TestScope(TestCase):
    def test_decorator(self):
        @set_device("meta")
        def build():
            return nn.Linear(2, 2, device="cpu")

        self.assertTrue(build().weight.is_meta)
        self.assertEqual(torch.empty(1, device="cpu").device.type, "cpu")

    def test_the_innermost_block_decides(self):
        with torch.device("meta"):
            with torch.device("cpu"):
                made = [
                    torch.empty(2),
                    torch.empty(2, device="cpu"),
                    X.new_empty(2, device="cpu"),
                ]
                made += [
                    torch.empty_like(X, device="cpu"),
                    nn.Linear(2, 2, device="cpu").weight,
                ]
                with torch.device("meta"):
                    inner = [
                        torch.empty(2),
                        torch.empty(2, device="cpu"),
                        X.new_empty(2, device="cpu"),
                    ]
            inner += [torch.empty(2, device="cpu")]
        self.assertEqual([t.device.type for t in made], ["cpu"] * 5)
        self.assertEqual([t.device.type for t in inner], ["meta"] * 4)

    def test_an_error_in_an_inner_block_leaves_the_outer_one_as_it_was(self):
        with torch.device("meta"):
            with torch.device("cpu"), self.assertRaises(RuntimeError):
                torch.empty(-1)
            self.assertTrue(torch.empty(2, device="cpu").is_meta)

    def test_meta_inside_of_another_device(self):
        with torch.device("cpu"), torch.device("meta"):
            self.assertTrue(torch.empty(2, device="cpu").is_meta)

    def test_other_devices_are_stock(self):
        with torch.device("cpu"):
            self.assertTrue(torch.empty(2, device="meta").is_meta)
            self.assertEqual(torch.empty(2).device.type, "cpu")

    def test_a_default_device_overrides_nothing(self):
        torch.set_default_device("meta")
        try:
            default, explicit = torch.empty(2), torch.empty(2, device="cpu")
            with torch.device("meta"):
                in_block = torch.empty(2, device="cpu")
            after = torch.empty(2, device="cpu")
        finally:
            torch.set_default_device(None)
        self.assertEqual(
            [t.device.type for t in (default, explicit, in_block, after)],
            ["meta", "cpu", "meta", "cpu"],
        )

    def test_a_block_inside_of_a_default_device(self):
        torch.set_default_device("cpu")
        try:
            with torch.device("meta"):
                made = torch.empty(2, device="cpu")
        finally:
            torch.set_default_device(None)
        self.assertTrue(made.is_meta)

    def test_the_other_modes_see_the_calls(self):
        class Log(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if func is torch.zeros:
                    seen.append(kwargs["device"])
                return func(*args, **(kwargs or {}))

        seen = []
        with torch.device("meta"), Log():
            torch.zeros(2, device="cpu")
        self.assertEqual(seen, ["cpu"])
        seen.clear()
        with Log(), torch.device("meta"):
            torch.zeros(2, device="cpu")
        self.assertEqual(seen, [torch.device("meta")])

    def test_another_thread_is_not_in_the_block(self):
        made = []
        with torch.device("meta"):
            thread = threading.Thread(
                target=lambda: made.append(torch.empty(2, device="cpu"))
            )
            thread.start()
            thread.join()
        self.assertEqual(made[0].device.type, "cpu")


instantiate_parametrized_tests(TestExplicitDevice)

if __name__ == "__main__":
    run_tests()
