"""What the tests of deferred_init have in common: the law, for one constructor."""

import random

import numpy as np
import torch
from torch import nn
from torch.testing._internal.common_utils import TestCase


def tensors(module):
    """The tensors of a module by name, those in plain attributes, too."""
    found = {}
    for prefix, m in module.named_modules():
        for kind in (m._parameters, m._buffers, m.__dict__):
            for name, value in kind.items():
                if isinstance(value, torch.Tensor):
                    found[f"{prefix}.{name}"] = value
    return found


class DeferredTestCase(TestCase):
    def eager(self, f, seed=0):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        module = f()
        return module, torch.get_rng_state()

    def deferred(self, f, seed=0):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        state = torch.get_rng_state()
        module = nn.utils.deferred_init(f)
        self.assertEqual(torch.get_rng_state(), state)
        return module

    def assertSame(self, expected, actual):
        one, other = tensors(expected), tensors(actual)
        self.assertEqual(list(one), list(other))
        for name, t in one.items():
            o = other[name]
            self.assertIs(type(o), type(t), name)
            self.assertEqual(o.device, t.device, name)
            self.assertEqual(o.requires_grad, t.requires_grad, name)
            if not nn.parameter.is_lazy(t):
                self.assertEqual(o.stride(), t.stride(), name)
                self.assertEqual(o.storage_offset(), t.storage_offset(), name)
                self.assertEqual(o, t, rtol=0, atol=0, exact_dtype=True, msg=name)
            self.assertEqual(list(o.__dict__), list(t.__dict__), name)
        for a in one:
            for b in one:
                self.assertEqual(one[a] is one[b], other[a] is other[b], (a, b))
                if not nn.parameter.is_lazy(one[a]) and not nn.parameter.is_lazy(
                    one[b]
                ):
                    shared = (
                        one[a].untyped_storage()._cdata
                        == one[b].untyped_storage()._cdata
                    )
                    same = (
                        other[a].untyped_storage()._cdata
                        == other[b].untyped_storage()._cdata
                    )
                    self.assertEqual(shared, same, (a, b))

    def check(self, f):
        """The law, in order and shuffled; returns a materialized module."""
        expected, state = self.eager(f)
        module = self.deferred(f)
        self.assertIs(nn.utils.materialize_module(module), module)
        self.assertSame(expected, module)
        self.assertEqual(torch.get_rng_state(), state)
        self.assertFalse(nn.utils.is_deferred(module))

        shuffled = self.deferred(f)
        parts = list(shuffled.modules())
        random.Random(3).shuffle(parts)
        for part in parts:
            nn.utils.materialize_module(part)
        self.assertSame(expected, shuffled)
        self.assertEqual(torch.get_rng_state(), state)

        one_by_one = self.deferred(f)
        found = [t for t in tensors(one_by_one).values() if nn.utils.is_deferred(t)]
        random.Random(4).shuffle(found)
        for t in found:
            self.assertIs(nn.utils.materialize_tensor(t), t)
        self.assertSame(expected, one_by_one)
        return module
