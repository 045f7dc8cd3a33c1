"""``load_state_dict(reuse_tensors=True)`` against the copying load and ``assign=True``: time and memory.

Law: every variant runs in fresh processes, the variants taking turns, with the files in the page cache; times are
medians with their range, of ``load_state_dict`` alone or of the named phases. Memory is sampled from outside and told
as anonymous pages, which the process alone holds, and file pages, which it shares with the page cache. What the models
compute must agree bit for bit.

    python benchmarks/bench_load_state_dict.py [--quick] [--rounds N] [--only llama] [--json FILE]

(a) ``llama``: 1.1 B parameters in bf16, from meta to the logits of eight tokens, with all that is imported on the way;
(b) ``moe``: 60 layers of 128 experts of 3 matrices; (c) ``siblings``: 8,000 Linears in one list; (d) ``growth``: the
same from 500 to 32,000, that is 1,000 to 64,000 tensors. What this does not measure: cold files, other devices.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn, Tensor

from torch_ext._demo import measure


MIB = 1 << 20
PAUSE = 0.02  # seconds: lets the parent see the memory before and behind a phase

FILES = {
    "load, copy": "model.pt",
    "mmap, assign": "model.pt",
    "safetensors, assign": "model.safetensors",
    "lazy, reuse": "model.pt",
}
MEMORY = ("copy", "assign", "reuse")


@dataclass(frozen=True)
class Case:
    """One thing to measure: a model of a size, and one of the ways to load it."""

    model: str
    size: int
    variant: str

    def __str__(self) -> str:
        return f"{self.model} {self.size}, {self.variant}"


def cases(only: str | None, quick: bool) -> list[Case]:
    """All of them, those to be compared next to each other."""
    layers, experts, siblings, largest = (
        (2, 6, 1000, 4000) if quick else (22, 60, 8000, 32000)
    )
    listed = [Case("llama", layers, variant) for variant in FILES]
    listed += [Case("moe", experts, variant) for variant in MEMORY]
    listed += [Case("siblings", siblings, variant) for variant in MEMORY]
    size = 500
    while size <= largest:
        listed.append(Case("growth", size, "reuse"))
        size *= 2
    return [case for case in listed if only in (None, case.model)]


# In the child: one run of one case


def child(case: Case, folder: Path) -> None:
    """Do it, and print when each phase began and ended, and a digest of the result."""
    phases: dict[str, tuple[float, float]] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        time.sleep(PAUSE)
        start = time.monotonic()
        yield
        phases[name] = start, time.monotonic()
        time.sleep(PAUSE)

    if case.variant in ("lazy, reuse", "reuse"):
        import torch_ext

        torch_ext.enable()
    run = run_llama if case.model == "llama" else run_in_memory
    result = run(case, folder, phase)
    digest = hashlib.sha256(result.detach().view(torch.uint8).numpy().tobytes())
    print(json.dumps({"phases": phases, "digest": digest.hexdigest()}))


def run_llama(case: Case, folder: Path, phase: Callable[[str], Any]) -> Tensor:
    """From meta to the logits of eight tokens."""
    from torch_ext._demo import llama

    with torch.device("meta"):
        model = llama_of(case.size).eval()
    path = folder / FILES[case.variant]
    with phase("load"):
        if case.variant == "load, copy":
            model.to_empty(device="cpu")
            model.load_state_dict(torch.load(path))
        elif case.variant == "mmap, assign":
            model.load_state_dict(torch.load(path, mmap=True), assign=True)
        elif case.variant == "safetensors, assign":
            from safetensors.torch import load_file

            model.load_state_dict(load_file(path), assign=True)
        else:
            state_dict = torch.load(path, lazy=True)
            model.load_state_dict(state_dict, reuse_tensors=True)  # type: ignore[call-arg]
            del state_dict
    # The one module with buffers that are in no state dict, alike for all.
    with phase("fill in"), torch.device("cpu"):
        rotary: Any = model.get_submodule("model.rotary_emb")
        model.get_submodule("model").rotary_emb = type(rotary)(rotary.config)
    with phase("forward"), torch.no_grad():
        return llama.forward(model, llama.inputs())


def run_in_memory(case: Case, folder: Path, phase: Callable[[str], Any]) -> Tensor:
    """``load_state_dict`` alone: onto real memory for ``copy``, else onto meta."""
    with torch.device("meta"):
        model = build(case)
    memory = torch.randn(sum(p.numel() for p in model.parameters()))
    shapes = {key: t.shape for key, t in model.state_dict().items()}
    pieces = memory.split([shape.numel() for shape in shapes.values()])
    state_dict = {
        key: piece.view(shape).clone()
        for (key, shape), piece in zip(shapes.items(), pieces, strict=True)
    }
    if case.variant == "copy":
        model.to_empty(device="cpu")
    how = {"copy": {}, "assign": {"assign": True}, "reuse": {"reuse_tensors": True}}
    tiny = nn.Linear(1, 1)
    tiny.load_state_dict(tiny.state_dict(), **how[case.variant])  # imports
    with phase("load"):
        model.load_state_dict(state_dict, **how[case.variant])
    return torch.cat([t.detach().reshape(-1) for t in model.state_dict().values()])


def build(case: Case) -> nn.Module:
    if case.model == "moe":
        expert = lambda: nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        layers = (nn.ModuleList(expert() for _ in range(128)) for _ in range(case.size))
        return nn.ModuleList(layers)
    return nn.ModuleList(nn.Linear(4, 4) for _ in range(case.size))


def llama_of(layers: int) -> nn.Module:
    """The demo's model with this many layers."""
    from torch_ext._demo import llama

    model: Any = llama.construct()
    model.model.layers = model.model.layers[:layers]
    return model  # type: ignore[no-any-return]


