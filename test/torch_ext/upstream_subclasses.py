"""What copies and pickles, for each class of ``subclass_db`` and each watcher: the result, and what the watcher saw.

No new argument is used, and no meta block is open: a subclass, a mode or a tensor-like sees the calls that it sees in
stock. But one was open before, since most seams do nothing until then.
"""

import copy
import functools
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import _init_utils
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import distribute_tensor, Shard
from torch.overrides import redispatch_function, TorchFunctionMode
from torch.testing._internal.common_subclass import subclass_db
from torch.testing._internal.distributed.fake_pg import FakeStore
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


class Unknowing(torch.Tensor):
    """Knows nothing, so that each overridable call raises."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return NotImplemented


class TensorLike:
    """No tensor, but answers each overridable call, and is asked for no attribute that it does not have."""

    def __init__(self) -> None:
        self.call_log: list[tuple[str, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.call_log.append((name_of(func), types))
        return "answered"

    def __getattr__(self, name: str) -> Any:
        self.call_log.append((f"attribute {name}", None))
        raise AttributeError(name)


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


def _sharded_by_fsdp(x: Any) -> Any:
    module = nn.Linear(2, 3)
    of = SimpleNamespace(module=module, param_name="weight")
    of.shared_modules, of.shared_param_names = [nn.Linear(2, 3)], ["weight"]
    FSDPParam._setattr_on_modules(SimpleNamespace(_module_info=of), x)  # type: ignore[arg-type]
    return module


def _materialized_by_fsdp(x: Any) -> Any:
    module = _module_of(x)
    module.reset_parameters = lambda: None  # type: ignore[assignment]
    module.child.reset_parameters = lambda: None  # type: ignore[assignment,union-attr]
    _init_utils._materialize_meta_module(module, torch.device("cpu"), set(), None)  # type: ignore[arg-type]
    return module


def _initialized_by_fsdp(x: Any) -> Any:
    module = _module_of(x)
    _init_utils._materialize_with_param_init_fn(module, lambda m: None, set())
    return module


@functools.cache
def _mesh() -> DeviceMesh:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    return init_device_mesh("cpu", (2,))


def _in_a_cpu_block(x: Any) -> Any:
    with torch.device("cpu"):
        return [torch.add(x, x), torch.zeros(2)]


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
    "deepcopy as a parameter": lambda x: nn.Parameter.__deepcopy__(x, {}),
    "sharded by FSDP": _sharded_by_fsdp,
    "materialized by FSDP": _materialized_by_fsdp,
    "initialized by FSDP": _initialized_by_fsdp,
    "distribute_tensor": lambda x: distribute_tensor(x, _mesh(), [Shard(0)]),
    "in a block of the CPU": _in_a_cpu_block,
    "_no_grad_trunc_normal_": lambda x: (
        nn.init._no_grad_trunc_normal_(x.detach(), 0.0, 1.0, -2.0, 2.0).__class__
    ),
    "trunc_normal_": lambda x: nn.init.trunc_normal_(x.detach()).__class__,
    "normal_": lambda x: nn.init.normal_(x.detach()).__class__,
    "kaiming_uniform_": lambda x: (
        nn.init.kaiming_uniform_(x.detach().reshape(1, -1)).__class__
    ),
    "rng state": lambda x: torch.get_rng_state().shape,
    "seed": lambda x: torch.initial_seed(),
}
# The seams of functions that are given tensors: which action calls the function.
SEAMS = {
    "load in torch/serialization.py": "save and load",
    "save in torch/serialization.py": "save and load",
    "Module.to_empty in torch/nn/modules/module.py": "to_empty",
    "Module._apply in torch/nn/modules/module.py": "to",
    "Module.load_state_dict in torch/nn/modules/module.py": "load_state_dict",
    "Tensor.__deepcopy__ in torch/_tensor.py": "__deepcopy__",
    "Tensor.__reduce_ex__ in torch/_tensor.py": "__reduce_ex__",
    "_no_grad_trunc_normal_ in torch/nn/init.py": "_no_grad_trunc_normal_",
    "Parameter.__new__ in torch/nn/parameter.py": "parameter",
    "Parameter.__deepcopy__ in torch/nn/parameter.py": "deepcopy as a parameter",
    "get_rng_state in torch/random.py": "rng state",
    "initial_seed in torch/random.py": "seed",
    "DeviceContext.__init__ in torch/utils/_device.py": "in a block of the CPU",
    "DeviceContext.__torch_function__ in torch/utils/_device.py": "in a block of the CPU",
    "FSDPParam._setattr_on_modules in torch/distributed/fsdp/_fully_shard/_fsdp_param.py": "sharded by FSDP",
    "_materialize_with_param_init_fn in torch/distributed/fsdp/_init_utils.py": "initialized by FSDP",
    "_materialize_meta_module in torch/distributed/fsdp/_init_utils.py": "materialized by FSDP",
    "distribute_tensor in torch/distributed/tensor/_api.py": "distribute_tensor",
}
# Those that are given none.
WITHOUT_TENSORS = {
    "DeviceContext.__enter__ in torch/utils/_device.py",  # of torch.set_default_device
    "dcp_to_torch_save in torch/distributed/checkpoint/format_utils.py",  # paths
    "Optimizer._process_value_according_to_param_policy in torch/optim/optimizer.py",  # asks for DTensors' class alone
}
WATCHERS: dict[str, Callable[[], Any]] = {
    "nothing": nullcontext,
    "function mode": Functions,
    "redispatching mode": Redispatches,
    "dispatch mode": Operators,
}


def cases(limit: int) -> Iterator[Case]:
    arm()
    for seam, action in SEAMS.items():
        yield f"{action} calls {seam}", partial(_calls, seam, ACTIONS[action])
    makers = {info.name: partial(info.create_fn, 3) for info in subclass_db.values()}
    makers["refuses"] = lambda: torch.randn(3).as_subclass(Refuses)
    makers["unknowing"] = lambda: torch.randn(3).as_subclass(Unknowing)
    makers["tensor-like"] = TensorLike
    makers["meta"] = lambda: torch.randn(3, device="meta")
    for name, make in makers.items():
        for kind in ("tensor", "parameter"):
            for action, act in ACTIONS.items():
                for watcher, watch in WATCHERS.items():
                    case = f"{action} of {kind} of {name} under {watcher}"
                    yield case, partial(_act, make, kind, act, watch)


def arm() -> None:
    """Let the seams that do nothing before the first meta block do something."""
    with torch.device("meta"):
        torch.empty(1)


def _calls(seam: str, act: Any) -> bool:
    """Whether ``act`` calls the function of ``seam``."""
    qualname, _, file = seam.partition(" in ")
    called = set()

    def profile(frame: Any, event: str, arg: Any) -> None:
        path = frame.f_code.co_filename.removesuffix("+torch_ext")
        called.add((frame.f_code.co_name, path.endswith(f"/{file}")))

    x = nn.Parameter(torch.ones(3))
    sys.setprofile(profile)
    try:
        act(x)
    except RuntimeError:  # a Parameter is no plain tensor to Tensor.__deepcopy__
        pass
    finally:
        sys.setprofile(None)
    return (qualname.rpartition(".")[2], True) in called


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
