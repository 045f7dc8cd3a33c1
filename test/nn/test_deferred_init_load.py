# Owner(s): ["module: nn"]
"""load_state_dict of a module with deferred tensors: once materialized it is as if eagerly constructed and loaded."""

import functools
import itertools

import torch
from deferred_init_case import DeferredTestCase
from torch import nn
from torch.testing._internal.common_utils import run_tests, TemporaryFileName


MODES = ({}, {"assign": True}, {"reuse_tensors": True})


class _Noisy(nn.Linear):
    """Its load reads and changes what the constructor drew."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        with torch.no_grad():
            self.scale += self.bias.sum()


def _model(kind):
    m = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 5)
    )
    m.register_buffer("table", torch.arange(3.0), persistent=False)
    if kind == "pre-hook":  # NB: reads a deferred tensor
        m[0].register_load_state_dict_pre_hook(
            lambda module, sd, prefix, *_: sd.update(
                {prefix + "weight": sd[prefix + "weight"] * 2 + module.bias[0].detach()}
            )
        )
    elif kind == "post-hook":
        m[2].register_load_state_dict_post_hook(
            lambda module, _: module.weight.data.mul_(module.bias.data) is None or None
        )
    elif kind == "override":
        m[2] = _Noisy(5, 5)
        m[2].register_buffer("scale", torch.rand(5), persistent=False)
    elif kind == "tied":
        m[3].weight = m[2].weight
    elif kind == "views":
        flat = torch.randn(50)
        m[2].weight = nn.Parameter(flat[:25].view(5, 5))
        m[3].weight = nn.Parameter(flat[25:].view(5, 5))
    return m


KINDS = ("plain", "pre-hook", "post-hook", "override", "tied", "views")


def _is_norm(module):
    return isinstance(module, nn.BatchNorm1d)


class TestLoad(DeferredTestCase):
    def _state_dicts(self, kind, part):
        """The same state dict, real and in a mapped file."""
        with TemporaryFileName() as name:
            torch.manual_seed(9)
            sd = {
                k: v.detach().clone() + 1 for k, v in _model(kind).state_dict().items()
            }
            if part:
                for key in ("3.weight", "2.weight", "1.running_mean"):
                    del sd[key]
            yield lambda: {k: v.clone() for k, v in sd.items()}
            torch.save(sd, name)
            yield lambda: torch.load(name, mmap=True)

    def test_table(self):
        for kind, part in itertools.product(KINDS, (False, True)):
            for get in self._state_dicts(kind, part):
                for mode, inside in itertools.product(MODES, (False, True)):
                    with self.subTest(kind=kind, part=part, mode=mode, inside=inside):
                        self._check(kind, part, get, mode, inside)

    def _check(self, kind, part, get, mode, inside):
        def load(m):
            sd = get()
            m.load_state_dict(sd, strict=False, **mode)
            return m

        def eager():
            return load(_model(kind))

        expected, state = self.eager(eager)
        module = self.deferred(eager if inside else lambda: _model(kind))
        if not inside:
            load(module)
        nn.utils.materialize_module(module)
        self.assertSame(expected, module)
        # NB: where a load replaces all that was drawn, nothing has to be drawn.
        if part or not mode:
            self.assertEqual(torch.get_rng_state(), state)

    def test_known_from_meta_block(self):
        def f():
            m = nn.BatchNorm1d(5)
            m.lin = nn.Linear(5, 5)
            return m

        sd = {k: torch.full_like(v, 7) for k, v in f().state_dict().items()}
        for mode, inside in itertools.product(MODES, (False, True)):
            with self.subTest(mode=mode, inside=inside):
                with torch.device("meta"):
                    module = f()
                    if inside:
                        module.load_state_dict(sd, **mode)
                if not inside:
                    module.load_state_dict(sd, **mode)
                try:
                    nn.utils.materialize_module(module)
                except RuntimeError as e:  # never silently the constant
                    self.assertEqual(mode, {})
                    self.assertIn("lin.weight", str(e))
                    nn.utils.materialize_module(module, check_fn=_is_norm)
                for k, v in module.state_dict().items():
                    if not v.is_meta:
                        self.assertEqual(v, sd[k], msg=k)

    def test_a_load_that_raises_leaves_all_deferred(self):
        sd = _model("plain").state_dict()
        sd["3.weight"] = torch.ones(2)
        for kind in KINDS:
            make = functools.partial(_model, kind)
            expected, state = self.eager(make)
            module = self.deferred(make)
            before = torch.get_rng_state()
            with self.assertRaisesRegex(RuntimeError, "size mismatch for 3.weight"):
                module.load_state_dict(sd, strict=False, reuse_tensors=True)
            self.assertEqual(torch.get_rng_state(), before)
            self.assertTrue(all(p.is_meta for p in module.parameters()))
            self.assertSame(expected, nn.utils.materialize_module(module))
            self.assertEqual(torch.get_rng_state(), state)

    def test_deferred_state_dict(self):
        source, _ = self.eager(lambda: _model("plain"), seed=3)
        for mode in MODES:
            deferred = self.deferred(lambda: _model("plain"), seed=3)
            sd = deferred.state_dict()
            module = self.deferred(lambda: _model("plain"))
            module.load_state_dict(sd, **mode)
            nn.utils.materialize_module(module)
            for k, v in source.state_dict().items():
                self.assertEqual(module.state_dict()[k], v, rtol=0, atol=0, msg=k)


class TestGenerator(DeferredTestCase):
    def test_overwritten_draws_move_it(self):
        def f():
            m = nn.Linear(3, 4)
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)
            return m

        _, state = self.eager(f)
        for order in (list, reversed):
            for p in order(list((module := self.deferred(f)).parameters())):
                self.assertNotEqual(torch.get_rng_state(), state)
                nn.utils.materialize_tensor(p)
                break
            self.assertEqual(torch.get_rng_state(), state)
            self.assertEqual(module.weight.is_meta, order is reversed)


class _Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x):
        return self.norm(self.b(self.a(x))) + self.table


class _ScriptedAttributes(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.tied = self.lin.weight
        self.constant = torch.arange(2.0) + 1
        self.drawn = torch.rand(2)
        self.listed = [torch.ones(2), torch.zeros(2)]
        self.by_name = {"a": torch.full((2,), 3.0)}

    def forward(self, x):
        x = self.lin(x) + self.constant * self.drawn
        return x + self.listed[0] + self.by_name["a"]


def ones_for(module):
    return {key: torch.ones(t.shape) for key, t in module.state_dict().items()}


class TestScripted(DeferredTestCase):
    def test_is_materialized(self):
        def f():
            return torch.jit.script(_Scripted())

        expected, state = self.eager(f)
        for holder in (lambda m: m, nn.Sequential):
            module = self.deferred(f)
            bias = module.a.bias
            nn.utils.materialize_module(holder(module))
            self.assertEqual(torch.get_rng_state(), state)
            self.assertIs(module.a.bias, bias)
            self.assertEqual(module.a.weight.data_ptr(), module.b.weight.data_ptr())
            for k, v in expected.state_dict().items():
                self.assertEqual(module.state_dict()[k], v, rtol=0, atol=0, msg=k)
            x = torch.ones(3, 4)
            self.assertEqual(module.eval()(x), expected.eval()(x), rtol=0, atol=0)

    def test_plain_attributes_are_materialized(self):
        def f():
            return torch.jit.script(_ScriptedAttributes())

        expected, state = self.eager(f)
        x = torch.ones(2)
        for holder in (lambda m: m, nn.Sequential):
            module = self.deferred(f)
            self.assertTrue(nn.utils.is_deferred(module))
            nn.utils.materialize_module(holder(module))
            self.assertFalse(nn.utils.is_deferred(module))
            self.assertEqual(torch.get_rng_state(), state)
            for name in ("constant", "drawn", "listed", "by_name"):
                got, want = getattr(module, name), getattr(expected, name)
                self.assertEqual(got, want, rtol=0, atol=0, msg=name)
            self.assertEqual(module.tied.data_ptr(), module.lin.weight.data_ptr())
            self.assertEqual(module(x), expected(x), rtol=0, atol=0)

    def test_plain_attributes_that_nobody_knows_are_named(self):
        with nn.utils.meta_init():
            module = torch.jit.script(_ScriptedAttributes())
        module.load_state_dict(ones_for(module), assign=True)
        with self.assertRaisesRegex(RuntimeError, "any: m.drawn. Random"):
            nn.utils.materialize_module(nn.ModuleDict({"m": module}))
        self.assertTrue(module.constant.is_meta)


if __name__ == "__main__":
    run_tests()
