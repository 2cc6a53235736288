"""Feeds on their way to an engine and back: the event loop's side of `Feed` and `Feeds`.

What begins in one turn of the event loop is one call of an engine. Feeds of one entry go in columns: an object a
session would cost more than its step.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
import structlog

from service import tracing
from service.engine import Engine
from service.errors import Problem, invalid, not_ready
from service.registry import Model
from service.run import Race
from service.state import Array
from service.store.base import Head, Key
from service.turns import Place, Turn, leave
from service.work.base import NewSession, Work
from service.work.events import Column, Done, Event, Failed, Listener, LostRace
from service.work.feed import KeptAnswer
from service.work.feeds import Feeds

log = structlog.get_logger(__name__)

Prediction = dict[str, Any]


class Inputs(msgspec.Struct, frozen=True):
    """A sequence to feed, and what its answer shows."""

    given: object
    shown: Literal["last", "all", "none", "outputs"] = "last"
    """outputs: those of every step, as the graph gave them, and no predictions"""
    alternatives: int = 5
    kept: Callable[[Model], KeptAnswer] | None = None
    closes: bool = False
    """the session is closed in the same commit"""

    def check(self, model: Model, steps: int) -> None:
        """Raise Problem when the answer would be too large."""
        if steps == 1 or self.shown != "all":
            return
        most = model.most_steps(self.alternatives)
        if steps > most:
            raise invalid(f"at most {most} predictions a request with these alternatives", "/predictions")


class Fed(msgspec.Struct, frozen=True):
    """The outcome of a feed: the model, and what the engine answered."""

    model: Model
    done: Done
    head: Head
    shown: list[Prediction] | None = None
    """the prediction at the last position, where it was worked out already"""


class Ending:
    """The end of a piece of work: its listener, and what one waits for."""

    __slots__ = ("_event", "_waiter")

    def __init__(self) -> None:
        self._event: Event | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __call__(self, event: Event) -> None:
        """Take the event, on the event loop."""
        self.settle(event)

    def settle(self, event: Event) -> None:
        """Tell the one who waits."""
        self._event = event
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def ended(self) -> bool:
        """Whether the work has ended."""
        return self._event is not None

    async def wait(self) -> Event:
        """The last event, once it has come; at most one may wait."""
        while self._event is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._event


class Feeding(Ending):
    """A feed that has begun; it keeps its session's turn until it has ended, whoever waits for it."""

    __slots__ = ("_place", "at", "dropped", "entries", "inputs", "model", "shown", "then", "trace", "work")

    def __init__(self, model: Model, inputs: Inputs, place: Place, at: Head | NewSession, entries: Array) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.at = at
        self.entries = entries
        self.shown: list[Prediction] | None = None
        self.work: Work | None = None
        """what it is part of at the moment"""
        self.dropped = False
        self.then: Callable[[], None] | None = None
        """called at the end, in place of one who waits"""
        self.trace = tracing.current()
        self._place = place

    def __call__(self, event: Event) -> None:
        """Take the event, give the turn to the next."""
        self.work = None  # it holds this listener and its session's arrays: a cycle would keep them
        self._place.leave()
        self.settle(event)
        if self.then is not None:
            then, self.then = self.then, None
            then()

    def result(self) -> Fed:
        """What was fed, once it has ended; raises Problem, or Race when somebody else was first."""
        assert self._event is not None
        return fed_of(self.model, self._event, self.shown)

    async def outcome(self) -> Fed:
        """What was fed, when it has ended."""
        if self._event is None:
            try:
                await self.wait()
            except asyncio.CancelledError:
                self.drop()
                await self.wait()
                raise
        return self.result()

    def drop(self) -> None:
        """Feed nothing if that is still possible: nobody waits for it."""
        self.dropped = True
        if self.work is not None:
            self.work.drop()
            self.model.engine.wake()


