"""How many infer requests each model version was asked, and how they ended."""

import time
from dataclasses import dataclass

from service.registry import Model
from service.store.base import now_ms


@dataclass(slots=True)
class Tally:
    """The infer requests of one model version; times are seconds in all."""

    succeeded: int = 0
    succeeded_s: float = 0.0
    failed: int = 0
    failed_s: float = 0.0
    last_ms: int = 0
    """when the last one that succeeded came, milliseconds since 1970; 0: never"""

    def note(self, began: float, succeeded: bool) -> None:
        """A request that came at `began` (perf_counter) has ended."""
        took = time.perf_counter() - began
        if succeeded:
            self.succeeded += 1
            self.succeeded_s += took
            self.last_ms = now_ms() - round(took * 1000)
        else:
            self.failed += 1
            self.failed_s += took


class Tallies:
    """The tallies of all models since the service was started."""

    def __init__(self) -> None:
        self._by_version: dict[tuple[str, int], Tally] = {}

    def of(self, model: Model) -> Tally:
        """The tally of a model version."""
        manifest = model.bundle.manifest
        return self._by_version.setdefault((manifest.name, manifest.version), Tally())
