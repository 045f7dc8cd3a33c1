# Owner(s): ["module: nn"]
"""``load_state_dict(reuse_tensors=True)`` and the copying load leave a module alike."""

import copy
import itertools

import hypothesis.strategies as st
import torch
from hypothesis import assume, given, settings
from torch import nn
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    TestCase,
)


class Leaf(nn.Module):
    """Odd tensors in a module with nothing of its own."""

    def __init__(self):
        super().__init__()
        self.scalar = nn.Parameter(torch.randn(()))
        self.f16 = nn.Parameter(torch.randn(2, 3).half(), requires_grad=False)
        self.column = nn.Parameter(torch.randn(3, 2).t())
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.register_parameter("none", None)
        self.register_buffer("count", torch.arange(4))
        self.register_buffer("freq", torch.randn(3), persistent=False)
        self.stats = nn.Buffer(torch.randn(2))


class Tied(nn.Module):
    """One Parameter under two names, one memory under two Parameters, and a view of it."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4)
        self.head.weight = self.emb.weight
        self.alias = nn.Parameter(self.head.bias.data)
        self.part = nn.Parameter(self.head.bias.data[1:3])


class Halves(nn.Module):
    """Saved as one tensor, kept as two: a pre-hook splits it into views."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.randn(2)) for _ in range(2))
        self.register_load_state_dict_pre_hook(self.split)
        self.register_state_dict_post_hook(self.merge)

    @staticmethod
    def split(module, state_dict, prefix, *args):
        if prefix + "both" in state_dict:
            left, right = state_dict.pop(prefix + "both").chunk(2)
            state_dict[prefix + "left"], state_dict[prefix + "right"] = left, right

    @staticmethod
    def merge(module, state_dict, prefix, metadata):
        both = [state_dict.pop(prefix + name) for name in ("left", "right")]
        state_dict[prefix + "both"] = torch.cat(both)