class Feedings:
    """Feeds of one entry that were begun one by one, in columns (`Asked`)."""

    def __init__(self, feedings: Sequence[Feeding]) -> None:
        self._feedings = feedings
        self.ats = [feeding.at for feeding in feedings]
        self.keys = [at.key for at in self.ats]
        self.entries = np.concatenate([feeding.entries for feeding in feedings])

    def __call__(self, event: Event) -> None:
        """Take those that were fed together: their predictions are worked out together, which costs a tenth."""
        assert isinstance(event, Column)
        feedings = [self._feedings[i] for i in event.which]
        wanted = [
            feeding.inputs.alternatives if feeding.inputs.shown not in ("none", "outputs") else None
            for feeding in feedings
        ]
        shown = shown_together(feedings[0].model, event, wanted)
        for i, (feeding, prediction) in enumerate(zip(feedings, shown, strict=True)):
            feeding.shown = [prediction] if prediction is not None else None
            feeding(done_at(event, i, prediction is None))

    def alone(self, i: int) -> Listener:
        """The feed itself."""
        return self._feedings[i]

    def dropped(self, i: int) -> bool:
        """Whether nobody waits for one any more."""
        return self._feedings[i].dropped

    def part_of(self, i: int, work: Work) -> None:
        """Note what one is part of."""
        self._feedings[i].work = work

    def trace(self, i: int) -> tracing.Trace | None:
        """The trace of one."""
        return self._feedings[i].trace


class Told(Protocol):
    """Who asked for steps in columns."""

    def fed(self, gathering: "Gathering", column: Column) -> None:
        """Take those that were fed together: all of them, or raise and have taken none."""

    def ended(self, gathering: "Gathering", i: int, event: Event) -> None:
        """Take what became of one alone."""


class Gathering:
    """Steps of sessions of one model that begin together (`Asked`).

    It keeps the turn of each session until that one has ended, whoever waits for it.
    """

    def __init__(self, turns: dict[Key, Turn], told: Told, model: Model) -> None:
        self.model = model
        self.told = told
        self.whose: list[Any] = []
        """what each is to the one who is told"""
        self.keys: list[Key] = []
        self.ats: list[Head] = []
        self._entries: list[int | list[float]] = []
        self._turns = turns
        self._most = model.engine.max_batch
        self._trace = tracing.current()
        self._work: Work | None = None
        """what those are part of that go together"""
        self._alone: dict[int, Work] = {}
        self._under_way = 0
        self._dropped: set[int] = set()

    def __len__(self) -> int:
        return len(self.ats)

    @property
    def full(self) -> bool:
        """Whether it is a batch."""
        return len(self.ats) >= self._most

    def add(self, key: Key, head: Head, entry: int | list[float], whose: object) -> None:
        """Take one more in, whose turn it is."""
        self.whose.append(whose)
        self.keys.append(key)
        self.ats.append(head)
        self._entries.append(entry)

    def begin(self) -> Work:
        """All are there: the work to submit."""
        self.entries = self.model.engine.codec.column(self._entries)
        self._under_way = len(self)
        self._work = work = Feeds(self)
        if self._dropped:
            work.drop()
        return work

    def __call__(self, event: Event) -> None:
        """Take those that were fed together."""
        assert isinstance(event, Column)
        self._work = None  # it holds this listener: a cycle would keep both
        turns, keys = self._turns, self.keys
        for i in event.which:
            leave(turns, keys[i])
        try:
            self.told.fed(self, event)
        except Exception:
            log.exception("answers_failed")  # each tries for itself
            for place, i in enumerate(event.which):
                self.told.ended(self, i, done_at(event, place, True))

    def alone(self, i: int) -> Listener:
        """Who takes what became of one alone."""
        return partial(self._ended, i)

    def _ended(self, i: int, event: Event) -> None:
        self._alone.pop(i, None)
        self._under_way -= 1
        if not self._under_way:
            self._work = None  # as where they are fed together
        leave(self._turns, self.keys[i])
        self.told.ended(self, i, event)

    def part_of(self, i: int, work: Work) -> None:
        """Note what one is part of; called on the engine's thread."""
        self._alone[i] = work
        if i in self._dropped:
            work.drop()

    def dropped(self, i: int) -> bool:
        """Whether nobody waits for it any more."""
        return i in self._dropped

    def trace(self, i: int) -> tracing.Trace | None:
        """The trace of the request that they are for."""
        return self._trace

    def drop(self, places: Iterable[int]) -> None:
        """Feed these no more if that is still possible: nobody waits for them."""
        for i in places:
            self._dropped.add(i)
            work = self._alone.get(i, self._work)
            if work is not None:
                work.drop()
        self.model.engine.wake()


