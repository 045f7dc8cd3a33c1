"""The law of loading: a way to load leaves a module as the copying load does, or as it was.

What it does not say: whose memory the module has afterwards, and what happens to a state dict that is made of the
module's own memory.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from torch_ext.testing._modules import named_tensors, Recipe, Subject
from torch_ext.testing._observe import (
    differences,
    Observation,
    observe,
    observe_state_dict,
)
from torch_ext.testing._state_dicts import StateDict, StateDictRecipe


Load = Callable[[nn.Module, StateDict, bool], Any]


def copying_load(module: nn.Module, state_dict: StateDict, strict: bool) -> Any:
    """``module.load_state_dict(state_dict, strict)``."""
    return module.load_state_dict(state_dict, strict)


def assert_loads_as_copy(
    load: Load,
    recipe: Recipe,
    values: StateDictRecipe,
    *,
    strict: bool = True,
    atomic: bool = True,
) -> Any:
    """Load a module one way and its twin on the CPU by the copying load; observe both, use both, observe again.

    Args:
        load: takes a module, a state dict and ``strict``.
        recipe: of the module.
        values: of the state dict.
        strict: whether other keys are an error.
        atomic: whether a load that raises must leave the module as it was.

    Returns:
        What ``load`` returned, or None if both raised the same error.

    Raises:
        AssertionError: with a line for each aspect in which the two differ.

    Example::

        >>> linear = Recipe(("linear",), optimizer="sgd", steps=1)
        >>> values = StateDictRecipe(linear, seed=1)
        >>> assert_loads_as_copy(copying_load, linear, values)
        <All keys matched successfully>
        >>> def assign(module, state_dict, strict):
        ...     return module.load_state_dict(state_dict, strict, assign=True)
        >>> assert_loads_as_copy(assign, linear, values)
        Traceback (most recent call last):
        AssertionError: Expected the same state dict, got:
        as a whole, metadata: ...
    """
    observed, expected = recipe.build(), recipe.on("cpu").build()
    state_dict = values.build()
    untouched, before = observe_state_dict(state_dict), observe(observed)
    on_meta = {name for name, t in named_tensors(observed.module) if t.is_meta}
    expected_result, expected_error = _try(copying_load, expected, state_dict, strict)
    _assert_alike("state dict", untouched, observe_state_dict(state_dict))
    result, error = _try(load, observed, state_dict, strict)
    _assert_alike("state dict", untouched, observe_state_dict(state_dict))
    if error != expected_error:
        raise AssertionError(f"Expected the error {expected_error}, got {error}.")
    if error is not None:
        if atomic:
            # NB: what hooks do outside of the module cannot be undone.
            before["", "calls"] = list(expected.calls)
            _assert_alike("module after an error", before, observe(observed))
        return None
    if result != expected_result:
        raise AssertionError(f"Expected the result {expected_result}, got {result}.")
    # NB: what nothing was loaded into had no value on meta, not even where a tie gave it memory.
    no_value = on_meta & {*result.missing_keys, *_non_persistent(observed.module)}
    left = [
        name
        for name, t in named_tensors(observed.module)
        if t.is_meta or name in no_value
    ]
    _assert_as_loaded(expected, observed, left)
    if not left:
        expected.use()
        observed.use()
        _assert_as_loaded(expected, observed, left)
    return result


def _non_persistent(module: nn.Module) -> Iterator[str]:
    for prefix, child in module.named_modules(remove_duplicate=False):
        for name in child._non_persistent_buffers_set:
            yield f"{prefix}.{name}" if prefix else name


def _try(
    load: Load, subject: Subject, state_dict: StateDict, strict: bool
) -> tuple[Any, tuple[type, str] | None]:
    try:
        return load(subject.module, state_dict, strict), None
    except Exception as error:
        return None, (type(error), str(error))


def _assert_as_loaded(expected: Subject, observed: Subject, left: list[str]) -> None:
    """But for the memory of those tensors that are left on meta, or without a value."""
    seen = [observe(s, ignore_values=left) for s in (expected, observed)]
    for observation in seen if left else ():
        pairs = observation["", "shared memory"]
        assert isinstance(pairs, list)
        kept = [pair for pair in pairs if not set(pair) & set(left)]
        observation["", "shared memory"] = kept
    _assert_alike("module", *seen)


def _assert_alike(what: str, expected: Observation, observed: Observation) -> None:
    lines = differences(expected, observed)
    if lines:
        raise AssertionError("\n".join([f"Expected the same {what}, got:", *lines]))
