"""Recipes for state dicts, from faithful to hostile, and strategies that draw them.

The law: ``recipe.build()`` makes the same state dict each time, in memory of its own. What it does not draw: other
kinds of mappings, sparse and quantized tensors, and subclasses of Tensor.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import hypothesis.strategies as st
import torch
from torch import nn, Tensor

from torch_ext.testing._modules import Recipe


StateDict = OrderedDict[str, Any]


@dataclass(frozen=True)
class Edit:
    """One of :data:`EDITS`, done to a key; some have to do with another key, too."""

    how: str
    key: str
    other: str


@dataclass(frozen=True)
class StateDictRecipe:
    """How to build a state dict: as that of ``module`` on the CPU with the values of ``seed``, then edited.

    An edit of what is by now not there, no tensor, an inference tensor or on meta does nothing.

    Example::

        >>> recipe = StateDictRecipe(Recipe(("linear",)), seed=1, edits=(Edit("double", "0.bias", "0.bias"),))
        >>> recipe.build()["0.bias"].dtype
        torch.float64
    """

    module: Recipe
    seed: int = 0
    edits: tuple[Edit, ...] = ()

    def build(self) -> StateDict:
        module = self.module.on("cpu").build(self.seed).module
        state_dict = cast(StateDict, module.state_dict())
        for edit in self.edits:
            if all(
                map(_editable, (state_dict.get(edit.key), state_dict.get(edit.other)))
            ):
                EDITS[edit.how](state_dict, edit.key, edit.other)
        return state_dict


def _editable(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_inference() and not value.is_meta


def _value(
    change: Callable[[Tensor], object],
) -> Callable[[StateDict, str, str], None]:
    def edit(state_dict: StateDict, key: str, other: str) -> None:
        with torch.no_grad():
            state_dict[key] = change(state_dict[key])

    return edit


def _as(dtype: torch.dtype, value: Tensor) -> Tensor:
    # NB: a conversion of complex numbers to real ones warns.
    return value if value.is_complex() else value.to(dtype)


def _strided(value: Tensor) -> Tensor:
    return torch.stack([value, value], -1)[..., 0]


def _expanded(value: Tensor) -> Tensor:
    return value.reshape(-1)[0].expand(value.shape) if value.numel() else value


def _parameter(value: Tensor) -> Tensor:
    return nn.Parameter(value) if value.is_floating_point() else value


def _in_a_graph(value: Tensor) -> Tensor:
    with torch.enable_grad():
        return _parameter(value).clone()


def _foreign(value: Tensor) -> Tensor:
    """Memory that numpy owns."""
    if value.dtype is torch.bfloat16:
        return value  # numpy has none
    return torch.from_numpy(value.detach().numpy().copy())


def _inference(value: Tensor) -> Tensor:
    with torch.inference_mode():
        return value.clone()


def _same(state_dict: StateDict, key: str, other: str) -> None:
    if _alike(state_dict, key, other):
        state_dict[key] = state_dict[other]


def _alias(state_dict: StateDict, key: str, other: str) -> None:
    if _alike(state_dict, key, other):
        state_dict[key] = state_dict[other].detach()


def _swapped(state_dict: StateDict, key: str, other: str) -> None:
    if _alike(state_dict, key, other):
        state_dict[key], state_dict[other] = state_dict[other], state_dict[key]


def _overlapping(state_dict: StateDict, key: str, other: str) -> None:
    """Both in one piece of memory, the one's last element being the other's first."""
    a, b = state_dict[key], state_dict[other]
    if a.dtype is b.dtype and a.numel() and b.numel():
        memory = torch.cat([a.detach().reshape(-1), b.detach().reshape(-1)[1:]])
        state_dict[key] = memory[: a.numel()].view(a.shape)
        state_dict[other] = memory[a.numel() - 1 :].view(b.shape)


def _flat(state_dict: StateDict, key: str, other: str) -> None:
    """All of one dtype in one piece of memory, as sharded and flattened checkpoints are."""
    dtype = state_dict[key].dtype
    keys = [k for k, v in state_dict.items() if _editable(v) and v.dtype is dtype]
    memory = torch.cat([state_dict[k].detach().reshape(-1) for k in keys])
    start = 0
    for k in keys:
        end = start + state_dict[k].numel()
        state_dict[k] = memory[start:end].view(state_dict[k].shape)
        start = end


def _drop(state_dict: StateDict, key: str, other: str) -> None:
    del state_dict[key]


def _adding(suffix: str) -> Callable[[StateDict, str, str], None]:
    def edit(state_dict: StateDict, key: str, other: str) -> None:
        state_dict[key + suffix] = state_dict[key]

    return edit


def _plain(state_dict: StateDict, key: str, other: str) -> None:
    """What was saved before modules had versions."""
    if hasattr(state_dict, "_metadata"):
        del state_dict._metadata


def _alike(state_dict: StateDict, key: str, other: str) -> bool:
    return bool(state_dict[other].shape == state_dict[key].shape)


#: What the copying load accepts, with another memory, dtype or layout than the module has.
HARMLESS = {
    "double": _value(lambda t: _as(torch.float64, t)),
    "half": _value(lambda t: _as(torch.float16, t)),
    "int": _value(lambda t: _as(torch.int32, torch.nan_to_num(t))),
    "strided": _value(_strided),
    "expanded": _value(_expanded),
    "parameter": _value(_parameter),
    "in a graph": _value(_in_a_graph),
    "foreign": _value(_foreign),
    "shared": _value(lambda t: t.clone().share_memory_()),
    "inference": _value(_inference),
    "same": _same,
    "alias": _alias,
    "swapped": _swapped,
    "overlapping": _overlapping,
    "flat": _flat,
    "no metadata": _plain,
}

#: What it refuses if it is strict, or at all.
HARMFUL = {
    "drop": _drop,
    "add": _adding("x"),
    "add below": _adding(".x"),
    "add extra state": _adding("_extra_state"),
    "shape": _value(lambda t: torch.stack([t, t])),
    "one": _value(lambda t: t.reshape(-1)[:1]),
    "text": _value(lambda t: "text"),
    "none": _value(lambda t: None),
}

#: All edits by name; ``"meta"`` takes the values away.
EDITS = {**HARMLESS, **HARMFUL, "meta": _value(lambda t: t.to("meta"))}


@st.composite
def state_dict_recipes(
    draw: st.DrawFn,
    module: Recipe,
    *,
    edits: Iterable[str] = (*HARMLESS, *HARMFUL),
    seeds: Sequence[int] = range(1, 10),
) -> StateDictRecipe:
    """Recipes for state dicts that were meant for a module.

    Args:
        module: what the keys are from.
        edits: names of :data:`EDITS`.
        seeds: of the values; seed 0 gives those that ``module.build()`` has.

    Example::

        >>> from hypothesis import given
        >>> linear = Recipe(("linear",))
        >>> @given(state_dict_recipes(linear, edits=HARMLESS))
        ... def test(recipe):
        ...     assert list(recipe.build()) == ["0.weight", "0.bias"]
        >>> test()
    """
    keys = list(module.on("meta").build().module.state_dict())
    seed = draw(st.sampled_from(seeds))
    hows = sorted(edits)
    if not (keys and hows):
        return StateDictRecipe(module, seed)
    key = st.sampled_from(keys)
    edit = st.builds(Edit, st.sampled_from(hows), key, key)
    return StateDictRecipe(module, seed, tuple(draw(st.lists(edit, max_size=4))))


def state_dicts(
    module: Recipe, *, edits: Iterable[str] = (*HARMLESS, *HARMFUL)
) -> st.SearchStrategy[StateDict]:
    """State dicts as :func:`state_dict_recipes` describes them.

    Example::

        >>> from hypothesis import given
        >>> linear = Recipe(("linear",))
        >>> @given(state_dicts(linear, edits=["half", "expanded"]))
        ... def test(state_dict):
        ...     assert linear.build().module.load_state_dict(state_dict)
        >>> test()
    """
    return state_dict_recipes(module, edits=edits).map(StateDictRecipe.build)
