"""Claim: a lease on a mapped file costs microseconds and a descriptor; a writer waits for a copy of what is in use.

In one process, with and without leases taking turns: the time to open one file, and 1,000 files (of which at most
``--leases`` get a lease), with the descriptors that are open then; and how long another process waits that truncates a
file of which all tensors are in use, per GiB.

    python benchmarks/bench_file_lease.py [--folder /dev/shm] [--gib 1] [--leases 1000]
"""

import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.serialization import config

import torch_ext


TRUNCATE = """
import os, sys, time
start = time.perf_counter()
os.truncate(sys.argv[1], 0)
print(time.perf_counter() - start)
"""


def opened(paths: list[str], leases: int) -> tuple[float, int]:
    """Seconds to open all files, and the descriptors that stay open."""
    config.load.lazy_leases = leases
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    start = time.perf_counter()
    loaded = [torch.load(path, lazy=True) for path in paths]
    seconds = time.perf_counter() - start
    descriptors = len(os.listdir("/proc/self/fd")) - before
    del loaded
    return seconds, descriptors


def waited(path: str, gib: float) -> float:
    """Seconds that another process waits to truncate a file with so much in use."""
    count = int(gib * 2**30) // 2**20
    torch.save({str(i): torch.ones(2**18) for i in range(count)}, path)
    loaded = torch.load(path, lazy=True)
    run = [sys.executable, "-c", TRUNCATE, path]
    seconds = float(subprocess.run(run, capture_output=True, check=True).stdout)
    assert all(bool((t == 1).all()) for t in loaded.values())
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default="/dev/shm")
    parser.add_argument("--gib", type=float, default=1)
    parser.add_argument("--leases", type=int, default=1000)
    options = parser.parse_args()
    torch_ext.enable()
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}"
    )
    print(f"torch {torch.__version__}, {machine}, {options.folder}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths = [str(Path(folder, f"{i}.pt")) for i in range(1000)]
        for path in paths:
            torch.save({"weight": torch.ones(1000)}, path)
        for count in (1, 1000):
            found: dict[int, list[tuple[float, int]]] = {0: [], options.leases: []}
            for _ in range(7 if count > 1 else 200):
                for leases, runs in found.items():
                    runs.append(opened(paths[:count], leases))
            for leases, runs in found.items():
                middle = 1e6 * statistics.median(s for s, _ in runs) / count
                print(
                    f"{count:5} files, lazy_leases={leases:4}: {middle:7.1f} µs each, {runs[-1][1]} descriptors"
                )
        config.load.lazy_leases = options.leases
        large = str(Path(folder, "large.pt"))
        times = [waited(large, options.gib) / options.gib for _ in range(3)]
        middle = statistics.median(times)
        print(f"a writer waits {min(times):.2f} s per GiB in use (median {middle:.2f})")


if __name__ == "__main__":
    main()
