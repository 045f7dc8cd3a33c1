# Owner(s): ["module: nn"]
"""``load_state_dict(reuse_tensors=True)`` of several modules from one state dict or file."""

import contextlib
import copy
import inspect
import sys
import tempfile
import threading
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


WAYS_TO_OPEN = {"read": {}, "mmap": {"mmap": True}}
if "lazy" in inspect.signature(torch.load).parameters:
    WAYS_TO_OPEN["lazy"] = {"lazy": True}


class TestTwoModulesOfOneFile(TestCase):
    """Note [Memory is handed over once] in torch/nn/modules/_reuse_tensors/_memory.py"""

    @parametrize(
        "kwargs", [subtest(how, name=name) for name, how in WAYS_TO_OPEN.items()]
    )
    def test_do_not_see_each_others_writes(self, kwargs):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.pt"
            torch.save(nn.Linear(3, 2).state_dict(), path)
            in_file = path.read_bytes()
            state_dict = torch.load(path, **kwargs)
            saved = copy.deepcopy(state_dict)
            with torch.device("meta"):
                trained, untouched = nn.Linear(3, 2), nn.Linear(3, 2)
            first = trained.load_state_dict(state_dict, reuse_tensors=True)
            second = untouched.load_state_dict(state_dict, reuse_tensors=True)
            self.assertEqual((first.reused, first.converted), (("weight", "bias"), ()))
            self.assertEqual(
                (second.reused, second.converted), ((), ("weight", "bias"))
            )
            optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
            trained(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            self.assertEqual(trained.weight, saved["weight"] - 1)
            self.assertEqual(untouched.state_dict(), saved)
            self.assertEqual(path.read_bytes(), in_file)
            # The memory is the state dict's, for better or worse.
            self.assertEqual(state_dict["weight"], saved["weight"] - 1)

    def test_the_second_one_reuses_it_once_the_first_is_gone(self):
        state_dict = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
        for _ in range(3):
            module = nn.Linear(3, 2)
            result = module.load_state_dict(state_dict, reuse_tensors=True)
            self.assertEqual(result.reused, ("weight", "bias"))
            del module

    def test_parts_of_one_storage_go_to_several(self):
        whole = torch.arange(6.0)
        parts = {i: {"weight": whole[2 * i :][:2].view(1, 2)} for i in range(3)}
        modules = [nn.Linear(2, 1, bias=False) for _ in range(3)]
        for i, module in enumerate(modules):
            result = module.load_state_dict(parts[i], reuse_tensors=True)
            self.assertEqual(result.reused, ("weight",))
        late = nn.Linear(2, 2, bias=False)
        overlapping = {"weight": whole[1:5].view(2, 2)}
        result = late.load_state_dict(overlapping, reuse_tensors=True)
        self.assertEqual(result.converted, ("weight",))

    def test_a_reload_is_not_a_second_module(self):
        state_dict, module = {"weight": torch.ones(2, 3)}, nn.Linear(3, 2, bias=False)
        for _ in range(2):
            result = module.load_state_dict(state_dict, reuse_tensors=True)
            self.assertEqual(result.reused, ("weight",))
        self.assertEqual(module.weight.data_ptr(), state_dict["weight"].data_ptr())

    def test_a_load_that_failed_took_nothing(self):
        state_dict = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
        module = nn.Linear(3, 2, bias=False)
        with self.assertRaisesRegex(RuntimeError, "Unexpected key"):
            module.load_state_dict(state_dict, reuse_tensors=True)
        held = [t[:1] for t in state_dict.values()]
        result = nn.Linear(3, 2).load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual(result.reused, ("weight", "bias"))
        del held


@contextlib.contextmanager
def switching_often():
    """Let threads take turns after every few instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def in_threads(functions):
    """Call them at the same time; return their results."""
    results = [None] * len(functions)
    start = threading.Barrier(len(functions))

    def run(i):
        start.wait()
        results[i] = functions[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class Override(nn.Linear):
    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)


def tied_by_memory():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
    module[1].weight = nn.Parameter(module[0].weight.data)
    return module


BUILDS = {
    "plain": lambda: nn.Sequential(*(nn.Linear(3, 2) for _ in range(100))),
    "overrides": lambda: nn.Sequential(nn.Linear(3, 2), Override(3, 2)),
    "tied": tied_by_memory,
}


class TestSeveralThreads(TestCase):
    def assert_none_share(self, modules, state_dict, saved):
        for key, value in state_dict.items():
            tensors = [module.get_parameter(key) for module in modules]
            self.assertEqual(tensors, [saved[key]] * len(tensors))
            takers = [t.data_ptr() == value.data_ptr() for t in tensors]
            self.assertLessEqual(sum(takers), 1, key)

    @parametrize("build", [subtest(f, name=name) for name, f in BUILDS.items()])
    @parametrize("device", ["cpu", "meta"])
    def test_no_two_take_the_same_memory(self, build, device):
        with switching_often():
            for _ in range(15):
                state_dict = build().state_dict()
                saved = copy.deepcopy(state_dict)
                modules = [build().to(device) for _ in range(4)]
                in_threads(
                    [
                        lambda m=m, s=state_dict: m.load_state_dict(
                            s, reuse_tensors=True
                        )
                        for m in modules
                    ]
                )
                self.assert_none_share(modules, state_dict, saved)

    def test_each_takes_its_part_of_one_storage(self):
        """What another thread takes elsewhere in a file's memory is no reason to copy."""
        with switching_often():
            for _ in range(15):
                whole = torch.arange(48.0)
                parts = [{"weight": whole[6 * i :][:6].view(2, 3)} for i in range(8)]
                modules = [nn.Linear(3, 2, bias=False) for _ in parts]
                results = in_threads(
                    [
                        lambda m=m, p=p: m.load_state_dict(p, reuse_tensors=True)
                        for m, p in zip(modules, parts, strict=True)
                    ]
                )
                self.assertEqual([r.reused for r in results], [("weight",)] * 8)

    @parametrize("in_thread", [False, True])
    @parametrize("hook", ["pre", "post"])
    def test_a_hook_may_wait_for_another_load(self, in_thread, hook):
        build = BUILDS["plain"]
        state_dict = build().state_dict()
        saved = copy.deepcopy(state_dict)
        outer, inner = build(), build()

        def load_inner(*args):
            load = lambda: inner.load_state_dict(state_dict, reuse_tensors=True)
            in_threads([load]) if in_thread else load()

        if hook == "pre":
            outer[5].register_load_state_dict_pre_hook(load_inner)
        else:
            outer[5].register_load_state_dict_post_hook(load_inner)
        outer.load_state_dict(state_dict, reuse_tensors=True)
        self.assert_none_share([outer, inner], state_dict, saved)

    def test_a_load_that_failed_claims_nothing(self):
        """Not even while its error is looked at."""
        state_dict = nn.Linear(3, 2).state_dict()
        module = nn.Linear(3, 2)
        hook = module.register_load_state_dict_post_hook(lambda *_: 1 / 0)
        try:
            module.load_state_dict(state_dict, reuse_tensors=True)
        except ZeroDivisionError:
            hook.remove()
            results = in_threads(
                [
                    lambda: nn.Linear(3, 2).load_state_dict(
                        state_dict, reuse_tensors=True
                    )
                ]
            )
            self.assertEqual(results[0].reused, ("weight", "bias"))
        else:
            self.fail("Expected an error from the hook, got none.")


instantiate_parametrized_tests(TestTwoModulesOfOneFile)
instantiate_parametrized_tests(TestSeveralThreads)


if __name__ == "__main__":
    run_tests()
