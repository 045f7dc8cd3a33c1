"""Every overridable function called with tensor-likes: what reaches their ``__torch_function__``, and what comes back.

The functions are those of ``torch.overrides.get_testing_overrides()``; each is called with a tensor-like, and with a
subclass of Tensor, for each argument that has no default: outside of any mode, and inside of a meta block.
"""

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from upstream_case import Case, name_of


class TensorLike:
    """No tensor, but overrides every function."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(name_of(func))
        return -1


class Subclass(torch.Tensor):
    """A tensor that overrides every function."""

    seen: list[str]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        cls.seen.append(name_of(func))
        return -1


def cases(limit: int) -> Iterator[Case]:
    names: dict[str, int] = {}
    for func, example in torch.overrides.get_testing_overrides().items():
        name = name_of(func)
        names[name] = names.get(name, 0) + 1
        for kind in ("tensor-like", "subclass"):
            for place in ("outside", "in a meta block"):
                case = f"{name} {names[name]} of {kind} {place}"
                yield case, partial(_call, func, example, kind, place)


def _call(func: Any, example: Any, kind: str, place: str) -> Any:
    seen: list[str] = []
    if kind == "subclass":
        Subclass.seen = seen
        with torch._C.DisableTorchFunctionSubclass():
            made = torch.ones(5).as_subclass(Subclass)
    else:
        made = TensorLike(seen)
    count = sum(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in inspect.signature(example).parameters.values()
    )
    seen.clear()
    with torch.device("meta") if place == "in a meta block" else nullcontext():
        try:
            result = func(*[made] * count)
        except Exception as e:
            result = ["raises", type(e).__name__]
    return [result, seen]
