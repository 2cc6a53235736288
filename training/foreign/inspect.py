"""Finding out what a stranger's graph is: its states, its axes, and how it may be called."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime

from service.bundle import DTYPES
from training.foreign import trial
from training.foreign.graph import Flow, GraphError, flow
from training.foreign.pairs import Pair, Tensor, ways
from training.foreign.spec import GraphAnswers
from training.foreign.trial import Called, Named, Session, Unknown, named_ways
from training.publish import cpu_kind

CLEAR = 0.5
"""how much more the second best set of states must cost, where no trial can tell them apart"""


@dataclass(frozen=True)
class Findings:
    """A graph whose axes have names, and how it is to be called."""

    model: onnx.ModelProto = field(repr=False)
    called: Called
    streamable: bool
    stepping: Literal["chunks", "single"]
    batching: Literal["exact", "together", "alone"]
    checks: dict[str, Any]
    notes: tuple[str, ...]


def inspect(model: onnx.ModelProto, answers: GraphAnswers) -> Findings:
    """Find states and axes, try the graph; raises Unknown when the owner has to say something, else GraphError."""
    session = Session(model.SerializeToString())
    _check_answers(session, answers)
    way = flow(model)
    called, streamable = _called(session, way, answers)
    called = replace(called, outputs=tuple(_served(called, answers)))
    if not called.outputs:
        raise GraphError("no output has a part for each session" + (" and step" if called.timed else ""))
    return _examined(model, called, streamable, way, answers)


def _check_answers(session: Session, answers: GraphAnswers) -> None:
    inputs, outputs = ({one.name for one in side} for side in (session.inputs, session.outputs))
    sized = {key.rpartition(".")[0] for key in answers.sizes}
    pairs = answers.states or ()
    for what, names, there in (
        ("constants", set(answers.constants), inputs),
        ("sizes", sized, inputs),
        ("states", {pair.input for pair in pairs}, inputs),
        ("states", {pair.output for pair in pairs}, outputs),
        ("outputs", set(answers.outputs or ()), outputs),
    ):
        if unknown := sorted(names - there):
            raise GraphError(
                f"{what}: {', '.join(map(repr, unknown))}: there are {', '.join(map(repr, sorted(there)))}"
            )
    if any(size < 1 for size in answers.sizes.values()):
        raise GraphError("sizes: a size is at least 1")
    if len({pair.input for pair in pairs}) + len({pair.output for pair in pairs}) < 2 * len(pairs):
        raise GraphError("states: an input or output is named twice")


# ---------------------------------------------------------------------- states and axes


def _called(session: Session, way: Flow, answers: GraphAnswers) -> tuple[Called, bool]:
    """The graph as it is called, and whether it can be streamed: the first way to see it that holds."""
    runs: list[tuple[Called, bool]] = []
    (best, first), *others = _pairs(session, way, answers)
    doubtful = bool(others) and others[0][0] - best < CLEAR
    _ask_for_constants(session, first, answers)
    for number, pairs in enumerate([first, *(pairs for _, pairs in others)]):
        for called in _named(session, pairs, answers):
            if number and not called.timed:
                continue  # nothing can be proved of it: what is most likely has to do
            called = replace(called, initial={pair.input: pair.initial for pair in answers.states or ()})
            runs.append((called, trial.rows_are_apart(called)))
            if runs[-1][1] and (streamable := _streamable(called, way)) is not None:
                if doubtful and not called.timed:
                    raise _states_unknown(called)
                return called, streamable
    if not runs:
        raise _sizes_unknown(session, answers)
    for called, apart in runs:  # sessions that change each other are tried alone
        if not apart and (streamable := _streamable(replace(called, batched=False), way)) is not None:
            return called, streamable
    raise GraphError(
        "states that are carried from call to call do not go on where they stopped, so the number of steps in a "
        "call matters: give its axis a size (sizes.INPUT.AXIS), or name the states ([graph] states)"
    )


def _states_unknown(called: Called) -> Unknown:
    fed = ", ".join(repr(pair.input) for pair, _ in called.states)
    given = ", ".join(repr(pair.output) for pair, _ in called.states)
    return Unknown(
        {"states": f'which of {given} goes on from which of {fed}, as [{{"input": ..., "output": ...}}, ...]'}
    )


def _streamable(called: Called, way: Flow) -> bool | None:
    """Whether single steps with carried states are the whole; None: these can not be its states and axes."""
    if not called.timed:
        if not called.states:
            raise GraphError("no state is found: name them in [graph], states = [{ input = ..., output = ... }]")
        if way.looks_back:
            raise GraphError("a layer runs from the end to the beginning, over a fixed number of steps")
        return True
    if trial.looks_ahead(called):
        return False
    if not called.states:
        return False if trial.remembers(called) else None
    return True if trial.carries(called) else None


def _pairs(session: Session, way: Flow, answers: GraphAnswers) -> list[tuple[float, list[Pair]]]:
    """Sets of state pairs with what they cost, the owner's or the most likely ones."""
    if answers.states is not None:
        return [(0.0, [Pair(one.input, one.output, "as you say") for one in answers.states])]
    inputs = [one for one in session.inputs if one.name not in answers.constants]
    return ways(inputs, session.outputs, way)


