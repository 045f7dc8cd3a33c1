"""torch.load(lazy=True): how long a file takes to open, and how many bytes are read for what is used.

Claims: 10,000 tensors open 15 times faster than with torch.load(mmap=True), and faster than with safetensors;
300 tensors take at most 5 ms more than none; time grows linearly up to 100,000; of one tensor of a large file, and of
an eighth of the rows of each, no more than 1.05 times the bytes are read, in no more time than safetensors takes; a
file larger than memory opens.

Each run is a process of its own, and the variants take turns. Before the clock starts everything is imported and an
empty file has been loaded. All variants must come to the same sum over all they read. "cold": the file's pages were
dropped from the page cache before. "disk" is what the kernel fetched for the process (read_bytes of /proc/self/io),
with its read-ahead; "counted" is what a file object was asked for; both for each byte that was needed.

    python benchmarks/bench_load_lazy.py [--quick] [--dir DIR] [--json FILE]
"""

import argparse
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_ext


ROWS, COLUMNS = 4096, 8192  # of a bfloat16 tensor of 64 MiB
FIRST, LAST = ROWS // 2, ROWS // 2 + ROWS // 8  # the rows that are used
MIB = 1 << 20

Figures = dict[str, Any]


# What is measured: a function takes a path and returns what is to be reported beside the time.


def open_lazy(path: str) -> Figures:
    return {"sum": len(torch.load(path, lazy=True))}


def open_mmap(path: str) -> Figures:
    return {"sum": len(torch.load(path, mmap=True))}


def open_load(path: str) -> Figures:
    return {"sum": len(torch.load(path))}


def open_safetensors(path: str) -> Figures:
    return {"sum": len(load_file(beside(path)))}


def open_lazy_safetensors(path: str) -> Figures:
    return {"sum": len(torch.load(beside(path), lazy=True))}


def one_lazy(path: str) -> Figures:
    return used([torch.load(path, lazy=True)["5"]])


def one_deferred(path: str) -> Figures:
    with Counted(path) as file:
        figures = used([torch.load(file, lazy=True)["5"]])
        return figures | {"counted": file.count}


def one_lazy_read(path: str) -> Figures:
    return used([torch.load(path, lazy=True, mmap=False)["5"]])


def one_mmap(path: str) -> Figures:
    return used([torch.load(path, mmap=True)["5"]])


def one_load(path: str) -> Figures:
    return used([torch.load(path)["5"]])


def one_safetensors(path: str) -> Figures:
    with safe_open(beside(path), "pt") as file:
        return used([file.get_tensor("5")])


def rows_lazy(path: str) -> Figures:
    return used(t[FIRST:LAST] for t in torch.load(path, lazy=True).values())


def rows_deferred(path: str) -> Figures:
    with Counted(path) as file:
        tensors = torch.load(file, lazy=True).values()
        figures = used(t[FIRST:LAST] for t in tensors)
        return figures | {"counted": file.count}


def rows_lazy_read(path: str) -> Figures:
    tensors = torch.load(path, lazy=True, mmap=False).values()
    return used(t[FIRST:LAST] for t in tensors)


def rows_mmap(path: str) -> Figures:
    return used(t[FIRST:LAST] for t in torch.load(path, mmap=True).values())


def rows_safetensors(path: str) -> Figures:
    with safe_open(beside(path), "pt") as file:
        names = file.keys()
        return used(file.get_slice(name)[FIRST:LAST] for name in names)


def last_lazy(path: str) -> Figures:
    return used([torch.load(path, lazy=True)["last"]])


def last_deferred(path: str) -> Figures:
    with Counted(path) as file:
        return used([torch.load(file, lazy=True)["last"]]) | {"counted": file.count}


class Counted(io.FileIO):
    """A file object that counts the bytes that are read from it."""

    count = 0

    def readinto(self, buffer: Any, /) -> int | None:
        done = super().readinto(buffer)
        self.count += done or 0
        return done

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        self.count += len(data)
        return data


