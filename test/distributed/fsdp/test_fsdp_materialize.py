# Owner(s): ["oncall: distributed"]
"""FullyShardedDataParallel of what is on meta: each module is initialized once, and what has values keeps them."""

import warnings
from functools import partial

import torch
from materialize_case import (
    CPU,
    eager,
    Level,
    levels,
    MaterializeCase,
    on_meta,
    reset_in_order,
    Resets,
    SEED,
    state,
    wrap_each_level,
)
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn import utils
from torch.testing._internal.common_utils import run_tests


def fsdp(module, **kwargs):
    return FSDP(module, device_id=CPU, **kwargs)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.loaded = nn.Linear(3, 3)
        self.some = nn.Linear(3, 3)
        self.fresh = nn.Linear(3, 3)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.head = nn.Linear(3, 6)
        self.head.weight = self.embedding.weight


class NoReset(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.empty(2))


class FSDPLaws:
    def assert_state(self, model, expected):
        with FSDP.summon_full_params(model, writeback=False):
            self.assert_bits(state(model), expected)

    def each(self, **kwargs):
        """Nested wrappers of either kind."""
        for use_orig_params in (False, True):
            with self.subTest(use_orig_params=use_orig_params):
                yield lambda m, keep=use_orig_params, **more: fsdp(
                    m, use_orig_params=keep, **kwargs, **more
                )

    def test_nested_wrappers_initialize_each_module_once(self):
        for wrap in self.each():
            model = on_meta()
            calls = Resets(model)
            torch.manual_seed(SEED)
            model = wrap_each_level(model, wrap)
            self.assert_once(calls)
            torch.manual_seed(SEED)
            self.assert_state(model, state(reset_in_order(calls)))

    def test_deferred_init_gives_the_eager_model(self):
        expected, generator_after = eager()
        for policy in (None, ModuleWrapPolicy({Level, nn.Linear})):
            for wrap in self.each(auto_wrap_policy=policy):
                torch.manual_seed(SEED)
                model = utils.deferred_init(levels)
                calls = Resets(model)
                model = wrap(model) if policy else wrap_each_level(model, wrap)
                self.assertEqual(torch.get_rng_state(), generator_after)
                self.assertEqual(calls, [])
                self.assertFalse(utils.is_deferred(model))
                self.assert_state(model, state(expected))

    def test_training_equals_ddp(self):
        for wrap in self.each():
            torch.manual_seed(SEED)
            recorded = wrap_each_level(utils.deferred_init(levels), wrap)
            model = on_meta()
            calls = Resets(model)
            torch.manual_seed(SEED)
            reset = wrap_each_level(model, wrap)
            torch.manual_seed(SEED)
            for sharded, unsharded in (
                (recorded, eager()[0]),
                (reset, None),
            ):
                if unsharded is None:
                    torch.manual_seed(SEED)
                    unsharded = reset_in_order(calls)
                losses, parameters = self.train_ddp(unsharded)
                self.assertEqual(self.train(sharded), losses)
                with FSDP.summon_full_params(sharded, writeback=False):
                    trained = state(sharded)
                    for name, parameter in parameters.items():
                        self.assertEqual(trained[name], parameter, msg=name)


