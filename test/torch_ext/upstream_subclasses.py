"""What copies and pickles, for each class of ``subclass_db`` and each watcher: the result, and what the watcher saw.

No new argument and no meta block is used: a subclass, a mode or a tensor-like sees the calls that it sees in stock.
"""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.overrides import redispatch_function, TorchFunctionMode
from torch.testing._internal.common_subclass import subclass_db
from torch.utils._python_dispatch import TorchDispatchMode
from upstream_case import Case, name_of


class Functions(TorchFunctionMode):
    """Writes down the functions that it sees."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(name_of(func))
        return func(*args, **(kwargs or {}))


class Redispatches(Functions):
    """Sees what is called inside of a function, too."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(name_of(func))
        if not isinstance(func, FunctionType):  # nothing overridable is called in there
            return func(*args, **(kwargs or {}))
        with self:
            return redispatch_function(func, types, args, kwargs)


class Operators(TorchDispatchMode):
    """Writes down the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Refuses(torch.Tensor):
    """Can be copied, pickled and asked for its shape; knows nothing else."""

    KNOWN = ("__deepcopy__", "__reduce_ex__", "shape.__get__", "_get_obj_state")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = name_of(func).removeprefix("torch.Tensor.")
        if name not in cls.KNOWN:
            return NotImplemented
        with torch._C.DisableTorchFunctionSubclass():
            data = args[0].as_subclass(torch.Tensor)
            if name == "__deepcopy__":
                return data.clone().as_subclass(Refuses)
            if name == "__reduce_ex__":
                return torch.Tensor.as_subclass, (data, Refuses)
            return func(*args, **(kwargs or {}))


def _save_and_load(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _module_of(x: Any) -> nn.Module:
    module = nn.Module()
    if isinstance(x, nn.Parameter):
        module.p = x
    else:
        module.register_buffer("b", x)
    module.tied = module.child = nn.Module()
    return module


def _load_into(x: Any, **kwargs: Any) -> Any:
    module = _module_of(x)
    result = module.load_state_dict(copy.deepcopy(module).state_dict(), **kwargs)
    return [module, list(result)]


ACTIONS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy twice in a list": lambda x: [
        a is b for a, b in [copy.deepcopy([x, x])]
    ],  # memo
    "__deepcopy__": lambda x: torch.Tensor.__deepcopy__(x, {}),
    "__reduce_ex__": lambda x: torch.Tensor.__reduce_ex__(x, 2),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "save and load": _save_and_load,
    "parameter": lambda x: nn.Parameter(x),
    "deepcopy of a module": lambda x: copy.deepcopy(_module_of(x)),
    "pickle of a module": lambda x: pickle.loads(pickle.dumps(_module_of(x))),
    "to": lambda x: _module_of(x).to(torch.float64),
    "to_empty": lambda x: _module_of(x).to_empty(device="cpu").__class__,
    "to meta": lambda x: _module_of(x).to("meta"),
    "load_state_dict": _load_into,
    "load_state_dict, assign": partial(_load_into, assign=True),
    "trunc_normal_": lambda x: nn.init.trunc_normal_(x.detach()).__class__,
    "normal_": lambda x: nn.init.normal_(x.detach()).__class__,
    "kaiming_uniform_": lambda x: (
        nn.init.kaiming_uniform_(x.detach().reshape(1, -1)).__class__
    ),
    "rng state": lambda x: torch.get_rng_state().shape,
    "seed": lambda x: torch.initial_seed(),
}
WATCHERS: dict[str, Callable[[], Any]] = {
    "nothing": nullcontext,
    "function mode": Functions,
    "redispatching mode": Redispatches,
    "dispatch mode": Operators,
}


def cases(limit: int) -> Iterator[Case]:
    makers = {info.name: partial(info.create_fn, 3) for info in subclass_db.values()}
    makers["refuses"] = lambda: torch.randn(3).as_subclass(Refuses)
    makers["meta"] = lambda: torch.randn(3, device="meta")
    for name, make in makers.items():
        for kind in ("tensor", "parameter"):
            for action, act in ACTIONS.items():
                for watcher, watch in WATCHERS.items():
                    case = f"{action} of {kind} of {name} under {watcher}"
                    yield case, partial(_act, make, kind, act, watch)


def _act(make: Any, kind: str, act: Any, watch: Any) -> Any:
    x = make()
    if kind == "parameter":
        x = nn.Parameter(x)
    if hasattr(x, "call_log"):
        x.call_log.clear()
    with watch() as watcher:
        try:
            result = act(x)
        except Exception as e:  # what was seen until then is part of the outcome
            result = ["raises", type(e).__name__]
    log = [name for name, _ in getattr(x, "call_log", [])]
    return [result, getattr(watcher, "seen", None), log[:200]]
