# Owner(s): ["module: nn"]
import weakref

import torch
from torch import nn
from torch.testing._internal.common_utils import run_tests, TestCase


def meta(make):
    with torch.device("meta"):
        return make()


def places(module):
    state = [*module.parameters(), *module.buffers()]
    return [(id(t), t.data_ptr(), t._version) for t in state]


class TestToEmptySkipMaterialized(TestCase):
    def test_what_has_memory_is_left_alone(self):
        module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LSTM(2, 2))
        before = places(module)
        self.assertIs(module.to_empty(device="cpu", skip_materialized=True), module)
        self.assertEqual(places(module), before)
        module.to_empty(device="cpu")
        self.assertNotEqual(places(module), before)

    def test_nested_wrappers_initialize_once(self):
        module = meta(
            lambda: nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
        )
        inner = module[1]
        for child in (inner, module):  # bottom-up
            new = [
                m
                for m in child.modules()
                if any(p.is_meta for p in m._parameters.values())
            ]
            child.to_empty(device="cpu", skip_materialized=True)
            for m in new:
                nn.init.constant_(m.weight, len(new))
        self.assertEqual(inner[0].weight, torch.ones(2, 2))
        self.assertEqual(module[0].weight, torch.ones(2, 2))

    def test_parameters_stay_the_same_objects(self):
        module = meta(lambda: nn.Linear(2, 2))
        weight, calls = module.weight, []
        weight.mark = "mine"
        weight.register_hook(lambda grad: calls.append("hook"))
        weight.requires_grad_(True)
        module.bias.requires_grad_(False)
        ref = weakref.ref(weight)
        optimizer = torch.optim.SGD([weight], lr=1.0)
        module.to_empty(device="cpu", skip_materialized=True)
        self.assertIs(module.weight, weight)
        self.assertIs(ref(), weight)
        self.assertEqual((weight.mark, weight.device.type), ("mine", "cpu"))
        self.assertFalse(module.bias.requires_grad)
        for p in module.parameters():
            nn.init.zeros_(p)
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        self.assertEqual(calls, ["hook"])
        self.assertEqual(weight.detach(), -torch.ones(2, 2))

    def test_ties_are_kept(self):
        def make():
            module = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
            module[1].weight = module[0].weight
            module[2].weight = nn.Parameter(module[0].weight.data)
            module[2].bias = nn.Parameter(module[0].weight.data[1])
            module.register_buffer("count", torch.zeros(2, dtype=torch.long))
            module[0].register_buffer("count", module.count)
            return module

        first, second, third = module = meta(make)
        module.to_empty(device="cpu", skip_materialized=True)
        pointer = first.weight.data_ptr()
        self.assertIs(second.weight, first.weight)
        self.assertIs(first.count, module.count)
        self.assertIsNot(third.weight, first.weight)
        self.assertEqual(third.weight.data_ptr(), pointer)
        self.assertEqual(third.bias.data_ptr(), pointer + 16)
        self.assertEqual(third.weight.untyped_storage().nbytes(), 64)

    def test_integers_are_zero(self):
        module = meta(lambda: nn.BatchNorm1d(2))
        module.register_buffer("mask", torch.ones(100, dtype=torch.bool, device="meta"))
        torch.full((100,), 7)  # leave something to find
        module.to_empty(device="cpu", skip_materialized=True)
        self.assertEqual(module.num_batches_tracked, torch.tensor(0))
        self.assertFalse(module.mask.any())

    def test_strides_are_kept(self):
        module = meta(lambda: nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last))
        strides = module.weight.stride()
        module.to_empty(device="cpu", skip_materialized=True)
        self.assertEqual(module.weight.stride(), strides)

    def test_lazy_module_goes_to_the_device_uninitialized(self):
        module = nn.LazyLinear(2, device="meta")
        weight = module.weight
        module.to_empty(device="cpu", skip_materialized=True)
        self.assertIs(module.weight, weight)
        self.assertIsInstance(weight, nn.UninitializedParameter)
        self.assertEqual(module(torch.ones(1, 3)).device.type, "cpu")
        self.assertIs(module.weight, weight)

    def test_recurse(self):
        module = meta(lambda: nn.ModuleList([nn.Linear(2, 2)]))
        module.register_buffer("own", torch.empty(2, device="meta"))
        module.to_empty(device="cpu", recurse=False, skip_materialized=True)
        self.assertEqual(module.own.device.type, "cpu")
        self.assertTrue(module[0].weight.is_meta)

    def test_module_with_its_own_apply(self):
        class Holds(nn.Module):
            def __init__(self):
                super().__init__()
                self.held = torch.empty(2)
                self.lstm = nn.LSTM(2, 2)

            def _apply(self, fn):
                self.held = fn(self.held)
                return super()._apply(fn)

        module = meta(lambda: nn.Sequential(Holds()))
        weights = module[0].lstm._flat_weights
        module.to_empty(device="cpu", skip_materialized=True)
        self.assertEqual(module[0].held.device.type, "cpu")
        for a, b in zip(module[0].lstm._flat_weights, weights, strict=True):
            self.assertIs(a, b)
        module[0].lstm.reset_parameters()
        module[0].lstm(torch.ones(1, 1, 2))

    def test_whatever_torch_future_says(self):
        class Holds(nn.Module):
            def __init__(self):
                super().__init__()
                self.lin = nn.Linear(2, 2)
                self.weight = nn.Parameter(torch.empty(2))

            def _apply(self, fn, recurse=True):
                return super()._apply(fn, recurse)

        flags = (
            torch.__future__.set_swap_module_params_on_conversion,
            torch.__future__.set_overwrite_module_params_on_conversion,
        )
        for set_flag in flags:
            set_flag(True)
            self.addCleanup(set_flag, False)
            module = meta(lambda: nn.ModuleList([Holds(), nn.LSTM(2, 2)]))
            module.append(nn.LSTM(2, 2))
            module[0].weight.mark = "mine"
            refs = [weakref.ref(p) for p in module.parameters()]
            real = places(module[2])
            module.to_empty(device="cpu", skip_materialized=True)
            self.assertEqual(places(module[2]), real)
            self.assertEqual(module[0].weight.mark, "mine")
            for ref, parameter in zip(refs, module.parameters(), strict=True):
                self.assertIs(ref(), parameter)
                self.assertEqual(parameter.device.type, "cpu")
            set_flag(False)

    def test_others_go_the_default_way(self):
        module = nn.Module()
        indices = torch.zeros(1, 1, dtype=torch.long)
        sparse = torch.sparse_coo_tensor(indices, torch.ones(1), (3,))
        module.register_buffer("sparse", sparse.to("meta"))
        module.register_buffer("plain", torch.empty(2, device="meta"))
        module.to_empty(device="cpu", skip_materialized=True)
        self.assertEqual(module.sparse.layout, torch.sparse_coo)
        self.assertEqual(module.sparse.device.type, "cpu")
        self.assertEqual(module.plain.device.type, "cpu")

    def test_default_is_as_it_was(self):
        def tied():
            first, second = nn.Linear(2, 2), nn.Linear(2, 2)
            second.weight = first.weight
            return nn.Sequential(first, second, nn.BatchNorm1d(2))

        module = meta(tied)
        weight = module[0].weight
        module.to_empty(device="cpu")
        self.assertIsNot(module[0].weight, weight)
        self.assertIsNot(module[0].weight, module[1].weight)
        with self.assertRaises(ValueError):
            nn.LazyLinear(2, device="meta").to_empty(device="cpu")

    def test_gradient_on_meta_is_dropped(self):
        module = meta(lambda: nn.Linear(2, 2))
        module(torch.empty(1, 2, device="meta")).sum().backward()
        module.to_empty(device="cpu", skip_materialized=True)
        self.assertIsNone(module.weight.grad)

    def test_in_any_mode(self):
        module = meta(lambda: nn.Linear(2, 2))
        with torch.inference_mode(), torch.device("meta"):
            module.to_empty(device="cpu", skip_materialized=True)
        self.assertFalse(module.weight.is_inference())
        self.assertEqual(module.weight.device.type, "cpu")


if __name__ == "__main__":
    run_tests()
