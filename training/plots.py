"""Pictures of a run, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt


def learning_curve(history: list[dict[str, Any]], unit: str, baselines: dict[str, float], path: Path) -> None:
    """Training and validation figure by step, with the baselines as level lines."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [line["step"] for line in history]
    axes.plot(steps, [line["train"] for line in history], label="training", color="tab:gray")
    axes.plot(steps, [line["validation"] for line in history], label="validation", color="tab:blue")
    for (name, value), style in zip(baselines.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, linestyle=style, color="tab:red", label=name)
    axes.set(xlabel="step", ylabel=unit)
    axes.legend()
    _save(figure, path)


def forecast(
    *, actual: list[float], mean: list[float], fan: list[list[float]], ahead: list[float], title: str, path: Path
) -> None:
    """What came true, the forecasts made one step before it with their fan, and the steps ahead."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    steps = range(-len(actual) + 1, 1)
    if fan:
        axes.fill_between(steps, fan[0], fan[-1], alpha=0.25, color="tab:blue", label="lowest to highest quantile")
    axes.plot(steps, mean, color="tab:blue", label="one step ahead")
    axes.plot(steps, actual, color="black", linewidth=1, label="measured")
    axes.plot(range(1, len(ahead) + 1), ahead, "--", color="tab:red", label="rolled on its own predictions")
    axes.set(xlabel="step", title=title)
    axes.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:  # noqa: ANN401 (matplotlib is untyped here)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
