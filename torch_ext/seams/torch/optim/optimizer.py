"""Seams of torch/optim/optimizer.py."""

from torch.optim import _sharded_state

from torch_ext.seams import seam


class Optimizer:
    @seam("optimizer_load_full_state", base="e892773ef2944170")
    def _process_value_according_to_param_policy(param, value, key=None):
        value = _sharded_state.like_param(param, value, key)
        ...