class TestFSDPMaterialize2(FSDPLaws, MaterializeCase):
    world_size = 2

    def test_auto_wrap_initializes_each_module_once(self):
        for wrap in self.each(auto_wrap_policy=ModuleWrapPolicy({Level, nn.Linear})):
            model = on_meta()
            calls = Resets(model)
            torch.manual_seed(SEED)
            model = wrap(model)
            self.assert_once(calls)
            torch.manual_seed(SEED)
            self.assert_state(model, state(reset_in_order(calls)))

    def test_param_init_fn_that_empties_all_below(self):
        for recurse in (True, False):
            for wrap in self.each():
                turns = []

                def init(module, recurse=recurse, turns=turns):
                    module.to_empty(device="cpu", recurse=recurse)
                    for tensors in (module._parameters, module._buffers):
                        for tensor in tensors.values():
                            nn.init.constant_(tensor, len(turns))
                    turns.append(module)

                model = on_meta()
                modules = list(model.modules())
                model = wrap_each_level(model, partial(wrap, param_init_fn=init))
                self.assertEqual(len(turns), len(modules))
                self.assertEqual(set(turns), set(modules))
                expected = on_meta().to_empty(device="cpu")
                for module in expected.modules():
                    turn = turns.index(modules.pop(0))
                    for tensors in (module._parameters, module._buffers):
                        for tensor in tensors.values():
                            nn.init.constant_(tensor, turn)
                self.assert_state(model, state(expected))

    def test_param_init_fn_of_containers(self):
        turns = []

        def init(module):
            turns.append(type(module).__name__)
            module.to_empty(device="cpu")

        real = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
        meta = on_meta(lambda: nn.Sequential(nn.Sequential(nn.Linear(2, 2))))
        fsdp(nn.Sequential(real, meta), param_init_fn=init)
        self.assertEqual(turns, ["Sequential", "Sequential", "Sequential", "Linear"])

    def test_what_has_values_keeps_them(self):
        for name in ("default", "param_init_fn"):
            for wrap in self.each():
                model = on_meta(Mixed)
                torch.manual_seed(SEED)
                model.loaded = nn.Linear(3, 3)
                model.some.weight = nn.Parameter(torch.rand(3, 3))
                calls = Resets(model)
                expected = {**state(model.loaded), "some": model.some.weight.clone()}
                if name == "default":
                    model = wrap(model)
                else:

                    def init(module):
                        if hasattr(module, "reset_parameters"):
                            module.to_empty(device="cpu")
                            module.reset_parameters()

                    model = wrap(model, param_init_fn=init)
                self.assertEqual(calls, ["some", "fresh"])
                with FSDP.summon_full_params(model, writeback=False):
                    after = state(model)
                self.assert_bits(
                    {
                        "weight": after["loaded.weight"],
                        "bias": after["loaded.bias"],
                        "some": after["some.weight"],
                    },
                    expected,
                )
                for tensor in after.values():
                    self.assertLess(tensor.abs().max(), 1.0)

    def test_ties_are_kept(self):
        for wrap in self.each():
            model = on_meta(Tied)
            calls = Resets(model)
            torch.manual_seed(SEED)
            model = wrap(model)
            self.assertEqual(calls, ["embedding", "head"])
            torch.manual_seed(SEED)
            embedding = nn.Embedding(6, 3).weight
            with FSDP.summon_full_params(model, writeback=False):
                self.assertEqual(model.embedding.weight, embedding, rtol=0, atol=0)
                self.assertEqual(model.head.weight, embedding, rtol=0, atol=0)
                weights = [p for p in model.parameters() if p.dim() == 2]
                self.assertLessEqual(len(weights), 1)

    def test_deferred_init_that_is_loaded_in_part(self):
        torch.manual_seed(SEED)
        model = utils.deferred_init(levels)
        loaded = {"inner.lin.weight": torch.full((11, 5), 3.0)}
        model.load_state_dict(loaded, strict=False, reuse_tensors=True)
        model = wrap_each_level(model, fsdp)
        self.assert_state(model, {**state(eager()[0]), **loaded})

    def test_param_init_fn_wins_over_the_record(self):
        def init(module):
            module.to_empty(device="cpu", recurse=False)
            for p in module.parameters(recurse=False):
                nn.init.constant_(p, 2.0)

        model = fsdp(utils.deferred_init(nn.Linear, 3, 3), param_init_fn=init)
        with FSDP.summon_full_params(model):
            self.assertEqual(model.weight, torch.full((3, 3), 2.0))

    def test_no_reset_parameters(self):
        model = on_meta(NoReset)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with self.assertRaisesRegex(AttributeError, "reset_parameters"):
                fsdp(model)
        self.assertTrue(any("reset_parameters" in str(w.message) for w in caught))
        self.assertTrue(all(p.is_meta for p in model.parameters()))


if __name__ == "__main__":
    run_tests()
