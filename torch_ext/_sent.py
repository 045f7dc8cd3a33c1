"""Lets a spawned process, in which nothing is grafted, import the new files that it needs for what it is sent.

multiprocessing pickles with the reducers that modules register with its ``ForkingPickler``. A reducer of a new file
returns functions and objects of new files, and a spawned process does not find these. So each such reducer is wrapped:
before what it returns it puts an object whose unpickling makes the new files known. No function is patched by that.

Not here: instances of new files' classes that are pickled without a reducer, and reducers that a package's module
registers when it is imported later than its package.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch_ext import _overlay
from torch_ext._series import series


class _Found:
    """Makes the new files of patches known to the process that unpickles it."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _find, self.names


def _find(*names: str) -> None:
    _overlay.find_also(patch for patch in series if patch.name in names)


def _call(_: None, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def wrap_reducers(module: str, names: Sequence[str]) -> None:
    """Wrap the reducers that ``module`` and what lies in it have registered with multiprocessing.

    Args:
        module: name of a module or package that a patch brings, just imported
        names: of the patches whose new files this process finds
    """
    reduction = sys.modules.get("multiprocessing.reduction")
    pickler = getattr(reduction, "ForkingPickler", None)
    for kind, reduce in list(getattr(pickler, "_extra_reducers", {}).items()):
        is_of_module = f"{reduce.__module__}.".startswith(f"{module}.")
        if is_of_module and not hasattr(reduce, "__wrapped__"):
            pickler.register(kind, _wrapped(reduce, names))  # type: ignore[union-attr]


def _wrapped(
    reduce: Callable[[Any], tuple[Any, ...]], names: Sequence[str]
) -> Callable[[Any], tuple[Any, ...]]:
    found = _Found(names)

    @functools.wraps(reduce)
    def reduce_found(value: Any) -> tuple[Any, ...]:
        function, arguments, *rest = reduce(value)
        # NB: a tuple is unpickled in order, so that the rest of it is found.
        return _call, (found, function, *arguments), *rest

    return reduce_found
