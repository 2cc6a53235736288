"""Pieces of work: what is folded for whom, and what becomes of it.

A piece of work is a row in the engine's batches. It begins on a session's newest committed state (or on the
initial one), folds its entries chunk by chunk, may draw a token or roll a forecast, and hands the engine a commit
where something shall be kept. All methods run on the engine's thread; events reach the listener on the event loop.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec
import numpy as np

from service import state
from service.bundle import Manifest
from service.errors import Problem, not_ready
from service.sampling import Purpose, Sampling, log_softmax, uniforms
from service.state import Array, Row
from service.store.base import Commit, Generation, Head, Key, Segment, Snapshot, tombstone
from service.tasks import Codec, Output, TextStream

SNAPSHOT_EVERY = 256
_UNIFORM_BLOCK = 64


# ---------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Done:
    """The work is done; `head` is the session's head after it (None without a session)."""

    head: Head | None
    outputs: Output = field(default_factory=dict)
    """outputs at the positions asked for, [n, ...] by name"""
    before: Output | None = None
    """the output at the position before those"""
    row: Row = ()
    created: bool = False
    generation: Generation | None = None
    rest: str = ""
    """text of a generate that was held back as the possible beginning of a stop string"""


@dataclass(frozen=True, slots=True)
class Token:
    """One token was drawn and, in a session, committed."""

    position: int
    token: int
    text: str
    logprob: float
    alternatives: list[dict[str, object]] | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The work was refused or failed; the session is as it was."""

    problem: Problem


@dataclass(frozen=True, slots=True)
class LostRace:
    """Another replica moved the session first; nothing of this commit was kept."""

    head: Head | None


@dataclass(frozen=True, slots=True)
class Suspended:
    """A generate stopped before its end because nobody reads it any more."""

    head: Head | None


Event = Done | Token | Failed | LostRace | Suspended
Listener = Callable[[Event], None]


# ---------------------------------------------------------------------- sessions in memory


@dataclass(frozen=True, slots=True)
class Resident:
    """A session in memory: its head, and the state after the first `folded` entries of its log."""

    head: Head
    row: Row
    folded: int
    tail: Array
    """the entries folded + 1 to position: at most the last sampled one, or what a wake-up has to fold"""
    output: Output | None
    """the outputs at position `folded`"""
    last: Array | None
    """the newest entry of the log"""
    snapshot_at: int


@dataclass(frozen=True, slots=True)
class NewSession:
    """How a session begins that does not live yet."""

    key: Key
    seed: int
    ttl_s: int = 0
    metadata: Mapping[str, object] = field(default_factory=dict)


class Host(Protocol):
    """What work needs of its engine."""

    @property
    def manifest(self) -> Manifest:
        """The model's manifest."""

    @property
    def codec(self) -> Codec:
        """The model's codec."""

    @property
    def numerics(self) -> str:
        """Names the arithmetic of this process."""

    def resident(self, key: Key) -> Resident:
        """A live session, loaded from the store if need be; raises Problem when it does not live."""

    def next_epoch(self, key: Key) -> int:
        """An epoch that this id has never had."""

    def log_entries(self, head: Head, after: int) -> Array:
        """The session's entries from position after + 1 to its head."""


# ---------------------------------------------------------------------- work


