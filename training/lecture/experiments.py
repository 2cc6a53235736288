"""All experiments, in the order of the lecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from training.lecture import adding, bptt, clipping, facts, memory, places, sentence, vanishing, windows
from training.lecture.finding import Finding, Setting

EXPERIMENTS: dict[str, Callable[[Setting], Finding]] = {
    "windows": windows.run,
    "places": places.run,
    "sentence": sentence.run,
    "bptt": bptt.run,
    "memory": memory.run,
    "clipping": clipping.run,
    "vanishing": vanishing.run,
    "adding": adding.run,
    "facts": facts.run,
}


def lecture(setting: Setting, names: list[str]) -> Iterator[tuple[str, Finding]]:
    """Run the named experiments, or all of them."""
    for name, run in EXPERIMENTS.items():
        if not names or name in names:
            yield name, run(setting)
