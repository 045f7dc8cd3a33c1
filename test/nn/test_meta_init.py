# Owner(s): ["module: nn"]
"""Law: under ``meta_init`` nothing that a constructor makes is off meta, and what it can know it is told."""

import importlib.util
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    subtest,
    TestCase,
)


_spec = importlib.util.spec_from_file_location(
    "escapes", Path(__file__).with_name("escapes.py")
)
escapes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(escapes)
DRAWS, RAISES, STAYS = escapes.DRAWS, escapes.RAISES, escapes.STAYS
inputs, off_meta = escapes.inputs, escapes.off_meta


def by_name(cases):
    return [subtest(n, name=re.sub(r"\W+", "_", n)) for n in cases]


class TestEscapes(TestCase):
    def test_the_list_has_them_all(self):
        self.assertGreaterEqual(len(escapes.ESCAPES), 137)
        self.assertLessEqual({*STAYS, *RAISES}, set(escapes.ESCAPES))

    @parametrize("name", by_name(escapes.ESCAPES))
    def test_ends_on_meta(self, name):
        given = inputs()
        state = torch.get_rng_state()
        copies = [t.clone() for t in given]
        if name in RAISES:
            with (
                nn.utils.meta_init(),
                self.assertRaises((RuntimeError, AssertionError)),
            ):
                escapes.ESCAPES[name](*given)
            return
        with nn.utils.meta_init():
            made = escapes.ESCAPES[name](*given)
        self.assertEqual(bool(off_meta(made)), name in STAYS)
        self.assertTrue(all(not t.is_meta for t in given))
        if "init" not in name:
            self.assertEqual(copies, list(given))
        if not (name.startswith("real") and DRAWS.search(name)):
            self.assertEqual(torch.get_rng_state(), state)

    def test_is_not_vacuous(self):
        escaped = 0
        for case in escapes.ESCAPES.values():
            given = inputs()
            torch.set_default_device("meta")
            try:
                escaped += bool(off_meta(case(*given)))
            except Exception:
                escaped += 1
            finally:
                torch.set_default_device(None)
        self.assertGreater(escaped, 60)

    @parametrize("name", by_name(escapes.ESCAPES))
    def test_is_as_the_eager_one_but_for_the_device(self, name):
        try:
            expected = escapes.ESCAPES[name](*inputs())
        except Exception:
            return
        if name in RAISES or isinstance(expected, nn.Module) or expected.is_nested:
            return
        if type(expected) not in (torch.Tensor, nn.Parameter):
            return
        given = inputs()
        with nn.utils.meta_init():
            made = escapes.ESCAPES[name](*given)
        self.assertIs(type(made), type(expected))
        self.assertEqual(made.shape, expected.shape)
        self.assertEqual(made.dtype, expected.dtype)
        self.assertEqual(made.layout, expected.layout)
        if made.layout is torch.strided and not made.is_quantized:
            self.assertEqual(made.stride(), expected.stride())
        self.assertEqual(made.requires_grad, expected.requires_grad)


