"""Modes, transforms and compilers combined with ``with torch.device("meta"):``, around it and inside of it.

A *program* takes a tensor on meta and a block, and enters the block, or has been called inside of it. What each mode
writes down (operators, functions, graphs, counts) is part of the outcome.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from upstream_case import Case
from upstream_subclasses import Functions, Operators, Redispatches


Program = Callable[[torch.Tensor], Any]
BUILT = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True, device="meta")


def built(x: torch.Tensor) -> Any:
    """A module that was made outside."""
    return BUILT(x.unsqueeze(-2))


def pure(x: torch.Tensor) -> Any:
    """Constants and operators that each transform knows."""
    angles = torch.outer(torch.arange(4.0), torch.ones(4)).cos()
    masked = torch.where(torch.eye(4) > 0, angles, torch.zeros_like(angles))
    return nn.functional.softmax(x @ masked, -1) * torch.linspace(0, 1, 4) + x.new_ones(
        4
    )


def made(x: torch.Tensor) -> Any:
    """Where what is made in the block lies."""
    tensors = [nn.Linear(2, 3).weight, torch.arange(3), torch.zeros(2).bool()]
    return x.sum() * sum(len(t.device.type) for t in tensors)


def mlp(x: torch.Tensor) -> Any:
    """Modules made and called."""
    layers = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))
    return layers(x)


def attention(x: torch.Tensor) -> Any:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[0])
    return layer(x.unsqueeze(0), src_mask=mask, is_causal=True)


def recurrent(x: torch.Tensor) -> Any:
    return nn.LSTM(4, 3, batch_first=True)(x.unsqueeze(0))[0]


def factories(x: torch.Tensor) -> Any:
    """Constants that name no device, and what is computed from them."""
    position = torch.arange(x.shape[-1], dtype=torch.float32)
    frequencies = 1.0 / (100.0 ** (position / x.shape[-1]))
    angles = torch.outer(position, frequencies)
    mask = torch.full((4, 4), float("-inf")).triu(1)
    scaled = x @ (angles.cos() + mask.exp())
    return (
        scaled
        + torch.zeros_like(x)
        + x.new_ones(4)
        + torch.tensor([1.0, 2.0, 3.0, 4.0])
    )


def in_place(x: torch.Tensor) -> Any:
    """Views, writes and indices."""
    y = torch.zeros(2, 4)
    y[:, 1:3] = x[:, 1:3]
    y[0].add_(1).mul_(2)
    y.index_copy_(0, torch.tensor([1, 0]), x.clone())
    return torch.cat([y, x.flip(0)]).masked_fill(torch.ones(4, 4).bool(), 0)


def random(x: torch.Tensor) -> Any:
    noise = torch.randn(2, 4) + torch.rand_like(x) + torch.empty(2, 4).normal_()
    return nn.functional.dropout(x + noise, training=True) + torch.randperm(4)


def initialization(x: torch.Tensor) -> Any:
    """What constructors of models do to parameters."""
    layer = nn.Linear(4, 4)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4)).mul_(0.5)
        layer.bias.data = torch.ones(4)
    layer = nn.utils.parametrizations.weight_norm(layer)
    return layer(x)


PROGRAMS: dict[str, Program] = {
    f.__name__: f
    for f in (
        built,
        pure,
        made,
        mlp,
        attention,
        recurrent,
        factories,
        in_place,
        random,
        initialization,
    )
}


def _under(mode: Callable[[], Any]) -> Callable[[Program, torch.Tensor], Any]:
    """Call the program under a mode, and say what it has written down."""

    def call(program: Program, x: torch.Tensor) -> Any:
        with mode() as entered:
            out = program(x)
        return [out, getattr(entered, "seen", None)]

    return call


def _fake(program: Program, x: torch.Tensor) -> Any:
    mode = FakeTensorMode()
    with mode:
        return program(mode.from_tensor(x))


def _flops(program: Program, x: torch.Tensor) -> Any:
    with FlopCounterMode(display=False) as counter:
        out = program(x.requires_grad_())
        out.sum().backward()
    counts = {
        k: {str(o): n for o, n in v.items()}
        for k, v in counter.get_flop_counts().items()
    }
    return [out, counts, counter.get_total_flops()]


def _graph(program: Program, x: torch.Tensor, tracing_mode: str) -> Any:
    graph = make_fx(program, tracing_mode=tracing_mode)(x)
    return [graph.code, graph(x)]


def _backward(program: Program, x: torch.Tensor) -> Any:
    x = x.requires_grad_()
    out = program(x)
    with Operators() as log:
        out.sum().backward()
    return [out, x.grad, log.seen]


def _compile(program: Program, x: torch.Tensor) -> Any:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append([graph.code, list(inputs)])
        return graph.forward

    torch._dynamo.reset()
    out = torch.compile(program, backend=backend)(x)
    return [out, graphs]


def _export(program: Program, x: torch.Tensor) -> Any:
    class Exported(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return program(x)

    exported = torch.export.export(Exported(), (x,), strict=False)
    return [exported.graph_module.code, list(exported.state_dict)]


def _trace(program: Program, x: torch.Tensor) -> Any:
    traced = torch.jit.trace(program, x, check_trace=False)
    return [[node.kind() for node in traced.graph.nodes()], traced(x)]


def _functional_call(program: Program, x: torch.Tensor) -> Any:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> Any:
            return program(x * self.scale)

    scale = {"scale": torch.empty(4, device="meta")}
    return torch.func.functional_call(Module(), scale, x)


def _saved(program: Program, x: torch.Tensor) -> Any:
    seen: list[Any] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        seen.append(list(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = program(x.requires_grad_())
        out.sum().backward()
    return [out, x.grad, seen]


def _default_device(program: Program, x: torch.Tensor) -> Any:
    torch.set_default_device("cpu")
    try:
        return [program(x), torch.get_default_device()]
    finally:
        torch.set_default_device(None)


def _checkpoint(program: Program, x: torch.Tensor, reentrant: bool) -> Any:
    x = x.requires_grad_()
    kwargs = {"use_reentrant": reentrant, "preserve_rng_state": not reentrant}
    out = checkpoint(program, x, **kwargs)
    out.sum().backward()
    return [out, x.grad]


MODES: dict[str, Callable[[Program, torch.Tensor], Any]] = {
    "nothing": lambda program, x: program(x),
    "backward": _backward,
    "operators": _under(Operators),
    "functions": _under(Functions),
    "redispatching functions": _under(Redispatches),
    "fake tensors": _fake,
    "fake mode, meta inputs": _under(
        lambda: FakeTensorMode(allow_non_fake_inputs=True)
    ),
    "flops": _flops,
    "make_fx, real": partial(_graph, tracing_mode="real"),
    "make_fx, fake": partial(_graph, tracing_mode="fake"),
    "make_fx, symbolic": partial(_graph, tracing_mode="symbolic"),
    "vmap": lambda program, x: torch.func.vmap(program, randomness="different")(
        torch.stack([x, x])
    ),
    "grad": lambda program, x: torch.func.grad(lambda x: program(x).sum())(x),
    "jvp": lambda program, x: torch.func.jvp(program, (x,), (x,)),
    "functionalize": lambda program, x: torch.func.functionalize(program)(x),
    "functional_call": _functional_call,
    "compile": _compile,
    "export": _export,
    "jit.trace": _trace,
    "checkpoint": partial(_checkpoint, reentrant=False),
    "checkpoint, reentrant": partial(_checkpoint, reentrant=True),
    "saved tensors": _saved,
    "autocast": _under(lambda: torch.autocast("cpu", torch.bfloat16)),
    "inference_mode": _under(torch.inference_mode),
    "no_grad": _under(torch.no_grad),
    "default device cpu": _default_device,
    "cpu block": _under(lambda: torch.device("cpu")),
}


def cases(limit: int) -> Iterator[Case]:
    for name, program in PROGRAMS.items():
        for mode, call in MODES.items():
            yield f"{name} in a block under {mode}", partial(_inside, call, program)
            yield f"{name} under {mode} in a block", partial(_around, call, program)


def _inside(call: Any, program: Program) -> Any:
    """The block is entered under the mode."""

    def in_a_block(x: torch.Tensor) -> Any:
        with torch.device("meta"):
            return program(x)

    return call(in_a_block, torch.empty(2, 4, device="meta"))


def _around(call: Any, program: Program) -> Any:
    """The mode is entered in the block."""
    x = torch.empty(2, 4, device="meta")
    with torch.device("meta"):
        return call(program, x)
