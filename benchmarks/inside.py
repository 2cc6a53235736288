"""The engine without HTTP and without a store: what it adds to the bare graph."""

import logging
import math
import threading
import time

import numpy as np
import structlog

from service.bundle import Bundle
from service.engine import Engine
from service.runner import Runner
from service.store.base import Generation
from service.store.memory import MemoryStore
from service.work.base import Work
from service.work.events import Done, Event, Failed, Listener
from service.work.feed import Predict
from service.work.generate import Generate

WAIT_S = 120.0
FEWEST = 32
"""tokens of each row that are drawn at least"""


class Inside:
    """An engine on a thread of its own; ended with the `with`."""

    def __init__(self, bundle: Bundle, rows: int, threads: int = 1) -> None:
        # What fails is raised here; the engine's own logging would show every array of the batch.
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        self._engine = Engine(Runner(bundle, threads), MemoryStore(), self._post, rows, 10**9, 1000)
        self._rows = rows
        self._left, self._failed = 0, False
        self._ended = threading.Event()

    def __enter__(self) -> "Inside":
        self._engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.stop()

    def _post(self, events: list[tuple[Listener, Event]]) -> None:
        for _, event in events:
            self._failed = self._failed or isinstance(event, Failed)
            self._left -= isinstance(event, Done | Failed)
        if self._left <= 0:
            self._ended.set()

    def drawn_per_s(self, seconds: float, expected_per_s: float) -> float:
        """Tokens a second of all rows, drawn at temperature 1, for about so many seconds."""
        tokens = max(FEWEST, math.ceil(expected_per_s / self._rows * seconds))
        start = np.zeros(1, "<i4")

        def generate(i: int) -> Work:
            asked = Generation(0, 0, max_tokens=tokens, temperature=1.0, top_k=0, top_p=1.0, seed=i)
            return Generate(_ignore, None, start, asked)

        return self._rows * tokens / self._seconds([generate(i) for i in range(self._rows)])

    def fed_per_s(self, seconds: float, steps: int) -> float:
        """Steps a second of all rows, each a sequence of so many steps, one after another for about so many seconds."""
        entries, count, took = np.zeros(steps, "<i4"), 0, 0.0
        while took < seconds:
            took += self._seconds([Predict(_ignore, entries, last_only=True) for _ in range(self._rows)])
            count += self._rows * steps
        return count / took

    def _seconds(self, works: list[Work]) -> float:
        """What it takes until all have ended."""
        self._left = len(works)
        self._ended.clear()
        begun = time.perf_counter()
        self._engine.submit(*works)
        if not self._ended.wait(WAIT_S) or self._failed:
            raise RuntimeError("the engine did not finish its work")
        return time.perf_counter() - begun


def _ignore(event: Event) -> None:
    """What becomes of a piece of work is counted where it is posted."""
