# Owner(s): ["module: python frontend"]
"""What a block of the meta device tells of constants is the truth; see torch/utils/_device_meta.py."""

import copy

import numpy as np
import torch
from device_factories import by_name, CONSTANTS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    subtest,
    TestCase,
)


@torch.jit.script
def scripted_fill(t: torch.Tensor) -> torch.Tensor:
    return t.fill_(1)


# All tensors have six elements, or are slices of such.
STEPS = {
    "view": lambda t, s: t.view(-1),
    "slice": lambda t, s: t[1:4],
    "step": lambda t, s: t[::2],
    "data": lambda t, s: t.data,
    "parameter": lambda t, s: nn.Parameter(t, requires_grad=False),
    "cpu": lambda t, s: t.cpu(),
    "double": lambda t, s: t * 2,
    "cumsum": lambda t, s: t.cumsum(0),
    "clone": lambda t, s: t.clone(),
    "flip": lambda t, s: t.flip(0),
    "sum": lambda t, s: t.sum() + s,
    "sort": lambda t, s: t.sort().values,
    "positive": lambda t, s: s[s > 1].sum() + t,
    "add_": lambda t, s: t.add_(s.max()),
    "zero_": lambda t, s: t.zero_(),
    "set": lambda t, s: t.__setitem__(0, s[-1]),
    "set_slice": lambda t, s: t.__setitem__(slice(1, None), 7),
    "numpy": lambda t, s: t.detach().numpy().__imul__(2),
    "full_like": lambda t, s: torch.full_like(t, s[0]),
    "as_tensor": lambda t, s: torch.as_tensor(t, device="cpu"),
}


