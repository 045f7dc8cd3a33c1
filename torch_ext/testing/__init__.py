"""Strategies and state machines that hold modules, and ways to load them, to their laws.

:func:`modules` and :func:`state_dicts` draw values. :func:`recipes` and :func:`state_dict_recipes` draw descriptions,
of which twins can be built. :func:`observe` and :func:`differences` compare twins, :func:`assert_loads_as_copy` is the
law of loading, and :class:`ModuleMachine` the state machine. All of it works with or without patches; it needs
hypothesis, ``pip install 'torch_ext[test]'``.

Example::

    >>> from hypothesis import given, strategies as st
    >>> def my_load(module, state_dict, strict):
    ...     return module.load_state_dict(state_dict, strict)
    >>> @given(st.data(), recipes(devices=["cpu"]))
    ... def test_my_load(data, recipe):
    ...     values = data.draw(state_dict_recipes(recipe))
    ...     assert_loads_as_copy(my_load, recipe, values, atomic=False)
    >>> test_my_load()
"""

from torch_ext.testing._kinds import COMPUTING, KINDS, PLAIN
from torch_ext.testing._law import assert_loads_as_copy, copying_load
from torch_ext.testing._machine import ModuleMachine
from torch_ext.testing._modules import (
    modules,
    named_tensors,
    Recipe,
    recipes,
    Subject,
    Tie,
)
from torch_ext.testing._observe import (
    differences,
    identities,
    Observation,
    observe,
    observe_state_dict,
    overlaps,
)
from torch_ext.testing._reference import Model, model_of
from torch_ext.testing._state_dicts import (
    Edit,
    EDITS,
    HARMFUL,
    HARMLESS,
    state_dict_recipes,
    state_dicts,
    StateDictRecipe,
)


__all__ = [
    "COMPUTING",
    "EDITS",
    "HARMFUL",
    "HARMLESS",
    "KINDS",
    "PLAIN",
    "Edit",
    "Model",
    "ModuleMachine",
    "Observation",
    "Recipe",
    "StateDictRecipe",
    "Subject",
    "Tie",
    "assert_loads_as_copy",
    "copying_load",
    "differences",
    "identities",
    "model_of",
    "modules",
    "named_tensors",
    "observe",
    "observe_state_dict",
    "overlaps",
    "recipes",
    "state_dict_recipes",
    "state_dicts",
]
