"""The tensors of scripted modules (``torch.jit.script``), plain attributes included.

A scripted module holds the impl of a tensor, where others hold the Python object. So after an exchange of impls it has
to be given each tensor again. Constants in the code of a traced module are not reached; to trace in a context raises.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import Module
from torch.utils._pytree import tree_leaves


def attributes(module: Module) -> dict[str, Any]:
    """What a scripted module itself has, by name, parameters and buffers included; nothing of any other module."""
    if not isinstance(module, torch.jit.ScriptModule):
        return {}
    names = module._concrete_type.get_attributes()
    return {name: module._c.getattr(name) for name in names}


def put_back(module: Module) -> Callable[[], None]:
    """What lets each scripted module below ``module`` have the tensors that it has now, after their exchange."""
    kept = [
        (m._c, name, value)
        for m in module.modules()
        for name, value in attributes(m).items()
        if any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves(value))
    ]

    def put() -> None:
        for scripted, name, value in kept:
            scripted.setattr(name, value)  # type: ignore[operator,union-attr]

    return put
