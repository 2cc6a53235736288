"""Sessions as their clients see them: one operation after another, streams that can be cut and resumed.

This is the event loop's side of the engine. Operations that change a session take its turn, in order of arrival;
reads, forecasts and states see the newest committed position and wait for nobody.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import msgspec

from service import metrics
from service.engine import Engine
from service.errors import Problem, invalid, not_ready
from service.feeding import Ending, Fed, Feeding, Gathering, Inputs, Outbox, Told, done_of
from service.registry import Model, Registry
from service.replies import Replies
from service.run import Race, Reader, Replay, Run, moved, tokens_of
from service.sampling import MAX_SEED
from service.state import Array, Row
from service.store.base import UNREAD, Commit, Conflict, Generation, Head, Key, Store, abandoned, now_ms, tombstone
from service.turns import Place, Turn
from service.work.base import NewSession, Work, new_head
from service.work.events import Done, Event, Listener, Token
from service.work.feed import Feed, Keyed, Predict, Whole
from service.work.forecast import Forecast, Path
from service.work.generate import MAX_TOKENS_KEPT, Generate, reply_of
from service.work.migrate import session_reply

P = ParamSpec("P")
T = TypeVar("T")

MAX_WHOLE = 65_536
"""steps of a sequence that can not be cut into calls"""

COUNT_EVERY_S = 5.0
"""a count of a million sessions takes some 50 ms"""

MANY = 1024
"""work on more items than this is done beside the event loop"""


_random = random.Random()


def new_seed() -> int:
    """A random seed; no secret, so it need not come from the system, which would give the GIL away."""
    return _random.randrange(MAX_SEED + 1)


class Opening(msgspec.Struct, frozen=True):
    """What a request says of the session it means: how to create it, and where it is believed to stand."""

    model: str | None = None
    version: int | None = None
    seed: int | None = None
    position: int | None = None
    ttl_s: int | None = None
    metadata: Mapping[str, object] | None = None
    lives: bool | None = None
    """whether the session must live already (True) or must not (False); None: either will do"""


class Step(Protocol):
    """What a request says of one step, and of the session that it means."""

    inputs: object
    model: str | None
    position: int | None


class Sessions:
    """All operations on sessions, and those without one."""

    def __init__(self, registry: Registry, store: Store, default_ttl_s: int, wait_s: float) -> None:
        self.registry = registry
        self.store = store
        self.replies = Replies(store, wait_s)
        self.default_ttl_s = default_ttl_s
        self._wait_s = wait_s
        self._turns: dict[Key, Turn] = {}
        self._runs: dict[Key, Run] = {}
        self._outbox = Outbox(self._turns)
        self.draining = False
        self._counted_at = -COUNT_EVERY_S
        self.may_begin: Callable[[str], None] = lambda _: None
        """raises Problem when the tenant of that name has as many sessions as it may have"""

    # ------------------------------------------------------------------ reading

    async def head(self, key: Key) -> Head:
        """The newest committed head of a live session; raises Problem 404 or 410."""
        return live(key, await self.stored(key))

    async def stored(self, key: Key) -> Head | None:
        """The newest committed head, also of a session that has ended."""
        # Queued or running work keeps a session from expiring under it.
        turn = self._turns.get(key)
        since_ms = turn.since_ms if turn is not None else None
        head = self.store.peek(key, since_ms)
        return head if head is not UNREAD else await asyncio.to_thread(self.store.head, key, since_ms)

    def model_of(self, head: Head) -> Model:
        """The model version that a session is pinned to."""
        return self.registry.of(head)

    async def heads(self, tenant: str, model: str | None, after: str, limit: int) -> list[Head]:
        """Live sessions in order of id."""
        return await asyncio.to_thread(self.store.heads, tenant, model, after, limit)

    async def forecast(
        self, key: Key, horizon: int, future: Sequence[Mapping[str, object]] | None, samples: int, seed: int | None
    ) -> tuple[Model, Done, list[Done]]:
        """Steps ahead on a copy: the model's own roll-out, and `samples` sampled paths."""

        async def ahead(model: Model, head: Head) -> tuple[Model, Done, list[Done]]:
            told = model.engine.codec.future(future, horizon)
            chosen = head.seed if seed is None else seed
            paths = [None, *(Path(i, chosen) for i in range(samples))]
            makes = [partial(Forecast, at=head, horizon=horizon, future=told, path=path) for path in paths]
            done, *sampled = await self._do_all(model, makes)
            return model, done, sampled

        return await self.read(key, ahead)

    async def read(self, key: Key, look: Callable[[Model, Head], Awaitable[T]]) -> T:
        """Look at a session as it stands; again, when it was moved under the look."""

        async def fresh() -> T:
            head = await self.head(key)
            return await look(self.registry.of(head), head)

        return await self.replies.again(fresh)

    async def predict(
        self, model: Model, sequences: Sequence[Array], last_only: bool, rows: Sequence[Row] | None = None
    ) -> list[Done]:
        """Whole sequences, each from the initial state or from its own of `rows`."""
        if not model.bundle.manifest.streamable:
            return await self._predict_whole(model, sequences, last_only, rows)
        begins = rows if rows is not None else [None] * len(sequences)
        pairs = zip(sequences, begins, strict=True)
        return await self._do_all(
            model, [partial(Predict, entries=e, last_only=last_only, row=row) for e, row in pairs]
        )

    async def _predict_whole(
        self, model: Model, sequences: Sequence[Array], last_only: bool, rows: Sequence[Row] | None
    ) -> list[Done]:
        if rows is not None:
            must_stream(model)
        if max(map(len, sequences)) > MAX_WHOLE:
            raise invalid(f"a sequence of this model is one call: at most {MAX_WHOLE} steps", "/sequences")
        return await self._do_all(model, [partial(Whole, entries=one, last_only=last_only) for one in sequences])

    # ------------------------------------------------------------------ changing

    async def create(self, key: Key, opening: Opening, keyed: Keyed | None = None) -> Head:
        """A new session at position 0."""
        async with self.turn(key):
            await self.must_not_live(key)
            model = must_stream(self.registry.get(opening.model or "", opening.version))
            epoch = await asyncio.to_thread(self.store.next_epoch, key)
            head = new_head(self._new(key, opening), model.bundle.manifest, epoch)
            return await self.put(Commit(head, None, reply=session_reply(keyed) if keyed is not None else None))

    async def must_not_live(self, key: Key) -> None:
        """Raise Problem 409 when the id lives."""
        head = await self.stored(key)
        if head is not None and head.status == "live":
            raise Problem("session_exists", f"session {key[1]!r} lives; delete it first, or choose another id")

    async def put(self, commit: Commit) -> Head:
        """Commit a change of a head; raises Race when the session stands elsewhere or the key is taken."""
        result = (await asyncio.to_thread(self.store.commit, [commit]))[0]
        if isinstance(result, Conflict):
            raise Race(result.head)
        return result.head

    async def update(self, key: Key, metadata: Mapping[str, object] | None, ttl_s: int | None) -> Head:
        """Change what is said of a session."""
        async with self.turn(key):
            head = await self.head(key)
            changed = msgspec.structs.replace(
                head,
                metadata=dict(metadata) if metadata is not None else head.metadata,
                ttl_s=ttl_s if ttl_s is not None else head.ttl_s,
            )
            return await self.put(Commit(changed, head.fence))

    async def delete(self, key: Key, forks: bool = False) -> None:
        """Close a session; a running generate ends as cancelled. With `forks` those that left it are closed too."""
        if (head := await self.stored(key)) is None:
            live(key, head)
            return
        to_close = [head]
        while to_close:  # forks have forks, in lines of any length
            closed = await self._close(to_close.pop())
            ids = await asyncio.to_thread(self.store.forks, closed.key, closed.life) if forks else []
            found = [await self.stored((key[0], id)) for id in ids]
            to_close += [fork for fork in found if fork is not None]

    async def _close(self, head: Head) -> Head:
        """Close the life that a session is in when its turn comes; returns its head."""
        key = head.key
        self._cancel_run(key)
        async with self.turn(key, urgent=True):
            head = await self.stored(key) or head
            if head.status == "live":
                await self._entomb(head)
            return head

    async def _entomb(self, head: Head) -> None:
        head = await self.abandon(head)
        await self.put(Commit(tombstone(head, "closed"), head.fence))
        self.forget(head)

    async def end(self, head: Head) -> None:
        """Close the life that a head is of, if it lives yet; another one under the same id is left alone."""
        async with self.turn(head.key, urgent=True):
            newest = await self.stored(head.key)
            if newest is not None and newest.status == "live" and newest.life == head.life:
                await self._entomb(newest)

    def forget(self, head: Head) -> None:
        """Drop a session from its engine's memory."""
        model = self.registry.find(head)
        if model is not None:
            model.engine.forget(head.key)

    async def cancel(self, key: Key) -> Head:
        """End a running or suspended generate where it stands."""
        await self.head(key)
        self._cancel_run(key)
        async with self.turn(key, urgent=True):
            return await self.abandon(await self.head(key))

    async def abandon(self, head: Head) -> Head:
        """End a suspended generate where it stands; under its key stays what it had made."""
        generation = abandoned(head)
        if generation is None or generation == head.generation:
            return head
        ended = msgspec.structs.replace(head, generation=generation)
        if not generation.key:
            return await self.put(Commit(ended, head.fence))
        few = head.position - generation.start <= MAX_TOKENS_KEPT
        span = (head.branch, generation.start, head.position)
        segments = await asyncio.to_thread(self.store.log, *span) if few else []
        return await self.put(Commit(ended, head.fence, reply=reply_of(ended, segments)))

    def _cancel_run(self, key: Key) -> None:
        run = self._runs.get(key)
        if run is not None:
            run.ask("cancel")

    async def feed(self, key: Key, inputs: Inputs, opening: Opening) -> Fed:
        """Feed a sequence: all of it or nothing; raises Race when somebody else was first."""
        begun = self.feed_now(key, inputs, opening)
        if begun is None:
            begun = await self._feed_later(key, inputs, opening)
        return await begun.outcome()

    def feed_now(self, key: Key, inputs: Inputs, opening: Opening) -> Feeding | None:
        """Begin a feed that has to wait for nothing: its turn, the store, a long input. None: it has to."""
        head = self.store.peek(key)
        if head is UNREAD or _many(inputs.given) or (head is not None and _owes_an_answer(head)):
            return None
        place = self.turn(key)
        if not place.take():
            return None
        try:
            model, at = self._opened(key, opening, head)
            entries = model.engine.codec.encode(inputs.given)
            inputs.check(model, len(entries))
            return self._feed(place, model, at, entries, inputs)
        except BaseException:
            place.leave()
            raise

    def step(self, key: Key, step: Step, told: Told, whose: object) -> Gathering | None:
        """Begin a step that has to wait for nothing, in columns with the others of this turn of the event loop.

        None where the session is new, busy or not in memory, and for whatever would be refused: nothing is here.
        """
        now = now_ms()
        head = self.store.peek(key, now)
        if head is None or head is UNREAD or key in self._turns or self.draining or not _may_step(head, step):
            return None
        model = self.registry.find(head)
        if model is None or not model.engine.codec.shows_together:
            return None
        entry = model.engine.codec.single(step.inputs)
        if entry is None:
            return None
        self._turns[key] = Turn(now)
        gathering = self._outbox.gathering(told, model)
        gathering.add(key, head, entry, whose)
        return gathering

    async def _feed_later(self, key: Key, inputs: Inputs, opening: Opening) -> Feeding:
        place = self.turn(key)
        await place.__aenter__()
        try:
            model, at = self._opened(key, opening, await self.stored(key))
            entries = await _encode(model, inputs.given)
            inputs.check(model, len(entries))
            return self._feed(place, model, await self._ready(at), entries, inputs)
        except BaseException:
            place.leave()
            raise

    def _feed(self, place: Place, model: Model, at: Head | NewSession, entries: Array, inputs: Inputs) -> Feeding:
        feeding = Feeding(model, inputs, place, at, entries)
        if len(entries) == 1 and inputs.kept is None and not inputs.closes:
            self._outbox.feed(feeding)
        else:
            kept = inputs.kept(model) if inputs.kept is not None else None
            feeding.work = Feed(feeding, at, entries, inputs.shown not in ("all", "outputs"), kept, inputs.closes)
            self._outbox.put(model.engine, (feeding.work,))
        return feeding

    async def _ready(self, at: Head | NewSession) -> Head | NewSession:
        """The session as it can be moved: a suspended generate with a key has left its answer."""
        return await self.abandon(at) if isinstance(at, Head) and _owes_an_answer(at) else at

    async def generate(self, key: Key, inputs: object | None, generation: Generation, opening: Opening) -> Run:
        """Begin a generate; it goes on while somebody reads it."""
        turn = self.turn(key)
        await turn.__aenter__()
        try:
            model, at = self._opened(key, opening, await self.stored(key))
            needs_language_model(model)
            prompt = await _encode(model, inputs) if inputs is not None else None
            seed = opening.seed if opening.seed is not None else at.seed
            at = await self._ready(at)
            return self._begin_run(model, at, turn, prompt, msgspec.structs.replace(generation, seed=seed))
        except BaseException:
            turn.leave()
            raise

    def _begin_run(
        self,
        model: Model,
        at: Head | NewSession,
        turn: Place,
        prompt: Array | None,
        generation: Generation,
        resumed: bool = False,
    ) -> Run:
        key = at.key

        def on_end() -> None:
            self._runs.pop(key, None)
            turn.leave()

        run = Run(model, at if isinstance(at, Head) else None, on_end)
        run.work = Generate(run.listen, at, prompt, generation, resumed)
        model.engine.submit(run.work)
        self._runs[key] = run
        return run

    def generate_alone(self, model: Model, prompt: Array, generation: Generation) -> Run:
        """A generate without a session: nothing is kept."""
        run = Run(model, None, lambda: None)
        run.work = Generate(run.listen, None, prompt, generation)
        model.engine.submit(run.work)
        return run

    # ------------------------------------------------------------------ resuming

    async def events(self, key: Key, epoch: int, after: int) -> Replay | None:
        """The latest generate after a position: what the log has of it, and its continuation. None: there is none."""
        head = await self.head(key)
        if epoch != head.epoch:
            raise Problem("log_truncated", f"event ids of epoch {epoch} are gone; the session is in epoch {head.epoch}")
        run = self._runs.get(key)
        if run is not None and run.stopping:
            await run.ended()
            run, head = None, await self.head(key)
        newest = run.tokens[-1].position if run is not None and run.tokens else head.position
        if after > max(newest, head.position):
            raise Problem("bad_request", f"the session stands at {newest}: there is no event {epoch}.{after} yet")
        reader = Reader(run) if run is not None else None
        try:
            if run is None and _unfinished(head):
                reader = await self._resume(key)
            head = await self.head(key)
            if head.generation is None and reader is None:
                return None
            return await self._replay(head, reader, after)
        except BaseException:
            if reader is not None:
                reader.close()
            raise

    async def _resume(self, key: Key) -> Reader | None:
        """Continue a suspended generate; None when somebody else ended it while this one waited."""
        turn = self.turn(key)
        await turn.__aenter__()
        try:
            head = await self.head(key)
            if head.generation is not None and _unfinished(head):
                model = self.registry.of(head)
                return Reader(self._begin_run(model, head, turn, None, head.generation, resumed=True))
        except BaseException:
            turn.leave()
            raise
        turn.leave()
        return None

    async def _replay(self, head: Head, reader: Reader | None, after: int) -> Replay:
        """Read the committed tokens that a run does not hold."""
        run = reader.run if reader is not None else None
        base = run.base if run is not None else head
        resumed = run is None or (run.work is not None and run.work.resumed)
        if base is None or base.generation is None or not resumed:
            return Replay(head, [], reader, after)
        tokens, rest = await self.logged(self.registry.of(head), base, base.generation)
        return Replay(head, [token for token in tokens if token.position > after], reader, after, rest)

    async def logged(self, model: Model, head: Head, generation: Generation) -> tuple[list[Token], str]:
        """The tokens of a generate that the log holds, and the text that was held back at its end."""
        end = generation.end if generation.end is not None else head.position
        segments = await asyncio.to_thread(self.store.log, head.branch, generation.start, end)
        return tokens_of(model, generation, segments)

    # ------------------------------------------------------------------ upkeep

    def deliver(self, events: Sequence[tuple[Listener, Event]]) -> None:
        """Take a tick's events, on the event loop."""
        for listener, event in events:
            listener(event)

    async def sweep(self) -> None:
        """Expire and forget what is due, but nothing that has work under way."""
        await asyncio.to_thread(self.store.sweep, frozenset(self._turns))

    async def count(self) -> None:
        """Count the sessions that live in the store alone, for the metrics: at most every few seconds."""
        now = asyncio.get_running_loop().time()
        if now < self._counted_at + COUNT_EVERY_S:
            return
        self._counted_at = now
        found = await asyncio.to_thread(self.store.census)
        here = {(m.bundle.manifest.name, m.bundle.manifest.version): m.engine.active for m in self.registry}
        left = {of: count - here.get(of, 0) for of, count in found.items()}
        metrics.parked({(name, str(version)): max(0, count) for (name, version), count in left.items()})

    def suspend_all(self) -> None:
        """Refuse new work from now on, and suspend the generates that run."""
        self.draining = True
        for run in list(self._runs.values()):
            run.ask("suspend")

    async def drain(self, grace_s: float) -> None:
        """Refuse new work, suspend the generates, wait until everybody had their turn."""
        self.suspend_all()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                for key in list(self._turns):
                    async with Place(self._turns, key, grace_s, urgent=True):
                        pass

    # ------------------------------------------------------------------ inside

    def turn(self, key: Key, urgent: bool = False) -> Place:
        """A place in the queue of those who want to change a session."""
        if self.draining:
            raise not_ready("the service is stopping")
        return Place(self._turns, key, self._wait_s, urgent)

    def _opened(self, key: Key, opening: Opening, head: Head | None) -> tuple[Model, Head | NewSession]:
        """The live session and its model, or what a new one begins with; raises Problem when neither can be."""
        if head is None or head.status != "live":
            if opening.model is None or opening.lives or opening.position not in (None, 0):
                live(key, head)
            return must_stream(self.registry.get(opening.model or "", opening.version)), self._new(key, opening)
        if opening.lives is False:
            raise Problem("session_exists", f"session {key[1]!r} lives", position=head.position)
        if opening.model not in (None, head.model) or opening.version not in (None, head.version):
            raise Problem("model_mismatch", f"session {key[1]!r} is of {head.model} version {head.version}")
        if opening.position not in (None, head.position):
            raise moved(head)
        return self.registry.of(head), head

    def _new(self, key: Key, opening: Opening) -> NewSession:
        self.may_begin(key[0])
        seed = opening.seed if opening.seed is not None else new_seed()
        ttl_s = opening.ttl_s if opening.ttl_s is not None else self.default_ttl_s
        return NewSession(key, seed, ttl_s, opening.metadata or {})

    async def do(
        self, model: Model, make: Callable[Concatenate[Listener, P], Work], *args: P.args, **kwargs: P.kwargs
    ) -> Done:
        """Submit one piece of work and await its end; raises Race when its commit was refused."""

        def made(listener: Listener) -> Work:
            return make(listener, *args, **kwargs)

        return (await self._do_all(model, [made]))[0]

    async def _do_all(self, model: Model, makes: Sequence[Callable[[Listener], Work]]) -> list[Done]:
        """Submit work that begins at the same time, all or none; when the caller is cancelled it is dropped first."""
        if self.draining:
            raise not_ready("the service is stopping")
        endings = [Ending() for _ in makes]
        works = [make(ending) for make, ending in zip(makes, endings, strict=True)]
        self._outbox.put(model.engine, works)
        return await _ends(model.engine, works, endings)


