"""Run a variant in a fresh process and watch, from outside, where its memory goes.

Anonymous pages are memory that the process alone holds and that must be kept or swapped; file pages are a view of the
page cache, which the system shares between processes and drops when it needs the room. ``/proc`` tells them apart.
The kernel batches its counters, so that they are off by up to some hundred KiB.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor


VARIANTS = ("stock", "torch_ext")
PHASES = ("construct", "load", "fill in", "forward")

_INTERVAL = 0.002  # seconds between samples


@dataclass(frozen=True)
class Sample:
    """Resident bytes of a process at a time."""

    time: float
    anonymous: int
    file: int


@dataclass(frozen=True)
class Run:
    """What one process did: times in seconds, memory in bytes."""

    phases: dict[str, tuple[float, float]]
    samples: list[Sample]
    copied: int
    tensors: int
    result: Tensor

    def seconds(self, *phases: str) -> float:
        spans = [self.phases.get(phase, (0.0, 0.0)) for phase in phases]
        return sum(end - start for start, end in spans)

    def before(self, phase: str) -> Sample:
        """The last sample before a phase."""
        return self.during(phase)[0]

    def during(self, *phases: str) -> list[Sample]:
        """The samples from the last one before ``phases`` to the first one behind them."""
        start, end = self.phases[phases[0]][0], self.phases[phases[-1]][1]
        times = [sample.time for sample in self.samples]
        return self.samples[
            bisect_right(times, start) - 1 : bisect_left(times, end) + 1
        ]

    def rise(self, *phases: str) -> tuple[int, int]:
        """By how much (anonymous, file) pages rose during ``phases``, at most."""
        samples = self.during(*phases)
        return (
            max(s.anonymous for s in samples) - samples[0].anonymous,
            max(s.file for s in samples) - samples[0].file,
        )


Runs: TypeAlias = dict[str, list[Run]]  # by variant


class ChildFailed(RuntimeError):
    """A measured process came to no result."""


def run(model: str, variant: str, checkpoint: Path) -> Run:
    """Measure one variant of ``model`` (a module of this package), with ``checkpoint`` in the page cache."""
    warm(checkpoint)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as folder:
        output = Path(folder) / "output.pt"
        command = [sys.executable, "-m", "torch_ext._demo.child"]
        command += [model, variant, str(checkpoint), str(output)]
        with (Path(folder) / "stderr").open("w+") as stderr:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
            try:
                samples = _watch(process)
            except BaseException:
                process.kill()
                raise
            finally:
                stdout, _ = process.communicate()
            if process.returncode != 0:
                stderr.seek(0)
                raise ChildFailed(
                    _why(model, variant, process.returncode, stderr.read())
                )
        told = json.loads(stdout.splitlines()[-1])
        phases = {name: (start, end) for name, (start, end) in told["phases"].items()}
        result: Tensor = torch.load(output)
        return Run(phases, samples, told["copied"], told["tensors"], result)


def median(runs: Sequence[Run]) -> Run:
    """The run whose load took the median time."""
    times = [run.seconds("load") for run in runs]
    return runs[times.index(statistics.median_low(times))]


def warm(path: Path) -> None:
    """Read a file, so that it is in the page cache."""
    buffer = bytearray(1 << 22)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _watch(process: "subprocess.Popen[str]") -> list[Sample]:
    """Sample the memory of ``process`` until it ends."""
    samples = []
    with open(f"/proc/{process.pid}/status", "rb", buffering=0) as status:
        while process.poll() is None:
            text = os.pread(status.fileno(), 1 << 14, 0)
            found = re.search(rb"RssAnon:\s*(\d+) kB\nRssFile:\s*(\d+) kB", text)
            if found:  # not of a process that has just ended
                anonymous, file = (int(n) << 10 for n in found.groups())
                samples.append(Sample(time.monotonic(), anonymous, file))
            time.sleep(_INTERVAL)
    return samples


def _why(model: str, variant: str, status: int, stderr: str) -> str:
    if status == -9:
        return f"{model}, {variant}: the process was killed, most likely for lack of memory"
    return (
        f"{model}, {variant}: the process ended with status {status}:\n{stderr.strip()}"
    )
