"""Forecasting: a session rolled forward on its own predictions, on a copy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from service.errors import Problem
from service.sampling import Purpose, uniforms
from service.state import Array
from service.store.base import Head
from service.tasks import Output
from service.work.base import Host, SessionWork
from service.work.events import Done, Listener


@dataclass(frozen=True, slots=True)
class Path:
    """One sampled path of a forecast."""

    index: int
    seed: int


class Forecast(SessionWork):
    """Roll a session forward on its own predictions, on a copy; commits nothing."""

    answered = 1

    def __init__(
        self,
        listener: Listener,
        at: Head,
        horizon: int,
        future: Sequence[Mapping[str, float]],
        path: Path | None = None,
    ) -> None:
        super().__init__(listener, horizon, at)
        self._horizon = horizon
        self._future = future
        self._path = path
        self._steps: list[Output] = []

    def begin(self, host: Host) -> None:
        """Start from the session's state."""
        base = self.open(host)
        if base.output is None and not len(base.tail):
            raise Problem("empty_session", "a forecast needs a session that has been fed")

    def advance(self) -> None:
        """Note a step, and feed it back until the horizon is reached."""
        if self.remaining or self.output is None:
            return
        said = self._host.codec.one_ahead(self.output)
        values = self._drawn(said, self._path) if self._path is not None else said["mean"]
        self._steps.append({**said, "mean": values})
        if len(self._steps) == self._horizon:
            whole = {name: np.stack([step[name] for step in self._steps]) for name in said}
            self.end(Done(self.base.head, whole))
            return
        entry = self._host.codec.next_entry(values, self._future[len(self._steps) - 1])
        self.entries, self.cursor = entry[None], 0

    def _drawn(self, output: Output, path: Path) -> Array:
        """Values [K] of the next step, drawn from its predicted quantiles."""
        quantiles, levels = output["quantiles"], np.array(self._host.manifest.quantiles)
        targets = quantiles.shape[1]
        position = self.base.head.position + len(self._steps) + 1
        drawn = [
            inverse_cdf(
                float(uniforms(path.seed, position, 1, Purpose.FORECAST, path.index * targets + k)[0]),
                levels,
                quantiles[:, k].astype(np.float64),
            )
            for k in range(targets)
        ]
        return np.array(drawn, "<f4")


def inverse_cdf(uniform: float, levels: Array, values: Array) -> float:
    """The value at `uniform`: linear between the quantiles and, with their outermost slopes, beyond them."""
    if len(levels) == 1:
        return float(values[0])
    i = int(np.clip(np.searchsorted(levels, uniform) - 1, 0, len(levels) - 2))
    slope = (values[i + 1] - values[i]) / (levels[i + 1] - levels[i])
    return float(values[i] + slope * (uniform - levels[i]))
