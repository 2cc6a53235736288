"""Engines without HTTP, for tests."""

from collections.abc import Callable
from dataclasses import dataclass

from service.engine import Engine
from service.runner import Runner
from service.store.base import Store
from service.work.events import Event, Listener


class Inbox:
    """Delivers an engine's events at once, on the engine's thread."""

    def __call__(self, events: list[tuple[Listener, Event]]) -> None:
        for listener, event in events:
            listener(event)


@dataclass
class Rig:
    """An engine on a store, and what it needs."""

    engine: Engine
    store: Store
    runner: Runner
    running: list[Engine]

    def start(self) -> None:
        """Let the engine begin to tick; it is stopped at the end of the test."""
        self.engine.start()
        self.running.append(self.engine)


MakeRig = Callable[..., Rig]
