"""Load an unsharded checkpoint into a ``fully_shard``ed model on four ranks: time, memory, and who reads how much.

Claims: all ranks together read at most 1.05 times the file, each at most 1.1 times its share; no rank has more
anonymous memory than its shard and one tensor; and that takes at most a third of the time of ``set_model_state_dict``
with ``broadcast_from_rank0`` after ``torch.load``, and of ``dcp.load`` with ``BroadcastingTorchSaveReader``, which
takes 14 GiB of memory for a file of 2.

Each run is four processes of its own (gloo, one thread each), and the variants take turns. The clock runs from a
barrier, before the file is opened, to one after the load, and on to one after each rank has summed up its shard: what
is mapped is read by then, too. All variants must come to the same sum. "cold": the file's pages were dropped from the
page cache. "read" is what a rank read by system calls, "disk" what the kernel fetched for it, with its read-ahead; each
for each byte of the file (all ranks), and for each byte of its shard (the rank that has most). "anonymous" is the
highest rise of any rank during the load, for each byte of its shard.

    python benchmarks/bench_sharded_load.py [--quick] [--rounds N] [--dir DIR] [--json FILE]
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import torch_ext


RANKS = 4
HIDDEN, INNER, WORDS = 2048, 5632, 32000
MIB = 1 << 20

Figures = dict[str, Any]


class Layer(nn.Module):
    """The matrices of a layer of Llama."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            self.add_module(name, nn.Linear(HIDDEN, HIDDEN, bias=False))
        self.gate = nn.Linear(HIDDEN, INNER, bias=False)
        self.up = nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)
        self.norm = nn.RMSNorm(HIDDEN)


class Model(nn.Module):
    """The tensors of a Llama of so many layers, in float32."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, WORDS, bias=False)


def sharded(layers: int) -> nn.Module:
    """The model on meta, under fully_shard."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    with torch.device("meta"):
        model = Model(layers)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


# What is measured: a function takes a model on meta and the path.


def lazy(model: nn.Module, path: str) -> None:
    model.load_state_dict(torch.load(path, lazy=True), reuse_tensors=True)  # type: ignore[call-arg]


def lazy_read(model: nn.Module, path: str) -> None:
    state_dict = torch.load(path, lazy=True, mmap=False)
    model.load_state_dict(state_dict, reuse_tensors=True)  # type: ignore[call-arg]


def lazy_in_place(model: nn.Module, path: str) -> None:
    model.to_empty(device="cpu")
    lazy(model, path)


def broadcast(model: nn.Module, path: str) -> None:
    from torch.distributed.checkpoint import state_dict as dcp

    model.to_empty(device="cpu")
    state_dict = torch.load(path) if dist.get_rank() == 0 else {}
    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp.set_model_state_dict(model, state_dict, options=options)


def dcp_reader(model: nn.Module, path: str) -> None:
    from torch.distributed.checkpoint import format_utils
    from torch.distributed.checkpoint import state_dict_loader as dcp

    # NB: the reader waits forever for DTensors, since it lets the ranks expect parts of what the first one sends
    # whole. So it loads full tensors, of which each rank keeps its part.
    full = {key: torch.empty(param.shape) for key, param in model.named_parameters()}
    dcp.load(
        full,
        storage_reader=format_utils.BroadcastingTorchSaveReader(),
        planner=format_utils.DynamicMetaLoadPlanner(),
        checkpoint_id=path,
    )
    model.to_empty(device="cpu")
    for key, param in model.named_parameters():
        shard: Any = param.detach()
        shard.to_local().copy_(full.pop(key).chunk(RANKS)[dist.get_rank()])


VARIANTS: dict[str, Callable[[nn.Module, str], None]] = {
    "lazy": lazy,
    "lazy_read": lazy_read,
    "lazy_in_place": lazy_in_place,
    "broadcast": broadcast,
    "dcp_reader": dcp_reader,
}


# In a rank


def child(variant: str, path: str, layers: int, address: str, rank: int) -> Figures:
    """Runs a variant on this rank."""
    torch.set_num_threads(1)
    if variant.startswith("lazy"):
        torch_ext.enable()
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    from torch.distributed.checkpoint import format_utils  # noqa: F401

    # NB: imports, and what gloo does once.
    VARIANTS[variant](sharded(0), str(Path(path).with_name("small.pt")))
    model = sharded(layers)
    dist.barrier()
    figures: Figures = {}
    before = io_counts()
    start = time.perf_counter()
    with highest_anonymous(figures):
        VARIANTS[variant](model, path)
        dist.barrier()
    figures["load"] = time.perf_counter() - start
    params: list[Any] = list(model.parameters())
    shards = [param.to_local() for param in params]
    total = sum(float(shard.double().sum()) for shard in shards)
    dist.barrier()
    figures["use"] = time.perf_counter() - start
    figures |= {key: now - before[key] for key, now in io_counts().items()}
    figures["shard"] = sum(shard.nbytes for shard in shards)
    figures["largest"] = max(param.numel() * 4 for param in params)
    return figures | {"sum": total}


