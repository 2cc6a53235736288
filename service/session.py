"""Sessions as their clients see them: one operation after another, streams that can be cut and resumed.

This is the event loop's side of the engine. Operations that change a session take its turn, in order of arrival;
reads, forecasts and states see the newest committed position and wait for nobody.
"""

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Concatenate, ParamSpec

import msgspec
import structlog

from service.errors import Problem, invalid, not_ready
from service.registry import Model, Registry
from service.run import Reader, Replay, Run, moved, tokens_of
from service.sampling import MAX_SEED
from service.state import Array
from service.store.base import Applied, Commit, Generation, Head, Key, Store
from service.turns import Place, Turn
from service.work.base import NewSession, Work
from service.work.events import Done, Event, Failed, Listener, LostRace
from service.work.feed import Change, Feed, Peek, Predict, cancelled, closed
from service.work.forecast import Forecast, Path
from service.work.generate import Generate

log = structlog.get_logger(__name__)

P = ParamSpec("P")

MAX_RACES = 3
MANY = 1024
"""work on more items than this is done beside the event loop"""


def new_seed() -> int:
    """A random seed."""
    return secrets.randbelow(MAX_SEED + 1)


@dataclass(frozen=True, slots=True)
class Opening:
    """What a request says of the session it means: how to create it, and where it is believed to stand."""

    model: str | None = None
    version: int | None = None
    seed: int | None = None
    position: int | None = None
    ttl_s: int | None = None
    metadata: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Fed:
    """The outcome of a feed: the model, and what the engine answered."""

    model: Model
    done: Done
    head: Head


class _Race(Exception):
    """Another replica moved the session first."""

    def __init__(self, head: Head | None) -> None:
        super().__init__("lost a race")
        self.head = head


