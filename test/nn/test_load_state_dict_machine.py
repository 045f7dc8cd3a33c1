# Owner(s): ["module: nn"]
"""Each way to load, held to the law and to naive models of modules by ``torch_ext.testing``."""

import hypothesis.strategies as st
import torch
from hypothesis import given, HealthCheck, settings
from torch.testing._internal.common_utils import (
    instantiate_parametrized_tests,
    parametrize,
    run_tests,
    TestCase,
)

from torch_ext.testing import (
    assert_loads_as_copy,
    COMPUTING,
    copying_load,
    Edit,
    HARMFUL,
    HARMLESS,
    ModuleMachine,
    named_tensors,
    Recipe,
    recipes,
    state_dict_recipes,
    StateDictRecipe,
    Tie,
)


EDITS = {*HARMLESS, *HARMFUL}


def reusing_load(module, state_dict, strict):
    result = module.load_state_dict(state_dict, strict, reuse_tensors=True)
    tensors = dict(named_tensors(module))
    for key in result.reused:
        # NB: a hook may have renamed it.
        if key in state_dict and key in tensors:
            assert tensors[key].data_ptr() == state_dict[key].data_ptr(), key
    assert set(result.still_meta) == {k for k, t in tensors.items() if t.is_meta}
    return result


def check_law(data, recipe, strict):
    # NB: on meta an override that computes may do so with what could not be loaded.
    computes = not recipe.kinds.isdisjoint(COMPUTING)
    edits = () if computes and recipe.meta else EDITS
    values = data.draw(state_dict_recipes(recipe, edits=edits))
    assert_loads_as_copy(reusing_load, recipe, values, strict=strict)


def check_copying_load(data, recipe, strict):
    values = data.draw(state_dict_recipes(recipe, edits=EDITS | {"meta"}))
    assert_loads_as_copy(copying_load, recipe, values, strict=strict, atomic=False)


# What the law was once broken by: a module, and what was done to its state dict.
BROKE_THE_LAW = {
    # Memory taken by one name was written to by the other.
    "tied_and_copied": (
        Recipe(
            ("linear", "linear", "linear"),
            meta=(0, 1, 2),
            casts=((0, torch.float64), (1, torch.float64), (2, torch.float64)),
            ties=(Tie("module", "2", "0"),),
        ),
        (Edit("inference", "2.bias", "2.bias"), Edit("swapped", "0.bias", "1.bias")),
    ),
    # What gets memory of its own lost the gaps that its strides leave.
    "gaps_on_meta": (
        Recipe(
            ("linear", "odd"),
            meta=(0, 1),
            ties=(Tie("part", "1.column", "1.column"),),
        ),
        (),
    ),
}


QUICK = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


class AllWays(ModuleMachine):
    ways = ("copy", "assign", "reuse")
    skips_materialized = True


class MostlyReuse(ModuleMachine):
    """Without what unties and replaces, so that reused memory lives longer."""

    ways = ("copy", "reuse")
    skips_materialized = True


class TestAllWays(AllWays.TestCase):
    settings = settings(QUICK, max_examples=40, stateful_step_count=25)


class TestMostlyReuse(MostlyReuse.TestCase):
    settings = settings(QUICK, max_examples=20, stateful_step_count=25)


class TestMachine(TestCase):
    def test_a_view_is_not_alone_in_its_memory(self):
        """The machine once asked for memory to be exchanged that the base of a view sees."""
        machine = MostlyReuse()
        part = Tie("part", "0.count", "0.count")
        module = machine.choose(recipe=Recipe(("odd",), ties=(part,)))
        state_dict = machine.state_dict(of=module)
        machine.to_empty(of=module)
        module = machine.construct(device="cpu", seed=1)
        self.assertIsNotNone(module.module[0].count._base)
        machine.load_reusing(into=module, source=state_dict)
        machine.agree()

    def test_tied_tensors_that_no_key_loads_stay_on_meta(self):
        """The machine once found that an empty load gave memory to a known bias and to what is tied to it."""
        machine = MostlyReuse()
        tie = Tie("memory", "0.in_proj_weight", "0.in_proj_bias")
        machine.choose(recipe=Recipe(("attention",), ties=(tie,)))
        module = machine.construct(device="meta", seed=1)
        state_dict = machine.state_dict(of=module)
        self.assertEqual(state_dict.entries, {})
        machine.load_reusing(into=module, source=state_dict)
        machine.agree()

    def test_what_is_assigned_is_there_at_once(self):
        """The machine once found a known bias, and all of its module, on meta after ``assign=True``."""
        machine = AllWays()
        module = machine.choose(recipe=Recipe(("attention",)))
        state_dict = machine.state_dict(of=module)
        module = machine.construct(device="meta", seed=1)
        machine.load_assigning(into=module, source=state_dict)
        machine.agree()
        for name, tensor in named_tensors(module.module):
            value = state_dict.state_dict[name]
            self.assertEqual(tensor.data_ptr(), value.data_ptr(), msg=name)

    def test_what_is_assigned_is_there_if_another_key_is_missing(self):
        with torch.device("meta"):
            module = torch.nn.MultiheadAttention(2, 1)
        state_dict = {"in_proj_bias": torch.ones(6)}
        with self.assertRaisesRegex(RuntimeError, "Missing key"):
            module.load_state_dict(state_dict, assign=True)
        self.assertEqual(module.in_proj_bias, torch.nn.Parameter(torch.ones(6)))
        self.assertTrue(module.in_proj_weight.is_meta)


class TestLaw(TestCase):
    @given(st.data(), recipes(devices=["cpu"]), st.booleans())
    @settings(QUICK, max_examples=60)
    def test_in_memory(self, data, recipe, strict):
        check_law(data, recipe, strict)

    @given(st.data(), recipes(devices=["meta", "mixed"]), st.booleans())
    @settings(QUICK, max_examples=60)
    def test_on_meta(self, data, recipe, strict):
        check_law(data, recipe, strict)

    @given(st.data(), recipes(devices=["cpu"]), st.booleans())
    @settings(QUICK, max_examples=20)
    def test_stock_load_is_a_copying_load(self, data, recipe, strict):
        check_copying_load(data, recipe, strict)

    @parametrize("name", sorted(BROKE_THE_LAW))
    @parametrize("strict", [True, False])
    def test_what_broke_it(self, name, strict):
        recipe, edits = BROKE_THE_LAW[name]
        values = StateDictRecipe(recipe, seed=1, edits=edits)
        assert_loads_as_copy(reusing_load, recipe, values, strict=strict)


instantiate_parametrized_tests(TestLaw)


if __name__ == "__main__":
    run_tests()
