"""What runs around each load: nothing, until ``torch.nn.utils._deferred_init``, of a later patch, sets it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.nn.modules.module import Module


def _nothing(
    module: Module, state_dict: Mapping[str, Any], reuses: bool
) -> AbstractContextManager[None]:
    return nullcontext()


# NB: called with the module, the state dict, and whether this is a load with reuse_tensors=True.
around_load: Callable[
    [Module, Mapping[str, Any], bool], AbstractContextManager[None]
] = _nothing
