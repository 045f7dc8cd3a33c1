# Owner(s): ["module: nn"]
"""load_state_dict and .to() of a module with deferred tensors: as if it had been constructed eagerly."""

import itertools

import torch
from deferred_init_case import DeferredTestCase
from torch import nn
from torch.nn.utils import deferred_init, materialize_module, materialize_tensor
from torch.testing._internal.common_utils import run_tests


def _model(hook):
    m = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    if hook:
        m[0].register_load_state_dict_pre_hook(
            lambda module, sd, prefix, *_: sd.update(
                {prefix + "weight": sd[prefix + "weight"] * 2 + module.bias[0]}
            )
        )
    return m


class TestLoad(DeferredTestCase):
    def test_table(self):
        modes = ({}, {"assign": True}, {"reuse_tensors": True})
        for mode, inside, part, hook in itertools.product(modes, *[(False, True)] * 3):
            def load(m):
                sd = {k: v.detach().clone() + 1 for k, v in source.items()}
                if part:
                    del sd["2.weight"], sd["1.running_mean"]
                m.load_state_dict(sd, strict=not part, **mode)
                return m

            torch.manual_seed(9)
            source = _model(False).state_dict()
            with self.subTest(mode=mode, inside=inside, part=part, hook=hook):
                expected, _ = self.eager(lambda: load(_model(hook)))
                if inside:
                    module = self.deferred(lambda: load(_model(hook)))
                else:
                    module = load(self.deferred(lambda: _model(hook)))
                materialize_module(module)
                for k, v in expected.state_dict().items():
                    self.assertEqual(module.state_dict()[k], v, rtol=0, atol=0, msg=k)

    def test_overwritten_draws_move_the_generator(self):
        def f():
            m = nn.Linear(3, 4)
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)
            return m

        _, state = self.eager(f)
        module = self.deferred(f)
        for p in module.parameters():
            materialize_tensor(p)
        self.assertEqual(torch.get_rng_state(), state)

    def test_to_materializes(self):
        expected, state = self.eager(lambda: nn.Linear(3, 4))
        module = self.deferred(lambda: nn.Linear(3, 4)).to("cpu", torch.float64)
        self.assertEqual(module.weight, expected.weight.double(), rtol=0, atol=0)
        self.assertEqual(torch.get_rng_state(), state)
        self.assertFalse(deferred_init(nn.Linear, 3, 4).cpu().weight.is_meta)


if __name__ == "__main__":
    run_tests()