class Work:
    """A row of the engine's batches: entries to fold into a state, from a beginning to an end."""

    def __init__(self, listener: Listener, cost: int) -> None:
        self.listener = listener
        self.cost = max(cost, 1)
        self.events: list[Event] = []
        self.finished = False
        self.stop: Literal["suspend", "cancel"] | None = None
        """set from the event loop: nobody waits any more, or somebody wants an end"""
        self.halted = False
        self.row: Row = ()
        self.output: Output | None = None
        self.entries: Array = np.empty(0)
        self.cursor = 0

    @property
    def remaining(self) -> int:
        """Steps that can be folded now."""
        return len(self.entries) - self.cursor

    def begin(self, host: Host) -> None:
        """Take the state to start from; raises Problem when the work can not be done."""
        raise NotImplementedError

    def chunk(self, steps: int) -> Array:
        """The next entries to fold."""
        return np.asarray(self.entries[self.cursor : self.cursor + steps])

    def folded(self, outputs: Output, row: Row) -> None:
        """Take what a chunk gave: outputs [steps, ...] by name, and the state after it."""
        steps = length_of(outputs)
        self.keep(outputs)
        self.cursor += steps
        self.row = row
        self.output = {name: array[-1] for name, array in outputs.items()}

    def keep(self, outputs: Output) -> None:
        """Keep of a chunk's outputs what the answer needs."""

    def commit(self) -> Commit | None:
        """What shall be kept now, if anything."""
        return None

    def applied(self, head: Head) -> Resident | None:
        """The commit holds; returns the session as it is in memory now (None: leave it out of memory)."""
        raise NotImplementedError

    def advance(self) -> None:
        """Called once a tick after the commit: finish, or prepare the next entries."""

    def halt(self) -> None:
        """Called instead of folding when `stop` is set."""
        self.end(Failed(not_ready("the work was dropped")))

    def end(self, event: Event) -> None:
        """The last event."""
        self.events.append(event)
        self.finished = True


def length_of(outputs: Output) -> int:
    """How many positions outputs [n, ...] hold."""
    return len(next(iter(outputs.values())))


class Kept:
    """The outputs that an answer needs: those of all new entries or of the last, and the one before."""

    def __init__(self, count: int) -> None:
        self._needed = count + 1
        self._chunks: list[Output] = []
        self._held = 0

    def start(self, output: Output | None) -> None:
        """The output before the first entry, if there is one."""
        if output is not None:
            self.add({name: array[None] for name, array in output.items()})

    def add(self, outputs: Output) -> None:
        """The outputs of the next entries, [steps, ...]."""
        self._chunks.append(outputs)
        self._held += length_of(outputs)
        while self._held - length_of(self._chunks[0]) >= self._needed:
            self._held -= length_of(self._chunks.pop(0))

    def take(self, count: int) -> tuple[Output, Output | None]:
        """(the last `count` outputs, the one before them or None)."""
        whole = {name: np.concatenate([chunk[name] for chunk in self._chunks]) for name in self._chunks[0]}
        length = length_of(whole)
        before = {name: array[length - count - 1] for name, array in whole.items()} if length > count else None
        return {name: array[length - count :] for name, array in whole.items()}, before


class Predict(Work):
    """A whole sequence from the initial state, without a session."""

    def __init__(self, listener: Listener, entries: Array, last_only: bool) -> None:
        super().__init__(listener, len(entries))
        self.entries = entries
        self._count = 1 if last_only else len(entries)
        self._kept = Kept(self._count)

    def begin(self, host: Host) -> None:
        """Start from the initial state."""
        self.row = state.initial_row(host.manifest.states)
        self.entries = host.codec.fill(self.entries, None)

    def keep(self, outputs: Output) -> None:
        """Keep the outputs asked for."""
        self._kept.add(outputs)

    def advance(self) -> None:
        """Answer when all is folded."""
        if not self.remaining:
            outputs, before = self._kept.take(self._count)
            self.end(Done(None, outputs, before, self.row))


