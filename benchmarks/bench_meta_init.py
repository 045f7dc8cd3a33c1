"""Claim: constructing under ``meta_init`` costs no more than under ``torch.device("meta")``, recording at most 3 times.

Construction only; nothing is loaded. Each variant runs in fresh processes that take turns; a figure is the CPU time of
one construction, the median of each process's best of five, relative to stock's ``with torch.device("meta")``. Claim,
too: each context of ours takes at most half of what ``accelerate.init_empty_weights`` takes, if that is installed; it
runs in a torch as it is.

    python benchmarks/bench_meta_init.py [--models bert-base llama-7b gpt-oss-20b moe-40k] [--rounds 5]
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


MODELS = ["bert-base", "llama-7b", "gpt-oss-20b", "moe-40k"]
OURS = ["patched", "meta_init", "deferred_init"]
WAYS = ["stock", *OURS, "accelerate"]


def builder(model: str) -> Callable[[], Any]:
    import transformers

    transformers.logging.set_verbosity_error()
    if model == "moe-40k":
        return moe
    config = {
        "bert-base": transformers.BertConfig,
        "llama-7b": transformers.LlamaConfig,
        "gpt-oss-20b": lambda: transformers.GptOssConfig(
            num_hidden_layers=24, num_local_experts=32
        ),
    }[model]()
    return lambda: transformers.AutoModel.from_config(config)


def moe() -> Any:
    """60 layers of 224 experts of three Linear each: 53,760 modules, as DeepSeek's before experts were fused."""
    from torch import nn

    def expert() -> nn.Module:
        return nn.ModuleList(
            nn.Linear(7168, 2048, bias=False)
            if i < 2
            else nn.Linear(2048, 7168, bias=False)
            for i in range(3)
        )

    return nn.ModuleList(nn.ModuleList(expert() for _ in range(224)) for _ in range(60))


def child(model: str, way: str) -> None:
    import torch

    if way not in ("stock", "accelerate"):
        import torch_ext

        torch_ext.enable()
    build = builder(model)
    contexts: dict[str, Callable[[], Any]] = {
        "stock": lambda: torch.device("meta"),
        "patched": lambda: torch.device("meta"),
        "meta_init": lambda: torch.nn.utils.meta_init(),  # type: ignore[attr-defined]
        "deferred_init": lambda: torch.nn.utils.deferred_init(),  # type: ignore[attr-defined]
        "eager": contextlib.nullcontext,
    }
    if way == "accelerate":
        from accelerate import init_empty_weights

        contexts[way] = init_empty_weights
    times = []
    for _ in range(3 if model == "moe-40k" else 6):
        start = time.process_time()
        with contexts[way]():
            module = build()
        times.append(time.process_time() - start)
        del module
    print(json.dumps(min(times[1:])))


def measure(model: str, ways: list[str], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            run = subprocess.run(
                [sys.executable, "-W", "ignore", __file__, "--child", model, way],
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
            )
            if run.returncode == 0:
                times[way].append(json.loads(run.stdout.splitlines()[-1]))
            elif "No module named 'accelerate'" not in run.stderr:
                raise RuntimeError(f"{model}, {way}: {run.stderr}")
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    import torch

    python, machine = platform.python_version(), platform.machine()
    print(
        f"torch {torch.__version__}, Python {python}, {machine}, {os.cpu_count()} cores"
    )
    print("model          " + "".join(f"{way:>22}" for way in WAYS))
    for model in options.models:
        times = measure(model, WAYS, options.rounds)
        stock = statistics.median(times["stock"])
        cells = [
            f"{statistics.median(t) * 1e3:9.1f} ms {statistics.median(t) / stock:6.2f}x"
            if t
            else "not installed"
            for t in times.values()
        ]
        print(f"{model:15}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
        if times["accelerate"]:
            slow = statistics.median(times["accelerate"])
            ratios = [
                f"{slow / statistics.median(times[way]):.1f}x {way}" for way in OURS
            ]
            print(f"{'':15}accelerate is {', '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
