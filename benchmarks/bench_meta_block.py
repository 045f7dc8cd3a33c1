"""Claim: calls in ``with torch.device("meta")`` cost little more patched than in stock, and the record is small.

Three measurements; each variant runs in fresh processes that take turns. Forward, and forward and backward, of a Llama
of 32 layers: CPU time of a call, and the FLOPs that ``FlopCounterMode`` counts, which must be equal. Construction: CPU
time, the best of each process, and memory of the module's Python objects, the record included (``tracemalloc``).
Materializing: the time that ``materialize_module`` takes for the modules whose buffers no state dict holds.

    python benchmarks/bench_meta_block.py [--models forward bert-base llama-7b gpt-oss-20b moe-40k] [--rounds 3]
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import bench_meta_init


WAYS = ["stock", "patched", "meta_init"]
MODELS = ["forward", *bench_meta_init.MODELS]


def llama() -> Any:
    import torch
    from torch import nn, Tensor
    from torch.nn import functional as F

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.RMSNorm(4096) for _ in range(2))
            self.qkvo = nn.ModuleList(
                nn.Linear(4096, 4096, bias=False) for _ in range(4)
            )
            self.gate = nn.Linear(4096, 11008, bias=False)
            self.up = nn.Linear(4096, 11008, bias=False)
            self.down = nn.Linear(11008, 4096, bias=False)

        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            batch, length, _ = x.shape
            h = self.norms[0](x)
            q, k, v = (
                p(h).view(batch, length, 32, 128).transpose(1, 2) for p in self.qkvo[:3]
            )
            q, k = (t * cos + rotated(t) * sin for t in (q, k))
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.qkvo[3](h.transpose(1, 2).reshape(batch, length, -1))
            h = self.norms[1](x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32000, 4096)
            self.layers = nn.ModuleList(Layer() for _ in range(32))
            self.head = nn.Linear(4096, 32000, bias=False)
            frequencies = 1 / 10000 ** (torch.arange(0, 128, 2) / 128)
            self.register_buffer("frequencies", frequencies, persistent=False)

        def forward(self, ids: Tensor) -> Tensor:
            angles = torch.outer(torch.arange(ids.shape[1]), self.frequencies)
            angles = torch.cat((angles, angles), -1)
            x, cos, sin = self.embed(ids), angles.cos(), angles.sin()
            for layer in self.layers:
                x = layer(x, cos, sin)
            return self.head(x)

    def rotated(t: Tensor) -> Tensor:
        return torch.cat((-t[..., 64:], t[..., :64]), -1)

    return Llama()


def opened(way: str) -> Any:
    import torch

    if way == "meta_init":
        return torch.nn.utils.meta_init()  # type: ignore[attr-defined]
    return torch.device("meta")


def forward(way: str) -> dict[str, float]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    found: dict[str, float] = {}
    with opened(way):
        model = llama()
        ids = torch.zeros(1, 128, dtype=torch.long)
        calls: dict[str, Callable[[], Any]] = {
            "forward": lambda: model(ids),
            "forward, backward": lambda: model(ids).sum().backward(),
        }
        for name, call in calls.items():
            with torch.no_grad() if name == "forward" else nullcontext():
                found[name] = 1e3 * best(call, 5)
        with FlopCounterMode(display=False) as counter:
            model(ids).sum().backward()
        found["FLOPs"] = counter.get_total_flops()
    return found


def best(call: Callable[[], Any], times: int) -> float:
    call()
    found = []
    for _ in range(times):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def construct(model: str, way: str) -> dict[str, float]:
    import torch

    build = bench_meta_init.builder(model)

    def construct_once() -> Any:
        with opened(way):
            return build()

    found = {"ms": 1e3 * best(construct_once, 2 if model == "moe-40k" else 5)}
    tracemalloc.start()
    module = construct_once()
    gc.collect()
    found["KiB of objects"] = tracemalloc.get_traced_memory()[0] / 1024
    tracemalloc.stop()
    if way != "stock":
        computed = [
            m
            for m in module.modules()
            if m._non_persistent_buffers_set and not [*m.parameters()]
        ]
        start = time.process_time()
        for part in computed:
            torch.nn.utils.materialize_module(part)  # type: ignore[attr-defined]
        found["ms to materialize"] = 1e3 * (time.process_time() - start)
    return found


def child(model: str, way: str) -> None:
    import torch

    torch.set_num_threads(1)
    if way != "stock":
        import torch_ext

        torch_ext.enable()
    found = forward(way) if model == "forward" else construct(model, way)
    print(json.dumps(found))


def measure(model: str, rounds: int) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for i in range(rounds):
        for way in WAYS if i % 2 == 0 else reversed(WAYS):
            run = subprocess.run(
                [sys.executable, "-W", "ignore", __file__, "--child", model, way],
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
            )
            if run.returncode:
                raise RuntimeError(f"{model}, {way}: {run.stderr}")
            found[way].append(json.loads(run.stdout.splitlines()[-1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    import torch

    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {machine}")
    for model in options.models:
        results = measure(model, options.rounds)
        for way, runs in results.items():
            for key in runs[0]:
                numbers = [run[key] for run in runs]
                line = (
                    f"{model:12} {way:10} {key:18} best {min(numbers):14.1f}, median "
                )
                line += f"{statistics.median(numbers):14.1f}"
                if stock := [run[key] for run in results["stock"] if key in run]:
                    low = min(numbers) / max(min(stock), 1e-9)
                    middle = statistics.median(numbers) / max(
                        statistics.median(stock), 1e-9
                    )
                    line += f", {low:.2f}x and {middle:.2f}x stock's"
                print(line, flush=True)


if __name__ == "__main__":
    main()
