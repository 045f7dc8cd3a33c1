"""What a later patch does around each load: :mod:`torch.nn.utils._deferred_init`, once a module was deferred.

The normal path pays for one look at a global. Nothing is imported here; the later patch registers itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.nn import Module


# NB: called with the module, the state dict, and whether tensors of the module are replaced (assign=True) or exchanged
# (reuse_tensors=True) instead of being copied to.
Around = Callable[[Module, Mapping[str, Any], bool], AbstractContextManager[None]]
_around: Around | None = None
_nothing = nullcontext()


def register(around: Around) -> None:
    """Let each load run in the context that ``around`` returns."""
    global _around
    _around = around


def around_load(
    module: Module, state_dict: Mapping[str, Any], replaces: bool
) -> AbstractContextManager[None]:
    """The context in which one load runs."""
    return _nothing if _around is None else _around(module, state_dict, replaces)