def programs():
    step = st.tuples(
        st.sampled_from(sorted(STEPS)), st.integers(0, 99), st.integers(0, 99)
    )
    return st.lists(step, max_size=8)


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
            subtest(lambda t: t.__setitem__(0, 5), name="setitem"),
            subtest(lambda t: t.data.fill_(1), name="data"),
            subtest(lambda t: t.detach().add_(1), name="detach"),
            subtest(lambda t: nn.init.ones_(nn.Parameter(t)), name="parameter"),
            subtest(lambda t: t.resize_(1), name="resize"),
            subtest(lambda t: t.copy_(torch.full((2,), 3.0)), name="copy_of_real"),
            subtest(lambda t: torch.add(t, 1, out=t), name="out"),
            subtest(lambda t: torch.ops.aten.fill_(t, 1), name="aten"),
            subtest(lambda t: scripted_fill(t), name="scripted"),
        ],
    )
    def test_what_is_written_is_read(self, write):
        def read():
            constant = torch.zeros(2, device="cpu")
            with torch.device("cpu"):
                write(constant)
            return constant.tolist()

        self.check(read)

    @parametrize(
        "write",
        [
            subtest(lambda t: t.uniform_(), name="random"),
            subtest(lambda t: t.copy_(torch.rand(2)), name="unknown"),
        ],
    )
    def test_what_nobody_knows_is_not_told(self, write):
        state = torch.get_rng_state()
        with torch.device("meta"):
            constant = torch.zeros(2, device="cpu")
            write(constant)
            with self.assertRaisesRegex((RuntimeError, NotImplementedError), "meta"):
                constant[0].item()
        self.assertEqual(torch.get_rng_state(), state)

    def test_a_constant_takes_its_value_along(self):
        def read():
            one, two = torch.zeros(2, device="cpu"), torch.ones(2, device="cpu")
            torch.utils.swap_tensors(one, two)
            three = torch.full((2,), 3.0, device="cpu")
            alias, three.data = three.view(2), two
            return one.tolist(), three.tolist(), alias.tolist()

        self.check(read)

    def test_a_real_tensor_takes_constants(self):
        def read():
            with torch.device("cpu"):
                real, indexed, summed = torch.zeros(3), torch.zeros(3), torch.zeros(3)
            constant = torch.ones(3, device="cpu")
            real += constant
            indexed[torch.tensor([2], device="cpu")] = 5
            torch._foreach_add_([summed, constant], 1)
            self.assertIs(real.add_(constant), real)
            return [t.tolist() for t in (real, indexed, summed, constant)]

        self.check(read)

    def test_copies(self):
        def read():
            module = nn.BatchNorm1d(3, device="cpu")
            module.register_buffer("steps", torch.linspace(0, 1, 3, device="cpu"))
            clones = [copy.deepcopy(module) for _ in range(2)]
            clones[0].steps.add_(1)
            return [[t.tolist() for t in m.buffers()] for m in (module, *clones)]

        self.check(read)
        with torch.device("meta"):
            constant = torch.zeros(4, device="cpu")
            one, other = copy.deepcopy([constant, constant[:2]])
            one.fill_(5)
            self.assertEqual(other.tolist(), [5, 5])
            self.assertEqual(constant.tolist(), [0, 0, 0, 0])

    def test_errors_stay_errors(self):
        with torch.device("meta"):
            leaf = torch.ones(3, device="cpu", requires_grad=True)
            with self.assertRaisesRegex(RuntimeError, "leaf"):
                leaf.add_(1)
            with self.assertRaises((RuntimeError, TypeError)):
                leaf.numpy()
            self.assertEqual(leaf.tolist(), [1, 1, 1])

    def test_a_quantized_tensor_tells_the_truth_or_nothing(self):
        with torch.device("meta"):
            quantized = torch.quantize_per_tensor(
                torch.ones(3, device="cpu"), 0.1, 0, torch.qint8
            )
            try:
                told = quantized.dequantize().tolist()
            except (RuntimeError, NotImplementedError):
                told = [1.0, 1.0, 1.0]
        self.assertEqual(told, [1.0, 1.0, 1.0])

    def test_function_transforms(self):
        with torch.device("meta"):
            constant = torch.ones(3, device="cpu")
            self.assertTrue(torch.vmap(lambda x: x * 2)(torch.empty(3)).is_meta)
            self.assertTrue(
                torch.func.grad(lambda x: (x * x).sum())(torch.empty(3)).is_meta
            )
            self.assertEqual(constant.tolist(), [1, 1, 1])

    @parametrize(
        "compute",
        [
            subtest(lambda c: 2 * c, name="mul"),
            subtest(lambda c: c.cumsum(0), name="cumsum"),
            subtest(lambda c: torch.cat([c, c[1:]]), name="cat"),
            subtest(lambda c: torch.full_like(c, c[-1]), name="full_like"),
            subtest(lambda c: c.new_full((2,), 7), name="new_full"),
            subtest(lambda c: c.cpu(), name="cpu"),
            subtest(lambda c: c.to("cpu", torch.float64), name="to"),
            subtest(lambda c: c.nonzero(), name="nonzero"),
            subtest(lambda c: c[c > 1], name="mask"),
            subtest(lambda c: c * torch.arange(5.0).to(c.dtype), name="with_real"),
            subtest(lambda c: torch.tensor([c[1], c[2]], device="cpu"), name="tensor"),
            subtest(
                lambda c: torch.linspace(0, c[3], 3, device="cpu"), name="linspace"
            ),
            subtest(lambda c: c.sort(descending=True).values, name="sort"),
            subtest(lambda c: torch.unique(c, return_counts=True)[1], name="unique"),
        ],
    )
    def test_what_is_computed(self, compute):
        def read():
            constant = torch.arange(5, device="cpu")
            with torch.device("cpu"):  # so that its other factories make real tensors
                return compute(constant).tolist()

        self.check(read)

    def test_a_computed_tensor_is_on_meta_and_shares_memory_as_it_would(self):
        with torch.device("meta"):
            constant = torch.arange(5, device="cpu")
            made = [
                constant * 2,
                constant.cpu(),
                constant.nonzero(),
                constant[1:].cpu(),
            ]
            self.assertTrue(all(t.is_meta for t in made))
            made[1].add_(1)
            self.assertEqual(constant.tolist(), [1, 2, 3, 4, 5])
            self.assertEqual(made[3].tolist(), [2, 3, 4, 5])
            self.assertEqual(made[0].tolist(), [0, 2, 4, 6, 8])

    def test_a_constant_as_size_and_index(self):
        with torch.device("meta"):
            n = torch.tensor([2, 3], device="cpu")
            made = [torch.empty((4, n[1])), torch.ones(n[0], 1), nn.Linear(3, n[0] * 2)]
            unknown = torch.empty(6)
            view = unknown.view(n[0], -1)
        self.assertEqual([tuple(t.shape) for t in made[:2]], [(4, 3), (2, 1)])
        self.assertEqual(tuple(made[2].weight.shape), (4, 3))
        self.assertEqual(tuple(view.shape), (2, 3))

    def test_the_error_is_that_of_the_call(self):
        with torch.device("meta"):
            constant = torch.arange(3, device="cpu")
            with self.assertRaisesRegex(RuntimeError, "size of tensor a"):
                constant + torch.arange(4, device="cpu")

    @settings(max_examples=60, deadline=None)
    @given(programs())
    def test_law(self, program):
        def read():
            constants = [torch.arange(6.0, device="cpu"), torch.ones(6, device="cpu")]
            tensors = [*constants, torch.tensor([3.0, 1, 2, 0, 5, 4], device="cpu")]
            for step, target, source in program:
                made = STEPS[step](
                    tensors[target % len(tensors)], tensors[source % len(tensors)]
                )
                if isinstance(made, torch.Tensor):
                    tensors.append(made)
            return [t.tolist() for t in tensors]

        self.check(read)


instantiate_parametrized_tests(TestConstants)

if __name__ == "__main__":
    run_tests()
