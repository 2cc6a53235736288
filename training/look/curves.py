"""How a run learnt: its figure by step beside the baselines, its learning rate, and how often it was clipped."""

from __future__ import annotations

from typing import Any

from training.look import pictures
from training.look.seen import LacksError, Seen, View


def view(seen: Seen) -> View:
    """Two panels: the figure, and the share of clipped steps since the evaluation before."""
    if not seen.history:
        raise LacksError("the run has no history.json")
    steps = [line["step"] for line in seen.history]
    clipped = clipped_shares(seen.history)
    baselines = seen.task.baselines(seen.model, seen.corpus)
    figure, (curve, share) = pictures.panels(2)
    drawn: dict[str, pictures.Line] = {"training": (steps, [line["train"] for line in seen.history])}
    drawn["validation"] = (steps, [line["validation"] for line in seen.history])
    ends = (0, steps[-1])
    drawn |= {f"{name}*": (ends, (value, value)) for name, value in baselines.items()}
    pictures.lines(curve, drawn, "step", seen.task.unit, marker="." if len(steps) < 3 else "")
    edges = [0, *steps]
    share.stairs(clipped, edges, fill=True, alpha=0.5)
    share.set(ylim=(0, 1), xlabel="step", ylabel="share of steps whose gradient was clipped", xlim=curve.get_xlim())
    share.grid(alpha=0.3)
    rate = share.twinx()
    rate.plot(steps, [line["learning_rate"] for line in seen.history], "k:", label="learning rate (right)")
    rate.set(ylim=(0, None))
    rate.legend(fontsize="small", loc="upper right")
    pictures.save(figure, seen.plot("learning-curve"))
    best = min(seen.history, key=lambda line: line["validation"])
    overall = seen.history[-1]["clipped"]
    return View(
        f"best {best['validation']:.4f} {seen.task.unit} at step {best['step']},"
        f" gradient clipped in {overall:.0%} of the steps",
        {"best": best["validation"], "best_step": best["step"], "clipped": overall, "baselines": baselines},
    )


def clipped_shares(history: list[dict[str, Any]]) -> list[float]:
    """The history counts from the run's start; here each line counts from the line before."""
    counts = [line["clipped"] * line["step"] for line in history]
    shares = []
    before, step_before = 0.0, 0
    for line, count in zip(history, counts, strict=True):
        shares.append((count - before) / max(1, line["step"] - step_before))
        before, step_before = count, line["step"]
    return shares