async def _ends(engine: Engine, works: Sequence[Work], endings: Sequence[Ending]) -> list[Done]:
    """Wait for the end of work; when the caller is cancelled it is dropped first."""
    try:
        events = [await ending.wait() for ending in endings]
    except asyncio.CancelledError:
        for work in works:
            work.stop = "suspend"
        engine.wake()
        for ending in endings:
            await ending.wait()
        raise
    return [done_of(event) for event in events]


def live(key: Key, head: Head | None) -> Head:
    """The head if the session lives; else raises Problem saying whether it ever did."""
    if head is None:
        raise Problem("session_not_found", f"there is no session {key[1]!r}; give a model to create it")
    if head.status == "expired":
        raise Problem(
            "session_expired", f"session {key[1]!r} expired after {head.ttl_s} idle seconds", position=head.position
        )
    if head.status == "closed":
        raise Problem("session_closed", f"session {key[1]!r} was deleted", position=head.position)
    return head


async def prompt_of(model: Model, inputs: object | None, pointer: str = "/inputs") -> Array:
    """What a generate without a session begins with: inputs as entries, or else the start symbol."""
    needs_language_model(model)
    return await _encode(model, inputs, pointer) if inputs is not None else model.engine.codec.start()


async def _encode(model: Model, inputs: object, pointer: str = "/inputs") -> Array:
    """Inputs as entries; many of them beside the event loop."""
    encode = model.engine.codec.encode
    return await asyncio.to_thread(encode, inputs, pointer) if _many(inputs) else encode(inputs, pointer)


