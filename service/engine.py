"""The engine: one thread a model version; one tick advances many sessions.

schedule -> fold or roll out -> commit -> reply. Rows enter and leave between ticks; a reply leaves after its commit.
Large folds, and smaller ones of a slow graph, are begun ahead: the commit and the replies of one are made while the
graph runs for the next.
"""

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import NamedTuple, TypeVar, cast

import msgspec
import numpy as np
import structlog

from service import metrics, state, tracing
from service.errors import Problem, invalid, not_ready, overloaded
from service.runner import Begun
from service.sampling import Sampler
from service.scheduler import Batch, Scheduler
from service.state import Array, Row
from service.store.base import (
    Applied,
    Change,
    Conflict,
    Head,
    Key,
    Line,
    Result,
    Segment,
    Snapshot,
    Store,
    StoreError,
    home,
    problem_of,
)
from service.tasks import Codec, Output
from service.window import Served
from service.work.base import Keeping, Resident, Work
from service.work.events import Event, Failed, Listener, LostRace, Tokens
from service.work.generate import Generate

log = structlog.get_logger(__name__)

T = TypeVar("T")

AHEAD_DRAWN, AHEAD_FED = 32, 96
"""rows that draw, or that do not, from which on beginning their next call early saves more than it costs: to hand it to
another thread, and to cut in two what would have come together"""
AHEAD_SLOW = 24
"""the same of rows that do not draw, where steps wait for the graph more than for Python"""
MAX_AHEAD = 2
"""folds that are under way at once: one runs, and the other follows it without asking Python"""
JOINS, JOINING = 12, 4
"""how often a fold that waits is begun again for whoever comes, and which part of it they must be at least from then
on: while a slow graph runs it would else be gathered as often as sessions come, and each of these batches kept"""
SHARE, UNCUT, TICKS_KEPT = 0.6, 24, 16
"""of the sessions that come again and again may one fold of them have; how many it may have always; ticks that tell how
many come"""
SHORT_STEPS = 4
"""of a roll-out from which on each is so short that tokens may wait for one to be told"""
HURRY_S = 0.008
"""how long a roll-out goes on when others have come, or as long as it has itself waited for others: less would cost
streams more than it saves the others, since a commit of 64 rows takes about two milliseconds"""

_OUTCOMES = (
    (Applied, metrics.COMMITS.labels("applied")),
    (Problem, metrics.COMMITS.labels("failed")),
    (Conflict, metrics.COMMITS.labels("conflict")),
)

Post = Callable[[list[tuple[Listener, Event]]], None]
"""Takes a tick's events to the event loop; called on the engine's thread."""


class LogDamaged(Exception):
    """Entries or snapshots that a head needs are not in the store."""

    def __init__(self, head: Head) -> None:
        super().__init__("the log does not hold what its head says")
        self.head = head


class Took(NamedTuple):
    """What a tick took: seconds, and how many steps of each row."""

    seconds: float
    steps: int


@dataclass(frozen=True, slots=True)
class Ahead:
    """A fold that was begun before the one before it was committed."""

    batch: Batch[Work]
    works: list[Work]
    """those of its rows that are folded"""
    begun: Begun


