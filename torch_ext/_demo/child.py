"""One run of one variant, in a process of its own: ``python -m torch_ext._demo.child MODEL VARIANT CHECKPOINT OUTPUT``.

Writes what the model computes to the file OUTPUT and one line of JSON to stdout: when each phase began and ended, on
the clock that all processes share, and how many tensors were copied. Memory is watched from outside, by the parent.
"""

import importlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import torch_ext
from torch_ext._demo import paths


_PAUSE = 0.01  # seconds: lets the parent see the memory before, between and behind the phases


def main(model: str, variant: str, checkpoint: str, output: str) -> None:
    subject = importlib.import_module(f"torch_ext._demo.{model}")
    load = {"stock": paths.stock, "torch_ext": paths.patched}[variant]
    if variant == "torch_ext":
        torch_ext.enable()
    phases: dict[str, tuple[float, float]] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        time.sleep(_PAUSE)
        start = time.monotonic()
        yield
        phases[name] = start, time.monotonic()
        time.sleep(_PAUSE)

    batch = subject.inputs()
    net, state_dict = load(subject.construct, Path(checkpoint), phase)
    copied, tensors = paths.copied(net, state_dict), len(state_dict)
    del state_dict
    net.eval()
    with phase("forward"), torch.no_grad():
        result = subject.forward(net, batch)
    torch.save(result, output)
    print(json.dumps({"phases": phases, "copied": copied, "tensors": tensors}))


if __name__ == "__main__":
    main(*sys.argv[1:])
