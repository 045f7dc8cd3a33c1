# Owner(s): ["module: nn"]
"""What is done with a deferred module: materialize it, load, copy, pickle it; and who is in the context."""

import copy
import gc
import io
import pickle
import re
import weakref

import torch
from deferred_init_case import DeferredTestCase
from torch import nn
from torch.ao.quantization.fake_quantize import FusedMovingAvgObsFakeQuantize
from torch.testing._internal.common_utils import run_tests


class TestMaterialize(DeferredTestCase):
    def test_device_dtype_and_ties(self):
        def f():
            m = nn.Module()
            flat = torch.rand(8)
            m.a, m.b = nn.Parameter(flat[:4]), nn.Parameter(flat[4:])
            m.register_buffer("n", torch.arange(3))
            return m

        expected, _ = self.eager(f)
        module = self.deferred(f)
        nn.utils.materialize_module(module, device="cpu", dtype=torch.float64)
        self.assertEqual(module.a.dtype, torch.float64)
        self.assertEqual(module.n.dtype, torch.int64)
        self.assertEqual(module.b, expected.b.double(), rtol=0, atol=0)
        self.assertEqual(
            module.a.untyped_storage().data_ptr(), module.b.untyped_storage().data_ptr()
        )

    def test_objects_stay(self):
        module = self.deferred(lambda: nn.Linear(3, 3))
        weight = module.weight
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        ref, fired = weakref.ref(weight), []
        weight.register_hook(lambda g: fired.append(g))
        nn.utils.materialize_module(module)
        self.assertIs(module.weight, weight)
        self.assertIs(ref(), weight)
        module(torch.ones(1, 3)).sum().backward()
        before = weight.detach().clone()
        optimizer.step()
        self.assertEqual(len(fired), 1)
        self.assertEqual(weight, before - 0.1 * weight.grad)

    def test_buffers_only_and_check_fn(self):
        f = lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
        module = self.deferred(f)
        nn.utils.materialize_module(module, buffers_only=True)
        self.assertFalse(module[0].running_var.is_meta)
        self.assertTrue(module[0].weight.is_meta)
        nn.utils.materialize_module(module, check_fn=lambda m: isinstance(m, nn.Linear))
        self.assertFalse(module[1].weight.is_meta)
        self.assertTrue(module[0].weight.is_meta)
        nn.utils.materialize_module(module)
        self.assertSame(self.eager(f)[0], module)

    def test_not_skip_materialized(self):
        module = self.deferred(lambda: nn.Linear(3, 3))
        nn.utils.materialize_tensor(module.weight)
        with self.assertRaisesRegex(ValueError, "deferred, got weight on cpu"):
            nn.utils.materialize_module(module, skip_materialized=False)
        self.assertTrue(module.bias.is_meta)

    def test_a_shard_alone(self):
        def f():
            m = nn.Linear(64, 48)
            with torch.no_grad():
                m.weight.mul_(2)
            m.u = nn.Parameter(torch.rand(100))
            return m

        expected, _ = self.eager(f)
        module = self.deferred(f)
        weight = nn.utils.materialize_tensor(module.weight, index=slice(12, 24))
        self.assertEqual(weight, expected.weight[12:24], rtol=0, atol=0)
        self.assertEqual(weight.untyped_storage().nbytes(), weight.nbytes)
        part = nn.utils.materialize_tensor(
            module.u, index=(slice(50, 60),), dtype=torch.float64
        )
        self.assertEqual(part, expected.u[50:60].double(), rtol=0, atol=0)
        self.assertTrue(nn.utils.is_deferred(module.weight))
        nn.utils.materialize_module(module)
        self.assertSame(expected, module)

    def test_after_loading_it_fills_what_is_left(self):
        class Rotary(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, 4)
                inv = 1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8)
                self.register_buffer("inv_freq", inv, persistent=False)

        expected, _ = self.eager(Rotary)
        checkpoint = {k: v + 1 for k, v in expected.state_dict().items()}
        module = self.deferred(Rotary)
        state = torch.get_rng_state()
        module.load_state_dict(checkpoint, assign=True)
        nn.utils.materialize_module(module)
        self.assertEqual(module.inv_freq, expected.inv_freq, rtol=0, atol=0)
        self.assertEqual(module.linear.weight, checkpoint["linear.weight"])
        self.assertEqual(torch.get_rng_state(), state)

    def test_a_failing_call_changes_nothing(self):
        large = torch.rand(1 << 19)
        module = self.deferred(lambda: nn.Linear(3, 3))
        with nn.utils.deferred_init():
            module.extra = nn.Parameter(large + 1)
        large.zero_()
        with self.assertRaises(RuntimeError):
            nn.utils.materialize_module(module)
        self.assertTrue(all(p.is_meta for p in module.parameters()))
        del module.extra
        nn.utils.materialize_module(module)
        self.assertEqual(module.weight, self.eager(lambda: nn.Linear(3, 3))[0].weight)

    def test_to_move_it_names_the_remedy(self):
        moves = (lambda m: m.to("cpu"), lambda m: m.cpu(), lambda m: m.to("cpu").half())

        def f():
            return nn.Sequential(nn.LSTM(2, 3), nn.Linear(3, 2))

        expected, _ = self.eager(f)
        module = self.deferred(f)
        with nn.utils.meta_init():
            in_block = nn.Linear(2, 3)
        for move in moves:
            for m in (module, in_block):
                with self.assertRaisesRegex(
                    NotImplementedError,
                    "^Cannot copy out of meta tensor; no data! Use torch.nn.utils.materialize_module",
                ):
                    move(m)
        self.assertIs(module.to("meta"), module)
        self.assertIs(module.apply(lambda m: None), module)
        self.assertSame(expected, nn.utils.materialize_module(module))
        self.assertIs(module.to("cpu"), module)

    def test_to_move_what_is_on_meta_otherwise_raises_as_in_stock(self):
        module = nn.Linear(2, 3, device="meta")
        with self.assertRaisesRegex(
            NotImplementedError, "no data! Please use torch.nn.Module.to_empty"
        ):
            module.to("cpu")
        with self.assertRaisesRegex(NotImplementedError, "no data!$"):
            module.cpu()

    def test_a_large_real_tensor_that_changes_is_an_error(self):
        large, small = torch.ones(1 << 19), torch.ones(4)

        def f():
            m = nn.Module()
            m.one = nn.Parameter(torch.zeros(1 << 19) + large)
            m.two = nn.Parameter(torch.zeros(4) + small)
            return m

        module = self.deferred(f)
        large.add_(1)
        small.add_(1)
        line = f"{__file__}:{f.__code__.co_firstlineno + 2}"
        with self.assertRaisesRegex(
            RuntimeError,
            rf"real tensor of shape \[524288\] that add\S* \({re.escape(line)}\) reads",
        ):
            nn.utils.materialize_module(module)
        self.assertTrue(nn.utils.is_deferred(module.one))
        nn.utils.materialize_tensor(module.two)
        self.assertEqual(module.two, torch.ones(4))  # as it was

    def test_the_tape_is_released(self):
        module = self.deferred(
            lambda: nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 3))
        )
        from torch.nn.utils._deferred_init._slot import Slot
        from torch.nn.utils._deferred_init._tape import Node

        def alive():
            gc.collect()
            return sum(isinstance(o, (Slot, Node)) for o in gc.get_objects())

        self.assertGreater(alive(), 0)
        nn.utils.materialize_module(module)
        self.assertEqual(alive(), 0)
        module = self.deferred(lambda: nn.Linear(3, 3))
        del module
        self.assertEqual(alive(), 0)

    def test_no_memory_while_recording(self):
        module = nn.utils.deferred_init(nn.Linear, 1 << 20, 1 << 20)  # 4 TiB
        self.assertEqual(module.weight.shape, (1 << 20, 1 << 20))