def _ask_for_constants(session: Session, pairs: Sequence[Pair], answers: GraphAnswers) -> None:
    fed = {pair.input for pair in pairs} | set(answers.constants)
    lone = [one for one in session.inputs if one.name not in fed and _is_one_number(one)]
    if lone and len(lone) < len([one for one in session.inputs if one.name not in fed]):
        asked = {f"constants.{one.name}": f"the value of {one.name!r}, one {one.dtype} in every call" for one in lone}
        raise Unknown(asked | _sizes_needed(session, pairs, answers))


def _is_one_number(one: Tensor) -> bool:
    return len(one.dims) <= 1 and all(dim == 1 for dim in one.dims)


def _sizes_needed(session: Session, pairs: Sequence[Pair], answers: GraphAnswers) -> dict[str, str]:
    """Sizes that can not be anything but missing: of axes beyond time and batch."""
    asked = {}
    fed = {pair.input for pair in pairs} | set(answers.constants)
    for one in session.inputs:
        places = trial.open_axes(one.dims)
        places = [i for i in places if f"{one.name}.{i}" not in answers.sizes]
        if one.name not in fed and len(places) > 2:
            asked[f"sizes.{one.name}.{places[-1]}"] = _size_question(one, places[-1])
    return asked


def _size_question(one: Tensor, axis: int) -> str:
    return f"how many numbers axis {axis} of {one.name!r} {_dims(one)} has in every call (it is neither time nor batch)"


def _dims(one: Tensor) -> str:
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in one.dims) + "]"


def _named(session: Session, pairs: Sequence[Pair], answers: GraphAnswers) -> Iterator[Called]:
    """Ways to name the axes; where none runs, with sizes that the outputs are declared with."""
    if needed := _sizes_needed(session, pairs, answers):
        raise Unknown(needed)
    found = False
    for called in named_ways(session, pairs, answers.constants, answers.sizes):
        found = True
        yield called
    if found:
        return
    fed = {pair.input for pair in pairs} | set(answers.constants)
    inputs = [one for one in session.inputs if one.name not in fed]
    lone = [one for one in inputs if len(one.dims) == 1 and DTYPES[one.dtype].kind in "iu"]
    if lone and any(len(trial.open_axes(one.dims)) > 1 for one in inputs):  # many graphs are told the number of steps
        raise Unknown({f"constants.{one.name}": f"the value of {one.name!r} in every call" for one in lone})
    for sizes in _declared_sizes(session, fed):
        note = ", ".join(
            f"axis {key.rpartition('.')[2]} of {key.rpartition('.')[0]!r} is {n}" for key, n in sizes.items()
        )
        for called in named_ways(session, pairs, answers.constants, {**sizes, **answers.sizes}):
            yield replace(called, note=f"it runs only where {note}, which belongs to an entry")