def io_counts() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    counts = dict(line.split(": ") for line in lines)
    return {"read": int(counts["rchar"]), "disk": int(counts["read_bytes"])}


@contextmanager
def highest_anonymous(figures: Figures) -> Iterator[None]:
    """Context that notes by how much anonymous memory rose at most."""
    done = threading.Event()
    seen = [anonymous()]

    def watch() -> None:
        while not done.wait(0.01):
            seen.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    done.set()
    thread.join()
    figures["anonymous"] = max([*seen, anonymous()]) - seen[0]


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


# In the parent


def write(path: Path, layers: int) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Model(layers)
    # NB: whole numbers, of which every order of summing gives the same sum.
    torch.save(
        {
            k: torch.randint(-9, 9, p.shape).float()
            for k, p in model.state_dict().items()
        },
        path,
    )


def measured(variant: str, path: Path, layers: int, is_cold: bool) -> Figures:
    """What the ranks of one run told, put together."""
    (drop if is_cold else warm)(path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"tcp://localhost:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--child", variant, str(path), str(layers)]
    processes = [
        subprocess.Popen(
            [*command, address, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{variant} failed:\n{errors}")
    ranks = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    size = path.stat().st_size
    result = {key: max(rank[key] for rank in ranks) for key in ("load", "use")}
    for key in ("read", "disk"):
        result[f"{key}, all"] = sum(rank[key] for rank in ranks) / size
        result[f"{key}, one"] = max(rank[key] / rank["shard"] for rank in ranks)
    worst = max(ranks, key=lambda rank: float(rank["anonymous"] / rank["shard"]))
    result["anonymous"] = worst["anonymous"] / worst["shard"]
    result["allowed"] = (worst["shard"] + worst["largest"]) / worst["shard"]
    return result | {"sum": sum(rank["sum"] for rank in ranks)}


def warm(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(16 * MIB):
            pass


def drop(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def run_all(path: Path, layers: int, rounds: int, is_cold: bool) -> Figures:
    """Returns and prints what the runs of each variant told; ratios of times are to the first."""
    runs: dict[str, list[Figures]] = {variant: [] for variant in VARIANTS}
    for i in range(rounds):
        for variant in list(VARIANTS)[:: -1 if i % 2 else 1]:
            runs[variant].append(measured(variant, path, layers, is_cold))
            print(f"{variant}: {runs[variant][-1]}", file=sys.stderr, flush=True)
    sums = {run["sum"] for results in runs.values() for run in results}
    if len(sums) != 1:
        raise RuntimeError(f"Expected all variants to come to one sum, got {sums}.")
    print(f"\n### {'cold' if is_cold else 'warm'}\n")
    columns = ["read, all", "read, one", "disk, all", "disk, one", "anonymous"]
    print(f"| variant | load, s | ratio | and use, s | ratio | {' | '.join(columns)} |")
    print("|---" * (5 + len(columns)) + "|")
    first = runs["lazy"]
    for variant, results in runs.items():
        cells = [variant]
        for what in ("load", "use"):
            times = [run[what] for run in results]
            middle = statistics.median(times)
            cells.append(f"{middle:.2f} ({min(times):.2f} - {max(times):.2f})")
            cells.append(f"{middle / statistics.median(r[what] for r in first):.1f}")
        for column in columns:
            cells.append(f"{statistics.median(run[column] for run in results):.3f}")
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\nOne shard and the largest tensor are {first[0]['allowed']:.3f} shards.")
    return {"cold" if is_cold else "warm": runs}


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        f"{os.cpu_count()} cores, {memory >> 30} GiB, {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}; load average at the start {os.getloadavg()[0]:.1f}"
    )


def main(folder: Path, layers: int, rounds: int) -> Figures:
    path = folder / "model.pt"
    write(path, layers)
    write(folder / "small.pt", 0)
    title = f"{path.stat().st_size / (1 << 30):.2f} GiB, {RANKS} ranks, {machine()}"
    print(title, flush=True)
    figures: Figures = {"machine": title}
    for is_cold in (False, True):
        figures |= run_all(path, layers, rounds, is_cold)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model, one round")
    parser.add_argument("--rounds", type=int, help="default: 5, or 1 if quick")
    parser.add_argument("--dir", help="where the files are written")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        variant, path, layers, address, rank = arguments.child
        print(json.dumps(child(variant, path, int(layers), address, int(rank))))
        sys.exit()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        quick = arguments.quick
        figures = main(
            Path(name), 1 if quick else 8, arguments.rounds or (1 if quick else 5)
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
