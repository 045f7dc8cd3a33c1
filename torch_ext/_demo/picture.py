"""Resident memory over time as a PNG: a column for each model, stock above torch_ext, both on the same scales.

Time counts only while a phase is measured, and memory from where it stood before the first one.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from torch_ext._demo import report
from torch_ext._demo.measure import median, Run, Runs, VARIANTS


_ANONYMOUS, _FILE, _INK = "#c8553d", "#8fb8de", "#333333"
_SHADES = {
    "construct": "#e9e9e9",
    "load": "#ffe08a",
    "fill in": "#cdeac0",
    "forward": "#ddd8f0",
}
_SMALL = 0.3  # of the width: what is narrower is also shown enlarged

Curve = list[tuple[float, float, float]]  # seconds, anonymous and file bytes


def draw(shown: Mapping[str, Runs], path: Path) -> Path:
    """Draw the median run of each variant into ``path``."""
    figure = Figure(figsize=(7.5 * len(shown), 7.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(shown), sharex="col", sharey="col", squeeze=False)
    for column, (title, runs) in enumerate(shown.items()):
        _column(axes[:, column], title, runs)
    pages = {"anonymous pages": _ANONYMOUS, "file pages (page cache)": _FILE}
    figure.legend(
        handles=[Patch(color=color, label=label) for label, color in pages.items()],
        title="Resident memory above that of the imported libraries",
        loc="outside upper center",
        ncols=2,
        frameon=False,
        title_fontsize="large",
    )
    figure.savefig(path)
    return path


def _column(axes: Any, title: str, runs: Runs) -> None:
    curves = {v: _curve(median(runs[v])) for v in VARIANTS}
    peak = max(a + f for curve in curves.values() for _, a, f in curve)
    width = max(curve[-1][0] for curve in curves.values())
    unit, name = (1 << 30, "GiB") if peak >= 1 << 30 else (1 << 20, "MiB")
    for panel, (variant, curve) in zip(axes, curves.items(), strict=True):
        run = median(runs[variant])
        _plot(panel, run, curve, unit)
        panel.set_title(
            f"{title}, {variant}", loc="left", pad=26, weight="bold", color=_INK
        )
        panel.set_ylabel(name)
        panel.tick_params(labelbottom=True)
        panel.legend(
            handles=[
                Patch(color=_SHADES[phase], label=f"{phase} {report.seconds(seconds)}")
                for phase, seconds in _durations(run)
            ],
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=len(run.phases),
            frameon=False,
            fontsize="small",
            borderaxespad=0.2,
        )
        if curve[-1][0] < _SMALL * width:
            inset = panel.inset_axes((0.42, 0.22, 0.55, 0.6))
            _plot(inset, run, curve, unit)
            inset.set_ylim(0, 1.05 * peak / unit)
            inset.set_title("the same, enlarged in time", fontsize="small", color=_INK)
            inset.tick_params(labelsize="small")
    axes[0].set_xlim(0, 1.02 * width)
    axes[0].set_ylim(0, 1.05 * peak / unit)
    axes[1].set_xlabel("seconds")


def _plot(axes: Any, run: Run, curve: Curve, unit: int) -> None:
    begin = 0.0
    for phase, seconds in _durations(run):
        axes.axvspan(
            begin, begin + seconds, color=_SHADES[phase], linewidth=0, zorder=0
        )
        begin += seconds
    times, anonymous, file = zip(*curve, strict=True)
    axes.stackplot(
        times,
        [n / unit for n in anonymous],
        [n / unit for n in file],
        colors=(_ANONYMOUS, _FILE),
        linewidth=0,
    )
    axes.set_xlim(0, begin)
    axes.spines[["top", "right"]].set_visible(False)


def _durations(run: Run) -> Iterator[tuple[str, float]]:
    return ((phase, run.seconds(phase)) for phase in run.phases)


def _curve(run: Run) -> Curve:
    """The phases' samples, one phase right behind the other."""
    base = run.before("construct")
    curve: Curve = []
    begin = 0.0
    for phase, (start, end) in run.phases.items():
        for s in run.during(phase):
            time = begin + min(max(s.time, start), end) - start
            anonymous = max(s.anonymous - base.anonymous, 0)
            curve.append((time, anonymous, max(s.file - base.file, 0)))
        begin += end - start
    return curve
