"""The order of events: write a checkpoint, measure both variants in turn, compare the results, report."""

import importlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from torch_ext._demo.measure import ChildFailed, run, Runs, VARIANTS
from torch_ext._demo.picture import draw
from torch_ext._demo.report import gain, seconds, table


_ENOUGH = 100.0  # seconds: no round begins that would end later


def tour(names: Sequence[str], out: Path, *, rounds: int, keep: bool) -> int:
    """Show the models ``names`` (modules of this package); returns 0 if all that was computed is bit-equal, else 1."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    out.mkdir(parents=True, exist_ok=True)
    shown: dict[str, Runs] = {}
    same = True
    for name in names:
        model: Any = importlib.import_module(f"torch_ext._demo.{name}")
        lack = model.lack_of_room(out)
        if lack:
            console.print(f"\n{model.TITLE}: skipped, as {lack}")
            continue
        with tempfile.TemporaryDirectory(dir=out) as temporary:
            path = (out if keep else Path(temporary)) / f"{name}.pt"
            try:
                shown[model.TITLE] = _measure(name, model, path, rounds, console)
            except ChildFailed as e:
                console.print(str(e), markup=False)
                return 1
        same &= _tell(model, shown[model.TITLE], console)
    if shown:
        console.print(
            "\nresident memory over time:", str(draw(shown, out / "memory.png"))
        )
    return 0 if same else 1


def _measure(name: str, model: Any, path: Path, rounds: int, console: Console) -> Runs:
    console.print(f"\n[bold]{model.TITLE}")
    note = model.write_checkpoint(path, console)
    console.print(f"{note}: {path.stat().st_size / (1 << 20):,.0f} MiB in {path.name}")
    runs: Runs = {variant: [] for variant in VARIANTS}
    begin = time.monotonic()
    for i in range(rounds):
        elapsed = time.monotonic() - begin
        if i and elapsed * (i + 1) / i > _ENOUGH:
            console.print(f"no further round, as these took {elapsed:.0f} s")
            break
        for variant in VARIANTS[:: -1 if i % 2 else 1]:
            with console.status(f"round {i + 1} of {rounds}: {variant}"):
                runs[variant].append(run(name, variant, path))
        loads = (f"{v} {seconds(runs[v][-1].seconds('load'))}" for v in VARIANTS)
        console.print(f"round {i + 1} of {rounds}, load: {', '.join(loads)}")
    return runs


def _tell(model: Any, runs: Runs, console: Console) -> bool:
    """Print the table and what was computed; returns whether that is the same bits in all runs."""
    console.print(table(runs))
    console.print(gain(runs))
    results = [run.result for variant in VARIANTS for run in runs[variant]]
    same = all(_bits(result).equal(_bits(results[0])) for result in results)
    shape = " x ".join(map(str, results[0].shape))
    console.print(
        f"{model.RESULT} bit-equal: {'yes' if same else 'NO'} ({shape}, in {len(results)} processes)"
    )
    for line in model.describe(results[-1]):
        console.print(line, markup=False)
    return same


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