def used(tensors: Iterable[torch.Tensor]) -> Figures:
    """Reads every byte of ``tensors``; returns how many there are, and their sum."""
    nbytes = total = 0
    for tensor in tensors:
        total += int(tensor.view(torch.int64).sum())
        nbytes += tensor.nbytes
    return {"needed": nbytes, "sum": total}


def beside(path: str) -> str:
    return path.removesuffix(".pt") + ".safetensors"


# The files


def write_small(path: Path, count: int) -> None:
    tensors = {f"layer.{i}.weight": torch.full((16, 16), 1.0 * i) for i in range(count)}
    torch.save(tensors, path)
    save_file(tensors, beside(str(path)))


def write_large(path: Path, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        str(i): torch.randint(
            1 << 15, (ROWS, COLUMNS), dtype=torch.int16, generator=generator
        ).view(torch.bfloat16)
        for i in range(count)
    }
    torch.save(tensors, path)
    save_file(tensors, beside(str(path)))


def write_sparse(path: Path, size: int) -> None:
    """A checkpoint of ``size`` bytes, of which the disk has little more than the last tensor."""
    # NB: skip_data leaves room for each storage without writing it.
    with FakeTensorMode():
        state = {"huge": torch.empty(size // 4), "last": torch.empty(ROWS, 2 * COLUMNS)}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(state, path)
    with FakeTensorMode():
        last = torch.load(path)["last"].untyped_storage()
    with open(path, "r+b") as file:
        file.seek(last._checkpoint_offset)
        file.write(b"sparse" * (last.nbytes() // 6))


# Measuring


def child(variant: str, path: str, is_cold: bool) -> Figures:
    """Runs a variant in this process."""
    torch_ext.enable()
    function: Callable[[str], Figures] = globals()[variant]
    empty = Path(path).with_name("empty.pt")
    torch.load(empty)
    torch.load(empty, mmap=True)
    torch.load(empty, lazy=True)
    load_file(beside(str(empty)))
    for file in (path, beside(path)):
        if os.path.exists(file):
            (drop if is_cold else warm)(file)
    before = disk_reads()
    start, cpu = time.perf_counter(), time.process_time()
    figures = function(path)
    figures |= {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
    }
    return figures | {"disk": disk_reads() - before}


def warm(path: str) -> None:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < 16 << 30:
            while file.read(MIB):
                pass


def drop(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def disk_reads() -> int:
    return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])


def measure(
    variants: Sequence[str], path: Path, rounds: int, is_cold: bool = False
) -> dict[str, list[Figures]]:
    """Returns what the runs of each variant told."""
    runs: dict[str, list[Figures]] = {variant: [] for variant in variants}
    for i in range(rounds):
        for variant in variants[:: -1 if i % 2 else 1]:
            command = [sys.executable, __file__, "--child", variant, str(path)]
            command += ["cold"] * is_cold
            out = subprocess.run(command, capture_output=True, text=True)
            if out.returncode:
                raise RuntimeError(f"{variant} failed:\n{out.stderr}")
            runs[variant].append(json.loads(out.stdout.splitlines()[-1]))
    sums = {run["sum"] for results in runs.values() for run in results}
    if len(sums) != 1:
        raise RuntimeError(f"Expected all variants to come to one sum, got {sums}.")
    return runs


def report(title: str, runs: dict[str, list[Figures]]) -> Figures:
    """Prints a table, in which ratios are to the first variant; returns its figures."""
    print(f"\n### {title}\n")
    print("| variant | ms | min - max | ratio | CPU ms | ratio | counted | disk |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    first = next(iter(runs.values()))
    for variant, results in runs.items():
        times = [1e3 * run["seconds"] for run in results]
        print(
            f"| {variant} | {1e3 * median('seconds', results):.1f} "
            f"| {min(times):.1f} - {max(times):.1f} "
            f"| {median('seconds', results) / median('seconds', first):.2f} "
            f"| {1e3 * median('cpu', results):.1f} "
            f"| {median('cpu', results) / median('cpu', first):.2f} "
            f"| {per_needed('counted', results)} | {per_needed('disk', results)} |",
            flush=True,
        )
    return {title: runs}


def median(what: str, results: list[Figures]) -> float:
    return statistics.median(run[what] for run in results)


def per_needed(what: str, results: list[Figures]) -> str:
    """How many bytes were read for each one that was needed."""
    if "needed" not in results[0] or what not in results[0]:
        return ""
    return f"{median(what, results) / results[0]['needed']:.3f}"


# The claims


def many_tensors(folder: Path, rounds: int, most: int) -> Figures:
    figures: Figures = {}
    lazy: dict[int, list[Figures]] = {}
    for count in (0, 300, 1000, 3000, 10_000, 30_000, 100_000):
        if count > most:
            break
        path = folder / f"small{count}.pt"
        write_small(path, count)
        variants = ["open_lazy", "open_mmap", "open_load", "open_safetensors"]
        variants += ["open_lazy_safetensors"]
        some = variants if count <= 10_000 else [variants[0], *variants[3:]]
        runs = measure(some, path, rounds)
        figures |= report(f"Opening {count} tensors, warm", runs)
        lazy[count] = runs["open_lazy"]
        path.unlink()
        os.unlink(beside(str(path)))
    print(
        "\n| tensors | lazy, ms | µs a tensor, over no tensors | CPU |\n|---|---|---|---|"
    )
    for count, results in lazy.items():
        cells = [f"{1e3 * median('seconds', results):.2f}"]
        for what in ("seconds", "cpu"):
            over = median(what, results) - median(what, lazy[0])
            cells.append(f"{1e6 * over / count:.2f}" if count else "")
        print(f"| {count} | {' | '.join(cells)} |")
    return figures


def parts_of_much(folder: Path, rounds: int, count: int) -> Figures:
    figures: Figures = {}
    path = folder / "large.pt"
    write_large(path, count)
    for work, title in (("one", "One tensor of 64 MiB"), ("rows", "1/8 of the rows")):
        for is_cold in (False, True):
            kinds = ["lazy", "deferred", "lazy_read", "safetensors", "mmap"]
            if work == "one" and not is_cold:
                kinds.append("load")
            runs = measure([f"{work}_{k}" for k in kinds], path, rounds, is_cold)
            full = f"{title} of {count} tensors, {count / 16:.0f} GiB"
            figures |= report(f"{full}, {'cold' if is_cold else 'warm'}", runs)
    path.unlink()
    os.unlink(beside(str(path)))
    return figures


def more_than_memory(folder: Path, rounds: int) -> Figures:
    path = folder / "sparse.pt"
    size = (5 * memory() // 4) >> 20 << 20
    write_sparse(path, size)
    disk = path.stat().st_blocks * 512
    title = f"256 MiB of a file of {size >> 30} GiB ({disk >> 20} MiB on disk)"
    runs = measure(["last_lazy", "last_deferred"], path, rounds, is_cold=True)
    path.unlink()
    return report(f"{title}, memory of {memory() >> 30} GiB, cold", runs)


def memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine() -> str:
    found = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    return (
        f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores, "
        f"{memory() >> 30} GiB, {platform.system()} {platform.release()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, safetensors "
        f"{safetensors.__version__}; load average at the start {os.getloadavg()[0]:.1f}"
    )


def main(folder: Path, quick: bool) -> Figures:
    torch.save({}, folder / "empty.pt")
    save_file({}, beside(str(folder / "empty.pt")))
    print(machine(), flush=True)
    rounds = 3 if quick else 7
    figures = {"machine": machine()}
    figures |= many_tensors(folder, rounds, most=10_000 if quick else 100_000)
    figures |= parts_of_much(folder, rounds, count=8 if quick else 64)
    return figures | more_than_memory(folder, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--dir", help="where the files are written")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        variant, path, *cold = arguments.child
        print(json.dumps(child(variant, path, bool(cold))))
        sys.exit()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        figures = main(Path(name), arguments.quick)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