class SessionWork(Work):
    """Work on a session: begins on its newest committed state and may commit on top of it."""

    def __init__(self, listener: Listener, cost: int, key: Key, new: NewSession | None = None) -> None:
        super().__init__(listener, cost)
        self.key = key
        self.new = new
        self._snapshot: tuple[int, Row] | None = None

    def open(self, host: Host) -> Resident:
        """Load the session, or make a new one at position 0."""
        self._host = host
        self.base = self._fresh(host, self.new) if self.new is not None else host.resident(self.key)
        self.row, self.output, self.entries = self.base.row, self.base.output, self.base.tail
        self._folded = self.base.folded
        return self.base

    def _fresh(self, host: Host, new: NewSession) -> Resident:
        manifest = host.manifest
        head = Head(
            tenant=new.key[0],
            id=new.key[1],
            model=manifest.name,
            version=manifest.version,
            graph=manifest.graph_sha256,
            epoch=host.next_epoch(new.key),
            position=0,
            seed=new.seed,
            branch=secrets.token_hex(8),
            ttl_s=new.ttl_s,
            metadata=dict(new.metadata),
        )
        return Resident(head, state.initial_row(manifest.states), 0, host.codec.none(), None, None, 0)

    @property
    def expected(self) -> tuple[int, int] | None:
        """What the next commit expects of the live head."""
        return None if self.new is not None else self.base.head.fence

    def folded(self, outputs: Output, row: Row) -> None:
        """Note a snapshot where one is due: before a chunk, so that at least one entry follows it."""
        if self._folded - self.base.snapshot_at >= SNAPSHOT_EVERY:
            self._snapshot = (self._folded, self.row)
        super().folded(outputs, row)
        self._folded += length_of(outputs)

    def snapshots(self) -> tuple[Snapshot, ...]:
        """The snapshot that is due with this commit, if any."""
        if self._snapshot is None:
            return ()
        position, row = self._snapshot
        data = state.dump(self._host.manifest.states, row)
        return (Snapshot(self.base.head.branch, position, self._host.numerics, data),)

    def segment(self, entries: Array, start: int, source: Literal["fed", "generated"]) -> Segment:
        """Log entries start + 1 to start + n of this session."""
        return Segment(
            branch=self.base.head.branch,
            start=start,
            count=len(entries),
            source=source,
            data=entries.astype(self._host.codec.entry_dtype, copy=False).tobytes(),
            numerics=self._host.numerics,
        )

    def settle(self, head: Head) -> Resident:
        """The session in memory after a commit."""
        last = self.entries[-1] if len(self.entries) else self.base.last
        snapshot_at = self._snapshot[0] if self._snapshot is not None else self.base.snapshot_at
        self.base = Resident(head, self.row, self._folded, self.entries[self.cursor :], self.output, last, snapshot_at)
        self.new, self._snapshot = None, None
        return self.base


class Feed(SessionWork):
    """Feed a sequence: all of it is committed once, after its last entry is folded."""

    def __init__(
        self, listener: Listener, key: Key, entries: Array, last_only: bool, new: NewSession | None = None
    ) -> None:
        super().__init__(listener, len(entries), key, new)
        self._fed = entries
        self._count = 1 if last_only else len(entries)
        self._kept = Kept(self._count)

    def begin(self, host: Host) -> None:
        """Fold what is left of the log, then the new entries."""
        base = self.open(host)
        self._created = self.new is not None
        self._kept.start(base.output)
        self._fed = host.codec.fill(self._fed, base.last)
        self.entries = np.concatenate([base.tail, self._fed])

    def keep(self, outputs: Output) -> None:
        """Keep the outputs asked for."""
        self._kept.add(outputs)

    def commit(self) -> Commit | None:
        """Everything, once all is folded."""
        if self.remaining:
            return None
        start = self.base.head.position
        head = msgspec.structs.replace(
            self.base.head, position=start + len(self._fed), generation=abandoned(self.base.head)
        )
        return Commit(head, self.expected, (self.segment(self._fed, start, "fed"),), self.snapshots())

    def applied(self, head: Head) -> Resident:
        """Answer."""
        outputs, before = self._kept.take(self._count)
        self.end(Done(head, outputs, before, created=self._created))
        return self.settle(head)


class Change(SessionWork):
    """Change a session's head without feeding anything: create, describe, cancel, close."""

    def __init__(
        self, listener: Listener, key: Key, change: Callable[[Head], Head], new: NewSession | None = None
    ) -> None:
        super().__init__(listener, 1, key, new)
        self._change = change

    def begin(self, host: Host) -> None:
        """Load the session."""
        self.open(host)
        self._created = self.new is not None

    def commit(self) -> Commit | None:
        """The changed head."""
        return Commit(self._change(self.base.head), self.expected)

    def applied(self, head: Head) -> Resident | None:
        """Answer; a closed session leaves memory."""
        self.end(Done(head, created=self._created))
        if head.status != "live":
            return None
        base = self.base
        return Resident(head, base.row, base.folded, base.tail, base.output, base.last, base.snapshot_at)


class Peek(SessionWork):
    """The newest committed state, its last sampled entry folded in; commits nothing."""

    def __init__(self, listener: Listener, key: Key) -> None:
        super().__init__(listener, 1, key)

    def begin(self, host: Host) -> None:
        """Start from the session's state."""
        self.open(host)

    def advance(self) -> None:
        """Answer when the tail is folded."""
        if not self.remaining:
            self.end(Done(self.base.head, row=self.row))


