"""Figures as SVG: the same numbers give the same file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

matplotlib.rcParams["svg.hashsalt"] = "recurra"


def lines(path: Path, x_label: str, y_label: str, x: Sequence[int], series: Mapping[str, Sequence[float]]) -> None:
    """A line a series, both axes logarithmic; a name that begins with "engine" is dashed."""
    figure, axes = _figure(y_label)
    for name, y in series.items():
        axes.plot(x, y, "--" if name.startswith("engine") else "-", marker="o", markersize=3, label=name)
    axes.set(xscale="log", yscale="log", xlabel=x_label)
    axes.set_xticks(x, [f"{value:,}" for value in x])
    # A decade alone would often be the only number on the axis.
    axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=StrMethodFormatter("{x:,g}"))
    axes.minorticks_off()
    _save(figure, axes, path)


def bars(path: Path, y_label: str, groups: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    """Groups of bars, one a series."""
    figure, axes = _figure(y_label)
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        axes.bar([at + (i - (len(series) - 1) / 2) * width for at in range(len(groups))], values, width, label=name)
    axes.set_xticks(range(len(groups)), groups)
    _save(figure, axes, path)


def _figure(y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    return figure, figure.add_subplot(ylabel=y_label)


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
