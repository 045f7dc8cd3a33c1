"""Ways in which a constructor escapes ``with torch.device("meta")``, by what they have in common.

Each case is a function of ``x`` (a float tensor of shape ``(4,)``), ``m`` (a matrix) and ``i`` (indices), all real and
made outside, that returns a tensor or module. ``STAYS`` lists those that are not on meta under ``meta_init``, and why.
"""

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn


Case = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


def _load(value, **kwargs):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **kwargs)


EXPLICIT: dict[str, Case] = {
    "arange": lambda x, m, i: torch.arange(3, device="cpu"),
    "as_tensor": lambda x, m, i: torch.as_tensor([1.0], device="cpu"),
    "asarray": lambda x, m, i: torch.asarray([1.0], device="cpu"),
    "empty": lambda x, m, i: torch.empty(3, device="cpu"),
    "empty_like": lambda x, m, i: torch.empty_like(x, device="cpu"),
    "empty_like_of_meta": lambda x, m, i: torch.empty_like(
        torch.empty(3, device="meta"), device="cpu"
    ),
    "empty_permuted": lambda x, m, i: torch.empty_permuted(
        (2, 3), (1, 0), device="cpu"
    ),
    "empty_strided": lambda x, m, i: torch.empty_strided((2,), (1,), device="cpu"),
    "eye": lambda x, m, i: torch.eye(3, device="cpu"),
    "fftfreq": lambda x, m, i: torch.fft.fftfreq(3, device="cpu"),
    "full": lambda x, m, i: torch.full((3,), 2.0, device="cpu"),
    "hann_window": lambda x, m, i: torch.hann_window(3, device="cpu"),
    "linspace": lambda x, m, i: torch.linspace(0, 1, 3, device="cpu"),
    "logspace": lambda x, m, i: torch.logspace(0, 1, 3, device="cpu"),
    "ones": lambda x, m, i: torch.ones(3, device="cpu"),
    "rand": lambda x, m, i: torch.rand(3, device="cpu"),
    "randint": lambda x, m, i: torch.randint(3, (3,), device="cpu"),
    "randn": lambda x, m, i: torch.randn(3, device="cpu"),
    "randperm": lambda x, m, i: torch.randperm(3, device="cpu"),
    "scalar_tensor": lambda x, m, i: torch.scalar_tensor(3, device="cpu"),
    "tensor": lambda x, m, i: torch.tensor([1.0], device="cpu"),
    "tril_indices": lambda x, m, i: torch.tril_indices(3, 3, device="cpu"),
    "zeros": lambda x, m, i: torch.zeros(3, device="cpu"),
    "zeros_on_cuda": lambda x, m, i: torch.zeros(3, device="cuda"),
    "signal.windows": lambda x, m, i: torch.signal.windows.hann(3, device="cpu"),
    "sparse_coo": lambda x, m, i: torch.sparse_coo_tensor(
        [[0]], [1.0], (2,), device="cpu"
    ),
    "Linear": lambda x, m, i: nn.Linear(2, 3, device="cpu"),
    "Conv2d": lambda x, m, i: nn.Conv2d(2, 3, 1, device="cpu"),
    "LSTM": lambda x, m, i: nn.LSTM(2, 3, device="cpu"),
    "Embedding": lambda x, m, i: nn.Embedding(2, 3, device="cpu"),
    "MultiheadAttention": lambda x, m, i: nn.MultiheadAttention(4, 2, device="cpu"),
    "Transformer": lambda x, m, i: nn.Transformer(4, 2, 1, 1, 4, device="cpu"),
    "BatchNorm1d": lambda x, m, i: nn.BatchNorm1d(4, device="cpu"),
    "UninitializedParameter": lambda x, m, i: nn.UninitializedParameter(device="cpu"),
    "UninitializedBuffer": lambda x, m, i: nn.UninitializedBuffer(device="cpu"),
}
LEGACY: dict[str, Case] = {
    "Tensor(n)": lambda x, m, i: torch.Tensor(3),
    "Tensor(list)": lambda x, m, i: torch.Tensor([1.0, 2.0]),
    "Tensor()": lambda x, m, i: torch.Tensor(),
    "FloatTensor(n)": lambda x, m, i: torch.FloatTensor(3),
    "FloatTensor(list)": lambda x, m, i: torch.FloatTensor([1.0]),
    "LongTensor(list)": lambda x, m, i: torch.LongTensor([1]),
    "HalfTensor(n)": lambda x, m, i: torch.HalfTensor(3),
    "BoolTensor(list)": lambda x, m, i: torch.BoolTensor([True]),
    "Tensor.new(n)": lambda x, m, i: x.new(3),
    "Tensor.new(list)": lambda x, m, i: x.new([1.0]),
    "Tensor.new()": lambda x, m, i: x.new(),
    "sparse.FloatTensor": lambda x, m, i: torch.sparse.FloatTensor(2, 3),
    "Parameter(Tensor(n))": lambda x, m, i: nn.Parameter(torch.Tensor(3)),
    "Tensor(storage)": lambda x, m, i: torch.Tensor(x.storage()),
}
REAL: dict[str, Case] = {
    "new_zeros": lambda x, m, i: x.new_zeros(3),
    "new_ones": lambda x, m, i: x.new_ones(3),
    "new_empty": lambda x, m, i: x.new_empty(3),
    "new_full": lambda x, m, i: x.new_full((3,), 1.0),
    "new_tensor": lambda x, m, i: x.new_tensor([1.0]),
    "new_empty_strided": lambda x, m, i: x.new_empty_strided((2,), (1,)),
    "zeros_like": lambda x, m, i: torch.zeros_like(x),
    "ones_like": lambda x, m, i: torch.ones_like(x),
    "full_like": lambda x, m, i: torch.full_like(x, 2.0),
    "rand_like": lambda x, m, i: torch.rand_like(x),
    "randn_like": lambda x, m, i: torch.randn_like(x),
    "randint_like": lambda x, m, i: torch.randint_like(x, 3),
    "clone": lambda x, m, i: x.clone(),
    "detach": lambda x, m, i: x.detach(),
    "data": lambda x, m, i: x.data,
    "deepcopy": lambda x, m, i: copy.deepcopy(x),
    "copy": lambda x, m, i: copy.copy(x),
    "to(dtype)": lambda x, m, i: x.to(torch.float16),
    "to(device)": lambda x, m, i: x.to("cpu"),
    "cpu": lambda x, m, i: x.cpu(),
    "cuda": lambda x, m, i: x.cuda(),
    "type": lambda x, m, i: x.type(torch.float64),
    "double": lambda x, m, i: x.double(),
    "add": lambda x, m, i: x + 1,
    "index": lambda x, m, i: x[1:],
    "where": lambda x, m, i: torch.where(x > 0, 1.0, 0.0),
    "vander": lambda x, m, i: torch.vander(x),
    "complex": lambda x, m, i: torch.complex(x, x),
    "polar": lambda x, m, i: torch.polar(x, x),
    "block_diag": lambda x, m, i: torch.block_diag(m, m),
    "cartesian_prod": lambda x, m, i: torch.cartesian_prod(x, x),
    "stack": lambda x, m, i: torch.stack([x, x]),
    "cat": lambda x, m, i: torch.cat([x, x]),
    "masked_tensor": lambda x, m, i: torch.masked.masked_tensor(x, x > 0),
    "to_sparse": lambda x, m, i: x.to_sparse(),
    "quantize_per_tensor": lambda x, m, i: torch.quantize_per_tensor(
        x, 0.1, 0, torch.qint8
    ),
    "bernoulli": lambda x, m, i: torch.bernoulli(x),
    "poisson": lambda x, m, i: torch.poisson(x),
    "multinomial": lambda x, m, i: torch.multinomial(x, 2),
    "normal(tensor)": lambda x, m, i: torch.normal(x, 1.0),
    "nonzero": lambda x, m, i: torch.nonzero(x),
    "unique": lambda x, m, i: torch.unique(i),
    "Parameter": lambda x, m, i: nn.Parameter(x),
    "Parameter, registered": lambda x, m, i: nn.ParameterList([x]),
    "Buffer": lambda x, m, i: nn.Buffer(x),
    "Buffer, registered": lambda x, m, i: _registered(x),
    "as_subclass": lambda x, m, i: x.as_subclass(nn.Parameter),
    "_make_subclass": lambda x, m, i: torch.Tensor._make_subclass(nn.Parameter, x),
    "Embedding.from_pretrained": lambda x, m, i: nn.Embedding.from_pretrained(m),
    "CrossEntropyLoss(weight)": lambda x, m, i: nn.CrossEntropyLoss(weight=x),
    "init.normal_": lambda x, m, i: nn.init.normal_(x),
    "init.zeros_": lambda x, m, i: nn.init.zeros_(x),
    "meta + constant": lambda x, m, i: torch.empty(4, device="meta") + x,
    "meta * new constant": lambda x, m, i: torch.empty(4) * torch.ones(4, device="cpu"),
    "meta.to(cpu)": lambda x, m, i: torch.empty(4, device="meta").to("cpu"),
    "meta.cpu()": lambda x, m, i: torch.empty(4, device="meta").cpu(),
    "meta.cuda()": lambda x, m, i: torch.empty(4, device="meta").cuda(),
    "module.to(cpu)": lambda x, m, i: nn.Linear(2, 2).to("cpu"),
    "module.cuda()": lambda x, m, i: nn.Linear(2, 2).cuda(),
}
MEMORY: dict[str, Case] = {
    "from_numpy": lambda x, m, i: torch.from_numpy(np.ones(3)),
    "tensor(array)": lambda x, m, i: torch.tensor(np.ones(3)),
    "as_tensor(array)": lambda x, m, i: torch.as_tensor(np.ones(3)),
    "frombuffer": lambda x, m, i: torch.frombuffer(bytearray(8), dtype=torch.uint8),
    "frombuffer, registered": lambda x, m, i: _registered(
        torch.frombuffer(bytearray(8), dtype=torch.uint8)
    ),
    "frombuffer + 1": lambda x, m, i: (
        torch.frombuffer(bytearray(8), dtype=torch.uint8) + 1
    ),
    "from_dlpack": lambda x, m, i: torch.from_dlpack(np.ones(3)),
    "from_dlpack, registered": lambda x, m, i: _registered(
        torch.from_dlpack(np.ones(3))
    ),
    "UntypedStorage": lambda x, m, i: torch.empty(0).set_(torch.UntypedStorage(8)),
    "FloatStorage": lambda x, m, i: torch.empty(0).set_(torch.FloatStorage(8)),
    "set_(storage)": lambda x, m, i: torch.empty(0).set_(x.untyped_storage()),
    "set_(tensor)": lambda x, m, i: torch.empty(0).set_(x),
    "data = real": lambda x, m, i: _with_data(nn.Parameter(torch.empty(4)), x),
}
MISSED: dict[str, Case] = {
    "range": lambda x, m, i: torch.range(0, 3),
    "normal(size)": lambda x, m, i: torch.normal(0.0, 1.0, (3,)),
    "_efficientzerotensor": lambda x, m, i: torch._efficientzerotensor((3,)),
    "_empty_affine_quantized": lambda x, m, i: torch._empty_affine_quantized(
        [2], scale=1.0, zero_point=0, dtype=torch.qint8
    ),
    "spdiags": lambda x, m, i: torch.sparse.spdiags(m, torch.tensor([0, 1]), (2, 2)),
    "nested_tensor": lambda x, m, i: torch.nested.nested_tensor([[1.0], [2.0, 3.0]]),
    "as_nested_tensor": lambda x, m, i: torch.nested.as_nested_tensor([x, x]),
    "nested_tensor_from_jagged": lambda x, m, i: torch.nested.nested_tensor_from_jagged(
        x, torch.tensor([0, 1, 4])
    ),
}
BELOW: dict[str, Case] = {
    "aten.empty": lambda x, m, i: torch.ops.aten.empty.memory_format([3], device="cpu"),
    "aten.zeros": lambda x, m, i: torch.ops.aten.zeros.default([3]),
    "aten.randn": lambda x, m, i: torch.ops.aten.randn.default([3], device="cpu"),
    "aten.arange": lambda x, m, i: torch.ops.aten.arange.default(3, device="cpu"),
    "aten.full": lambda x, m, i: torch.ops.aten.full.default([3], 1.0),
    "aten.scalar_tensor": lambda x, m, i: torch.ops.aten.scalar_tensor.default(1.0),
    "aten.add": lambda x, m, i: torch.ops.aten.add.Tensor(x, x),
    "script": lambda x, m, i: _scripted(3),
}
FILES: dict[str, Case] = {
    "load": lambda x, m, i: _load(x),
    "load of a module": lambda x, m, i: _load(nn.Linear(2, 2), weights_only=False),
    "load_state_dict": lambda x, m, i: _loaded(nn.Linear(2, 2)),
    "load(map_location)": lambda x, m, i: _load(x, map_location="cpu"),
    "pickle": lambda x, m, i: pickle.loads(PICKLED),
    "_rebuild_tensor_v2": lambda x, m, i: torch._utils._rebuild_tensor_v2(
        x._typed_storage(), 0, (4,), (1,), False, {}
    ),
}
PICKLED = pickle.dumps(torch.ones(3))
ESCAPES = {
    f"{kind}: {name}": case
    for kind, cases in {
        "explicit": EXPLICIT,
        "legacy": LEGACY,
        "real": REAL,
        "memory": MEMORY,
        "missed": MISSED,
        "below": BELOW,
        "files": FILES,
    }.items()
    for name, case in cases.items()
}


