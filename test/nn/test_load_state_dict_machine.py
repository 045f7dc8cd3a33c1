# Owner(s): ["module: nn"]
"""Each way to load, held to the law and to naive models of modules by ``torch_ext.testing``."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from torch.testing._internal.common_utils import run_tests, TestCase

from torch_ext.testing import (
    assert_loads_as_copy,
    COMPUTING,
    copying_load,
    HARMFUL,
    HARMLESS,
    ModuleMachine,
    named_tensors,
    recipes,
    state_dict_recipes,
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


def run_law(check, max_examples, **kwargs):
    test = given(st.data(), recipes(**kwargs), st.booleans())(check)
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    settings(max_examples=max_examples, deadline=None, suppress_health_check=slow)(
        test
    )()


class AllWays(ModuleMachine):
    ways = ("copy", "assign", "reuse")
    skips_materialized = True


class MostlyReuse(ModuleMachine):
    """Without what unties and replaces, so that reused memory lives longer."""

    ways = ("copy", "reuse")
    skips_materialized = True


def run_machine(machine, max_examples):
    slow = [HealthCheck.too_slow]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=slow,
        ),
    )


class TestLoadStateDictMachine(TestCase):
    def test_law_in_memory(self):
        run_law(check_law, 60, devices=["cpu"])

    def test_law_on_meta(self):
        run_law(check_law, 60, devices=["meta", "mixed"])

    def test_stock_load_is_a_copying_load(self):
        run_law(check_copying_load, 20, devices=["cpu"])

    def test_machine(self):
        run_machine(AllWays, 40)

    def test_machine_of_those_that_keep_identity(self):
        run_machine(MostlyReuse, 20)

    @pytest.mark.slow
    def test_law_in_memory_at_length(self):
        run_law(check_law, 5000, devices=["cpu"])

    @pytest.mark.slow
    def test_law_on_meta_at_length(self):
        run_law(check_law, 5000, devices=["meta", "mixed"])

    @pytest.mark.slow
    def test_machine_at_length(self):
        run_machine(AllWays, 3500)
        run_machine(MostlyReuse, 1500)


if __name__ == "__main__":
    run_tests()
