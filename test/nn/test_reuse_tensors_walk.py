# Owner(s): ["module: nn"]
"""How ``load_state_dict`` goes through modules and keys: in linear time, as it always did."""

import functools
import random
from collections import OrderedDict
from unittest import mock

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import nn
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    TestCase,
)


class Key(str):
    """A key that counts how often it is looked at."""

    __slots__ = ()
    looks = 0

    def startswith(self, *args):
        Key.looks += 1
        return super().startswith(*args)

    def find(self, *args):
        Key.looks += 1
        return super().find(*args)


def siblings(n, cls):
    return nn.ModuleList(cls() for _ in range(n))


class Touchy(nn.Linear):
    """A module some of whose code edits the dicts that it and its parents are given."""

    def __init__(self, edits, kept):
        super().__init__(1, 1)
        self.register_load_state_dict_pre_hook(
            functools.partial(self.edit, edits, kept)
        )

    @staticmethod
    def edit(edits, kept, module, state_dict, prefix, *args):
        kept.append(state_dict)
        for how, which in edits:
            edited = kept[which % len(kept)]
            if how == "add":
                edited[f"{prefix}added.{len(edited)}"] = torch.ones(1)
                edited[f"{len(edited) % 3}.late"] = torch.ones(1)
            elif how == "drop" and edited:
                del edited[list(edited)[which % len(edited)]]
            elif edited:
                key = list(edited)[which % len(edited)]
                edited[key] = edited.pop(key)


edits = st.lists(
    st.tuples(st.sampled_from(["add", "drop", "move"]), st.integers(0, 9)), max_size=3
)
trees = st.recursive(
    st.sampled_from(["linear", "norm"]) | edits,
    lambda children: st.lists(children, min_size=1, max_size=3).map(tuple),
    max_leaves=8,
)


def build(tree, kept):
    if isinstance(tree, tuple):
        parent = nn.Sequential(*(build(t, kept) for t in tree))
        if any(isinstance(t, list) for t in tree):
            parent.register_load_state_dict_pre_hook(
                lambda module, state_dict, *args: kept.append(state_dict)
            )
        return parent
    if isinstance(tree, list):
        return Touchy(tree, kept)
    return {"linear": lambda: nn.Linear(1, 1), "norm": lambda: nn.BatchNorm1d(1)}[
        tree
    ]()


def naive_load(module, state_dict):
    """What ``Module.load_state_dict`` says that it does."""
    metadata = getattr(state_dict, "_metadata", None)
    state_dict = OrderedDict(state_dict)
    state_dict._metadata = metadata
    missing, unexpected, errors = [], [], []

    def load(module, local, prefix):
        local_metadata = (metadata or {}).get(prefix[:-1], {})
        module._load_from_state_dict(
            local, prefix, local_metadata, True, missing, unexpected, errors
        )
        for name, child in module._modules.items():
            begin = f"{prefix}{name}."
            load(child, {k: v for k, v in local.items() if k.startswith(begin)}, begin)

    load(module, state_dict, "")
    return missing, unexpected, errors


class TestLinearTime(TestCase):
    @parametrize("kwargs", [{}, {"assign": True}, {"reuse_tensors": True}])
    @parametrize("cls", [functools.partial(nn.Linear, 1, 1), nn.PReLU])
    def test_in_siblings(self, kwargs, cls):
        def looks(n, kind):
            module = siblings(n, kind)
            state_dict = {Key(k): v for k, v in module.state_dict().items()}
            Key.looks = 0
            siblings(n, kind).load_state_dict(state_dict, **kwargs)
            return Key.looks

        for kind in (cls, functools.partial(nn.BatchNorm1d, 1)):
            self.assertLessEqual(looks(64, kind), 3 * looks(32, kind))


