"""Which cores threads run on, where there are two of them and three threads are busy.

While large folds are begun ahead, the event loop and the engine take turns at the interpreter and the graph needs no
part of it. Left to itself the system puts the one that wakes up beside the graph now and then, where it waits for
milliseconds.
"""

import os
import threading
from collections.abc import Set
from contextlib import suppress
from typing import ClassVar

# Not every system lets a process choose.
ALL: Set[int] = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
"""the cores that the process may use"""


class Cores:
    """Gives the graph of one model a core of its own; of several models that want it the first has it."""

    _lock: ClassVar = threading.Lock()
    _apart: ClassVar["Cores | None"] = None
    """who has a core of its own"""

    def __init__(self, threads: int) -> None:
        """`threads`: those of a call of the graph."""
        self._able = threads == 1 and len(ALL) == 2
        self._graph: int | None = None
        self._held: list[int] = []
        """the threads that are kept to a core"""
        self.under_way = 0
        """calls that were begun beside and have not ended"""

    def enter(self) -> None:
        """Say that this thread runs the graph."""
        self._graph = threading.get_native_id()

    def begin(self, apart: bool = True) -> None:
        """A call of the graph begins beside this thread, which keeps away from it from now on, as the main one does.

        Not where it needs more than a core: `apart` is False.
        """
        self.under_way += 1
        if apart and self._able and not self._held and self._graph is not None:
            with Cores._lock:
                self._part(self._graph)

    def _part(self, graph: int) -> None:
        if Cores._apart is not None:
            return
        Cores._apart = self
        first, second = sorted(ALL)
        main = threading.main_thread().native_id
        python = [threading.get_native_id(), *([main] if main is not None else [])]
        for thread in python:
            _hold(thread, {first})
        _hold(graph, {second})
        self._held = [*python, graph]

    def end(self) -> None:
        """A call that was begun beside has ended; after the last one all run where they will."""
        self.under_way -= 1
        if self._held and not self.under_way:
            with Cores._lock:
                self._join()

    def _join(self) -> None:
        for thread in self._held:
            _hold(thread, ALL)
        self._held = []
        Cores._apart = None


def free() -> None:
    """Let this thread run where it will, whatever held the one that began it."""
    _hold(threading.get_native_id(), ALL)


def _hold(thread: int, cores: Set[int]) -> None:
    if ALL:
        with suppress(OSError):  # it has ended, or the process may not choose any more: then it is slower, no more
            os.sched_setaffinity(thread, cores)
