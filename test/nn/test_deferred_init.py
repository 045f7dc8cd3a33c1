# Owner(s): ["module: nn"]
"""``materialize_module(deferred_init(f))`` is ``f()``, bit for bit; ``test_deferred_init_law.py`` has any program."""

import copy
import io
import random

import numpy as np
import torch
from deferred_init_case import DeferredTestCase
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import run_tests


class TestDeferredInit(DeferredTestCase):
    def test_every_module_of_torch_nn(self):
        built = 0
        for info in module_db:
            for inputs in info.module_inputs_func(
                info,
                device="cpu",
                dtype=torch.float32,
                requires_grad=False,
                training=True,
            ):
                args = inputs.constructor_input
                self.check(lambda: info.module_cls(*args.args, **args.kwargs))  # noqa: B023
                built += 1
        self.assertGreater(built, 200)

    def test_every_initialization(self):
        def f():
            m = nn.Module()
            w = lambda *size: nn.Parameter(torch.empty(*size or (5, 7)))
            m.a, m.b, m.c, m.d, m.e = (w() for _ in range(5))
            nn.init.xavier_uniform_(m.a)
            nn.init.xavier_normal_(m.b)
            nn.init.kaiming_normal_(m.c)
            nn.init.trunc_normal_(m.d, std=2.0)
            nn.init.trunc_normal_(m.e, mean=4.0, a=5.0, b=6.0)
            m.f, m.g, m.h = w(), w(), w(3, 3, 3)
            nn.init.orthogonal_(m.f)
            nn.init.sparse_(m.g, 0.4)
            nn.init.dirac_(m.h)
            m.i, m.j, m.k = w(40), w(17), w(5)
            nn.init.normal_(m.i, 1.0, 2.0)
            nn.init.uniform_(m.j, -1, 1)
            nn.init.constant_(m.k, 3)
            with torch.no_grad():
                m.l = w().bernoulli_(0.3)
                m.m = nn.Parameter(torch.empty(9).exponential_())
                m.n = nn.Parameter(torch.randint(9, (6,)).float())
                m.o = nn.Parameter(torch.randperm(9).float())
                m.p = nn.Parameter(torch.rand(3, 3, dtype=torch.float64))
                m.q = nn.Parameter(torch.randn(33, dtype=torch.bfloat16))
                m.r = nn.Parameter(torch.normal(0.0, 1.0, (3,)))
                m.s = nn.Parameter(torch.multinomial(torch.rand(9), 4).float())
                m.t = nn.Parameter(torch.nn.functional.dropout(torch.rand(20), 0.5))
                m.u = nn.Parameter(torch.empty(6, 4).t().normal_())
            return m

        self.check(f)

    def test_views_ties_and_attributes(self):
        def f():
            m = nn.Module()
            m.flat = torch.randn(24)
            m.a = nn.Parameter(m.flat[:12].view(3, 4))
            m.b = nn.Parameter(m.flat[12:].view(4, 3).t())
            m.tied = m.a
            m.alias = nn.Parameter(m.a.data)
            m.register_buffer("expanded", torch.arange(3.0).expand(4, 3))
            m.register_buffer("part", m.flat[2:9:2])
            m.a.data.mul_(2)
            m.part.add_(1)
            m.held = [m.a, {"x": (m.b, torch.rand(2))}]
            m.b.note = "kept"
            m.c = torch.randn(3, dtype=torch.cfloat).conj()
            return m

        module = self.check(f)
        self.assertEqual(module.b.note, "kept")
        self.assertIs(module.held[0], module.a)
        self.assertIs(module.held[1]["x"][0], module.b)
        self.assertFalse(module.held[1]["x"][1].is_meta)
        with torch.no_grad():
            module.a[0, 0] = 77
        self.assertEqual(module.flat[0].item(), 77)

    def test_what_python_reads_is_true(self):
        def f():
            m = nn.Module()
            w = torch.randn(6)
            m.numbers = w.tolist()
            m.large = bool((w > 0.5).any())
            m.array = w.numpy() * 2
            m.w = nn.Parameter(w + np.random.rand() + random.random())
            m.i = torch.nonzero(w > 0).flatten()
            m.kind = (w.device.type, w.is_cpu, w.is_meta, w.type())
            m.unique = (m.w.data_ptr() == w.data_ptr(), w[1:].data_ptr() - w.data_ptr())
            return m

        expected, _ = self.eager(f)
        module = self.check(f)
        for name in ("numbers", "large", "array", "kind", "unique"):
            self.assertEqual(getattr(module, name), getattr(expected, name))

    def test_factories_that_take_tensors(self):
        def f():
            m = nn.Module()
            ends = torch.log(torch.tensor([1.0, 8.0]))
            m.a = torch.linspace(ends[0], ends[1], 6) - torch.ones(6)
            m.b = torch.logspace(ends[0], 2, 4) * torch.arange(4, device="cpu")
            m.c = torch.linspace(0, ends[1], 3, device="meta")
            m.d = torch.full((2,), ends[1]) + torch.arange(ends[0], 2)
            return m

        self.check(f)

    def test_a_constructor_that_runs_what_it_builds(self):
        def f():
            m = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
            with torch.no_grad():
                width = m(torch.zeros(1, 3, 2, 2)).shape[1]
            m.append(nn.Linear(width, 2))
            return m.train()

        self.check(f)

    def test_seeds_and_generators_in_the_constructor(self):
        def f():
            m = nn.Module()
            m.a = torch.rand(5)
            m.seed = torch.initial_seed()
            with torch.random.fork_rng():
                torch.manual_seed(99)
                m.b = torch.rand(5)
            m.c = torch.rand(5)
            state = torch.get_rng_state()
            m.d = torch.rand(5)
            torch.set_rng_state(state)
            m.e = torch.rand(5)
            g = torch.Generator().manual_seed(5)
            m.f = torch.randn(20, generator=g)
            m.g = torch.empty(3).uniform_(generator=g)
            m.drawn = g.get_state()
            m.h = torch.rand(3)
            return m

        expected, _ = self.eager(f)
        module = self.check(f)
        self.assertEqual(module.drawn, expected.drawn)
        self.assertEqual(module.seed, expected.seed)
        self.assertEqual(module.d, module.e)

    def test_what_is_overwritten_is_drawn_for_nobody(self):
        def f():
            m = nn.Linear(30, 40)
            nn.init.normal_(m.weight)
            nn.init.zeros_(m.bias)
            return m

        self.check(f)

    def test_a_generator_that_was_moved_since_is_left_alone(self):
        module = self.deferred(lambda: nn.Linear(3, 3))
        torch.manual_seed(5)
        state = torch.get_rng_state()
        nn.utils.materialize_module(module)
        self.assertEqual(torch.get_rng_state(), state)
        self.assertSame(self.eager(lambda: nn.Linear(3, 3))[0], module)

    def test_copies_in_the_constructor(self):
        def f():
            layer = nn.TransformerEncoderLayer(8, 2, 16)
            m = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            m.register_buffer("x", torch.rand(4))
            m.y = copy.deepcopy(m.x)
            m.z = copy.copy(m.x)
            base = torch.rand(6)
            m.p, m.q = copy.deepcopy((base[:3], base[3:]))
            m.half = m.x.to(torch.float16)
            m.same = m.x.to("cpu")
            return m

        self.check(f)

    def test_real_tensors(self):
        outer = torch.rand(4)

        def f():
            m = nn.Module()
            m.a = nn.Parameter(outer)
            m.b = outer * 2
            m.register_buffer("c", outer)
            m.register_buffer("d", torch.from_numpy(np.arange(3.0)))
            m.e = torch.tensor([[1, 2], [3, 4]])
            file = io.BytesIO()
            torch.save({"x": torch.ones(3), "y": torch.zeros(2)}, file)
            file.seek(0)
            m.f = nn.Parameter(torch.load(file)["x"])
            return m

        module = self.check(f)
        self.assertIs(module.c, outer)
        self.assertEqual(module.a.data_ptr(), outer.data_ptr())

    def test_memory_that_an_array_shares(self):
        def f():
            m = nn.Module()
            a = torch.zeros(3)
            seen = a.numpy()
            a.add_(1)
            seen[0] = 9
            data = np.zeros(3)
            torch.as_tensor(data).fill_(3)
            torch.from_numpy(data)[1] = 7
            m.register_buffer("a", a)
            m.read = [seen.tolist(), data.tolist()]
            return m

        self.check(f)
        self.assertEqual(self.deferred(f).read, f().read)

    def test_ops_on_lists(self):
        def f():
            m = nn.Module()
            m.register_buffer("a", torch.ones(3))
            m.register_buffer("b", torch.zeros(2))
            torch._foreach_add_([m.a, m.b], 2)
            torch._foreach_mul_([m.a, m.b], [2.0, 3.0])
            return m

        self.check(f)

    def test_a_real_tensor_that_is_written_to_later(self):
        large = torch.rand(1 << 19)
        module = nn.Module()
        with nn.utils.deferred_init():
            module.a = nn.Parameter(large * 2)
        large.zero_()
        with self.assertRaisesRegex(
            RuntimeError,
            r"real tensor of shape \[524288\] that mul.* reads to be as it was",
        ):
            nn.utils.materialize_module(module)
        self.assertTrue(module.a.is_meta)

    def test_parametrizations(self):
        def f():
            m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 3))
            parametrizations.weight_norm(m[0])
            parametrizations.spectral_norm(m[1])
            parametrizations.orthogonal(m[2])
            return m

        module = self.check(f)
        module(torch.rand(2, 4)).sum().backward()

    def test_lazy_modules(self):
        module = self.check(lambda: nn.Sequential(nn.LazyLinear(3), nn.ReLU()))
        self.assertEqual(module(torch.rand(2, 5)).shape, (2, 3))

    def test_the_models_own_meta_tensors(self):
        def f():
            m = nn.Linear(2, 2)
            m.register_buffer("meta", torch.empty(3, device="meta"))
            m.register_buffer("also", torch.zeros_like(m.meta))
            with torch.device("meta"):
                m.inner = nn.Linear(2, 2)
            m.after = nn.Parameter(torch.rand(2))
            return m

        module = self.check(f)
        self.assertTrue(module.meta.is_meta and module.also.is_meta)
        self.assertTrue(module.inner.weight.is_meta)

    def test_sparse_and_quantized(self):
        def f():
            m = nn.Module()
            m.register_buffer("i", torch.eye(3).to_sparse())
            m.linear = torch.ao.nn.quantized.Linear(2, 3)
            return m

        module = nn.utils.materialize_module(nn.utils.deferred_init(f))
        self.assertEqual(module.i.to_dense(), torch.eye(3))
        self.assertEqual(module.linear.weight().shape, (3, 2))


if __name__ == "__main__":
    run_tests()
