"""What runs around each load: nothing, until :mod:`torch.nn.utils._deferred_init`, of a later patch, sets itself here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.nn import Module


# NB: called with the module, the state dict, and whether this is a load with reuse_tensors=True.
around_load: Callable[
    [Module, Mapping[str, Any], bool], AbstractContextManager[None]
] = lambda *_: nullcontext()  # noqa: E731