class Scaled(nn.Linear):
    """An override that writes before, and in several ways after it has loaded."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("copied", torch.zeros(2))

    def _load_from_state_dict(self, *args):
        self.weight.data.fill_(1)
        super()._load_from_state_dict(*args)
        self.weight.data *= 2
        with torch.no_grad():
            self.bias[0] = 3
            self.seen.view(-1)[:1].add_(self.bias.sum())
            self.copied.copy_(self.bias)
            if self.weight.device.type == "cpu":
                self.copied.numpy()[0] += 1


class Extra(nn.Linear):
    def __init__(self):
        super().__init__(2, 1)
        self.extra = [1]

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra[:] = state


KINDS = {
    "linear": lambda: nn.Linear(3, 2),
    "norm": lambda: nn.BatchNorm1d(3),
    "lstm": lambda: nn.LSTM(2, 2),
    "leaf": Leaf,
    "tied": Tied,
    "halves": Halves,
    "scaled": Scaled,
    "extra": Extra,
    "attention": lambda: nn.MultiheadAttention(2, 1),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    "weight_norm_old": lambda: nn.utils.weight_norm(nn.Linear(2, 2)),
}


def build(spec, seed=0, with_grad=False):
    """The same module for the same arguments."""
    torch.manual_seed(seed)
    module = nn.Sequential(*(make(s) for s in spec))
    if with_grad:
        for i, p in enumerate(module.parameters()):
            if i % 2 and p.requires_grad:
                p.grad = torch.full_like(p, i)
                p.mark = i
    return module


def make(spec):
    if isinstance(spec, list):
        return nn.Sequential(*(make(s) for s in spec))
    return KINDS[spec]()


def tensors(module):
    """All, with each name that they have."""
    for prefix, child in module.named_modules(remove_duplicate=False):
        for own in (child._parameters, child._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    yield f"{prefix}.{name}".lstrip("."), tensor


def extent(tensor):
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def overlaps(module):
    """Which names lie in the same memory."""
    named = [(n, *extent(t)) for n, t in tensors(module) if t.data_ptr()]
    pairs = itertools.combinations(named, 2)
    return {(a, b) for (a, i, j), (b, k, m) in pairs if i < m and k < j}


def observe(module, skip=()):
    """What can be seen of a module but for addresses."""
    seen = {}
    for name, t in tensors(module):
        if name in skip:
            continue
        kind = (type(t), t.dtype, t.device, t.stride(), t.requires_grad, vars(t).copy())
        grad = None if t.grad is None else t.grad.tolist()
        seen[name] = (kind, t.double().tolist(), grad, isinstance(t, nn.Buffer))
    extra = [(k, v.extra) for k, v in module.named_modules() if isinstance(v, Extra)]
    return seen, overlaps(module), list(module.state_dict()), copy.deepcopy(extra)


def frozen(module):
    """What a load that raises must not change, object for object."""
    objects = [
        (id(m), type(m), {k: id(v) for k, v in vars(m).items()})
        for m in module.modules()
    ]
    places = [(n, id(t), t.data_ptr(), t.device) for n, t in tensors(module)]
    return objects, places


def contents(state_dict):
    """A state dict as it is, with the objects in it."""
    listed = [
        (k, id(v), v.requires_grad, v.tolist()) if isinstance(v, torch.Tensor) else k
        for k, v in state_dict.items()
    ]
    return listed, copy.deepcopy(getattr(state_dict, "_metadata", None))


def load(module, state_dict, **kwargs):
    try:
        return module.load_state_dict(state_dict, **kwargs), None
    except Exception as e:
        return None, (type(e), str(e))


def disturb(draw, state_dict):
    """Make a state dict less like the module that it is for."""
    for key in draw(st.lists(st.sampled_from(list(state_dict)), max_size=4)):
        value = state_dict.get(key)
        if not isinstance(value, torch.Tensor):
            continue
        how = draw(
            st.sampled_from(
                ["double", "int", "strided", "same", "one", "drop", "add"]
                + ["shape", "text", "part", "expand", "param"]
            )
        )
        if how == "double":
            state_dict[key] = value.double()
        elif how == "int":
            state_dict[key] = (value * 3).long()
        elif how == "strided":
            state_dict[key] = torch.stack([value, value], -1)[..., 0]
        elif how == "same":
            alike = [
                k
                for k, v in state_dict.items()
                if getattr(v, "shape", 0) == value.shape
            ]
            state_dict[key] = state_dict[draw(st.sampled_from(alike))]
        elif how == "one":
            state_dict[key] = value.reshape(-1)[:1]
        elif how == "drop":
            del state_dict[key]
        elif how == "add":
            state_dict[key + draw(st.sampled_from(["x", ".x", "_extra_state"]))] = value
        elif how == "shape":
            state_dict[key] = torch.stack([value, value])
        elif how == "text":
            state_dict[key] = "text"
        elif how == "part":
            state_dict[key] = torch.cat([value.reshape(-1)] * 2)[: value.numel()].view(
                value.shape
            )
        elif how == "expand" and value.numel():
            state_dict[key] = value.reshape(-1)[0].expand(value.shape)
        elif how == "param" and value.is_floating_point():
            state_dict[key] = nn.Parameter(value)


kinds = st.sampled_from(sorted(KINDS))
specs = st.recursive(
    st.lists(kinds, min_size=1, max_size=3),
    lambda s: st.lists(kinds | s, min_size=1, max_size=3),
    max_leaves=4,
)


class TestReuseTensorsLaw(TestCase):
    def assert_law(self, observed, expected, state_dict, **kwargs):
        """Load both ways; compare the modules, or what is left of them."""
        saved, objects = contents(state_dict), frozen(observed)
        on_meta = any(t.is_meta for _, t in tensors(observed))
        before = None if on_meta else observe(observed)
        expected_result, expected_error = load(expected, state_dict, **kwargs)
        self.assertEqual(contents(state_dict), saved)
        result, error = load(observed, state_dict, reuse_tensors=True, **kwargs)
        self.assertEqual(contents(state_dict), saved)
        self.assertEqual(error, expected_error)
        if error:
            self.assertEqual(frozen(observed), objects)
            self.assertTrue(on_meta or observe(observed) == before)
            return
        self.assertEqual(result, expected_result)
        self.assertEqual(repr(result), repr(expected_result))
        ids = [(name, id(t)) for name, t in tensors(observed)]
        self.assertEqual(ids, [place[:2] for place in objects[1]])
        skip = result.still_meta
        self.assertEqual(observe(observed, skip), observe(expected, skip))
        reused = {k: state_dict[k].data_ptr() for k in result.reused if k in state_dict}
        named = dict(tensors(observed))
        self.assertEqual(reused, {k: named[k].data_ptr() for k in reused})

    @given(st.data(), specs, st.integers(0, 9), st.booleans())
    @settings(max_examples=200, deadline=None)
    def test_in_memory(self, data, spec, seed, strict):
        with_grad = data.draw(st.booleans())
        observed, expected = build(spec, seed, with_grad), build(spec, seed, with_grad)
        state_dict = build(spec, seed + 1).state_dict()
        disturb(data.draw, state_dict)
        self.assert_law(observed, expected, state_dict, strict=strict)

    @given(st.data(), specs, st.integers(0, 9))
    @settings(max_examples=150, deadline=None)
    def test_on_meta(self, data, spec, seed):
        with torch.device("meta"):
            observed = build(spec)
        state_dict = build(spec, seed).state_dict()
        if "scaled" not in str(spec):  # computes with what it could not load
            disturb(data.draw, state_dict)
        self.assert_law(observed, build(spec), state_dict)

    @given(st.data(), specs, st.integers(0, 9))
    @settings(max_examples=50, deadline=None)
    def test_from_own_memory(self, data, spec, seed):
        assume("scaled" not in str(spec))  # writes to what others still have to read
        observed, expected = build(spec, seed), build(spec, seed)
        mixed = [m.state_dict() for m in (observed, expected)]
        keys = [k for k, v in mixed[0].items() if isinstance(v, torch.Tensor)]
        for key in data.draw(st.lists(st.sampled_from(keys), max_size=3)):
            alike = [k for k in keys if mixed[0][k].shape == mixed[0][key].shape]
            other = data.draw(st.sampled_from(alike))
            for state_dict in mixed:
                state_dict[key] = state_dict[other]
        load(expected, mixed[1])
        load(observed, mixed[0], reuse_tensors=True)
        self.assertEqual(observe(observed), observe(expected))

    def test_ties_on_meta(self):
        with torch.device("meta"):
            module = Tied()
        other = Tied()
        module.load_state_dict(other.state_dict(), reuse_tensors=True)
        self.assertIs(module.head.weight, module.emb.weight)
        self.assertEqual(module.alias.data_ptr(), module.head.bias.data_ptr())
        self.assertEqual(module.part.data_ptr(), module.head.bias[1:].data_ptr())
        self.assertEqual(module.part, other.part)

    def test_says_what_is_still_on_meta(self):
        with torch.device("meta"):
            module = nn.Sequential(Leaf())
        state_dict = nn.Sequential(Leaf()).state_dict()
        del state_dict["0.scalar"]
        result = module.load_state_dict(state_dict, strict=False, reuse_tensors=True)
        self.assertEqual(result.still_meta, ("0.scalar", "0.freq"))

    @parametrize("where", ["pre_hook", "post_hook", "override", "extra_state"])
    def test_what_raises_midway_leaves_no_trace(self, where):
        class Raises(nn.Linear):
            def _load_from_state_dict(self, *args):
                super()._load_from_state_dict(*args)
                fail(self) if where == "override" else None

            def set_extra_state(self, state):
                fail(self) if where == "extra_state" and state == "new" else None

            def get_extra_state(self):
                return "old"

        def fail(module, *args):
            module.weight.data.zero_()
            module.new = 1
            module.register_buffer("late", torch.ones(1))
            raise KeyError("on purpose")

        module = nn.Sequential(
            nn.BatchNorm1d(3), nn.Linear(3, 2), Raises(3, 2), Extra()
        )
        state_dict = copy.deepcopy(module).double().state_dict()
        for value in state_dict.values():
            if isinstance(value, torch.Tensor):
                value += 1
        state_dict["2._extra_state"] = "new"
        if where == "pre_hook":
            module[2].register_load_state_dict_pre_hook(fail)
        if where == "post_hook":
            module[2].register_load_state_dict_post_hook(fail)
        before, objects = observe(module), frozen(module)
        with self.assertRaisesRegex(KeyError, "on purpose"):
            module.load_state_dict(state_dict, reuse_tensors=True)
        self.assertEqual(observe(module), before)
        self.assertEqual(frozen(module), objects)


instantiate_parametrized_tests(TestReuseTensorsLaw)


if __name__ == "__main__":
    run_tests()
