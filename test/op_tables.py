"""Core's own lists of functions and operations, for the tests of tables that are kept by hand.

A new release that adds to these lists makes such a test fail and say what is missing; each takes any table.
"""

import warnings

import torch
from torch import Tensor
from torch.overrides import get_ignored_functions, get_testing_overrides
from torch.testing._internal.common_methods_invocations import op_db


def overridable():
    """Everything that ``__torch_function__`` may be given."""
    return set(get_testing_overrides())


def known_to_core(function):
    """Whether core lists ``function``, as overridable or as one that never is."""
    return function in overridable() or function in get_ignored_functions()


def properties():
    """Names of Tensor's properties, whose getters ``__torch_function__`` may be given."""
    return {
        name
        for name in dir(Tensor)
        if hasattr(getattr(Tensor, name), "__set__")
        and getattr(Tensor, name).__get__ in overridable()
    }


def views():
    """By name, the functions and methods of op_db whose result lies in the memory of their first argument."""
    found = {}
    for op in op_db:
        # NB: jiterator needs an accelerator.
        if torch.float32 not in op.dtypes or "jiterator" in op.name:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if any(map(_is_view_of_input, [op] * 2, _samples(op))):
                found[op.name] = {
                    f for f in (op.op, op.method_variant) if callable(f)
                } & overridable()
    return found


def _samples(op):
    for i, sample in enumerate(op.sample_inputs("cpu", torch.float32)):
        if i == 2:
            return
        yield sample


def _is_view_of_input(op, sample):
    if not (isinstance(sample.input, Tensor) and sample.input.numel()):
        return False
    out = op(sample.input, *sample.args, **sample.kwargs)
    outs = out if isinstance(out, (tuple, list)) else [out]
    storage = _storage(sample.input)
    return any(isinstance(o, Tensor) and _storage(o) == storage for o in outs)


def _storage(tensor):
    return tensor.untyped_storage()._cdata if torch._C._has_storage(tensor) else 0