class Engine:
    """Runs the work of one model version, batched, on a thread of its own."""

    def __init__(
        self,
        runner: Served,
        store: Store,
        post: Post,
        max_batch: int,
        max_queue_steps: int,
        max_resident: int,
        keeping: Keeping | None = None,
    ) -> None:
        self.manifest = runner.manifest
        self.codec = Codec(runner.manifest)
        self.numerics = runner.numerics
        self.initial_row = state.initial_row(runner.manifest.session_states)
        self.max_batch = max_batch
        self._runner = runner
        self._store = store
        self._post = post
        self._max_queue_steps = max_queue_steps
        self._max_resident = max_resident
        self._scheduler: Scheduler[Work] = Scheduler(max_batch, numbers=self.manifest.output_numbers)
        self.keeping = keeping or Keeping()
        self._residents: OrderedDict[Key, Resident] = OrderedDict()
        self._parking: list[Snapshot] = []
        self._sampled: list[Generate] = []
        self._sampler = Sampler([], [])
        self._store_run = store.run
        self._arrived = threading.Condition()
        self._inbox: deque[Work] = deque()
        self._patience = HURRY_S
        """seconds that a roll-out may go on when others have come"""
        self._since = 0.0
        """when what is begun, or goes on, was there: the oldest of the inbox, the end of its tick"""
        self._inbox_since = 0.0
        self._unscheduled: list[Work] = []
        self._untold: list[tuple[Listener, Event]] = []
        self._ahead: deque[Ahead] = deque()
        self._joins = 0
        """how often the last one was begun again"""
        self._there: deque[int] = deque(maxlen=TICKS_KEPT)
        """the sessions that waited or were under way at the newest ticks"""
        self._queued_steps = 0
        self._stopping = False
        self.calls: dict[int, tuple[int, float]] = {}
        """calls of the graph by their number of rows: (how many, seconds in all)"""
        labels = (self.manifest.name, str(self.manifest.version))
        self._steps = metrics.STEPS.labels(*labels)
        self._tokens = metrics.TOKENS.labels(*labels)
        self._ticks = metrics.TICKS.labels(*labels)
        self._batch_rows = metrics.BATCH_ROWS.labels(*labels)
        self._queue_seconds = metrics.QUEUE_SECONDS.labels(*labels)
        self._run_seconds = metrics.RUN_SECONDS.labels(*labels)
        self._wake_seconds = metrics.WAKE_SECONDS.labels(*labels)
        self._parked, self._ended, self._discarded, self._restarted = (
            metrics.EVICTED.labels(*labels, reason) for reason in ("parked", "ended", "discarded", "store_restarted")
        )
        self._faults = metrics.NUMERIC_FAULTS.labels(*labels)
        metrics.MAX_BATCH_ROWS.labels(*labels).set(max_batch)
        # A gauge is part of a cycle: it would keep the engine, the states and the graph after they are forgotten.
        me = weakref.ref(self)
        metrics.ACTIVE.labels(*labels).set_function(lambda: len(one._residents) if (one := me()) is not None else 0)
        metrics.QUEUED_STEPS.labels(*labels).set_function(lambda: one._queued_steps if (one := me()) is not None else 0)
        self._thread = threading.Thread(target=self._run, name=f"engine-{'-'.join(labels)}", daemon=True)

    @property
    def active(self) -> int:
        """Sessions held in memory."""
        return len(self._residents)

    def start(self) -> None:
        """Begin to tick."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what is queued, then end the thread."""
        with self._arrived:
            self._stopping = True
            self._arrived.notify()
        self._thread.join()
        self._runner.close()
        metrics.forget(self.manifest.name, str(self.manifest.version))

    def submit(self, *works: Work) -> None:
        """Queue work that begins at the same time, from any thread; raises Problem when the queue is full."""
        cost = sum(work.cost for work in works)
        if cost > self._max_queue_steps:
            detail = f"{cost} steps at once; at most {self._max_queue_steps} (RECURRA_MAX_QUEUE_STEPS)"
            raise Problem("payload_too_large", detail)
        with self._arrived:
            if self._stopping:
                raise not_ready("the service is stopping")
            if self._queued_steps + cost > self._max_queue_steps:
                raise overloaded(f"more than {self._max_queue_steps} steps are waiting; try again later")
            self._queued_steps += cost
            if not self._inbox:
                self._inbox_since = perf_counter()
            self._inbox.extend(works)
            self._arrived.notify()

    def wake(self) -> None:
        """Make the engine look at its work's `stop` flags soon."""
        with self._arrived:
            self._arrived.notify()

    # ------------------------------------------------------------------ the loop

    def _run(self) -> None:
        while self._admit():
            self._tick()
        self._commit([])
        self._tell()

    def _admit(self) -> bool:
        """Begin what has arrived; wait while there is nothing to do. False: stop."""
        with self._arrived:
            while not self._something_to_do():
                if self._stopping and not self._ahead:
                    return False
                if self._untold:
                    self._tell()
                else:
                    self._arrived.wait()
            arrived, self._inbox = self._inbox, deque()
            self._since = self._inbox_since
        for work in arrived:
            self._begin(work)
        return True

    def _something_to_do(self) -> bool:
        if self._inbox or self._unscheduled or (self._ahead and self._ahead[0].begun.done()):
            return True
        if len(self._ahead) == MAX_AHEAD:
            return self._may_join(self._ahead[-1])
        return self._scheduler.waiting >= (1 if self._runner.on_graph or not self._ahead else AHEAD_FED)

    def _begin(self, work: Work) -> None:
        self._try(work, lambda: work.begin(self))
        self._begin_strays(work)
        self._queue(work)

    def _begin_strays(self, work: Work) -> None:
        strays, work.strays = work.strays, []
        if strays:
            with self._arrived:
                self._queued_steps += sum(stray.cost for stray in strays)
        for stray in strays:
            self._begin(stray)

    def _try(self, work: Work, act: Callable[[], T]) -> T | None:
        """Let a piece of work act; whatever goes wrong ends that work alone."""
        try:
            return act()
        except Problem as problem:
            work.end(Failed(problem))
        except StoreError as error:
            log.error("store_failed", error=str(error))
            work.end(Failed(problem_of(error)))
        except LogDamaged as damaged:
            head = damaged.head
            self._try(work, lambda: work.end(self._explained(head)))
        except Exception:
            log.exception("work_failed", model=self.manifest.name, sessions=[key[1] for key in work.keys[:8]])
            work.end(Failed(Problem("internal", "the service failed on this request; nothing was changed")))
        return None

    def _explained(self, head: Head) -> Event:
        """Why entries are missing: another replica has moved the session since its head was read, or they are lost."""
        newest = self._asked().head(head.key)
        if newest is None or newest.fence != head.fence:
            return LostRace(newest)
        log.error("log_damaged", session=head.id, position=head.position)
        return Failed(Problem("internal", "the session's log is damaged; nothing was changed"))

    def _queue(self, work: Work) -> None:
        if not work.finished and work.steps:
            self._scheduler.add(work, self._since)
        else:
            self._unscheduled.append(work)

    def _tick(self) -> None:
        landed = self._ahead.popleft() if self._ahead and self._ahead[0].begun.done() else None
        if landed is not None and self._ahead:
            self._land(landed)  # first: the graph has what to do, and somebody waits for his answer
            landed = None
        batch = self._next_batch()
        ahead = batch is not None and self._goes_ahead(batch)
        if batch is not None and ahead:
            self._begin_ahead(batch)  # first: the graph shall not wait for what is to be done with the last one
        if landed is not None:
            self._land(landed)
        if batch is not None and not ahead:
            while self._ahead:
                self._land(self._ahead.popleft())
        works, self._unscheduled = self._unscheduled, []
        if batch is None or ahead:
            self._finish(works)
        else:
            self._finish([*works, *batch.rows], batch)

    def _next_batch(self) -> Batch[Work] | None:
        """What is to be run now: beside what is under way only where it may be begun ahead."""
        if len(self._ahead) == MAX_AHEAD:
            return self._joined()
        self._joins = 0
        if self._ahead and self._scheduler.waiting < AHEAD_FED and not self._runner.on_graph:
            return None
        batch = self._scheduler.next(self._share() if self._runner.on_graph else None)
        if batch is not None:
            waited = perf_counter() - batch.since
            self._queue_seconds.observe(waited)
            self._patience = max(HURRY_S, waited)
        return batch

    def _share(self) -> int:
        """The most sessions of a fold that others answer for meanwhile: little more than half of those that come again.

        With more, those who are left are done long before the many have come again, and the graph waits for them; and
        since they come together, it would go on like that. Half at most leaves rests, which become folds of their own.
        """
        self._there.append(self._scheduler.waiting + sum(ahead.batch.width for ahead in self._ahead))
        return max(UNCUT, int(SHARE * max(self._there)))

    def _may_join(self, last: Ahead) -> bool:
        """Whether rows wait that could be in a fold that was begun, and does not run yet."""
        return (
            self._runner.on_graph
            and last.batch.steps == 1
            and len(last.works) == len(last.batch.rows)
            and not (last.begun.running() or last.begun.done())
            and self._scheduler.joins(last.batch, 1 if self._joins < JOINS else -(-last.batch.width // JOINING))
        )

    def _joined(self) -> Batch[Work] | None:
        """The fold that was begun last, taken back, with those that came since."""
        last = self._ahead[-1]
        if not (self._may_join(last) and self._runner.cancel(last.begun)):
            return None
        self._ahead.pop()
        self._joins += 1
        return self._scheduler.joined(last.batch)

    def _goes_ahead(self, batch: Batch[Work]) -> bool:
        """Whether a batch is a fold that is begun ahead."""
        least = AHEAD_FED if not self._runner.on_graph else 1 if self._ahead else AHEAD_SLOW
        return not batch.draws and batch.width >= least

    def _begin_ahead(self, batch: Batch[Work]) -> None:
        """Begin a fold in another thread."""
        self._halt(batch.rows)
        works = [work for work in batch.rows if not (work.halted or work.finished)]
        if not works:
            self._finish(batch.rows)
            return
        try:
            begun = self._runner.begin(*_call_of(works, batch.steps))
        except Exception:
            log.exception("batch_failed", model=self.manifest.name, rows=len(works), steps=batch.steps)
            while self._ahead:
                self._land(self._ahead.popleft())
            self._finish(batch.rows, batch)  # in this thread, where one bad row harms no other
            return
        begun.add_done_callback(lambda _: self.wake())
        self._ahead.append(Ahead(batch, works, begun))

    def _land(self, ahead: Ahead) -> None:
        """Take what a fold that was begun ahead has given, commit it and answer."""
        self._finish(ahead.batch.rows, ahead.batch, ahead)

    def _finish(self, works: list[Work], batch: Batch[Work] | None = None, ahead: "Ahead | None" = None) -> None:
        """Run a batch, or take what was run ahead; then commit and answer."""
        if not works:
            return
        try:
            if ahead is None:
                self._halt(works)
            if batch is not None:
                self._step(batch, ahead)
            self._commit(works)
            self._advance(works)
        except Exception:
            # A defect must not end the thread that everybody waits for.
            log.exception("tick_failed", model=self.manifest.name)
            self._abort(works)
        self._reply(works)

    def _halt(self, works: list[Work]) -> None:
        for work in works:
            if work.stop is not None and not work.finished:
                work.halted = True
                work.halt()

    def _abort(self, works: list[Work]) -> None:
        for work in works:
            for key in work.keys:
                self._hold((key, None))
            if not work.finished:
                work.end(Failed(Problem("internal", "the service failed on this request")))

    # ------------------------------------------------------------------ fold and draw

    def _step(self, batch: Batch[Work], ahead: "Ahead | None") -> None:
        works = ahead.works if ahead else [work for work in batch.rows if not (work.halted or work.finished)]
        if not works:
            return
        act = self._roll if batch.draws else partial(self._fold, begun=ahead.begun) if ahead else self._fold
        seconds, steps = self._together(act, works, batch.steps)
        width = sum(work.width for work in works)
        self._scheduler.pace.took(batch.draws, width, steps, seconds)
        self._ticks.inc()
        self._run_seconds.observe(seconds)
        self._batch_rows.observe(width)
        count, total = self.calls.get(width, (0, 0.0))
        self.calls[width] = (count + 1, total + seconds)
        self._steps.inc(steps * width)
        if tracing.on:
            tracing.tell("run", works, seconds)

    def _together(self, act: Callable[[list[Work], int], Took], works: list[Work], steps: int) -> Took:
        """All rows at once; after a failure each once alone, so that one bad row harms no other."""
        try:
            return act(works, steps)
        except Exception:
            log.exception("batch_failed", model=self.manifest.name, rows=len(works), steps=steps)
            if len(works) == 1:
                works[0].failed(self._refusal())
                return Took(0.0, steps)
            alone = self._roll if works[0].draws else self._fold
            return Took(sum(self._together(alone, [work], steps).seconds for work in works), steps)

    def _refusal(self) -> Problem:
        """What is answered when the graph fails: of a raw model's inputs only the graph knows what they may be."""
        if self.manifest.input_kind == "tensors":
            return invalid("the model's graph can not be run on these inputs", "/inputs")
        return Problem("internal", "the model could not be run on these inputs")

    def _fold(self, works: list[Work], steps: int, begun: Begun | None = None) -> Took:
        if begun is None:
            call = _call_of(works, steps)
            self._tell()
            folded = self._runner.run(*call)
        else:
            self._tell()
            folded = self._runner.end(begun)
        end = 0
        for work in works:
            begin, end = end, end + work.width
            outputs = {name: array[:, begin:end] for name, array in folded.outputs.items()}
            if faults := work.take(outputs, folded.rows[begin:end], folded.finite):
                self._faults.inc(faults)
        return Took(folded.seconds, steps)

    def _roll(self, works: list[Work], steps: int) -> Took:
        """Fold the last entry of each, draw the next from what comes out, and so on."""
        began = perf_counter()
        rolling = cast(list[Generate], works)
        showing = [(i, work) for i, work in enumerate(rolling) if work.alternatives]
        for _, work in showing:
            work.show_again()
        sampler = self._sampler_of(rolling)
        first = np.array([work.next_position for work in rolling])
        uniform = sampler.numbers(first, steps)
        tokens, logprobs = np.empty((steps, len(works)), np.int64), np.empty((steps, len(works)), np.float32)

        taken = 0

        def draw(step: int, outputs: Output) -> Array:
            nonlocal taken
            taken, logits = step + 1, outputs["logits"]
            tokens[step], logprobs[step] = sampler.draw(logits, uniform[step])
            for i, work in showing:
                work.show(logits[i])
            if not step:
                self._tell()
            return np.asarray(tokens[step])

        entries = np.array([work.entries[-1] for work in rolling])
        many = len(works) >= AHEAD_DRAWN
        ahead = many and all(work.steps > steps for work in rolling)
        may_wait = many and steps >= SHORT_STEPS and all(isinstance(event, Tokens) for _, event in self._untold)
        if not may_wait:  # else the event loop would have the interpreter when the step that was begun early ends
            self._tell()
        folded = self._runner.roll(entries, [work.row for work in works], self._until_hurried(steps), draw, ahead)
        # Now, and not when they are needed: then the event loop is busy with what is told of this tick.
        sampler.prepare(first + taken, steps)
        if not folded.finite:
            self._roll_with_care(works, taken)
            return Took(perf_counter() - began, taken)
        drawn = tokens[:taken].T.astype(self.codec.entry_dtype, order="C")
        chances = np.ascontiguousarray(logprobs[:taken].T)
        for i, work in enumerate(rolling):
            outputs = {name: array[0, i] for name, array in folded.outputs.items()}
            self._tokens.inc(work.rolled(drawn[i], chances[i], outputs, folded.rows[i]))
        return Took(perf_counter() - began, taken)

    def _until_hurried(self, steps: int) -> Iterator[int]:
        """Numbers of the steps to take: fewer when others have come, who would wait for all of them."""
        began = perf_counter()
        for step in range(steps):
            if step and self._inbox and perf_counter() - began > self._patience:
                return
            yield step

    def _roll_with_care(self, works: list[Work], steps: int) -> None:
        """After a number that is not finite: each row alone and step by step, up to the last good token."""
        if len(works) > 1:
            for work in works:
                self._roll([work], steps)
        elif steps > 1:
            before = works[0].steps
            for step in range(steps):
                if works[0].steps == before - step and not works[0].finished:
                    self._roll(works, 1)
        elif cast(Generate, works[0]).has_drawn:
            return  # what is good is committed first; the next tick finds the fault again
        else:
            self._faults.inc()
            works[0].end(Failed(works[0].fault))

    def _sampler_of(self, works: list[Generate]) -> Sampler:
        """The sampler of the last tick while the batch has the same members."""
        if works != self._sampled:
            self._sampled = works
            self._sampler = Sampler([work.sampling for work in works], [work.generation.seed for work in works])
        return self._sampler

    # ------------------------------------------------------------------ commit

    def _commit(self, works: list[Work]) -> None:
        unfinished = [work for work in works if not work.finished]
        due = [(work, commits) for work in unfinished if (commits := self._try(work, work.commits))]
        parking, self._parking = self._parking, []
        if due or parking:
            started = perf_counter()
            results = self._committed([commit for _, commits in due for commit in commits], parking)
            seconds = perf_counter() - started
            metrics.COMMIT_SECONDS.observe(seconds)
            if tracing.on:
                tracing.tell("commit", (work for work, _ in due), seconds)
            end = 0
            for work, commits in due:
                begin, end = end, end + len(commits)
                self._hold(*work.settled(results[begin:end]))
            _count(results)

    def _committed(self, due: Sequence[Change], parking: Sequence[Snapshot] = ()) -> list[Result | Problem]:
        try:
            return list(self._asked().commit(due, parking))
        except StoreError as error:
            log.error("commit_failed", error=str(error))
            return [problem_of(error)] * len(due)
        except Exception:
            # Something in one commit could not be written: the others shall not suffer for it.
            log.exception("commit_failed")
            if len(due) <= 1 and not parking:
                return [Problem("internal", "the session could not be written; nothing was changed")] * len(due)
            return [result for one in due for result in self._committed([one])]

    # ------------------------------------------------------------------ reply

    def _advance(self, works: list[Work]) -> None:
        for work in works:
            if not work.finished:
                self._try(work, work.advance)

    def _reply(self, works: list[Work]) -> None:
        self._since = perf_counter()
        for work in works:
            self._untold += work.events
            work.events = []
            self._begin_strays(work)
            if work.finished:
                work.listener = _nobody  # it may hold the work, and the work its arrays
            else:
                self._queue(work)
        ended = sum(work.cost for work in works if work.finished)
        if ended:
            with self._arrived:
                self._queued_steps -= ended

    def _tell(self) -> None:
        """Hand the answers of past ticks to the event loop.

        When the graph runs next, or the store, or there is nothing else to do: sooner, the event loop would take the
        interpreter from this thread while the graph waits for it.
        """
        if self._untold:
            told, self._untold = self._untold, []
            self._post(told)

    def _asked(self) -> Store:
        """The store, to be read or written: that may take its time, so nobody shall wait for it who has his answer."""
        self._tell()
        return self._store

    # ------------------------------------------------------------------ sessions in memory

    def resident(self, known: Head) -> Resident:
        """A session that stands at `known` or, by this process's own commits, further on."""
        self._drop_if_the_store_restarted()
        held = self._residents.get(known.key)
        if held is not None and held.head is known:
            return held
        if held is None or not _leads_to(known, held.head):
            held = self._load(known)
        elif held.head.position == known.position:
            held = msgspec.structs.replace(held, head=known)  # what is said of a session may change without a step
        self._hold((known.key, held))
        return held

    def standing(self, keys: Sequence[Key], ats: Sequence[object]) -> list[Resident | None]:
        """Sessions in memory that stand exactly there, by the key of each; None for any other."""
        self._drop_if_the_store_restarted()
        held = map(self._residents.get, keys)
        return [one if one is not None and one.head is at else None for one, at in zip(held, ats, strict=True)]

    def forget(self, key: Key) -> None:
        """Drop a session from memory: it has ended, or left for another model version. From any thread."""
        if self._residents.pop(key, None) is not None:
            self._ended.inc()

    def _drop_if_the_store_restarted(self) -> None:
        if self._store.run != self._store_run:
            self._store_run = self._store.run
            self._restarted.inc(len(self._residents))
            self._residents.clear()

    def _load(self, head: Head) -> Resident:
        """The newest snapshot, and the log after it: at least one entry, which gives the last output back."""
        began = perf_counter()
        start, row = self.state_below(head, head.position)
        tail = self.log_entries(head, start, head.position)
        self._wake_seconds.observe(perf_counter() - began)
        return Resident(head, row, start, tail, None, tail[-1] if len(tail) else None, start)

    def state_below(self, head: Head, below: int) -> tuple[int, Row]:
        """(position, state) of the newest snapshot before `below` that can be read, or of the log's beginning."""
        specs, below = self.manifest.session_states, max(below, head.origin + 1)
        while (snapshot := self.snapshot(head, below)) is not None:
            try:
                return snapshot.position, state.load(specs, snapshot.data)
            except ValueError as error:
                log.error("snapshot_unreadable", session=head.id, position=snapshot.position, error=str(error))
                below = snapshot.position
        if head.origin:
            raise LogDamaged(head)
        return 0, self.initial_row

    def snapshot(self, head: Head, below: int) -> Snapshot | None:
        """The newest snapshot of this model's state before `below`."""
        found = self._asked().snapshot(head.branch, below, self.manifest.graph_sha256)
        return found if found is not None and found.position >= head.origin else None

    def snapshots(self, head: Head, to: int) -> list[int]:
        """Positions of the snapshots of this model's state up to `to`."""
        return self._asked().snapshots(head.branch, head.origin - 1, to, self.manifest.graph_sha256)

    def log(self, branch: str, after: int, to: int) -> list[Segment]:
        """The segments of positions after + 1 to `to`."""
        return self._asked().log(branch, after, to)

    def log_entries(self, head: Head, after: int, to: int) -> Array:
        """The session's entries from position after + 1 to `to`; raises Problem when they are not all there."""
        entries = self.codec.entries(b"".join(segment.data for segment in self._asked().log(head.branch, after, to)))
        if len(entries) != to - after:
            raise LogDamaged(head)
        return entries

    def line(self, branch: str) -> Line:
        """What comes before a branch's own entries."""
        return self._asked().line(branch)

    def next_epoch(self, key: Key) -> int:
        """An epoch that this id has never had."""
        return self._asked().next_epoch(key)

    def _hold(self, *held: tuple[Key, Resident | None]) -> None:
        """Keep sessions in memory as they are now (None: not any more); park those that were not used for longest."""
        residents = self._residents
        for key, resident in held:
            if resident is not None:
                residents[key] = resident
                residents.move_to_end(key)
            elif residents.pop(key, None) is not None:
                self._discarded.inc()
        while len(residents) > self._max_resident:
            self._park(residents.popitem(last=False)[1])

    def _park(self, resident: Resident) -> None:
        """Leave a session to the store; a long way from its last snapshot it gets one with the next commit."""
        self._parked.inc()
        if resident.behind is not None:
            position, row = resident.behind
            data = state.dump(self.manifest.session_states, row)
            with suppress(StoreError):  # without it the next wake-up takes a little longer
                branch = home(self.line(resident.head.branch), resident.head.branch, position)
                self._parking.append(Snapshot(branch, position, self.numerics, data, self.manifest.graph_sha256))


def _call_of(works: Sequence[Work], steps: int) -> tuple[Array, list[Row], list[int]]:
    """What is run: entries [steps, rows, ...], the rows' states, and how many outputs of each are looked at."""
    entries = np.concatenate([work.block(steps) for work in works], axis=1)
    wanted = [last for work in works for last in (work.wanted(steps),) * work.width]
    return entries, [row for work in works for row in work.rows], wanted


def _nobody(event: Event) -> None:
    """The listener of work that has ended."""


def _leads_to(known: Head, held: Head) -> bool:
    """Whether a head in memory is the known one, or one that this process has committed on top of it."""
    return (held.epoch, held.branch) == (known.epoch, known.branch) and held.position >= known.position


def _count(results: Sequence[Result | Problem]) -> None:
    kinds = list(map(type, results))
    for kind, outcome in _OUTCOMES:
        if count := kinds.count(kind):
            outcome.inc(count)
