"""PyTorch core patches around the creation, initialization and loading of models, as an importable queue.

Importing this package changes nothing. :func:`enable` switches patches on and returns a handle that undoes it::

    import torch, torch_ext
    torch_ext.enable()                                  # the whole series; torch_ext.auto does it on import
    with torch_ext.enable("load_lazy"):                 # or one patch, for a while
        sd = torch.load("model.pt", lazy=True)
"""

from torch_ext._error import PatchError
from torch_ext._queue import disable, enable, enabled, Handle
from torch_ext._series import Patch, series


__all__ = ["Handle", "Patch", "PatchError", "disable", "enable", "enabled", "series"]
__version__ = "0.1.0"