class TestConstants(TestCase):
    def check(self, read):
        expected = read()
        with nn.utils.meta_init():
            actual = read()
        self.assertEqual(actual, expected, rtol=0, atol=0, exact_dtype=True)

    def test_reads(self):
        self.check(lambda: [x.item() for x in torch.linspace(0, 0.1, 12)])
        self.check(lambda: (torch.arange(9.0).reshape(3, 3) @ torch.eye(3)).tolist())
        self.check(lambda: bool((torch.tensor([1, 2]) > 1).any()))
        self.check(lambda: np.asarray(torch.linspace(0, 1, 5) ** 2))
        self.check(lambda: torch.arange(6).reshape(2, 3).t()[1].numpy())
        self.check(lambda: torch.zeros(3).index_fill_(0, torch.tensor([1]), 2).tolist())
        self.check(lambda: torch.nonzero(torch.tensor([0, 1, 1])).tolist())
        self.check(lambda: torch.unique(torch.tensor([3, 1, 3])).tolist())
        self.check(lambda: f"{torch.tensor(1.5) * 2:.2f}")
        self.check(lambda: list(range(torch.tensor(3))))
        self.check(lambda: torch.Tensor([1, 2]).tolist())
        self.check(lambda: torch.from_numpy(np.arange(3)).cumsum(0).tolist())

    def test_what_is_written_is_read(self):
        def read():
            t = torch.empty(4)
            t.fill_(1)
            t[1:3] = torch.tensor([5.0, 6.0])
            t.view(2, 2)[1].mul_(2)
            t.data.add_(1)
            return t.tolist()

        self.check(read)

    def test_numpy_shares_memory(self):
        def read():
            t = torch.zeros(3)
            t.numpy()[1] = 7
            return (t + 1).tolist()

        self.check(read)

    def test_random_values_are_not_known(self):
        with nn.utils.meta_init():
            t = torch.zeros(2)
            t.uniform_()
            with self.assertRaisesRegex(
                RuntimeError,
                "result of uniform_.*asked for by item, called at .*test_meta_init.py",
            ):
                t[0].item()
            t.zero_()
            self.assertEqual(t.tolist(), [0, 0])

    def test_what_nothing_is_known_of_is_not_known(self):
        unknown = torch.empty(2, device="meta")
        with nn.utils.meta_init():
            t = torch.zeros(2)
            t.add_(unknown)
            with self.assertRaisesRegex(RuntimeError, "add_"):
                t.tolist()
            with self.assertRaises(RuntimeError):
                unknown.tolist()

    def test_afterwards_values_are_kept_and_not_read(self):
        with nn.utils.meta_init():
            t, random = torch.zeros(2), torch.rand(2)
        with self.assertRaises(RuntimeError):
            t[0].item()
        self.assertTrue(nn.utils.is_deferred(t))
        self.assertFalse(nn.utils.is_deferred(random))
        self.assertEqual(nn.utils.materialize_tensor(t).tolist(), [0, 0])


