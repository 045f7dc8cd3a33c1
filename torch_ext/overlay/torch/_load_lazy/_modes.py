"""Whether a dispatch mode looks at what is done to real tensors: then nothing is deferred or hidden from it."""

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def has_dispatch_modes() -> bool:
    """Whether a dispatch mode is on, other than one that says that it ignores real tensors."""
    return bool(torch._C._len_torch_dispatch_stack()) and not all(
        getattr(mode, "ignores_real_tensors", False)
        for mode in _get_current_dispatch_mode_stack()
    )
