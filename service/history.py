"""Going through a session's past: fork, rewind, migrate, verify, its log, its state at any retained position."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from service import state
from service.bundle import Manifest, Window
from service.errors import Problem
from service.feeding import head_of
from service.registry import Model
from service.run import Race, moved, tokens_of
from service.sampling import MAX_SEED
from service.session import Sessions, must_stream, new_seed
from service.state import Array, Row
from service.store.base import (
    Branch,
    Commit,
    Generation,
    Head,
    Key,
    Parent,
    Reply,
    Segment,
    Snapshot,
    Source,
    graft,
)
from service.tasks import Alternative
from service.tensors import same_entries
from service.work.base import NewSession, new_branch, new_head
from service.work.events import Done, Listener, Token, Verdict
from service.work.feed import Keyed
from service.work.look import Peek, Verify
from service.work.migrate import Migrate, session_reply

MAX_POSITION = 2**48
"""so that a session that is fed on stays below 2**53, up to which JSON's numbers are exact"""

_NUMBER = re.compile("[0-9]{1,16}")


class History:
    """Operations that need a session's log or snapshots."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._registry = sessions.registry
        self._store = sessions.store

    # ------------------------------------------------------------------ looking

    async def state(self, key: Key, position: int | None) -> tuple[Model, Done]:
        """The state at a position, by default the newest committed one."""

        async def look(model: Model, head: Head) -> tuple[Model, Done]:
            if position is None:
                return model, await self._sessions.do(model, Peek, head)
            _must_reach(head, position)
            return model, await self._sessions.do(model, Peek, head, position)

        return await self._sessions.read(key, look)

    async def log(self, key: Key, after: int | None, limit: int) -> tuple[Model, Head, list[Segment]]:
        """Up to `limit` entries after a position, by default from the log's beginning."""

        async def look(model: Model, head: Head) -> tuple[Model, Head, list[Segment]]:
            begin = head.origin if after is None else after
            if begin < head.origin:
                raise _truncated(head)
            to = min(begin + limit, head.position)
            segments = await asyncio.to_thread(self._store.log, head.branch, begin, to) if to > begin else []
            if sum(segment.count for segment in segments) < to - begin:
                await self._explain(key, head)
            return model, head, segments

        return await self._sessions.read(key, look)

    async def _explain(self, key: Key, head: Head) -> None:
        """Entries are missing: the session was moved since its head was read, or they are lost."""
        newest = await self._sessions.head(key)
        if newest.fence != head.fence:
            raise Race(newest)
        raise Problem("internal", "the session's log is damaged; nothing was changed")

    async def verify(self, key: Key, position: int | None) -> Verdict:
        """Fold the retained log again and compare with snapshots and the state in memory."""

        async def look(model: Model, head: Head) -> Verdict:
            if position is not None:
                _must_reach(head, position)
            done = await self._sessions.do(model, Verify, head, position)
            assert done.verdict is not None
            return done.verdict

        return await self._sessions.read(key, look)

    # ------------------------------------------------------------------ branching

    async def fork(
        self, key: Key, child: Key, position: int | None, seed: int | None, keyed: Keyed | None = None
    ) -> Head:
        """A new session whose past is the parent's up to a position; no log is copied."""
        async with self._sessions.turn(child):
            parent = await self._sessions.head(key)
            at = parent.position if position is None else position
            _must_reach(parent, at)
            await self._sessions.must_not_live(child)
            self._sessions.may_begin(child[0])
            branch = await self._branch(parent, at)
            head = msgspec.structs.replace(
                parent,
                id=child[1],
                epoch=await asyncio.to_thread(self._store.next_epoch, child),
                position=at,
                seed=new_seed() if seed is None else seed,
                branch=branch.id,
                parent=Parent(parent.id, at, parent.life),
                generation=None,
                origin=parent.origin if at else 0,
            )
            reply = session_reply(keyed) if keyed is not None else None
            if not branch.line:
                return await self._sessions.put(Commit(head, None, reply=reply))
            source = Source(parent.id, parent.epoch, parent.branch)
            return await self._sessions.put(Commit(head, None, branch=branch, source=source, reply=reply))

    async def rewind(self, key: Key, position: int, keyed: Keyed | None = None) -> Head:
        """Back to a position; what came after is no longer reached."""
        async with self._sessions.turn(key):
            head = await self._sessions.head(key)
            _must_reach(head, position)
            head = await self._sessions.abandon(head)
            branch = await self._branch(head, position)
            generation = head.generation
            back = msgspec.structs.replace(
                head,
                epoch=head.epoch + 1,
                position=position,
                branch=branch.id,
                generation=generation if generation is not None and (generation.end or 0) <= position else None,
                origin=head.origin if position else 0,
            )
            reply = session_reply(keyed) if keyed is not None else None
            return await self._sessions.put(
                Commit(back, head.fence, branch=branch if branch.line else None, reply=reply)
            )

    async def _branch(self, head: Head, position: int) -> Branch:
        """A branch that goes on after a position of the session's log; without a line where it begins a log."""
        line = await asyncio.to_thread(self._store.line, head.branch)
        return Branch(new_branch(), graft(line, head.branch, position))

    async def migrate(self, key: Key, version: int, keyed: Keyed | None = None) -> Head:
        """Fold the log with another version; the old memory stays in force until the new one is committed."""
        head = await self._sessions.head(key)
        model = self._registry.get(head.model, version)
        _must_fit(self._registry.of(head), model)
        if head.origin:
            raise _truncated(head)
        folded = await self._fold(model, head)
        async with self._sessions.turn(key):
            newest = await self._sessions.abandon(await self._sessions.head(key))
            if newest.branch != head.branch or newest.position < head.position:
                raise Race(newest)
            done = await self._sessions.do(model, Migrate, newest, folded, True, keyed)
            self._sessions.forget(newest)
            return head_of(done)

    async def _fold(self, model: Model, head: Head) -> Migrate:
        """Fold a session's log with another version, beside the session's own work."""
        works: list[Migrate] = []

        def make(listener: Listener) -> Migrate:
            works.append(Migrate(listener, head))
            return works[0]

        await self._sessions.do(model, make)
        return works[0]

    # ------------------------------------------------------------------ the state as a file

    async def upload(self, key: Key, data: bytes) -> Head:
        """A new session from a state file: its log begins at the file's position."""
        file = _read_state(data)
        model = must_stream(self._registry.with_graph(file.model, file.graph))
        manifest = model.bundle.manifest
        row = _checked_row(manifest, file, data)
        async with self._sessions.turn(key):
            await self._sessions.must_not_live(key)
            self._sessions.may_begin(key[0])
            new = NewSession(key, file.seed, self._sessions.default_ttl_s)
            epoch = await asyncio.to_thread(self._store.next_epoch, key)
            head = new_head(new, manifest, epoch, file.position)
            kept = state.dump(manifest.session_states, row)
            snapshot = Snapshot(head.branch, head.position, model.engine.numerics, kept, head.graph)
            return await self._sessions.put(Commit(head, None, snapshots=(snapshot,) if head.origin else ()))

    # ------------------------------------------------------------------ answers that are worked out again

    async def outputs(self, key: Key, reply: Reply, end: int, count: int) -> tuple[Model, Done]:
        """The last `count` outputs up to `end` of the log that a kept answer names, and the one before."""
        head = await self._sessions.head(key)
        await self.must_be_on_line(head, reply)
        model = self._registry.with_graph(head.model, reply.graph)
        then = msgspec.structs.replace(head, branch=reply.branch, position=reply.end, graph=reply.graph)
        return model, await self._sessions.do(model, Peek, then, end, count)

    async def tokens(self, key: Key, reply: Reply, generation: Generation) -> tuple[list[Token], str]:
        """The tokens that a generate has made, and the text that was held back at its end."""
        model = self._registry.with_graph(self._model_name(reply), reply.graph)
        segments: Sequence[Segment] = reply.segments
        if not segments and reply.end > reply.start:
            await self.must_be_on_line(await self._sessions.head(key), reply)
            segments = await asyncio.to_thread(self._store.log, reply.branch, reply.start, reply.end)
        return tokens_of(model, generation, segments)

    async def with_alternatives(self, key: Key, reply: Reply, tokens: list[Token], count: int) -> list[Token]:
        """Tokens with the most likely symbols at each, as they were kept, or worked out again."""
        if not tokens:
            return tokens
        if reply.body:
            kept = msgspec.json.decode(reply.body, type=list[list[Alternative]])
            return [msgspec.structs.replace(token, alternatives=one) for token, one in zip(tokens, kept, strict=True)]
        model, done = await self.outputs(key, reply, reply.end - 1, len(tokens))
        codec = model.engine.codec
        shown = [codec.alternatives(logits, count) for logits in done.outputs["logits"]]
        return [msgspec.structs.replace(token, alternatives=one) for token, one in zip(tokens, shown, strict=True)]

    @staticmethod
    def _model_name(reply: Reply) -> str:
        assert reply.head is not None
        return reply.head.model

    async def must_be_on_line(self, head: Head, reply: Reply) -> None:
        """Raise Problem 410 when the session's log does not hold a kept answer's entries any more."""
        line = await asyncio.to_thread(self._store.line, head.branch)
        whole = (*line, (head.branch, head.position))
        reached = any(branch == reply.branch and upto >= reply.end for branch, upto in whole)
        if not reached or reply.start < head.origin:
            raise _truncated(head)


