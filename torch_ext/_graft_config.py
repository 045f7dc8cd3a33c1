"""Give an imported config module the options that seams add to its classes, and take them away again.

A config module (``torch.utils._config_module``) turns the assignments of its classes into entries when it is imported.
Here the patched text is run once more, as a module of another name, so that torch's own machinery makes the entries of
the new options; these are moved over. Law: after undo the module has the very entries that it had.

Other classes than those of a config module are refused: what has read the class before would not see the change.
"""

import sys
import types
from collections.abc import Callable, Sequence
from typing import cast, TYPE_CHECKING

from torch_ext._error import PatchError
from torch_ext._seam import Seam


if TYPE_CHECKING:
    from torch.utils._config_module import ConfigModule


_added: dict[str, set[str]] = {}  # by module: the options that are there by a graft


def plan_options(
    module: types.ModuleType, code: types.CodeType, seams: Sequence[Seam]
) -> Callable[[], None]:
    """Return what makes ``seams`` the ones that ``module`` has the options of; ``code`` is that of the patched file."""
    # NB: here, since torch_ext alone does not import torch.
    from torch.utils._config_module import ConfigModule

    if not isinstance(module, ConfigModule):
        raise PatchError(
            f"Expected {module.__name__} to be a config module, whose classes can get assignments while torch runs, "
            f"got {module!r}. (Did you mean to use a tree?)"
        )
    wanted = [f"{seam.qualname}.{name}" for seam in seams for name in seam.adds]
    twin = _run(module, code)
    added = _added.setdefault(module.__name__, set())

    def put() -> None:
        for key in added.difference(wanted):
            del module._config[key]
        added.intersection_update(wanted)
        for key in wanted:
            if key not in module._config:  # else from a tree, or set by the user
                module._config[key] = twin._config[key]
                added.add(key)
        # What the module remembers of all its options lies in these.
        for name in module._bypass_keys & vars(twin).keys():
            setattr(module, name, vars(twin)[name])

    return put


def _run(module: types.ModuleType, code: types.CodeType) -> "ConfigModule":
    twin = types.ModuleType(f"{module.__name__}+torch_ext")
    twin.__file__ = code.co_filename  # where linecache has the text
    sys.modules[twin.__name__] = twin
    try:
        exec(code, twin.__dict__)
    finally:
        del sys.modules[twin.__name__]
    return cast("ConfigModule", twin)
