"""``torch.load(lazy=True)`` to the CPU, for the commands, while the patches are on."""

import importlib
import pickle
from typing import Any

import torch


def load(path: str, weights_only: bool = True) -> Any:
    """What is in the file, or sharded checkpoint, ``path``; no tensor data are read."""
    try:
        return _load(path, weights_only)
    except pickle.UnpicklingError as error:
        # NB: jagged tensors are allowed where their modules are imported, which takes seconds.
        if "must be imported to load nested jagged tensors" not in str(error):
            raise
    for name in ("torch._dynamo", "torch.nested"):
        importlib.import_module(name)
    return _load(path, weights_only)


def _load(path: str, weights_only: bool) -> Any:
    return torch.load(path, map_location="cpu", weights_only=weights_only, lazy=True)