class TestStockLoad(TestCase):
    """Without new arguments, each module is called as it always was."""

    def calls_of(self, load, tree, seed):
        torch.manual_seed(seed)
        module = build(tree, [])
        state_dict = build(tree, []).state_dict()
        keys = list(state_dict)
        random.Random(seed).shuffle(keys)
        for key in keys:
            state_dict.move_to_end(key)
        state_dict["stray"] = state_dict["0.stray"] = torch.ones(1)
        calls, stock = [], nn.Module._load_from_state_dict

        @functools.wraps(stock)
        def recorded(self, local, prefix, metadata, strict, *lists):
            seen = [(key, value.tolist()) for key, value in local.items()]
            has_metadata = hasattr(local, "_metadata")
            before = [list(found) for found in lists]
            calls.append((type(local), has_metadata, prefix, seen, metadata, before))
            return stock(self, local, prefix, metadata, strict, *lists)

        with mock.patch.object(nn.Module, "_load_from_state_dict", recorded):
            try:
                outcome = load(module, state_dict)
            except RuntimeError as e:
                outcome = str(e)
        return calls, outcome, module.state_dict()

    @given(trees.filter(lambda tree: isinstance(tree, tuple)), st.integers(0, 99))
    @settings(max_examples=200, deadline=None)
    def test_calls_each_module_as_before(self, tree, seed):
        expected, (missing, unexpected, errors), values = self.calls_of(
            naive_load, tree, seed
        )
        seen, result, seen_values = self.calls_of(
            lambda m, sd: m.load_state_dict(sd, strict=False), tree, seed
        )
        self.assertEqual(seen, expected)
        self.assertEqual(seen_values, values)
        if not errors:
            self.assertEqual(list(result), [missing, unexpected])

    def test_texts_of_errors(self):
        module = nn.Sequential(nn.Linear(2, 1), nn.Linear(2, 1))
        state_dict = {"0.weight": torch.ones(3), "1.weight": torch.ones(1, 2), "x": 1}
        with self.assertRaises(RuntimeError) as error:
            module.load_state_dict(state_dict)
        self.assertExpectedInline(
            str(error.exception),
            """\
Error(s) in loading state_dict for Sequential:
	Missing key(s) in state_dict: "0.bias", "1.bias". 
	Unexpected key(s) in state_dict: "x". 
	size mismatch for 0.weight: copying a param with shape torch.Size([3]) from checkpoint, the shape in current model is torch.Size([1, 2]).""",  # noqa: E501, W291
        )
        with self.assertRaisesRegex(TypeError, "to be dict-like, got <class 'list'>"):
            module.load_state_dict([])
        module.register_load_state_dict_post_hook(lambda *args: 1)
        with self.assertRaisesRegex(AssertionError, "not expected to return new"):
            module.load_state_dict(module.state_dict())


class TestOnePass(TestCase):
    """Modules with nothing of their own are planned in one pass, with the same outcome."""

    @given(
        trees.filter(lambda tree: isinstance(tree, tuple)),
        st.sampled_from(["cpu", "meta"]),
        st.lists(st.integers(0, 20), max_size=2),
    )
    @settings(max_examples=100, deadline=None)
    def test_is_the_walk_in_short(self, tree, device, dropped):
        def load():
            torch.manual_seed(0)
            module = build(tree, []).to(device)
            state_dict = build(tree, []).state_dict()
            for i in dropped:
                if i < len(state_dict):
                    del state_dict[list(state_dict)[i]]
            result = module.load_state_dict(
                state_dict, strict=False, reuse_tensors=True
            )
            values = [t.tolist() for t in module.state_dict().values() if not t.is_meta]
            return result, result.reused, result.converted, result.still_meta, values

        in_one_pass = load()
        with mock.patch(
            "torch.nn.modules._reuse_tensors.plan_plain", return_value=None
        ) as plan_plain:
            self.assertEqual(load(), in_one_pass)
        plan_plain.assert_called_once()


instantiate_parametrized_tests(TestLinearTime)


if __name__ == "__main__":
    run_tests()