# ---------------------------------------------------------------------- helpers


def _must_reach(head: Head, position: int) -> None:
    """Raise Problem when the session's log can not be gone back to a position."""
    if position > head.position:
        raise moved(head)
    if 0 < position < head.origin:
        raise _truncated(head)


def _truncated(head: Head) -> Problem:
    detail = f"the log of session {head.id!r} begins at position {head.origin}"
    return Problem("log_truncated", detail, oldest_position=head.origin)


def _must_fit(old: Model, new: Model) -> None:
    """Raise Problem when the entries of one version mean something else to the other."""
    a, b = old.bundle.manifest, new.bundle.manifest
    same = (a.task, a.symbols, [(f.name, f.unit) for f in a.features]) == (
        b.task,
        b.symbols,
        [(f.name, f.unit) for f in b.features],
    )
    if not (same and same_entries(a, b)):
        detail = f"{a.name} versions {a.version} and {b.version} differ in vocabulary, features or inputs"
        raise Problem("incompatible_version", detail)


@dataclass(frozen=True, slots=True)
class _StateFile:
    """What a state file says of itself."""

    model: str
    graph: str
    position: int
    seed: int
    sha256: str


def write_state(manifest: Manifest, head: Head, row: Row) -> bytes:
    """A state as a safetensors file that says which model and position it is of."""
    return state.dump(
        manifest.session_states,
        row,
        {
            "model": head.model,
            "version": str(manifest.version),
            "graph_sha256": manifest.graph_sha256,
            "session": head.id,
            "epoch": str(head.epoch),
            "position": str(head.position),
            "seed": str(head.seed),
            "state_sha256": state.digest(row),
        },
    )