# In the parent


def prepare(folder: Path, layers: int) -> None:
    """Write the checkpoint in both formats, the second one through a mapping of the first."""
    from rich.console import Console
    from safetensors.torch import save_file

    from torch_ext._demo import llama

    path = folder / "model.pt"
    llama.write_checkpoint(path, Console(stderr=True))
    with torch.device("meta"):
        wanted = set(llama_of(layers).state_dict())
    whole = torch.load(path, mmap=True)
    state_dict = {key: value for key, value in whole.items() if key in wanted}
    if len(wanted) < len(whole):
        torch.save({k: v.clone() for k, v in state_dict.items()}, folder / "fewer.pt")
        (folder / "fewer.pt").replace(path)
    save_file(state_dict, folder / "model.safetensors")


def measured(case: Case, folder: Path) -> tuple[measure.Run, str]:
    """One run in a process of its own, and the digest of what it computed."""
    if case.model == "llama":
        measure.warm(folder / FILES[case.variant])
    command = [sys.executable, __file__, "--child", case.model, str(case.size)]
    command += [case.variant, "--folder", str(folder)]
    with (folder / "stderr").open("w+") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        samples = measure._watch(process)
        stdout, _ = process.communicate()
        stderr.seek(0)
        if process.returncode:
            raise measure.ChildFailed(f"{case}: {stderr.read()}")
    told = json.loads(stdout.splitlines()[-1])
    phases = {name: (start, end) for name, (start, end) in told["phases"].items()}
    return measure.Run(phases, samples, 0, 0, torch.empty(0)), told["digest"]


def run_all(
    listed: list[Case], folder: Path, rounds: int
) -> dict[Case, list[measure.Run]]:
    """Each case once a round; all of one model and size must compute the same."""
    runs: dict[Case, list[measure.Run]] = {case: [] for case in listed}
    results: dict[tuple[str, int], str] = {}
    for i in range(rounds):
        for case in listed:
            print(f"round {i + 1} of {rounds}: {case}", file=sys.stderr)
            run, digest = measured(case, folder)
            runs[case].append(run)
            # NB: random numbers are drawn anew in each process.
            if case.model == "llama":
                known = results.setdefault((case.model, case.size), digest)
                assert digest == known, f"{case} computes something else"
    return runs


def figures(case: Case, runs: list[measure.Run], model_bytes: int) -> dict[str, Any]:
    """What is told of one case; times in seconds, memory in bytes above that before the load."""
    phases = ("load", "forward") if case.model == "llama" else ("load",)
    load = [run.seconds("load") for run in runs]
    usable = [run.seconds(*phases) for run in runs]
    rises = [run.rise(*phases) for run in runs]
    anonymous = statistics.median(r[0] for r in rises)
    return {
        "model": case.model,
        "size": case.size,
        "variant": case.variant,
        "load": [statistics.median(load), min(load), max(load)],
        "usable": [statistics.median(usable), min(usable), max(usable)],
        "anonymous": anonymous,
        "file": statistics.median(r[1] for r in rises),
        "anonymous_share": anonymous / model_bytes if model_bytes else None,
    }


def table(rows: list[dict[str, Any]], model: str) -> list[str]:
    """Markdown; each ratio is to the last variant, which is the new one."""
    rows = [row for row in rows if row["model"] == model]
    if model == "growth":
        return growth(rows)
    lines = [
        "| variant | open + load, s | ratio | to usable, s | ratio | anonymous, MiB | of the model | file, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["variant"]]
        for what in ("load", "usable"):
            cells += [spread(row[what]), f"{row[what][0] / rows[-1][what][0]:.2f}"]
        share = row["anonymous_share"]
        cells += [
            f"{row['anonymous'] / MIB:.0f}",
            "" if share is None else f"{share:.1%}",
        ]
        cells.append(f"{row['file'] / MIB:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def growth(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| tensors | load, s | µs a tensor |", "|---|---|---|"]
    for row in rows:
        tensors = 2 * row["size"]
        each = row["load"][0] / tensors * 1e6
        lines.append(f"| {tensors:,} | {spread(row['load'])} | {each:.1f} |")
    return lines


def spread(times: list[float]) -> str:
    median, least, most = times
    return f"{median:.3f} ({least:.3f} to {most:.3f})"


def machine() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": psutil.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "load": os.getloadavg()[0],
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--quick", action="store_true", help="small models, one round")
    made.add_argument("--rounds", type=int, help="default: 5, or 1 if quick")
    made.add_argument("--only", choices=["llama", "moe", "siblings", "growth"])
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    made.add_argument("--folder", type=Path, help="for the checkpoints (5 GB)")
    made.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return made


def main() -> None:
    args = parser().parse_args()
    if args.child:
        model, size, variant = args.child
        child(Case(model, int(size), variant), args.folder)
        return
    listed = cases(args.only, args.quick)
    here = machine()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, model_bytes = Path(name), 0
        if any(case.model == "llama" for case in listed):
            prepare(folder, listed[0].size)
            model_bytes = (folder / "model.pt").stat().st_size
        runs = run_all(listed, folder, args.rounds or (1 if args.quick else 5))
    rows = [
        figures(case, of, model_bytes if case.model == "llama" else 0)
        for case, of in runs.items()
    ]
    print(", ".join(f"{key} {value}" for key, value in here.items()))
    for model in dict.fromkeys(case.model for case in listed):
        size = next(case.size for case in listed if case.model == model)
        title = f"### {model}" + ("" if model == "growth" else f" ({size:,})")
        print("\n".join(["", title, "", *table(rows, model)]))
    if args.json:
        args.json.write_text(json.dumps({"machine": here, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