def _registered(tensor):
    module = nn.Module()
    module.register_buffer("buffer", tensor)
    return module


def _with_data(parameter, data):
    parameter.data = data
    return parameter


def _loaded(module):
    module.load_state_dict(
        _load({"weight": torch.ones(2, 2), "bias": torch.ones(2)}), assign=True
    )
    return module


@torch.jit.script
def _scripted(n: int):
    return torch.zeros(n)


# What comes from outside is real, as in stock, until a module registers it; and so is what is computed of it alone.
OUTSIDE = """real: new_zeros|new_ones|new_empty|new_full|new_empty_strided|zeros_like|ones_like|full_like
real: rand_like|randn_like|randint_like|clone|detach|data|deepcopy|copy|to(dtype)|to(device)|cpu|type|double|add|index
real: where|vander|complex|polar|block_diag|cartesian_prod|stack|cat|to_sparse|bernoulli|poisson|multinomial
real: normal(tensor)|nonzero|unique|Buffer|as_subclass|_make_subclass
legacy: Tensor.new(n)|Tensor.new()
memory: from_numpy|frombuffer|frombuffer + 1|from_dlpack
below: aten.add
files: load|load(map_location)|pickle|_rebuild_tensor_v2"""
# What is not on meta, and why.
STAYS = {
    f"{line.partition(': ')[0]}: {name}": "comes from outside"
    for line in OUTSIDE.splitlines()
    for name in line.partition(": ")[2].split("|")
} | {
    "real: masked_tensor": "a wrapper subclass, made in Python around what it is given",
    "real: init.normal_": "writes to a tensor of the caller's",
    "real: init.zeros_": "writes to a tensor of the caller's",
    "real: quantize_per_tensor": "meta has no form of it",
    "missed: _empty_affine_quantized": "meta has no form of it",
    "missed: as_nested_tensor": "meta has no form of it",
}
# Those draw from the generator, as in stock.
DRAWS = re.compile("init|rand|bernoulli|poisson|multinomial|normal.tensor")
RAISES = {
    "missed: nested_tensor": "meta has no form of it",
}


def off_meta(value):
    if isinstance(value, torch.Tensor):
        return [] if value.is_meta else [value]
    return [t for t in (*value.parameters(), *value.buffers()) if not t.is_meta]


def inputs():
    return torch.rand(4), torch.rand(2, 2), torch.tensor([1, 2])
