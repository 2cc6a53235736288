"""Pictures without a display, PNG or SVG by the path's ending; the same numbers give the same file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.rcParams["svg.hashsalt"] = "recurra"
mpl.rcParams["svg.fonttype"] = "none"  # text stays text: smaller files

WIDTH, HEIGHT = 6.4, 3.6
"""Inches of one panel."""

Line = tuple[Sequence[float], Sequence[float]]
"""(x, y)."""


def panels(count: int, *, width: float = WIDTH, height: float = HEIGHT, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, `width` and `height` inches each."""
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = [ax for row in grid for ax in row]
    for idle in axes[count:]:
        idle.set_axis_off()
    return figure, axes[:count]


def lines(
    axes: Axes,
    series: Mapping[str, Line],
    x_label: str,
    y_label: str,
    *,
    x_scale: str = "linear",
    y_scale: str = "linear",
    marker: str = "",
) -> None:
    """A line a series, dashed where its name ends in an asterisk, with a legend where there are several."""
    for name, (x, y) in series.items():
        style = "--" if name.endswith("*") else "-"
        axes.plot(x, y, style, marker=marker, markersize=3, linewidth=1.5, label=name.removesuffix("*"))
    axes.set(xscale=x_scale, yscale=y_scale, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize="small")


def save(figure: Figure, path: Path) -> None:
    """Write the picture; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
