"""``TorchSaveReader`` against ``BroadcastingTorchSaveReader``, and streaming conversion against ``dcp_to_torch_save``.

Law: every variant runs in fresh processes, the variants taking turns, with the files in the page cache; times are
medians with their range. Memory is the peak of anonymous pages while the phase runs, sampled from outside, less what
there was before it; of several ranks the largest. Bytes read are those of the process' system calls (``rchar`` of
``/proc/self/io``), which has what a mapping reads as zero: no variant maps. What each variant loads or writes must
agree bit for bit.

    python benchmarks/bench_dcp.py [--quick] [--rounds N] [--only load] [--json FILE]

(a) ``load``: a state dict of 2 GiB into DTensors sharded by rows among 4 gloo processes. BroadcastingTorchSaveReader
waits forever for those (it lets the ranks expect shards of what rank 0 sends whole), so it loads full tensors, of which
each rank keeps its rows. ``hf`` is torch's ``HuggingFaceStorageReader``. (b) ``convert``: the DCP checkpoint that 4
processes wrote of it, to one file. What this does not measure: cold files, other devices, networks.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch


MIB = 1 << 20
RANKS = 4
VARIANTS = {
    "load": ("broadcast", "hf, safetensors", "ours", "ours, safetensors"),
    "convert": ("dcp_to_torch_save", "stream", "safetensors"),
}


def state_dict_of(layers: int) -> dict[str, torch.Tensor]:
    """Layers as a decoder has them, 64 MiB each."""
    shapes = {"q": (2048, 2048), "o": (2048, 2048), "up": (4096, 2048)}
    return {
        f"layers.{i}.{name}.weight": torch.randn(shape)
        for i in range(layers)
        for name, shape in shapes.items()
    }


# In a child: one run


def child(what: str, variant: str, folder: Path, rank: int) -> None:
    """Do it, and print when it began and ended, what was read, and a digest of the result."""
    import torch_ext

    torch_ext.enable("load_lazy", "dcp_torch_reader")
    warnings.simplefilter("ignore")
    run = load(folder, variant, rank) if what == "load" else convert(folder, variant)
    time.sleep(0.1)  # lets the parent see the memory before
    read, start = _bytes_read(), time.monotonic()
    digest = run()
    end, read = time.monotonic(), _bytes_read() - read
    print(json.dumps({"start": start, "end": end, "read": read, "digest": digest()}))


def load(folder: Path, variant: str, rank: int) -> Callable[[], Callable[[], str]]:
    """The load, ready to run among the ranks."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import (
        BroadcastingTorchSaveReader,
        DynamicMetaLoadPlanner,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, zeros

    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    file = torch.load(folder / "model.pt", map_location="meta")
    targets: dict[str, Any] = {
        key: zeros(t.size(), device_mesh=mesh, placements=[Shard(0)])
        for key, t in file.items()
    }
    path = folder / ("model.safetensors" if "safetensors" in variant else "model.pt")

    def run() -> Callable[[], str]:
        dist.barrier()
        if variant == "broadcast":
            full = {key: torch.empty(t.size()) for key, t in targets.items()}
            reader: Any = BroadcastingTorchSaveReader(path)
            dcp.load(full, storage_reader=reader, planner=DynamicMetaLoadPlanner())
            for key, t in full.items():
                targets[key].to_local().copy_(t.chunk(RANKS)[rank])
        elif variant == "hf, safetensors":
            reader = dcp.HuggingFaceStorageReader(str(path.parent))
            dcp.load(targets, storage_reader=reader)
        else:
            reader = dcp.TorchSaveReader(path)  # type: ignore[attr-defined]
            dcp.load(targets, storage_reader=reader)
        return lambda: _digest(t.to_local() for t in targets.values())

    return run


def convert(folder: Path, variant: str) -> Callable[[], Callable[[], str]]:
    """The conversion, ready to run."""
    from torch.distributed.checkpoint import format_utils

    out = folder / ("out.safetensors" if variant == "safetensors" else "out.pt")

    def run() -> Callable[[], str]:
        if variant == "safetensors":
            format_utils.dcp_to_safetensors(folder / "dcp", out)  # type: ignore[attr-defined]
        elif variant == "stream":
            format_utils.dcp_to_torch_save(folder / "dcp", out, stream=True)  # type: ignore[call-arg]
        else:
            format_utils.dcp_to_torch_save(folder / "dcp", out)
        loaded = torch.load(out, lazy=True)  # type: ignore[call-arg]
        return lambda: _digest(loaded[key] for key in sorted(loaded))

    return run


def _bytes_read() -> int:
    text = Path("/proc/self/io").read_text()
    return int(text.split("rchar:")[1].split()[0])


