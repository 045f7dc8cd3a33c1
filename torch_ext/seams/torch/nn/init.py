"""Seams of torch/nn/init.py."""

import sys

import torch

from torch_ext.seams import seam


@seam("deferred_init", base=("ad9b346582c8b125", "d1a4cfc03eb5b40e"))
def _no_grad_trunc_normal_(tensor, mean, std, a, b, generator=None):
    # It looks at what it draws. A recorder, which knows no values, has to see it as one call, as it does uniform_ and
    # normal_. Outside of a recorder's context everybody sees the operations, as without this.
    if torch._C._is_torch_function_mode_enabled():
        outside = sys.modules.get("torch.nn.utils._deferred_init._outside")
        if outside is not None:
            if outside.is_inside() and torch.overrides.has_torch_function_variadic(
                tensor
            ):
                return torch.overrides.handle_torch_function(
                    _no_grad_trunc_normal_,
                    (tensor,),
                    tensor,
                    mean,
                    std,
                    a,
                    b,
                    generator=generator,
                )
    ...
