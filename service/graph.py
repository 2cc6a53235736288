"""A loaded graph, run by one thread a call or by two: the only module of the service that loads one.

Two threads halve a call that takes long, and take the core on which Python would run meanwhile. So where the number is
chosen by itself a graph is loaded twice, and each call says whether it may have both.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import onnxruntime

from service.bundle import BundleError
from service.cores import ALL

Array = np.ndarray[Any, Any]
Call = Callable[[bool], Sequence[Array]]
"""Runs the graph, with two threads or without, always on the same numbers"""

VERSION: str = onnxruntime.__version__

TRIAL_ROWS = (1, 4, 16, 32, 64)
TRIALS, TRIAL_S = 7, 0.03
"""calls of a trial, or seconds that they may take together"""
LONG_S = 0.0003
"""a call that takes less is not worth waking a second thread for"""
GAIN = 1.05
"""times as fast must two threads be; less is within what a trial may err"""
TWICE_BYTES = 256 * 2**20
"""a larger graph is loaded once"""

onnxruntime.disable_telemetry_events()


class Graph:
    """The sessions of ONNX Runtime over one graph."""

    def __init__(self, path: Path, threads: int | Literal["auto"]) -> None:
        self._path = path
        self._chosen = threads == "auto" and len(ALL) != 1
        self.threads = 1 if threads == "auto" else threads
        """of a call that may not have more"""
        self._session = _open(path, self.threads)
        self._wide: onnxruntime.InferenceSession | None = None
        self._wide_rows = 0
        """from how many on a call may have two"""

    @property
    def inputs(self) -> Sequence[Any]:
        """Inputs as onnxruntime describes them."""
        return list(self._session.get_inputs())

    @property
    def outputs(self) -> Sequence[Any]:
        """Outputs as onnxruntime describes them."""
        return list(self._session.get_outputs())

    @property
    def is_wide(self) -> bool:
        """Whether there are calls that may have two threads."""
        return self._wide is not None

    def threads_of(self, rows: int, wide: bool) -> int:
        """The threads of a call of so many rows that may have more than the others."""
        return 2 if self._session_of(rows, wide) is self._wide else self.threads

    def run(self, fetch: Sequence[str], feed: dict[str, Array], rows: int, wide: bool) -> list[Array]:
        """Call the graph."""
        found: list[Array] = self._session_of(rows, wide).run(fetch, feed)
        return found

    def stepping(
        self, entries: tuple[str, Array], outputs: dict[str, Array], states: dict[tuple[str, str], Array]
    ) -> "Stepping":
        """Calls of a step each for as many rows as `entries` [1, rows, ...] has, which may have two threads."""
        return Stepping(self._session_of(entries[1].shape[1], True), entries, outputs, states)

    def _session_of(self, rows: int, wide: bool) -> onnxruntime.InferenceSession:
        return self._wide if wide and self._wide is not None and rows >= self._wide_rows else self._session

    def widen(self, trial: Callable[[int], Call]) -> None:
        """Find out from how many rows on two threads pay, if the number of threads is chosen here.

        `trial`: a call on so many rows. Should two threads give other bits than one, they are not used.
        """
        rows = next((rows for rows in TRIAL_ROWS if self._chosen and self._pays(trial(rows))), None)
        if rows is None or not all(_same(trial(n)) for n in (rows, 4 * rows)):
            self._wide = None
        elif self._path.stat().st_size > TWICE_BYTES:
            self._session, self._wide, self.threads = self._wide, None, 2
        else:
            self._wide_rows = rows

    def _pays(self, call: Call) -> bool:
        alone = _took(call, False)
        if alone < LONG_S:
            return False
        if self._wide is None:
            self._wide = _open(self._path, 2)
        return alone > GAIN * _took(call, True)


class Stepping:
    """Calls of one step after another, in arrays that are made once: two sets of states take turns.

    To make an array for each output of each call, and to read those that go in, takes a tenth of a small graph's time.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        entries: tuple[str, Array],
        outputs: dict[str, Array],
        states: dict[tuple[str, str], Array],
    ) -> None:
        """Each call reads `entries` and writes `outputs`; `states`: by the names by which they are fed and given."""
        self._session = session
        self._entries = entries[1]
        self._outputs = list(outputs.values())
        self._before = list(states.values())
        self._after = list(map(np.empty_like, self._before))

        def bound(before: list[Array], after: list[Array]) -> onnxruntime.IOBinding:
            binding = session.io_binding()
            for name, array in (entries, *zip((fed for fed, _ in states), before, strict=True)):
                binding.bind_ortvalue_input(name, _value(array))
            for name, array in (*outputs.items(), *zip((given for _, given in states), after, strict=True)):
                binding.bind_ortvalue_output(name, _value(array))
            return binding

        self._next, self._other = bound(self._before, self._after), bound(self._after, self._before)

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self._entries[0])

    @property
    def states(self) -> list[Array]:
        """The states now, in copies."""
        return [array.copy() for array in self._before]

    def begin(self, states: Sequence[Array]) -> None:
        """Go on from these states."""
        for array, given in zip(self._before, states, strict=True):
            array[...] = given

    def __call__(self, entries: Array) -> list[Array]:
        """Take a step with `entries` [rows, ...]; returns outputs [1, rows, ...], which the next one overwrites."""
        self._entries[0] = entries
        self._session.run_with_iobinding(self._next)
        self._next, self._other = self._other, self._next
        self._before, self._after = self._after, self._before
        return self._outputs


def _value(array: Array) -> onnxruntime.OrtValue:
    """An array in C order as ONNX Runtime sees it: the same memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _took(call: Call, wide: bool) -> float:
    """Seconds of a call: the shortest of some."""
    took: list[float] = []
    while len(took) < TRIALS and sum(took) < TRIAL_S:
        began = perf_counter()
        call(wide)
        took.append(perf_counter() - began)
    return min(took)


def _same(call: Call) -> bool:
    """Whether two threads give the same bits as one."""
    return all(one.tobytes() == other.tobytes() for one, other in zip(call(False), call(True), strict=True))


def _open(graph: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that spin between calls take the core from the event loop.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many types, none of them public
        reason = str(error).replace(str(graph), graph.name).splitlines()[0]
        raise BundleError(f"the graph can not be loaded: {reason[:300]}") from error