def _declared_sizes(session: Session, fed: set[str]) -> Iterator[Mapping[str, int]]:
    """An exporter may have fixed a number of steps without saying so, but for the shapes of its outputs."""
    declared = {dim for one in session.outputs for dim in one.dims if isinstance(dim, int)}
    inputs = [one for one in session.inputs if one.name not in fed]
    for i in range(max((len(one.dims) for one in inputs), default=0)):
        for size in sorted(declared):
            open_there = [one for one in inputs if i < len(one.dims) and not isinstance(one.dims[i], int)]
            if open_there:
                yield {f"{one.name}.{i}": size for one in open_there}


def _sizes_unknown(session: Session, answers: GraphAnswers) -> GraphError:
    """What to ask when the graph runs with no axes that were tried."""
    asked = {}
    named = {one.input for one in answers.states or ()} | set(answers.constants)
    for one in session.inputs:
        places = trial.open_axes(one.dims)
        places = [i for i in places if f"{one.name}.{i}" not in answers.sizes]
        if one.name not in named and len(places) > 1:
            asked[f"sizes.{one.name}.{places[-1]}"] = _size_question(one, places[-1])
    if asked:
        return Unknown(asked)
    shown = "; ".join(f"{one.name!r} {one.dtype} {_dims(one)}" for one in session.inputs)
    return GraphError(f"the graph runs with no axes that were tried; its inputs are {shown}")


def _served(called: Called, answers: GraphAnswers) -> Iterator[Named]:
    """The outputs that have a part for each session."""
    for one in called.outputs:
        asked = answers.outputs is None or one.name in answers.outputs
        if asked and (not called.batched or "B" in one.axes) and prod(one.row) * 8 <= trial.MAX_TENSOR_BYTES:
            yield one


# ---------------------------------------------------------------------- the trial


def _examined(model: onnx.ModelProto, called: Called, streamable: bool, way: Flow, answers: GraphAnswers) -> Findings:
    notes = [f"state {pair.input!r} <- {pair.output!r}: {pair.why}" for pair, _ in called.states]
    notes += [called.note] if called.note else []
    checks: dict[str, Any] = {"onnxruntime": onnxruntime.__version__, "cpu": cpu_kind()}
    if not streamable:
        why = "looks ahead" if called.states or way.looks_back else "gives no state out"
        notes.append(f"it {why}: whole sequences are served by predict, sessions are not")
        outputs = tuple(one for one in called.outputs if "T" in one.axes) or called.outputs
        return Findings(model, replace(called, outputs=outputs), False, "single", "alone", checks, tuple(notes))
    try:
        called.alone(*_one_step(called))
    except Exception as error:  # onnxruntime raises many types, none of them public
        raise GraphError("the graph does not take one step of one session") from error
    many = called.timed and all("T" in one.axes for one in (*called.inputs, *called.outputs))
    checks["batch_invariant"] = batches = called.batched and trial.batches_exactly(called)
    checks["chunk_invariant"] = chunks = many and trial.chunks_exactly(replace(called, batched=batches))
    checks["batches"] = [1, *trial.BATCHES] if called.batched else [1]
    if not chunks:
        notes.append("one step a call" + (": chunks of steps change bits" if many else ""))
    if not called.batched:
        notes.append("the graph takes a batch of 1: sessions run one by one")
    elif not batches:
        notes.append(
            "sessions in one batch change each other's bits: they run one by one, unless batching = 'together'"
        )
    batching = answers.batching or ("exact" if batches else "alone")
    if not called.batched and batching != "alone":
        raise GraphError("batching: the graph takes a batch of 1, so sessions run alone")
    return Findings(model, called, True, "chunks" if chunks else "single", batching, checks, tuple(notes))


def _one_step(called: Called) -> tuple[dict[str, Any], list[Any]]:
    rng = np.random.default_rng(6)
    return called.some_entries(1, 1, rng), called.zero(1)