class TestCopyAndPickle(DeferredTestCase):
    def test_deepcopy_is_deferred(self):
        def f():
            m = nn.Linear(3, 3)
            m.register_buffer("x", torch.rand(4))
            m.register_buffer("y", m.x[1:])
            return m

        expected, _ = self.eager(f)
        module = self.deferred(f)
        copied = copy.deepcopy(module)
        nn.utils.materialize_module(module)
        with torch.no_grad():
            module.weight.zero_()
        nn.utils.materialize_module(copied)
        self.assertSame(copy.deepcopy(expected), copied)

    def test_pickling_is_refused(self):
        module = self.deferred(lambda: nn.Linear(3, 3))
        for save in (pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
            with self.assertRaisesRegex(RuntimeError, "materialize_module first"):
                save(module)
        meta = nn.Linear(3, 3, device="meta")
        self.assertTrue(pickle.loads(pickle.dumps(meta)).weight.is_meta)


class TestScope(DeferredTestCase):
    def test_an_error_leaves_nothing_behind(self):
        torch.manual_seed(3)
        state = torch.get_rng_state()

        def f():
            nn.Linear(3, 3)
            raise ZeroDivisionError("mine")

        with self.assertRaisesRegex(ZeroDivisionError, "mine"):
            nn.utils.deferred_init(f)
        self.assertEqual(torch.get_rng_state(), state)
        self.assertEqual(torch.empty(1).device.type, "cpu")
        self.assertEqual(torch._C._len_torch_dispatch_stack(), 0)
        self.assertEqual(torch._C._len_torch_function_stack(), 0)

    def test_nested(self):
        f = lambda: nn.Sequential(
            nn.Linear(2, 2), nn.utils.deferred_init(nn.Linear, 2, 2)
        )
        expected, state = self.eager(
            lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        )
        module = self.deferred(f)
        nn.utils.materialize_module(module)
        self.assertSame(expected, module)
        self.assertEqual(torch.get_rng_state(), state)

    def test_in_and_around_meta_contexts(self):
        torch.set_default_device("meta")
        try:
            module = nn.utils.deferred_init(nn.Linear, 2, 2)
        finally:
            torch.set_default_device(None)
        self.assertFalse(nn.utils.is_deferred(module))
        with nn.utils.meta_init():
            module = self.deferred(lambda: nn.Linear(2, 2))
        self.assertTrue(nn.utils.is_deferred(module))
        nn.utils.materialize_module(module)
        self.assertSame(self.eager(lambda: nn.Linear(2, 2))[0], module)
        with nn.utils.deferred_init(), nn.utils.meta_init():
            module = nn.Linear(2, 2)
        self.assertFalse(nn.utils.is_deferred(module))

    def test_fake_tensor_mode(self):
        from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

        def f():
            with FakeTensorMode():
                return nn.Linear(2, 2)

        self.assertIsInstance(nn.utils.deferred_init(f).weight.data, FakeTensor)
        with FakeTensorMode():
            module = nn.utils.deferred_init(nn.Linear, 2, 2)
        nn.utils.materialize_module(module)
        self.assertEqual(module.weight.shape, (2, 2))

    def test_compiled_afterwards(self):
        module = self.check(lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
        x = torch.rand(2, 3)
        self.assertEqual(torch.compile(module, backend="eager")(x), module(x))

    def test_what_reads_memory_below_the_dispatcher(self):
        def make():
            fake = FusedMovingAvgObsFakeQuantize()
            module = nn.ModuleList([fake, nn.Linear(4, 4)])
            module[1].weight = nn.Parameter(fake(module[1].weight).detach())
            return module

        self.check(make)

    def test_threads(self):
        import threading

        def f():
            m = nn.Module()

            def work():
                m.layer = nn.Linear(5, 5)

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            return m

        self.check(f)


if __name__ == "__main__":
    run_tests()
