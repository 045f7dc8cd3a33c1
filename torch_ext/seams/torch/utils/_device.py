"""Seams of torch/utils/_device.py.

A block is made as its context is, and dropped where that turns out to be a default device: there, in blocks of other
devices and in contexts that are older than the patch (hence ``getattr``), stock's code alone answers.
"""

import torch
from torch.utils import _device_meta

from torch_ext.seams import seam


class DeviceContext:
    @seam("device_context_meta", base=("7a9bf637db3220cb", "7cefaebd06c10f21"))
    def __init__(self, device):
        # NB: asked here, since Dynamo traces no other file of torch.utils; what it traces is stock's context.
        tracing = torch.compiler.is_dynamo_compiling()
        self.block = None if tracing else _device_meta.block(device)
        ...

    @seam("device_context_meta", base=("6441b3c5905f7a0a",))
    def __enter__(self):
        self.block = None
        ...

    @seam("device_context_meta", base=("db0aa5703d5a9061",))
    def __torch_function__(self, func, types, args=(), kwargs=None):
        block = getattr(self, "block", None)
        if block is not None and not torch.compiler.is_dynamo_compiling():
            call = block.call
            del self, block  # NB: a traceback must not keep the block open
            return call(func, types, args, kwargs)
        ...
