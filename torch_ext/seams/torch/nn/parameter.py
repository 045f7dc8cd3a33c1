"""Seams of torch/nn/parameter.py."""

import sys

import torch

from torch_ext.seams import seam


class Parameter:
    @seam("deferred_init", base=("5bde8bd6f15585ac",))
    def __new__(cls, data=None, requires_grad=True):
        if data is not None and torch._C._is_torch_function_mode_enabled():
            if "torch.nn.utils._deferred_init._outside" in sys.modules:
                from torch.nn.utils._deferred_init import _outside

                data = _outside.parameter_data(data)
        ...

    @seam("deferred_init", base=("b2cd07b9d64edd9e",))
    def __deepcopy__(self, memo):
        if "torch.nn.utils._deferred_init._outside" in sys.modules:
            from torch.nn.utils._deferred_init import _outside

            if _outside.is_recorded(self):
                return _outside.deepcopy_parameter(self, memo)
        ...
