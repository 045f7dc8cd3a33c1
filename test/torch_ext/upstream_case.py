"""Describe what a call did as plain data, so that two processes can be compared: one with the patches, one without.

A *case* is a function without arguments with a name. Its outcome is the description of what it returns, or the type of
what it raises. The message of an error is written down for the reader; it is not compared.

    python test/torch_ext/upstream_case.py GROUP OUT [LIMIT]

writes the outcomes of one group of cases to OUT, one JSON line each. A line is written when its case starts, too: the
last one of a process that died names the case.
"""

import hashlib
import importlib
import itertools
import json
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch


Case = tuple[str, Callable[[], Any]]


def describe(value: Any) -> Any:
    """What can be seen of ``value``: JSON data, equal in two processes if the values are."""
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, torch.nn.Module):
        state = [*value.named_parameters(), *value.named_buffers()]
        return {"module": type(value).__name__, "state": describe(dict(state))}
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (complex, torch.dtype, torch.device, torch.layout)):
        return repr(value)
    return type(value).__name__


def _tensor(t: torch.Tensor) -> dict[str, Any]:
    # NB: a subclass may answer these itself, also by raising.
    with torch._C.DisableTorchFunction():
        seen = {
            "type": type(t).__name__,
            "device": str(t.device),
            "dtype": str(t.dtype),
            "layout": str(t.layout),
            "shape": str(tuple(t.shape)),
            "requires_grad": t.requires_grad,
        }
        if t.layout is torch.strided and not t.is_nested:
            seen["stride"] = str(t.stride())
            if type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu":
                seen["data"] = _digest(t)
    return seen


def _digest(t: torch.Tensor) -> str:
    if t.is_quantized:
        t = t.int_repr()
    real = t.detach().resolve_conj().resolve_neg().contiguous()
    data = real.flatten().view(torch.uint8).numpy().tobytes() if real.numel() else b""
    return hashlib.sha1(data).hexdigest()[:12]


def name_of(function: Any) -> str:
    """The name of an overridable function, the same in each process."""
    name = torch.overrides.resolve_name(function) or str(function)
    return re.sub(r" at 0x[0-9a-f]+", "", name)


def outcome(function: Callable[[], Any]) -> Any:
    """The description of what ``function`` returns, or the error that it raises."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    try:
        return describe(function())
    except Exception as e:
        lines = str(e).strip().split("\n")
        return {"raises": type(e).__name__, "message": lines[0][:200]}


def write(group: str, out: str, limit: int) -> None:
    """Write the outcomes of the cases of ``group``; ``limit`` is how many inputs of an operator or module it takes."""
    cases: Iterable[Case] = importlib.import_module(f"upstream_{group}").cases(limit)
    warnings.simplefilter("ignore")
    with open(out, "w") as file:
        for name, function in cases:
            print(json.dumps([name]), file=file, flush=True)
            print(json.dumps([name, outcome(function)]), file=file, flush=True)


def some(inputs: Iterable[Any], limit: int) -> list[Any]:
    """The first ``limit`` of ``inputs``, or all of them if it is 0."""
    return list(itertools.islice(inputs, limit or None))


if __name__ == "__main__":
    write(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1)
