"""What was measured, as a table: stock, torch_ext, and by what factor the patches do with less."""

import statistics
from collections.abc import Callable

from rich.table import Table

from torch_ext._demo.measure import median, PHASES, Runs, VARIANTS


_TIMES = {
    "construct": ("construct",),
    "open + load_state_dict": ("load",),
    "fill in the rest": ("fill in",),
    "first forward": ("forward",),
    "all of it": PHASES,
}
_MEMORY = {"load": ("load",), "all of it": PHASES}


def table(runs: Runs) -> Table:
    """Median times over the rounds; memory and copies of the round whose load took the median time."""
    result = Table()
    result.add_column()
    for head in (*VARIANTS, "less by"):
        result.add_column(head, justify="right")

    def row(label: str, a: float, b: float, unit: Callable[[float], str]) -> None:
        result.add_row(label, unit(a), unit(b), _factor(a, b))

    for label, phases in _TIMES.items():
        a, b = (
            statistics.median(run.seconds(*phases) for run in runs[variant])
            for variant in VARIANTS
        )
        row(f"{label}, wall time", a, b, seconds)
    result.add_section()
    a_run, b_run = (median(runs[variant]) for variant in VARIANTS)
    for label, phases in _MEMORY.items():
        for kind, a, b in zip(
            ("anonymous", "file"), a_run.rise(*phases), b_run.rise(*phases), strict=True
        ):
            row(f"{label}, peak {kind} pages", a, b, _bytes)
    result.add_section()
    row(f"copied of {a_run.tensors} tensors", a_run.copied, b_run.copied, str)
    return result


def gain(runs: Runs) -> str:
    """What the patches are for, in one line."""
    a, b = (median(runs[variant]) for variant in VARIANTS)
    time = b.seconds("load") / a.seconds("load")
    memory = b.rise("load")[0] / max(a.rise("load")[0], 1)
    return f"the load takes {time:.1%} of stock's time and {memory:.1%} of its peak anonymous memory"


def seconds(time: float) -> str:
    """A duration with three digits or so."""
    if not time:
        return "-"
    return f"{time:.2f} s" if time >= 1 else f"{time * 1e3:.1f} ms"


def _factor(a: float, b: float) -> str:
    if not a or not b:
        return ""
    return (
        f"{a / b:.0f}x"
        if a >= 10 * b
        else f"{a / b:.1f}x"
        if a >= b
        else f"{a / b:.2g}x"
    )


def _bytes(size: float) -> str:
    mib = size / (1 << 20)
    return f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:.1f} MiB"
