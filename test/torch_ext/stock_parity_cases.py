"""Calls of patched functions without their new arguments, as a script: prints what each does, for stock and patched.

What is seen of a call: its result or its error; each warning with its category, text and module; the functions and
operations that modes see.
"""

import io
import json
import pathlib
import re
import sys
import tempfile
import warnings
from collections import OrderedDict
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Refuses(TorchDispatchMode):
    """No tensor may be made of nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "empty" in str(func) or "zeros" in str(func):
            raise RuntimeError(f"refused: {func}")
        return func(*args, **(kwargs or {}))


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__qualname__", str(func)))
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    pass


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.PReLU()))


def values(module):
    return {key: value.tolist() for key, value in module.state_dict().items()}


def loaded(state_dict=None, module=None, **kwargs):
    module = model() if module is None else module
    if state_dict is None:
        state_dict = model().state_dict()
    return [list(module.load_state_dict(state_dict, **kwargs)), values(module)]


def edited(**edits):
    return OrderedDict({**model().state_dict(), **edits})


def under(mode, function, make=lambda: None):
    """What ``mode`` sees of a call, which is given what ``make`` made before."""
    made = make()
    with mode:
        function(made)
    return mode.seen


def autospec():
    with mock.patch.object(nn.Linear, "_load_from_state_dict", autospec=True) as own:
        result = nn.Sequential(nn.Linear(2, 3)).load_state_dict({}, strict=False)
        return [list(result), own.call_count]


def made_by_exec():
    names = {"nn": nn, "__name__": None}
    text = "class Made(nn.Linear):\n def _load_from_state_dict(self, *a): super()._load_from_state_dict(*a)"
    exec(text, names)
    made = names["Made"](2, 3)
    return list(nn.Sequential(made).load_state_dict({}, strict=False))


class Duck:
    """What load_state_dict uses of a child, and nothing else."""

    def __init__(self):
        self._modules, self._load_state_dict_post_hooks, self.got = {}, {}, []

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.got += [list(state_dict), prefix, *map(str, args)]


def duck():
    module, child = nn.Module(), Duck()
    module._modules["duck"] = child
    module.load_state_dict({"duck.x": 1, "y": 2}, strict=False)
    return child.got


def hooks():
    module, kept = model(), []
    for child in module.modules():
        child.register_load_state_dict_post_hook(lambda _, keys: kept.append(keys))
    kept.append(module.load_state_dict({}, strict=False))
    return [
        type(kept[0]).__name__,
        len({id(k) for k in kept}),
        len({id(k[0]) for k in kept}),
    ]


def returning_hook():
    module = nn.Linear(2, 3)
    module.register_load_state_dict_post_hook(lambda *_: 1)
    return loaded(module.state_dict(), module)


def to_meta(**kwargs):
    module = nn.Linear(2, 3, device="meta")
    module.load_state_dict(nn.Linear(2, 3).state_dict(), **kwargs)
    return str(module.weight.device)


def filtered():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"torch\.nn\.modules\.module")
        return to_meta()


def deepest():
    """How many modules below each other can be loaded."""

    def loads(n):
        module = nn.Module()
        for _ in range(n):
            module, child = nn.Module(), module
            module._modules["a"] = child
        try:
            module.load_state_dict({})
        except RecursionError:
            return False
        return True

    low, high = 1, 2000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if loads(middle) else (low, middle)
    return low


def half_on_meta():
    return nn.Sequential(nn.Linear(2, 3, device="meta"), nn.Linear(3, 2))


def emptied(*args, module=None, **kwargs):
    module = half_on_meta() if module is None else module
    module.to_empty(*args, **kwargs)
    return [[str(p.device), p.shape] for p in module.parameters()]


def saved(*args, **kwargs):
    file = io.BytesIO()
    torch.manual_seed(0)
    torch.save(
        {"a": torch.rand(3), "b": [nn.Parameter(torch.ones(2))]}, file, *args, **kwargs
    )
    return file


def saved_to_read():
    return io.BytesIO(saved().getvalue())


def on_disk(function):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "f.pt")
        path.write_bytes(saved().getvalue())
        return str(function(path)).replace(folder, "FOLDER")


def mesh():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    return init_device_mesh("cpu", (2,))


def distributed(placement, tensor=None, trace=False):
    from torch.distributed.tensor import distribute_tensor, Replicate, Shard

    here = mesh()
    if tensor is None:
        tensor = nn.Parameter(torch.empty(5, 3, device="meta").as_subclass(Own))
    placements = {
        "shard": [Shard(0)],
        "copy": [Replicate()],
        "two": [Shard(0)] * 2,
        "none": None,
    }
    with Ops() as ops:
        made = distribute_tensor(tensor, here, placements[placement])
    local = made._local_tensor
    shares = local.untyped_storage()._cdata == tensor.untyped_storage()._cdata
    seen = [type(made).__name__, type(local).__name__, shares, made.shape, local.shape]
    return [
        *map(str, seen),
        made.requires_grad,
        local.requires_grad,
        ops.seen if trace else [],
    ]


def fully_sharded(**kwargs):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    turns = []

    def init(module):
        turns.append(type(module).__name__)
        module.to_empty(device="cpu", recurse=False)

    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Dropout()))
    FSDP(
        module,
        mesh().get_group(),
        device_id=torch.device("cpu"),
        **{"param_init_fn": init, **kwargs},
    )
    return turns


def dcp(function):
    from torch.distributed.checkpoint import format_utils

    call = getattr(format_utils, function)
    try:
        return on_disk(lambda path: call(path.parent, path.with_suffix(".x")))
    except BaseException as error:  # that of dcp is no Exception, and has a traceback
        return type(error).__name__


# NB: in order: the first load of the process is one under a mode.
CASES = {
    "load_state_dict, the first one, no factories": lambda: under_refusal(lambda m, s: m.load_state_dict(s)),
    "to_empty, the first one, functions": lambda: under(
        Functions(), lambda m: emptied(module=m, device="cpu"), half_on_meta
    ),
    "load_state_dict, functions": lambda: under(
        Functions(), lambda m: m.load_state_dict(m.state_dict()), model
    ),
    "load_state_dict, operations": lambda: under(
        Ops(), lambda m: m.load_state_dict(m.state_dict()), model
    ),
    "load_state_dict": loaded,
    "load_state_dict, assign": lambda: loaded(assign=True),
    "load_state_dict, no mapping": lambda: loaded(3),
    "load_state_dict, pairs": lambda: loaded([("a", 1)]),
    "load_state_dict, plain dict": lambda: loaded(dict(model().state_dict())),
    "load_state_dict, other keys": lambda: loaded(edited(x=1, **{"0.x": 2, "9.weight": 3})),
    "load_state_dict, other keys, not strict": lambda: loaded(edited(x=1, **{"0.x.y": 2}), strict=False),
    "load_state_dict, a number as key": lambda: loaded({3: torch.ones(1)}),
    "load_state_dict, a shape": lambda: loaded(edited(**{"0.bias": torch.ones(4)})),
    "load_state_dict, no tensor": lambda: loaded(edited(**{"0.bias": "text"})),
    "load_state_dict, None": lambda: loaded(edited(**{"0.bias": None})),
    "load_state_dict, too many arguments": lambda: model().load_state_dict({}, True, False, True),
    "load_state_dict, an argument that is not known": lambda: loaded(strickt=True),
    "load_state_dict, __class__": lambda: nn.Module.load_state_dict(mock.Mock(spec=nn.Linear(2, 3)), {}),
    "load_state_dict, autospec": autospec,
    "load_state_dict, exec": made_by_exec,
    "load_state_dict, a child that is no module": duck,
    "load_state_dict, hooks": hooks,
    "load_state_dict, a hook that returns": returning_hook,
    "load_state_dict, to meta": to_meta,
    "load_state_dict, to meta, assign": lambda: to_meta(assign=True),
    "load_state_dict, to meta, filtered by module": filtered,
    "load_state_dict, deepest": deepest,
    "to_empty, operations": lambda: under(
        Ops(), lambda m: emptied(module=m, device="cpu"), half_on_meta
    ),
    "to_empty": lambda: emptied(device="cpu"),
    "to_empty, recurse": lambda: emptied(device="cpu", recurse=False),
    "to_empty, None": lambda: emptied(device=None),
    "to_empty, no device": emptied,
    "to_empty, positional": lambda: emptied("cpu"),
    "to_empty, no such device": lambda: emptied(device="nowhere"),
    "save": lambda: saved().getvalue().hex(),
    "save, legacy": lambda: saved(_use_new_zipfile_serialization=False).tell() > 0,
    "save, no file": lambda: torch.save({}, 3),
    "save, no folder": lambda: torch.save({}, "/nowhere/f.pt"),
    "save, no pickle": lambda: torch.save(lambda: 1, io.BytesIO()),
    "save, protocol": lambda: saved(pickle_protocol=9),
    "save, an argument that is not known": lambda: saved(lasy=True),
    "load": lambda: on_disk(torch.load),
    "load, mmap": lambda: on_disk(lambda p: torch.load(p, mmap=True)),
    "load, functions": lambda: under(Functions(), torch.load, saved_to_read),
    "load, operations": lambda: under(Ops(), torch.load, saved_to_read),
    "load, map_location": lambda: on_disk(lambda p: torch.load(p, map_location="meta")),
    "load, no file": lambda: torch.load("/nowhere/f.pt"),
    "load, a number": lambda: torch.load(3),
    "load, a folder": lambda: on_disk(lambda p: torch.load(p.parent)),
    "load, no checkpoint": lambda: torch.load(io.BytesIO(b"text")),
    "load, empty": lambda: torch.load(io.BytesIO()),
    "load, mmap of an object": lambda: torch.load(saved(), mmap=True),
    "load, weights_only and pickle_module": lambda: on_disk(
        lambda p: torch.load(p, pickle_module=json, weights_only=True)
    ),
    "load, an argument that is not known": lambda: on_disk(lambda p: torch.load(p, lasy=True)),
    "load, encoding": lambda: on_disk(lambda p: torch.load(p, encoding="ascii")),
    "distribute_tensor, sharded": lambda: distributed("shard"),
    "distribute_tensor, replicated": lambda: distributed("copy"),
    "distribute_tensor, default": lambda: distributed("none"),
    "distribute_tensor, two placements": lambda: distributed("two"),
    "distribute_tensor, no tensor": lambda: distributed("shard", 3),
    "distribute_tensor, no leaf": lambda: distributed("shard", torch.ones(2, requires_grad=True) * 2),
    "distribute_tensor, memory": lambda: distributed("shard", torch.ones(5, 3), trace=True),
    "FSDP, param_init_fn": fully_sharded,
    "FSDP, param_init_fn of another type": lambda: fully_sharded(param_init_fn=3),
    "FSDP, no reset_parameters": lambda: fully_sharded(param_init_fn=None),
    "dcp_to_torch_save, no checkpoint": lambda: dcp("dcp_to_torch_save"),
    "torch_save_to_dcp, arguments": lambda: dcp("torch_save_to_dcp"),
}  # fmt: skip


def under_refusal(load):
    module, state_dict = model(), model().state_dict()
    with Refuses():
        return list(load(module, state_dict))


def seen(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            outcome = ["result", function()]
        except Exception as error:
            text = str(error).replace(tempfile.gettempdir() + "/", "")
            text = re.sub(r"tmp\w{8}|0x[0-9a-f]+", "...", text)
            outcome = ["error", type(error).__name__, text]
    told = [
        [
            w.category.__name__,
            str(w.message),
            pathlib.Path(w.filename.removesuffix("+torch_ext")).name,
        ]
        for w in caught
    ]
    return [outcome, told]


if __name__ == "__main__":
    if "patched" in sys.argv:
        import torch_ext

        torch_ext.enable()
    json.dump(
        {name: seen(function) for name, function in CASES.items()},
        sys.stdout,
        default=str,
    )
