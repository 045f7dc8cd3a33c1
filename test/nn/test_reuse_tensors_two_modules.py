# Owner(s): ["module: nn"]
"""``load_state_dict(reuse_tensors=True)`` of several modules from one state dict or file."""

import copy
import inspect
import tempfile
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


instantiate_parametrized_tests(TestTwoModulesOfOneFile)


if __name__ == "__main__":
    run_tests()
