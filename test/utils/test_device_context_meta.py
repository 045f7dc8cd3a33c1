# Owner(s): ["module: python frontend"]
"""``with torch.device("meta"):`` overrides the device that a call names; see torch/utils/_device_meta.py."""

import re
import threading

import numpy as np
import torch
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


X = torch.arange(6.0).reshape(2, 3)
CSR = ([0, 1], [0], [1.0], (1, 2))

# Their arguments tell the values.
CONSTANTS = {
    "zeros": lambda **kw: torch.zeros(2, **kw),
    "ones": lambda **kw: torch.ones(2, **kw),
    "full": lambda **kw: torch.full((2,), 3.0, **kw),
    "eye": lambda **kw: torch.eye(2, **kw),
    "arange": lambda **kw: torch.arange(3, **kw),
    "linspace": lambda **kw: torch.linspace(0, 1, 3, **kw),
    "logspace": lambda **kw: torch.logspace(0, 1, 3, **kw),
    "tensor": lambda **kw: torch.tensor([1.0, 2.0], **kw),
    "as_tensor": lambda **kw: torch.as_tensor(np.ones(2), **kw),
    "as_tensor, of a tensor": lambda **kw: torch.as_tensor(X, **kw),
    "asarray": lambda **kw: torch.asarray([1.0], **kw),
    "scalar_tensor": lambda **kw: torch.scalar_tensor(1.0, **kw),
    "tril_indices": lambda **kw: torch.tril_indices(2, 3, **kw),
    "triu_indices": lambda **kw: torch.triu_indices(2, 3, **kw),
    "bartlett_window": lambda **kw: torch.bartlett_window(3, **kw),
    "blackman_window": lambda **kw: torch.blackman_window(3, **kw),
    "hamming_window": lambda **kw: torch.hamming_window(3, **kw),
    "hann_window": lambda **kw: torch.hann_window(3, **kw),
    "kaiser_window": lambda **kw: torch.kaiser_window(3, **kw),
    "fftfreq": lambda **kw: torch.fft.fftfreq(3, **kw),
    "rfftfreq": lambda **kw: torch.fft.rfftfreq(3, **kw),
}
FACTORIES = CONSTANTS | {
    "empty": lambda **kw: torch.empty(2, **kw),
    "empty_permuted": lambda **kw: torch.empty_permuted((2, 3), (1, 0), **kw),
    "empty_strided": lambda **kw: torch.empty_strided((2, 3), (1, 2), **kw),
    "rand": lambda **kw: torch.rand(2, **kw),
    "randn": lambda **kw: torch.randn(2, **kw),
    "randint": lambda **kw: torch.randint(9, (2,), **kw),
    "randperm": lambda **kw: torch.randperm(3, **kw),
    "rand, generator": lambda **kw: torch.rand(2, generator=torch.Generator(), **kw),
    "normal": lambda **kw: torch.normal(0.0, 1.0, (2,), **kw),
    "tensor, requires_grad": lambda **kw: torch.tensor(1.0, requires_grad=True, **kw),
    "signal.windows.hann": lambda **kw: torch.signal.windows.hann(3, **kw),
    "sparse_coo": lambda **kw: torch.sparse_coo_tensor([[0]], [1.0], (2,), **kw),
    "sparse_csr": lambda **kw: torch.sparse_csr_tensor(*CSR, **kw),
    "empty_like": lambda **kw: torch.empty_like(X, **kw),
    "zeros_like": lambda **kw: torch.zeros_like(X, **kw),
    "ones_like": lambda **kw: torch.ones_like(X, **kw),
    "full_like": lambda **kw: torch.full_like(X, 2.0, **kw),
    "rand_like": lambda **kw: torch.rand_like(X, **kw),
    "randn_like": lambda **kw: torch.randn_like(X, **kw),
    "randint_like": lambda **kw: torch.randint_like(X, 9, **kw),
    "new_empty": lambda **kw: X.new_empty(2, **kw),
    "new_empty_strided": lambda **kw: X.new_empty_strided((2,), (1,), **kw),
    "new_zeros": lambda **kw: X.new_zeros(2, **kw),
    "new_ones": lambda **kw: X.new_ones(2, **kw),
    "new_full": lambda **kw: X.new_full((2,), 3.0, **kw),
    "new_tensor": lambda **kw: X.new_tensor([1.0], **kw),
}
DEVICES = ["cpu", "cuda", "cuda:1", torch.device("cpu"), torch.device("cuda", 0), 0]


def by_name(factories):
    return [subtest(f, name=re.sub(r"\W+", "_", n)) for n, f in factories.items()]


class TestExplicitDevice(TestCase):
    @parametrize(
        "device", [subtest(d, name=f"device{i}") for i, d in enumerate(DEVICES)]
    )
    @parametrize("factory", by_name(FACTORIES))
    def test_is_overridden(self, factory, device):
        expected = factory(device="cpu")
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
            self.assertEqual(torch.normal(0.0, 1.0, (2,)).device.type, "cpu")

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


