"""The two ways from a checkpoint to a model that runs: stock PyTorch's, and that of the patches.

Law: the models that they return compute the same bits. Both read the file from its path, both start from a model's
constructor that nobody edited, and neither knows the model; only what is in no checkpoint is made as transformers does.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn, Tensor


Construct: TypeAlias = Callable[[], nn.Module]
Phase: TypeAlias = Callable[[str], AbstractContextManager[None]]
Loaded: TypeAlias = tuple[nn.Module, Mapping[str, Tensor]]


def stock(construct: Construct, checkpoint: Path, phase: Phase) -> Loaded:
    """Construct with random weights, read the checkpoint, copy it over."""
    with phase("construct"):
        model = construct()
    with phase("load"):
        state_dict = torch.load(checkpoint)
        model.load_state_dict(state_dict)
    return model, state_dict


def patched(construct: Construct, checkpoint: Path, phase: Phase) -> Loaded:
    """Construct without memory, map the checkpoint, let the model have its tensors."""
    with phase("construct"), torch.device("meta"):
        model = construct()
    with phase("load"):
        state_dict = torch.load(checkpoint, lazy=True)
        model.load_state_dict(state_dict, reuse_tensors=True)  # type: ignore[call-arg]
    with phase("fill in"):
        fill_in(model)
    return model, state_dict


def fill_in(model: Any) -> None:
    """Give a transformers model the buffers that no checkpoint brings back.

    As ``from_pretrained`` does it: transformers initializes each tensor that is not marked as loaded.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        if not tensor.is_meta:
            tensor._is_hf_initialized = True
    model.to_empty(device="cpu", skip_materialized=True)
    model.initialize_weights()


def copied(model: nn.Module, state_dict: Mapping[str, Tensor]) -> int:
    """Number of the state dict's tensors that the model has at another place in memory."""
    own = model.state_dict()
    return sum(own[key].data_ptr() != t.data_ptr() for key, t in state_dict.items())