class TestScope(TestCase):
    def assertOutside(self):
        self.assertEqual(torch.empty(1).device.type, "cpu")
        self.assertEqual(torch.Tensor(1).device.type, "cpu")
        self.assertEqual(nn.Parameter(torch.ones(1)).device.type, "cpu")
        self.assertEqual(nn.Linear(1, 1).weight.device.type, "cpu")
        self.assertEqual(torch.empty(1).to("cpu").device.type, "cpu")
        self.assertEqual(torch._C._len_torch_dispatch_stack(), 0)
        self.assertEqual(torch._C._len_torch_function_stack(), 0)

    def test_an_error_leaves_nothing_behind(self):
        with self.assertRaisesRegex(ZeroDivisionError, "mine"), nn.utils.meta_init():
            nn.Linear(2, 2)
            raise ZeroDivisionError("mine")
        self.assertOutside()

    def test_an_error_of_an_op_is_its_own(self):
        def wrong():
            return torch.ones(2, 3) @ torch.ones(2, 3)

        with self.assertRaises(RuntimeError) as expected:
            wrong()
        with nn.utils.meta_init(), self.assertRaises(RuntimeError) as actual:
            wrong()
        self.assertEqual(str(actual.exception), str(expected.exception))

    def test_a_generator_that_is_suspended_inside(self):
        def suspended():
            with nn.utils.meta_init():
                yield torch.empty(1)

        generator = suspended()
        self.assertTrue(next(generator).is_meta)
        generator.close()
        self.assertOutside()

    def test_threads_that_are_started_inside_are_inside(self):
        made = []
        with nn.utils.meta_init():
            thread = threading.Thread(target=lambda: made.append(torch.Tensor(2)))
            thread.start()
            thread.join()
            with ThreadPoolExecutor(1) as pool:
                made.append(pool.submit(nn.Linear, 2, 2, device="cpu").result().weight)
        self.assertTrue(all(t.is_meta for t in made))
        self.assertOutside()

    def test_a_thread_that_outlives_the_context_is_outside(self):
        made, entered, left = [], threading.Event(), threading.Event()

        def work():
            made.append(torch.empty(1))
            entered.set()
            left.wait(60)
            made.append(torch.empty(1))
            made.append(torch.Tensor(1))

        with nn.utils.meta_init():
            thread = threading.Thread(target=work)
            thread.start()
            entered.wait(60)
        left.set()
        thread.join()
        self.assertEqual([t.device.type for t in made], ["meta", "cpu", "cpu"])

    def test_threads_that_were_started_outside_are_outside(self):
        made, go = [], threading.Event()

        def work():
            go.wait(60)
            made.append(torch.Tensor(1))

        start = threading.Thread.start
        thread = threading.Thread(target=work)
        thread.start()
        with nn.utils.meta_init():
            go.set()
            thread.join()
        self.assertFalse(made[0].is_meta)
        self.assertIs(threading.Thread.start, start)

    def test_who_replaces_the_start_of_threads_keeps_it(self):
        """Before a context, or inside of one; each is called once a thread, whatever contexts follow."""
        stock, calls, made = threading.Thread.start, [], []
        self.addCleanup(setattr, threading.Thread, "start", stock)

        def replace(name):
            start = threading.Thread.start

            def replaced(thread):
                calls.append(name)
                start(thread)

            threading.Thread.start = replaced
            return replaced

        def run():
            made.clear()
            calls.clear()
            thread = threading.Thread(target=lambda: made.append(torch.Tensor(2)))
            thread.start()
            thread.join()
            return made[0].device.type, calls

        outer = replace("outer")
        with nn.utils.meta_init():
            self.assertEqual(run(), ("meta", ["outer"]))
        self.assertIs(threading.Thread.start, outer)
        with nn.utils.meta_init():
            inner = replace("inner")
            self.assertEqual(run(), ("meta", ["inner", "outer"]))
        self.assertIs(threading.Thread.start, inner)
        self.assertEqual(run(), ("cpu", ["inner", "outer"]))
        with nn.utils.meta_init():
            self.assertEqual(run(), ("meta", ["inner", "outer"]))
        self.assertIs(threading.Thread.start, inner)

    def test_a_thread_keeps_a_run_of_its_own(self):
        made = []
        with nn.utils.meta_init():
            thread = threading.Thread()
            own = thread.run = lambda: made.append(torch.Tensor(2))
            thread.start()
            thread.join()
        self.assertTrue(made[0].is_meta)
        self.assertIs(thread.run, own)

    def test_it_looks_like_meta(self):
        with nn.utils.meta_init():
            self.assertEqual(torch.get_default_device().type, "meta")
            self.assertTrue(torch.ones(1, device="cpu").is_meta)

    def test_inside_and_outside_of_device_contexts(self):
        with torch.device("cpu"), nn.utils.meta_init():
            self.assertTrue(torch.empty(1).is_meta)
        with torch.device("meta"), nn.utils.meta_init():
            self.assertEqual(torch.arange(3).tolist(), [0, 1, 2])
        self.assertOutside()


class TestReport(TestCase):
    def test_tells_what_was_overridden_and_where(self):
        with nn.utils.meta_init(report=True) as report:
            line = sys._getframe().f_lineno + 1
            torch.zeros(2, device="cpu")
            torch.zeros(2)
            nn.Linear(2, 2, device="cuda:1")
        here = f"{__file__}:{line}"
        self.assertEqual(report[0], f"{here}: zeros, device='cpu'")
        self.assertEqual(len(report), 3)
        self.assertTrue(all(__file__ in entry for entry in report))

    def test_tells_what_was_registered(self):
        buffer = torch.frombuffer(bytearray(8), dtype=torch.float32)
        with nn.utils.meta_init(report=True) as report:
            module = nn.Module()
            module.register_buffer("mask", buffer)
            module.register_buffer("tied", buffer)
        self.assertRegex(
            report[0], r"test_meta_init.py:\d+: Module.mask, a real tensor"
        )
        self.assertTrue(module.mask.is_meta and not buffer.is_meta)
        self.assertIs(module.tied, module.mask)

    def test_is_empty_unless_asked_for(self):
        with nn.utils.meta_init() as report:
            torch.zeros(2, device="cpu")
        self.assertEqual(report, [])


instantiate_parametrized_tests(TestEscapes)

if __name__ == "__main__":
    run_tests()