class TestConstants(TestCase):
    """What a constructor reads of the constants that it makes is what it would read without the block."""

    def check(self, read):
        expected = read()
        with torch.device("meta"):
            actual = read()
        self.assertEqual(actual, expected, rtol=0, atol=0, exact_dtype=True)

    @parametrize("factory", by_name(CONSTANTS))
    def test_every_factory(self, factory):
        self.check(lambda: factory(device="cpu").numpy())

    def test_drop_path_schedules(self):
        self.check(lambda: [x.item() for x in torch.linspace(0, 0.1, 12, device="cpu")])
        self.check(
            lambda: [
                x.tolist()
                for x in torch.linspace(0, 0.3, 9, device="cpu").split([2, 3, 4])
            ]
        )

    def test_every_way_to_read(self):
        def constant(**kw):
            return torch.arange(3, device="cpu", **kw)

        self.check(lambda: constant().numpy())
        self.check(lambda: np.asarray(constant(dtype=torch.float64)))
        self.check(lambda: [float(x) for x in constant()])
        self.check(lambda: [int(x) for x in constant()])
        self.check(lambda: [bool(x) for x in constant()])
        self.check(lambda: [complex(x) for x in constant()])
        self.check(lambda: ["a", "b", "c"][constant()[2]])
        self.check(lambda: list(range(constant()[2])))
        self.check(lambda: f"{constant()[1]:3d}")
        self.check(lambda: (2 in constant(), 3 in constant()))
        self.check(
            lambda: torch.equal(constant(), torch.tensor([0, 1, 2], device="cpu"))
        )
        self.check(lambda: torch.allclose(constant(), constant()))
        self.check(lambda: constant()[1].is_nonzero())

    def test_views(self):
        def constant():
            return torch.arange(24, device="cpu").reshape(2, 3, 4)

        self.check(lambda: constant()[1, 2, 3].item())
        self.check(lambda: constant().transpose(0, 2)[1:, ::2].tolist())
        self.check(lambda: constant().unsqueeze(0).expand(2, 2, 3, 4).tolist())
        self.check(lambda: constant().view(torch.int32).tolist())
        self.check(lambda: constant().detach().tolist())
        self.check(lambda: nn.Parameter(constant(), requires_grad=False).tolist())

    def test_data_of_the_caller(self):
        base = torch.arange(8.0)
        self.check(lambda: torch.as_tensor(base[3:], device="cpu")[1:].tolist())
        self.check(lambda: torch.as_tensor(base[::2], device="cpu").shape)
        self.check(lambda: torch.asarray(base.numpy()[2:5], device="cpu").tolist())
        data = [1, 2, 3]
        with torch.device("meta"):
            constant = torch.tensor(data, device="cpu")
            data[0] = 9
            self.assertEqual(constant.tolist(), [1, 2, 3])

    def test_the_default_dtype_is_that_of_the_call(self):
        def read():
            constant = torch.linspace(0, 1, 7, device="cpu")
            torch.set_default_dtype(torch.float64)
            try:
                return constant.numpy()
            finally:
                torch.set_default_dtype(torch.float32)

        self.check(read)

    def test_in_inner_blocks(self):
        with torch.device("meta"):
            constant = torch.linspace(0, 1, 3, device="cpu")
            with torch.device("cpu"):
                self.assertEqual(constant.tolist(), [0.0, 0.5, 1.0])
            with torch.device("meta"):
                self.assertEqual(constant.tolist(), [0.0, 0.5, 1.0])

    def test_what_numpy_writes_is_read(self):
        def read():
            constant = torch.zeros(2, device="cpu")
            constant.numpy()[1] = 5
            return constant.tolist()

        self.check(read)

    @parametrize(
        "write",
        [
            subtest(lambda t: t.fill_(1), name="fill"),
            subtest(lambda t: t[0].fill_(1), name="view"),
            subtest(lambda t: t.data.fill_(1), name="data"),
            subtest(lambda t: t.detach().add_(1), name="detach"),
            subtest(lambda t: nn.init.ones_(nn.Parameter(t)), name="parameter"),
            subtest(
                lambda t: setattr(nn.Parameter(torch.empty(2)), "data", t),
                name="set_data",
            ),
            subtest(lambda t: t.resize_(4), name="resize"),
        ],
    )
    def test_a_written_constant_has_no_value(self, write):
        with torch.device("meta"):
            constant = torch.zeros(2, device="cpu")
            write(constant)
            with self.assertRaisesRegex((RuntimeError, NotImplementedError), "meta"):
                constant[0].item()

    def test_a_swapped_constant_has_no_stale_value(self):
        with torch.device("meta"):
            one, two = torch.zeros(2, device="cpu"), torch.ones(2, device="cpu")
            torch.utils.swap_tensors(one, two)
            with self.assertRaises(RuntimeError):
                one[0].item()

    def test_what_is_computed_has_no_value(self):
        with torch.device("meta"):
            double = torch.linspace(0, 1, 3, device="cpu") * 2
            with self.assertRaises(RuntimeError):
                double[0].item()
            with self.assertRaises(RuntimeError):
                torch.linspace(0, 1, 3)[0].item()

    def test_nothing_is_kept_after_the_block(self):
        with torch.device("meta"):
            constant = torch.zeros(2, device="cpu")
        with self.assertRaises(RuntimeError):
            constant[0].item()


instantiate_parametrized_tests(TestExplicitDevice)
instantiate_parametrized_tests(TestConstants)

if __name__ == "__main__":
    run_tests()
