"""Seams of overridable functions show nothing of themselves to subclasses, modes and tensor-likes.

Every case runs with the stock library in one process and with all patches in another. The results have to be equal:
values, exceptions with their texts, and the calls that were seen.
"""

import copy
import functools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn, Tensor
from torch.overrides import redispatch_function, TorchFunctionMode
from torch.testing._internal.common_subclass import subclass_db

from torch_ext import _drift
from torch_ext._series import series


log: list[str] = []


class Redispatching(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        log.append(torch.overrides.resolve_name(func) or str(func))
        return redispatch_function(func, types, args, kwargs or {})


class Logging(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        log.append(torch.overrides.resolve_name(func) or str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


class Refusing(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        log.append(torch.overrides.resolve_name(func) or str(func))
        return NotImplemented


class Like:
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        log.append(torch.overrides.resolve_name(func) or str(func))
        return 7


class AnswersAll:
    def __getattr__(self, name):
        log.append(name)
        raise AttributeError(name)


class LoggingMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        log.append(torch.overrides.resolve_name(func) or str(func))
        return func(*args, **(kwargs or {}))


class RedispatchingMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        log.append(torch.overrides.resolve_name(func) or str(func))
        return redispatch_function(func, types, args, kwargs or {})


class RedispatchingInsideMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        log.append(torch.overrides.resolve_name(func) or str(func))
        with self:
            return redispatch_function(func, types, args, kwargs or {})


def _values():
    data = torch.arange(6.0).reshape(2, 3)
    values = {
        "tensor": data,
        "parameter": nn.Parameter(data.clone()),
        "buffer": nn.Buffer(data.clone()),
        "lazy": nn.UninitializedParameter(),
        "sparse": data.to_sparse(),
        "nested": torch.nested.nested_tensor([data[0], data[1, :2]]),
        "quantized": torch.quantize_per_tensor(data, 0.5, 0, torch.qint8),
        "meta": data.to("meta"),
        "meta parameter": nn.Parameter(data.to("meta")),
        "like": Like(),
        "answers all": AnswersAll(),
    }
    for cls in (Redispatching, Logging, Refusing):
        values[cls.__name__] = data.clone().as_subclass(cls)
        values[f"{cls.__name__} on meta"] = data.to("meta").as_subclass(cls)
        values[f"Parameter of {cls.__name__}"] = Tensor._make_subclass(
            type(f"P{cls.__name__}", (cls, nn.Parameter), {}), data.clone()
        )
    for cls, info in subclass_db.items():
        values[f"subclass_db {cls.__name__}"] = info.create_fn((2, 3))
    return values


def _trunc_normal(value):
    torch.manual_seed(0)
    return nn.init.trunc_normal_(value)


def _apply(value):
    module = nn.Linear(2, 2)
    fn = mock.MagicMock(side_effect=lambda t: t.double())
    module._apply(fn)
    return [str(p.dtype) for p in module.parameters()], fn.call_count


# What calls the function of a seam that is overridable; see test_every_overridable_seam_has_a_case.
CASES = {
    "Tensor.__deepcopy__": lambda v: Tensor.__deepcopy__(v, {}),
    "Tensor.__reduce_ex__": lambda v: Tensor.__reduce_ex__(v, 2)[0].__name__,
    "Parameter.__new__": lambda v: nn.Parameter(v, False),
    "Parameter.__deepcopy__": lambda v: nn.Parameter.__deepcopy__(v, {}),
    "_no_grad_trunc_normal_": _trunc_normal,
    "Module._apply": _apply,
    "get_rng_state": lambda v: torch.get_rng_state().shape,
    "initial_seed": lambda v: torch.manual_seed(3) and torch.initial_seed(),
}
MORE = {
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda v: pickle.loads(pickle.dumps(v)),
}
MODES = {
    "none": None,
    "logging": LoggingMode,
    "redispatching": RedispatchingMode,
    "redispatching inside": RedispatchingInsideMode,
}


def _show(result):
    with torch._C.DisableTorchFunction():
        if not isinstance(result, Tensor):
            return type(result).__name__ if hasattr(result, "__dict__") else str(result)
        kind = f"{type(result).__name__} {result.layout} {result.device}"
        if type(result) in (Tensor, nn.Parameter, Redispatching, Logging, Refusing):
            return f"{kind} {torch.Tensor.__repr__(result.as_subclass(Tensor))}"
        return kind


def _outcome(call, value, mode):
    log.clear()
    try:
        if mode is None:
            result = call(value)
        else:
            with mode():
                result = call(value)
        shown = _show(result)
    except Exception as error:
        # NB: an address in a text is another in each process.
        shown = f"{type(error).__name__}: {str(error).split(' at 0x')[0]}"
    return [shown, list(log)]


def outcomes():
    return {
        f"{what} / {kind} / {name}": _outcome(call, _values()[kind], mode)
        for what, call in {**CASES, **MORE}.items()
        for kind in _values()
        for name, mode in MODES.items()
    }


@functools.cache
def _run(patched):
    code = (
        "import torch_ext, json; "
        + ("torch_ext.enable(); " if patched else "")
        + "import test_seams_are_invisible as t; print(json.dumps(t.outcomes()))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("what", [*CASES, *MORE])
def test_patched_is_as_stock(what):
    stock, patched = (
        {k: v for k, v in _run(p).items() if k.split(" / ")[0] == what}
        for p in (False, True)
    )
    assert stock and stock.keys() == patched.keys()
    differ = {k: (stock[k], patched[k]) for k in stock if stock[k] != patched[k]}
    assert not differ


def test_every_overridable_seam_has_a_case():
    # These files hold what torch overrides: a seam in one of them needs a case.
    files = {"torch/_tensor.py", "torch/random.py", "torch/functional.py"}
    files |= {"torch/nn/init.py", "torch/nn/parameter.py", "torch/nn/functional.py"}
    seams = {s.qualname for p in series for s in _drift.seams_of(p) if s.file in files}
    assert seams and seams <= CASES.keys()