@dataclass(frozen=True, slots=True)
class Path:
    """One sampled path of a forecast."""

    index: int
    seed: int


class Forecast(SessionWork):
    """Roll a session forward on its own predictions, on a copy; commits nothing."""

    def __init__(
        self,
        listener: Listener,
        key: Key,
        horizon: int,
        future: Sequence[Mapping[str, float]],
        path: Path | None = None,
    ) -> None:
        super().__init__(listener, horizon, key)
        self._horizon = horizon
        self._future = future
        self._path = path
        self._steps: list[Output] = []

    def begin(self, host: Host) -> None:
        """Start from the session's state."""
        if self.open(host).head.position == 0:
            raise Problem("empty_session", "a forecast needs a session that has been fed")

    def advance(self) -> None:
        """Note a step, and feed it back until the horizon is reached."""
        if self.remaining or self.output is None:
            return
        self._steps.append(self.output)
        if len(self._steps) == self._horizon:
            whole = {name: np.stack([step[name] for step in self._steps]) for name in self.output}
            self.end(Done(self.base.head, whole))
            return
        values = self._drawn(self.output) if self._path is not None else self.output["mean"]
        entry = self._host.codec.next_entry(values, self._future[len(self._steps) - 1])
        self.entries, self.cursor = entry[None], 0

    def _drawn(self, output: Output) -> Array:
        """Values [K] drawn from the predicted quantiles, and what is noted as the step's mean."""
        assert self._path is not None
        quantiles, levels = output["quantiles"], np.array(self._host.manifest.quantiles)
        targets = quantiles.shape[1]
        position = self.base.head.position + len(self._steps)
        drawn = [
            inverse_cdf(
                float(uniforms(self._path.seed, position, 1, Purpose.FORECAST, self._path.index * targets + k)[0]),
                levels,
                quantiles[:, k].astype(np.float64),
            )
            for k in range(targets)
        ]
        values = np.array(drawn, "<f4")
        self._steps[-1] = {**self._steps[-1], "mean": values}
        return values


def inverse_cdf(uniform: float, levels: Array, values: Array) -> float:
    """The value at `uniform`: linear between the quantiles and, with their outermost slopes, beyond them."""
    if len(levels) == 1:
        return float(values[0])
    i = int(np.clip(np.searchsorted(levels, uniform) - 1, 0, len(levels) - 2))
    slope = (values[i + 1] - values[i]) / (levels[i + 1] - levels[i])
    return float(values[i] + slope * (uniform - levels[i]))


