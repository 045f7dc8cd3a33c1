"""Seams of torch/distributed/fsdp/_init_utils.py."""

import warnings

import torch

from torch_ext.seams import seam


@seam("materialize_sharded", base=("8c9d990a2ff1dac6",))
def _materialize_with_param_init_fn(root_module, param_init_fn, ignored_modules):
    if callable(param_init_fn):
        from torch.distributed.fsdp import _materialize

        modules = _get_modules_to_materialize(root_module, ignored_modules)
        return _materialize.by_param_init_fn(modules, param_init_fn)
    ...


@seam("materialize_sharded", base=("2201f4393beb8f80",))
def _materialize_meta_module(
    root_module, device_from_device_id, ignored_modules, device_handle
):
    from torch.distributed.fsdp import _materialize

    device = torch.device(device_from_device_id or device_handle.current_device())
    modules = _get_modules_to_materialize(root_module, ignored_modules)
    try:
        _materialize.by_default(modules, device)
    except BaseException as e:
        warnings.warn(
            f"Unable to call `reset_parameters()` for module on meta device with error {e}. Please ensure that each "
            "module with parameters or buffers of its own implements a `reset_parameters()` method.",
            stacklevel=2,
        )
        raise