class Sessions:
    """All operations on sessions, and those without one."""

    def __init__(self, registry: Registry, store: Store, default_ttl_s: int, wait_s: float) -> None:
        self._registry = registry
        self._store = store
        self._default_ttl_s = default_ttl_s
        self._wait_s = wait_s
        self._turns: dict[Key, Turn] = {}
        self._runs: dict[Key, Run] = {}
        self.draining = False

    # ------------------------------------------------------------------ reading

    async def head(self, key: Key) -> Head:
        """The newest committed head of a live session; raises Problem 404 or 410."""
        return live(key, await self._head(key))

    async def _head(self, key: Key) -> Head | None:
        # Queued or running work keeps a session from expiring under it.
        turn = self._turns.get(key)
        return await asyncio.to_thread(self._store.head, key, turn.since_ms if turn is not None else None)

    def model_of(self, head: Head) -> Model:
        """The model version that a session is pinned to."""
        return self._registry.of(head)

    async def heads(self, tenant: str, model: str | None, after: str, limit: int) -> list[Head]:
        """Live sessions in order of id."""
        return await asyncio.to_thread(self._store.heads, tenant, model, after, limit)

    async def state(self, key: Key) -> tuple[Model, Done]:
        """The state at the newest committed position."""
        model = self._registry.of(await self.head(key))
        return model, await self._do(model, Peek, key)

    async def forecast(
        self, key: Key, horizon: int, future: Sequence[Mapping[str, object]] | None, samples: int, seed: int | None
    ) -> tuple[Model, Done, list[Done]]:
        """Steps ahead on a copy: the model's own roll-out, and `samples` sampled paths."""
        head = await self.head(key)
        model = self._registry.of(head)
        codec = model.engine.codec
        told = codec.future(future, horizon)
        chosen = head.seed if seed is None else seed
        paths = [None, *(Path(i, chosen) for i in range(samples))]
        makes = [partial(Forecast, key=key, horizon=horizon, future=told, path=path) for path in paths]
        done, *sampled = await self._do_all(model, makes)
        return model, done, sampled

    async def predict(self, model: Model, sequences: Sequence[Array], last_only: bool) -> list[Done]:
        """Whole sequences from the initial state."""
        return await self._do_all(model, [partial(Predict, entries=one, last_only=last_only) for one in sequences])

    # ------------------------------------------------------------------ changing

    async def create(self, key: Key, opening: Opening) -> Head:
        """A new session at position 0."""
        async with self._turn(key):
            head = await self._head(key)
            if head is not None and head.status == "live":
                raise Problem("session_exists", f"session {key[1]!r} lives; delete it first, or choose another id")
            model = self._registry.get(opening.model or "", opening.version)
            new = self._new(key, opening)
            try:
                done = await self._do(model, Change, key, lambda head: head, new)
            except _Race as race:
                raise Problem("session_exists", f"session {key[1]!r} lives") from race
            return _head_of(done)

    async def update(self, key: Key, metadata: Mapping[str, object] | None, ttl_s: int | None) -> Head:
        """Change what is said of a session."""

        def change(head: Head) -> Head:
            return msgspec.structs.replace(
                head,
                metadata=dict(metadata) if metadata is not None else head.metadata,
                ttl_s=ttl_s if ttl_s is not None else head.ttl_s,
            )

        async with self._turn(key):
            return await self._change(key, change)

    async def delete(self, key: Key) -> None:
        """Close a session; a running generate ends as cancelled."""
        if (head := await self._head(key)) is None:
            live(key, head)
        self._cancel_run(key)
        async with self._turn(key, urgent=True):
            head = await self._head(key)
            if head is not None and head.status == "live":
                await self._change(key, closed)

    async def cancel(self, key: Key) -> Head:
        """End a running or suspended generate where it stands."""
        await self.head(key)
        self._cancel_run(key)
        async with self._turn(key, urgent=True):
            head = await self.head(key)
            if head.generation is None or head.generation.finish_reason is not None:
                return head
            return await self._change(key, cancelled)

    def _cancel_run(self, key: Key) -> None:
        run = self._runs.get(key)
        if run is not None:
            run.ask("cancel")

    async def _change(self, key: Key, change: Callable[[Head], Head]) -> Head:
        for _ in range(MAX_RACES + 1):
            head = await self.head(key)
            if not self._registry.has(head):
                # No engine holds it, so nobody else in this process can be moving it.
                result = (await asyncio.to_thread(self._store.commit, [Commit(change(head), head.fence)]))[0]
                if isinstance(result, Applied):
                    return result.head
                continue
            try:
                return _head_of(await self._do(self._registry.of(head), Change, key, change))
            except _Race:
                continue
        raise Problem("session_busy", "other replicas keep moving the session; try again")

    async def feed(self, key: Key, inputs: object, opening: Opening, last_only: bool, alternatives: int) -> Fed:
        """Feed a sequence: all of it or nothing."""
        async with self._turn(key):
            race: _Race | None = None
            for _ in range(MAX_RACES + 1):
                model, new = await self._open(key, opening)
                entries = await _encode(model, inputs)
                _bound_outputs(model, 1 if last_only else len(entries), alternatives)
                try:
                    done = await self._do(model, Feed, key, entries, last_only, new)
                    return Fed(model, done, _head_of(done))
                except _Race as lost:
                    race = lost
                    if opening.position is not None:
                        break
            raise moved(race.head if race is not None else None)

    async def generate(self, key: Key, inputs: object | None, generation: Generation, opening: Opening) -> Run:
        """Begin a generate; it goes on while somebody reads it."""
        turn = self._turn(key)
        await turn.__aenter__()
        try:
            model, new = await self._open(key, opening)
            _needs_language_model(model)
            prompt = await _encode(model, inputs) if inputs is not None else None
            head = None if new is not None else await self.head(key)
            seed = opening.seed if opening.seed is not None else (head.seed if head is not None else None)
            generation = msgspec.structs.replace(generation, seed=new.seed if new is not None else seed)
            return self._begin_run(key, model, head, turn, prompt, generation, new)
        except BaseException:
            turn.leave()
            raise

    def _begin_run(
        self,
        key: Key,
        model: Model,
        head: Head | None,
        turn: Place,
        prompt: Array | None,
        generation: Generation,
        new: NewSession | None = None,
        resumed: bool = False,
    ) -> Run:
        def on_end() -> None:
            self._runs.pop(key, None)
            turn.leave()

        run = Run(model, head, on_end)
        run.work = Generate(run.listen, key, prompt, generation, new, resumed)
        model.engine.submit(run.work)
        self._runs[key] = run
        return run

    async def generate_alone(self, model: Model, inputs: object | None, generation: Generation) -> Run:
        """A generate without a session: nothing is kept."""
        _needs_language_model(model)
        codec = model.engine.codec
        prompt = await _encode(model, inputs) if inputs is not None else codec.start()
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
        turn = self._turn(key)
        await turn.__aenter__()
        try:
            head = await self.head(key)
            if head.generation is not None and _unfinished(head):
                model = self._registry.of(head)
                return Reader(self._begin_run(key, model, head, turn, None, head.generation, resumed=True))
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
        generation = base.generation
        end = generation.end if generation.end is not None else base.position
        segments = await asyncio.to_thread(self._store.log, base.branch, generation.start, end)
        model = self._registry.of(head)
        tokens, rest = tokens_of(model, generation, segments)
        return Replay(head, [token for token in tokens if token.position > after], reader, after, rest)

    # ------------------------------------------------------------------ upkeep

    async def sweep(self) -> None:
        """Expire and forget what is due, but nothing that has work under way."""
        await asyncio.to_thread(self._store.sweep, frozenset(self._turns))

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
                for turn in list(self._turns.values()):
                    async with turn.lock:
                        pass

    # ------------------------------------------------------------------ inside

    def _turn(self, key: Key, urgent: bool = False) -> Place:
        if self.draining:
            raise not_ready("the service is stopping")
        return Place(self._turns, key, self._wait_s, urgent)

    async def _open(self, key: Key, opening: Opening) -> tuple[Model, NewSession | None]:
        """The live session's model, or what a new one begins with; raises Problem when neither can be."""
        head = await self._head(key)
        if head is None or head.status != "live":
            if opening.model is None or opening.position not in (None, 0):
                live(key, head)
            return self._registry.get(opening.model or "", opening.version), self._new(key, opening)
        if opening.model not in (None, head.model) or opening.version not in (None, head.version):
            raise Problem("model_mismatch", f"session {key[1]!r} is of {head.model} version {head.version}")
        if opening.position not in (None, head.position):
            raise moved(head)
        return self._registry.of(head), None

    def _new(self, key: Key, opening: Opening) -> NewSession:
        seed = opening.seed if opening.seed is not None else new_seed()
        ttl_s = opening.ttl_s if opening.ttl_s is not None else self._default_ttl_s
        return NewSession(key, seed, ttl_s, opening.metadata or {})

    async def _do(
        self, model: Model, make: Callable[Concatenate[Listener, P], Work], *args: P.args, **kwargs: P.kwargs
    ) -> Done:
        """Submit one piece of work and await its end."""

        def made(listener: Listener) -> Work:
            return make(listener, *args, **kwargs)

        return (await self._do_all(model, [made]))[0]

    async def _do_all(self, model: Model, makes: Sequence[Callable[[Listener], Work]]) -> list[Done]:
        """Submit work that begins at the same time, all or none; when the caller is cancelled it is dropped first."""
        if self.draining:
            raise not_ready("the service is stopping")
        loop = asyncio.get_running_loop()
        ended: list[asyncio.Future[Event]] = [loop.create_future() for _ in makes]
        works = [make(future.set_result) for make, future in zip(makes, ended, strict=True)]
        model.engine.submit(*works)
        try:
            events = await asyncio.shield(asyncio.gather(*ended))
        except asyncio.CancelledError:
            for work in works:
                work.stop = "suspend"
            model.engine.wake()
            await asyncio.shield(asyncio.gather(*ended))
            raise
        return [_done(event) for event in events]


def _done(event: Event) -> Done:
    match event:
        case Done():
            return event
        case Failed(problem):
            raise problem
        case LostRace(head):
            raise _Race(head)
        case _:
            raise not_ready("the work was dropped")


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


def _head_of(done: Done) -> Head:
    assert done.head is not None
    return done.head


async def _encode(model: Model, inputs: object) -> Array:
    """Inputs as entries; many of them beside the event loop."""
    encode = model.engine.codec.encode
    few = not isinstance(inputs, str | list) or len(inputs) < MANY
    return encode(inputs) if few else await asyncio.to_thread(encode, inputs)


def _unfinished(head: Head) -> bool:
    return head.generation is not None and head.generation.finish_reason is None


def _needs_language_model(model: Model) -> None:
    manifest = model.bundle.manifest
    if manifest.task != "language-model":
        raise Problem("task_mismatch", f"{manifest.name} is a {manifest.task}: generate is for language models")


def _bound_outputs(model: Model, shown: int, alternatives: int) -> None:
    most = model.most_steps(alternatives)
    if shown > most:
        raise invalid(f"at most {most} predictions a request with these alternatives", "/predictions")
