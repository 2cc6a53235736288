"""Whether steps wait for the graph or for Python: a call in another thread helps the one and hinders the other."""

from math import inf
from time import process_time

TICKS, KEPT = 16, 0.8
"""ticks after which the two are compared; so much of what was found before counts each time"""
LESS, STAYS = 1.0, 1.15
"""of what the graph computes may the rest be at most for handing over to begin, and to go on. Where they are alike it
is as good as not handing over, but makes the rest more, and to change from one to the other costs more than either"""


class Balance:
    """Compares what one model's graph computes with what the rest of the process does.

    What is computed for streams or for other models counts as the rest: beside them no core is free.
    """

    def __init__(self, able: bool) -> None:
        """`able`: whether a call of the graph can leave a core to the rest."""
        self._able = able
        self._ticks = self._steps = 0
        self._least_s = inf
        """of a step, in the newest calls: longer ones may have waited for the interpreter. A clock of the thread's own
        would know, and took 6 % of a small graph's steps to read."""
        self._graph_s = self._rest_s = 0.0
        self._process_s = process_time()
        self.on_graph = False
        """whether steps wait for the graph"""
        self.hardly_python = False
        """whether they would even if it took half as long"""

    def took(self, seconds: float, steps: int) -> None:
        """Learn from a call: seconds of all its threads, and the steps of all its rows."""
        self._ticks += 1
        self._steps += steps
        self._least_s = min(self._least_s, seconds / steps)
        if self._able and self._ticks >= TICKS:
            self._compare()

    def _compare(self) -> None:
        process_s = process_time()
        graph_s = self._least_s * self._steps
        self._graph_s = self._graph_s * KEPT + graph_s
        self._rest_s = self._rest_s * KEPT + process_s - self._process_s - graph_s
        self.on_graph = self._rest_s < (STAYS if self.on_graph else LESS) * self._graph_s
        self.hardly_python = self._rest_s < self._graph_s / 2
        self._ticks, self._steps, self._least_s, self._process_s = 0, 0, inf, process_s