def _read_state(data: bytes) -> _StateFile:
    try:
        said = state.metadata(data)
        position, seed = (int(_NUMBER.fullmatch(said[name])[0]) for name in ("position", "seed"))  # type: ignore[index]
        file = _StateFile(said["model"], said["graph_sha256"], position, seed, said["state_sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise Problem("state_mismatch", "not a state file: safetensors as GET .../state gives them") from error
    if not (0 <= file.position <= MAX_POSITION and 0 <= file.seed <= MAX_SEED):
        raise Problem("state_mismatch", "the file's position or seed is out of range")
    return file


def _checked_row(manifest: Manifest, file: _StateFile, data: bytes) -> Row:
    try:
        row = state.load(manifest.session_states, data)
    except ValueError as error:
        raise Problem("state_mismatch", str(error)) from error
    if state.digest(row) != file.sha256:
        raise Problem("state_mismatch", "the file's checksum is not that of its tensors")
    if not state.finite(row):
        raise Problem("invalid_input", "the state holds a number that is not finite")
    if file.position == 0 and not state.equal(row, state.initial_row(manifest.session_states)):
        raise Problem("state_mismatch", "at position 0 only the initial state is possible")
    if isinstance(manifest.memory, Window):
        _check_window(manifest, manifest.memory.window, file.position, *row[-2:])
    return row


def _check_window(manifest: Manifest, window: int, position: int, entries: Array, length: Array) -> None:
    """Raise Problem when the last entries of a state file can not be those of a session at its position."""
    if int(length[0]) != min(position, window):
        raise Problem("state_mismatch", f"{int(length[0])} entries in the window at position {position}")
    if manifest.symbols and not ((entries >= 0) & (entries < len(manifest.symbols))).all():
        raise Problem("state_mismatch", "the window holds a symbol that the model does not know")