def _many(inputs: object) -> bool:
    if isinstance(inputs, dict):
        return any(map(_many, inputs.values()))
    if not isinstance(inputs, str | list):
        return False
    items = len(inputs) * (len(inputs[0]) if len(inputs) > 1 and isinstance(inputs[0], list) else 1)
    return items >= MANY


def _owes_an_answer(head: Head) -> bool:
    """Whether the session's generate has a key under which its answer may have to be kept before it is abandoned."""
    return head.generation is not None and bool(head.generation.key)


def _may_step(head: Head, step: Step) -> bool:
    """Whether a session lives, is where a request believes it to be, and may be moved at once."""
    return (
        head.status == "live"
        and (step.model is None or step.model == head.model)
        and (step.position is None or step.position == head.position)
        and (head.generation is None or not _owes_an_answer(head))
    )


def _unfinished(head: Head) -> bool:
    return head.generation is not None and head.generation.finish_reason is None


def must_stream(model: Model) -> Model:
    """The model, if it can keep a session's memory; raises Problem when it takes whole sequences only."""
    manifest = model.bundle.manifest
    if not manifest.streamable:
        where = f"/v1/models/{manifest.name}/predict"
        raise Problem("not_streamable", f"{manifest.name} takes whole sequences only: POST them to {where}")
    return model


def needs_language_model(model: Model) -> None:
    """Raise Problem when the model can not generate."""
    manifest = model.bundle.manifest
    if manifest.task != "language-model":
        raise Problem("task_mismatch", f"{manifest.name} is a {manifest.task}: generate is for language models")