class Generate(SessionWork):
    """Draw token after token; in a session each is committed before it is sent.

    `resumed` continues the session's suspended generate instead of beginning a new one.
    """

    def __init__(
        self,
        listener: Listener,
        key: Key | None,
        prompt: Array | None,
        generation: Generation,
        new: NewSession | None = None,
        resumed: bool = False,
    ) -> None:
        cost = (len(prompt) if prompt is not None else 0) + 1
        super().__init__(listener, cost, key or ("", ""), new)
        self._in_session = key is not None
        self._prompt = prompt
        self.resumed = resumed
        self._uncommitted: tuple[int, float] | None = None
        self.generation = generation
        self.sampling = Sampling(generation.temperature, generation.top_k, generation.top_p)

    def begin(self, host: Host) -> None:
        """Fold what is left of the log and the prompt."""
        if self._in_session:
            self.open(host)
        else:
            self.new = NewSession(self.key, self.generation.seed)
            self.open(host)
        self._created = self.new is not None and self._in_session
        self._position = self.base.head.position
        self._text = TextStream(host.codec, self.generation.stop)
        if self.resumed:
            self._recall(host)
        else:
            self._start(host)

    def _start(self, host: Host) -> None:
        if self._prompt is None:
            self._prompt = host.codec.start() if self._position == 0 else host.codec.none()
        self.entries = np.concatenate([self.base.tail, self._prompt])
        self._position += len(self._prompt)
        self.generation = msgspec.structs.replace(
            self.generation, start=self._position, prompt_tokens=len(self._prompt)
        )

    def _recall(self, host: Host) -> None:
        """Bring the text stream to where the suspended generate stopped."""
        self._prompt = host.codec.none()
        self.entries = self.base.tail
        for token in host.log_entries(self.base.head, self.generation.start):
            self._text.push(int(token))

    @property
    def wants_token(self) -> bool:
        """Ready to draw once everything is folded."""
        ready = self.stop is None and not self.finished and self._uncommitted is None
        return ready and not self.remaining and self.output is not None

    @property
    def logits(self) -> Array:
        """What the next token is drawn from, [V]."""
        assert self.output is not None
        return self.output["logits"]

    def uniform(self) -> float:
        """The number that decides the token at the next position."""
        position = self._position + 1
        block, offset = divmod(position, _UNIFORM_BLOCK)
        if getattr(self, "_block", None) != block:
            self._block = block
            self._numbers = uniforms(self.generation.seed, block * _UNIFORM_BLOCK, _UNIFORM_BLOCK, Purpose.TOKEN)
        return float(self._numbers[offset])

    def take(self, token: int) -> None:
        """The token drawn for the next position."""
        self._uncommitted = (token, float(log_softmax(self.logits)[token]))
        shown = self.generation.logprobs
        self._alternatives = self._host.codec.alternatives(self.logits, shown) if shown else None
        self.entries, self.cursor = np.array([token], self._host.codec.entry_dtype), 0
        self._position += 1
        self._piece, stopped = self._text.push(token)
        if stopped:
            self._finish("stop")
        elif self._position - self.generation.start >= self.generation.max_tokens:
            self._piece += self._text.flush()
            self._finish("length")

    def _finish(self, reason: Literal["length", "stop", "cancelled"]) -> None:
        self.generation = msgspec.structs.replace(self.generation, finish_reason=reason, end=self._position)

    def commit(self) -> Commit | None:
        """The token just drawn, the first one with the prompt; or the end of a cancelled generate."""
        if not self._in_session or (self._uncommitted is None and self.generation.finish_reason != "cancelled"):
            return None
        head = msgspec.structs.replace(self.base.head, position=self._position, generation=self.generation)
        segments = []
        if self._prompt is not None and len(self._prompt):
            segments.append(self.segment(self._prompt, self.base.head.position, "fed"))
        if self._uncommitted is not None:
            segment = self.segment(self.entries, self._position - 1, "generated")
            logprob = np.array([self._uncommitted[1]], "<f4").tobytes()
            segments.append(msgspec.structs.replace(segment, logprobs=logprob))
        return Commit(head, self.expected, tuple(segments), self.snapshots())

    def applied(self, head: Head) -> Resident:
        """Send the token."""
        resident = self.settle(head)
        self._prompt = None
        self._send(head)
        return resident

    def advance(self) -> None:
        """Without a session a token is sent as soon as it is drawn."""
        if not self._in_session and self._uncommitted is not None:
            self._send(None)

    def _send(self, head: Head | None) -> None:
        if self._uncommitted is not None:
            token, logprob = self._uncommitted
            self.events.append(Token(self._position, token, self._piece, logprob, self._alternatives))
            self._uncommitted = None
        if self.generation.finish_reason is not None:
            self.end(Done(head, created=self._created, generation=self.generation, rest=self._text.flush()))

    def halt(self) -> None:
        """Suspend at the last committed token, or end there as cancelled."""
        started = self.resumed or self._prompt is None
        if self.stop == "cancel" and started:
            self._finish("cancelled")
        else:
            self.end(Suspended(self.base.head if self._in_session else None))


def abandoned(head: Head) -> Generation | None:
    """The head's generation once another operation changes the session: a suspended one ends as cancelled."""
    generation = head.generation
    if generation is None or generation.finish_reason is not None:
        return generation
    return msgspec.structs.replace(generation, finish_reason="cancelled", end=head.position)


def cancelled(head: Head) -> Head:
    """The head with its suspended generate ended where it stands."""
    return msgspec.structs.replace(head, generation=abandoned(head))


def closed(head: Head) -> Head:
    """The head's tombstone."""
    return tombstone(head, "closed")