class Outbox:
    """Hands work to its engine once a turn of the event loop: what came together is one call and one batch."""

    def __init__(self, turns: dict[Key, Turn]) -> None:
        self._turns = turns
        self._waiting: dict[Engine, list[Sequence[Work]]] = {}
        self._feedings: dict[Engine, list[Feeding]] = {}
        self._gathering: dict[tuple[Engine, Told], list[Gathering]] = {}
        self._newest: Gathering | None = None

    def put(self, engine: Engine, works: Sequence[Work]) -> None:
        """Submit work that begins at the same time, all or none; a refusal reaches its listeners."""
        self._flush_soon()
        self._waiting.setdefault(engine, []).append(works)

    def feed(self, feeding: Feeding) -> None:
        """Submit a feed of one entry, in columns with the others."""
        self._flush_soon()
        self._feedings.setdefault(feeding.model.engine, []).append(feeding)

    def gathering(self, told: Told, model: Model) -> Gathering:
        """Where steps of which one is told are gathered until this turn of the event loop ends, or a batch is full."""
        newest = self._newest
        if newest is not None and newest.told is told and newest.model is model and not newest.full:
            return newest
        self._flush_soon()
        gatherings = self._gathering.setdefault((model.engine, told), [])
        if not gatherings or gatherings[-1].full:
            gatherings.append(Gathering(self._turns, told, model))
        self._newest = gatherings[-1]
        return gatherings[-1]

    def _flush_soon(self) -> None:
        if not (self._waiting or self._feedings or self._gathering):
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, {}
        feedings, self._feedings = self._feedings, {}
        gathering, self._gathering, self._newest = self._gathering, {}, None
        for engine, those in feedings.items():
            size = engine.max_batch
            parts = [those[begin : begin + size] for begin in range(0, len(those), size)]
            waiting.setdefault(engine, []).extend((_columns_of(part),) for part in parts)
        for (engine, _), gatherings in gathering.items():
            waiting.setdefault(engine, []).extend((one.begin(),) for one in gatherings)
        for engine, groups in waiting.items():
            try:
                engine.submit(*chain.from_iterable(groups))
            except Problem:
                for works in groups:  # not all of them fit
                    _submit(engine, works)


def _columns_of(feedings: Sequence[Feeding]) -> Feeds:
    work = Feeds(Feedings(feedings))
    for feeding in feedings:
        feeding.work = work
    return work


def _submit(engine: Engine, works: Sequence[Work]) -> None:
    try:
        engine.submit(*works)
    except Problem as problem:
        for work in works:
            if isinstance(work, Feeds) and work.cost > 1:
                for one in work.each():
                    _submit(engine, (one,))
            else:
                work.refused(problem)


def shown_together(model: Model, column: Column, wanted: Sequence[int | None]) -> list[Prediction | None]:
    """The newest prediction of each place of a column with as many alternatives as are wanted; None: none is.

    Where they can not be worked out together there is none either.
    """
    shown: list[Prediction | None] = [None] * len(wanted)
    alike: dict[int, list[int]] = {}
    if model.engine.codec.shows_together:
        for i, alternatives in enumerate(wanted):
            if alternatives is not None:
                alike.setdefault(alternatives, []).append(i)
    for alternatives, chosen in alike.items():
        try:
            newest = _newest(model, column, chosen, alternatives)
        except Exception:
            log.exception("predictions_failed")  # each request tries for itself
            continue
        for i, prediction in zip(chosen, newest, strict=True):
            shown[i] = prediction
    return shown


def _newest(model: Model, column: Column, chosen: list[int], alternatives: int) -> list[Prediction]:
    outputs, before, entries = column.outputs, column.before, column.entries
    if len(chosen) < len(column.heads):
        outputs = {name: array[chosen] for name, array in outputs.items()}
        before = {name: array[chosen] for name, array in before.items()}
        entries = entries[chosen]
    positions = [column.heads[i].position for i in chosen]
    return model.engine.codec.newest(outputs, positions, before, entries, alternatives)


def done_at(column: Column, i: int, outputs: bool) -> Done:
    """One place of a column, with the outputs if they are needed."""
    head, entries, created = column.heads[i], column.entries[i : i + 1], column.created[i]
    if not outputs:
        return Done(head, entries=entries, created=created)
    before = {name: array[i] for name, array in column.before.items()}
    return Done(head, {name: array[i : i + 1] for name, array in column.outputs.items()}, before, (), entries, created)


def fed_of(model: Model, event: Event, shown: list[Prediction] | None = None) -> Fed:
    """What was fed, by the last event; raises Problem, or Race when somebody else was first."""
    done = done_of(event)
    return Fed(model, done, head_of(done), shown)


def done_of(event: Event) -> Done:
    """The end of work; raises Problem, or Race when its commit was refused."""
    match event:
        case Done():
            return event
        case Failed(problem):
            raise problem
        case LostRace(head):
            raise Race(head)
        case _:
            raise not_ready("the work was dropped")


def head_of(done: Done) -> Head:
    """The head after a piece of work on a session."""
    assert done.head is not None
    return done.head