def _digest(tensors: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


# In the parent


def measure(what: str, variant: str, folder: Path) -> dict[str, Any]:
    """One run in fresh processes."""
    (folder / "store").unlink(missing_ok=True)
    ranks = RANKS if what == "load" else 1
    command = [sys.executable, __file__, "--child", what, variant, str(folder)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environ
        )
        for rank in range(ranks)
    ]
    samples: list[list[tuple[float, int]]] = [[] for _ in children]
    sampler = threading.Thread(target=_sample, args=(children, samples))
    sampler.start()
    outputs = [process.communicate()[0] for process in children]
    sampler.join()
    if any(process.returncode for process in children):
        raise RuntimeError(f"{what}, {variant} failed")
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {
        "seconds": max(f["end"] for f in found) - min(f["start"] for f in found),
        "read": [f["read"] for f in found],
        "peak": max(_peak(f, some) for f, some in zip(found, samples, strict=True)),
        "digest": [f["digest"] for f in found],
    }


def _sample(
    children: list[subprocess.Popen[str]], samples: list[list[tuple[float, int]]]
) -> None:
    processes = [psutil.Process(process.pid) for process in children]
    while any(process.poll() is None for process in children):
        for process, some in zip(processes, samples, strict=True):
            try:
                memory = process.memory_info()
            except psutil.Error:
                continue
            some.append((time.monotonic(), memory.rss - memory.shared))
        time.sleep(0.01)


def _peak(found: dict[str, Any], samples: list[tuple[float, int]]) -> int:
    before = [memory for at, memory in samples if at < found["start"]][-1]
    during = [m for at, m in samples if found["start"] <= at <= found["end"]]
    return max(during, default=before) - before


def prepare(folder: Path, layers: int) -> None:
    """Write the files, in a process of its own for each that a group writes."""
    from safetensors.torch import save_file

    state_dict = state_dict_of(layers)
    torch.save(state_dict, folder / "model.pt")
    save_file(state_dict, folder / "model.safetensors")
    writers = [
        subprocess.Popen([sys.executable, __file__, "--write", str(folder), str(rank)])
        for rank in range(RANKS)
    ]
    if any(writer.wait() for writer in writers):
        raise RuntimeError("the checkpoint was not written")


def write(folder: Path, rank: int) -> None:
    """Write this rank's part of a DCP checkpoint."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    parts = {
        key: DTensor.from_local(t.chunk(RANKS)[rank], mesh, [Shard(0)])
        for key, t in torch.load(folder / "model.pt", mmap=True).items()
    }
    dcp.save(parts, checkpoint_id=folder / "dcp")


def table(results: dict[str, dict[str, list[dict[str, Any]]]], size: int) -> str:
    """What was measured, as Markdown."""
    lines = [
        f"{size / MIB:,.0f} MiB, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores",
        "",
        "| | variant | seconds | of the first | bytes read, all ranks | largest rank | peak anonymous |",
        "|---|---|---|---|---|---|---|",
    ]
    for what, variants in results.items():
        first = 0.0
        for variant, runs in variants.items():
            times = [run["seconds"] for run in runs]
            median = statistics.median(times)
            first = first or median
            total = statistics.median(sum(run["read"]) for run in runs)
            largest = statistics.median(max(run["read"]) for run in runs)
            peak = statistics.median(run["peak"] for run in runs)
            lines.append(
                f"| {what} | {variant} | {median:.2f} ({min(times):.2f}-{max(times):.2f}) | {median / first:.2f} | "
                f"{total / size:.3f} of the file | {largest / size:.3f} | {peak / MIB:,.0f} MiB |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=VARIANTS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        prepare(folder, 2 if args.quick else 32)
        size = (folder / "model.pt").stat().st_size
        chosen = [args.only] if args.only else list(VARIANTS)
        results: dict[str, dict[str, list[dict[str, Any]]]] = {
            what: {variant: [] for variant in VARIANTS[what]} for what in chosen
        }
        for _ in range(args.rounds):
            for what, variants in results.items():
                for variant, runs in variants.items():
                    runs.append(measure(what, variant, folder))
                    found = {key: runs[-1][key] for key in ("seconds", "read", "peak")}
                    print(what, variant, found, file=sys.stderr)
        for what, variants in results.items():
            digests = {
                json.dumps(r["digest"]) for runs in variants.values() for r in runs
            }
            if len(digests) != 1:
                raise RuntimeError(f"the variants of {what} differ")
        print(table(results, size))
        if args.json:
            args.json.write_text(json.dumps(results))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]))
    elif sys.argv[1:2] == ["--write"]:
        write(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
