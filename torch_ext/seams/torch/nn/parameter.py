"""Seams of torch/nn/parameter.py."""

import sys

import torch

from torch_ext.seams import seam


class Parameter:
    @seam("deferred_init", base=("5bde8bd6f15585ac",))
    def __new__(cls, data=None, requires_grad=True):
        if data is not None and torch._C._is_torch_function_mode_enabled():
            outside = sys.modules.get("torch.nn.utils._deferred_init._outside")
            if outside is not None:
                data = outside.parameter_data(data)
        ...

    @seam("deferred_init", base=("b2cd07b9d64edd9e",))
    def __deepcopy__(self, memo):
        outside = sys.modules.get("torch.nn.utils._deferred_init._outside")
        if outside is not None:
            if outside.is_recorded(self):
                return outside.deepcopy_parameter(self, memo)
        ...
