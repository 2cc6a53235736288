"""Forecast fans: what was said one step before with its quantiles, what came true, and the steps ahead."""

from __future__ import annotations

from torch import Tensor

from training.evaluate import forecasts
from training.look import pictures
from training.look.seen import LacksError, Seen, View
from training.sample import AHEAD, SHOWN, roll

ENTITIES, TARGETS = 3, 3


def view(seen: Seen) -> View:
    """A panel an entity and target, over the end of the test part."""
    if seen.meta["task"] != "forecaster":
        raise LacksError("the run is no forecaster")
    if seen.model.config.horizons[0] != 1:
        raise LacksError("the model says nothing of the next step, which is what is rolled")
    corpus, quantiles = seen.corpus, seen.model.config.quantiles
    sequences, targets = corpus.test[:ENTITIES], range(min(TARGETS, len(corpus.targets)))
    figure, axes = pictures.panels(len(sequences) * len(targets), width=6, height=3, columns=len(targets))
    covered: dict[str, float] = {}
    places = iter(axes)
    for sequence, outputs in zip(sequences, forecasts(seen.model, sequences), strict=True):
        ahead = roll(seen.model, sequence.inputs, AHEAD)
        for k in targets:
            ax, name = next(places), f"{sequence.name}: {corpus.target_names[k]}"
            steps, later = range(1 - min(SHOWN, len(sequence)), 1), range(1, AHEAD + 1)
            title = f"{name} {corpus.features[corpus.targets[k]].unit}"
            if quantiles:
                low, high = outputs["quantiles"][:, 0, k], outputs["quantiles"][:, -1, k]
                scored = sequence.weights[:, k] > 0
                if bool(scored.any()):
                    covered[name] = coverage(sequence.targets[:, k], low, high, scored)
                    title += f"; the {quantiles[-1] - quantiles[0]:.0%} interval covers {covered[name]:.0%}"
                fan = (low[-SHOWN:].numpy(), high[-SHOWN:].numpy())
                ax.fill_between(steps, *fan, alpha=0.3, label="lowest to highest quantile")
            ax.plot(steps, outputs["mean"][-SHOWN:, k].numpy(), label="one step ahead")
            ax.plot(steps, sequence.targets[-SHOWN:, k].numpy(), "k", linewidth=1, label="measured")
            ax.plot(later, ahead[:, k].numpy(), "--", color="tab:red", label="rolled on its own predictions")
            ax.set(title=title, xlabel="step")
            ax.title.set_fontsize("medium")
    axes[0].legend(fontsize="small")
    pictures.save(figure, seen.plot("forecasts"))
    said = ", ".join(f"{name} {share:.0%}" for name, share in covered.items())
    return View(f"covered: {said}" if covered else "means alone", {"covered": covered})


def coverage(actual: Tensor, low: Tensor, high: Tensor, scored: Tensor) -> float:
    """The share of the scored values that lie between."""
    inside = (actual >= low) & (actual <= high)
    return float(inside[scored].float().mean())
