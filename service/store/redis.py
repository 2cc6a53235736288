"""The Redis store: many replicas of the service on one Redis or Valkey.

A group commit is one call of one script. Whether a commit may be applied is judged here, on the head as it was last
seen; the script applies it when that head is still the one that is stored, so the judgement holds. A head is a string
that begins with its mark, which is all that the script compares; a log is a list of segments. What more than one
session may reach is counted in sorted sets, and goes with the last of them, in the commit that leaves it.
"""

import hashlib
import heapq
import importlib.resources
import itertools
import re
import secrets
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.store.base import (
    REPLIES_KEPT,
    SNAPSHOT_SPACING,
    SNAPSHOTS_KEPT,
    TENANT_REPLIES_KEPT,
    TOMBSTONE_TTL_S,
    UNREAD,
    Applied,
    Change,
    Commit,
    CommitUnknown,
    Conflict,
    Head,
    Key,
    Line,
    Reply,
    Result,
    RolledBack,
    Segment,
    Snapshot,
    StoreError,
    Unread,
    cut,
    holds,
    join,
    parts,
    stamp,
    whole,
)

log = structlog.get_logger(__name__)

SCHEMA_VERSION = 2
TIMEOUT_S = 1.0
SETTLE_S = 2.0
SETTLE_PAUSE_S = 0.05
GIVEN_UP_S = 3600
CLOCK_EVERY_S = 30.0
CACHED_HEADS = 16_384
CACHED_LINES = 4096
ACKNOWLEDGED = 100_000
ROUNDS = 3
SLICE = 512
SWEPT = 1000
GROUP = 256

_SCRIPT = importlib.resources.files("service.store").joinpath("redis.lua").read_bytes()
_SHA = hashlib.sha1(_SCRIPT).hexdigest()

_HEADER = struct.Struct("<6s6s6sIB")
_GENERATED, _LOGPROBS = 1, 2

_SCHEMA, _RUN, _LIVES, _DUE, _EPOCHS, _NUMERICS = (
    f"recurra:{name}" for name in ("schema", "run", "lives", "due", "epochs", "numerics")
)
_LOG, _SNAPSHOTS, _LINE = "recurra:log:", "recurra:snapshots:", "recurra:line:"

_encoder = msgspec.msgpack.Encoder()
_head = msgspec.msgpack.Decoder(Head)
_reply = msgspec.msgpack.Decoder(Reply)

Value = str | bytes | int
Command = tuple[Value, ...]
K = TypeVar("K")
V = TypeVar("V")


class _Unfit(redis.RedisError):
    """The server is not one that sessions may be kept in; the message says what to do."""


class _Unclear(Exception):
    """A command was sent, and its answer did not come."""


class _Seen(NamedTuple):
    """A head as it is stored, and the mark that its value begins with."""

    head: Head | None
    mark: bytes


class _Recent(Generic[K, V]):
    """The entries that were used last, of any thread."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._entries: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: K, value: V) -> None:
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            if len(self._entries) > self._size:
                self._entries.popitem(last=False)

    def drop(self, key: K) -> None:
        with self._lock:
            self._entries.pop(key, None)


class _Acknowledged(NamedTuple):
    """How far a session was committed by this process, and in which run of the server that was last seen."""

    epoch: int
    position: int
    ended: bool
    at_ms: int
    run: str


@dataclass(slots=True)
class _Part:
    """One session's part of a call of the script."""

    key: str = ""
    seen: bytes = b""
    commands: list[Command] = field(default_factory=list)
    source: Command = ("",)
    reply: Command = ("",)
    index: int = 0
    commit: Commit | None = None
    mark: bytes = b""

    def arguments(self) -> Iterator[Value]:
        packed = list(_packed(self.commands))
        yield from (self.key, self.seen, *self.source, *self.reply, len(packed), len(self.commands), *packed)


def _packed(commands: Iterable[Command]) -> Iterator[Value]:
    for command in commands:
        yield len(command)
        yield from command


# ---------------------------------------------------------------------- the connection


class _Link:
    """Connections to the server, each checked when it is made, and its clock."""

    def __init__(self, url: str, asked: str) -> None:
        self._asked = asked
        self._lock = threading.Lock()
        self.run: str | None = None
        self.durability = asked
        self._clock = (0, -CLOCK_EVERY_S)
        try:
            self._pool: redis.ConnectionPool = redis.ConnectionPool.from_url(
                url,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                redis_connect_func=self._greet,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
        except ValueError as error:
            raise StoreError(f"the store's address is no Redis URL: {error}") from None

    def ask(self, *commands: Command, again: bool = True) -> list[Any]:
        """The answers to commands that may be sent twice; raises StoreError."""
        try:
            connection = self._connection()
            try:
                return _exchange(connection, commands)
            finally:
                self._pool.release(connection)
        except (redis.ConnectionError, redis.TimeoutError) as error:
            if again and type(error) is redis.ConnectionError:
                return self.ask(*commands, again=False)
            raise StoreError(_explained(error)) from error
        except redis.RedisError as error:
            raise self._refused(error) from error

    def call(self, *arguments: Value) -> Any:  # noqa: ANN401 (what the script answers)
        """Call the script, once; raises StoreError when it did not run, _Unclear when that can not be told."""
        try:
            connection = self._connection()
        except redis.RedisError as error:
            raise StoreError(_explained(error)) from error
        try:
            try:
                return _exchange(connection, [("EVALSHA", _SHA, 0, *arguments)])[0]
            except redis.exceptions.NoScriptError:
                return _exchange(connection, [("EVAL", _SCRIPT, 0, *arguments)])[0]
        except redis.BusyLoadingError as error:
            raise StoreError(_explained(error)) from error
        except (redis.ConnectionError, redis.TimeoutError) as error:
            raise _Unclear(_explained(error)) from error
        except redis.RedisError as error:
            raise self._refused(error) from error
        finally:
            self._pool.release(connection)

    def _connection(self) -> Any:  # noqa: ANN401 (redis-py gives several classes)
        return self._pool.get_connection()

    def _refused(self, error: redis.RedisError) -> StoreError:
        if _code(error) == "READONLY":
            self._pool.disconnect()  # after a fail-over the address may lead to another server
        return StoreError(_explained(error))

    def now_ms(self) -> int:
        """Milliseconds since 1970 by the server's clock, which is asked now and then."""
        base, since = self._clock
        if time.monotonic() - since > CLOCK_EVERY_S:
            self._clock = base, since = self._asked_clock(base, since)
        return base + int((time.monotonic() - since) * 1000)

    def _asked_clock(self, base: int, since: float) -> tuple[int, float]:
        before = time.monotonic()
        try:
            seconds, micros = self.ask(("TIME",))[0]
        except StoreError:
            if base == 0:
                raise
            return base + int((before - since) * 1000), before  # asked again when the time has passed again
        return int(seconds) * 1000 + int(micros) // 1000, (before + time.monotonic()) / 2

    def _greet(self, connection: Any) -> None:  # noqa: ANN401
        connection.on_connect()
        info = _info(_exchange(connection, [("INFO",)])[0])
        if info.get("loading") == "1":  # until it has read its file it says of itself what is not so
            raise redis.BusyLoadingError("LOADING Redis is loading the dataset in memory")
        with self._lock:
            run = info.get("run_id", "")
            if run != self.run:
                self._inspect(connection, info)
                self.run = run

    def _inspect(self, connection: Any, info: dict[str, str]) -> None:  # noqa: ANN401
        """Refuse a server that may lose sessions or not understand the script."""
        _check_kind(info)
        self.durability = _level(self._asked, info.get("aof_enabled") == "1", _fsync_policy(connection))
        if info.get("aof_enabled") == "1":
            _leave_a_torn_end_behind(connection, info.get("run_id", ""))
        _exchange(connection, [("SET", _SCHEMA, SCHEMA_VERSION, "NX")])
        found = int(_exchange(connection, [("GET", _SCHEMA)])[0])
        if found > SCHEMA_VERSION:
            raise _Unfit(f"the store was written by a newer version (schema {found}, this one knows {SCHEMA_VERSION})")
        if found < SCHEMA_VERSION:
            raise _Unfit(f"the store has schema {found}, which no version of this store ever wrote")
        report = log.info if self.durability.startswith(("commit (appendonly ", "fsync")) else log.warning
        report("redis_connected", version=info.get("redis_version"), durability=self.durability)

    def close(self) -> None:
        self._pool.disconnect()


def _exchange(connection: Any, commands: Sequence[Command]) -> list[Any]:  # noqa: ANN401
    """Send commands in one go and read every answer; then raise the first error among them."""
    connection.send_packed_command([b"".join(map(_wire, commands))])
    answers = [_answer(connection) for _ in commands]
    for answer in answers:
        if isinstance(answer, redis.RedisError):
            raise answer
    return answers


def _wire(command: Command) -> bytes:
    """A command as it is sent: a group commit has thousands of words, and the client's own way takes them slowly."""
    words = [word if isinstance(word, bytes) else str(word).encode() for word in command]
    return b"*%d\r\n" % len(words) + b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])


def _answer(connection: Any) -> Any:  # noqa: ANN401
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error


def _info(answer: bytes) -> dict[str, str]:
    lines = answer.decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _check_kind(info: dict[str, str]) -> None:
    version = tuple(int(number) for number in info.get("redis_version", "0").split(".")[:2])
    if version < (6, 2):
        raise _Unfit(f"the store needs Redis 6.2 or newer, or Valkey; this is {info.get('redis_version')}")
    if info.get("cluster_enabled") == "1":
        raise _Unfit("the store can not be a Redis Cluster: name a single server, with replicas if you like")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise _Unfit(f"Redis may evict sessions (maxmemory-policy {policy}): set `maxmemory-policy noeviction`")


def _fsync_policy(connection: Any) -> str:  # noqa: ANN401
    try:
        found = _exchange(connection, [("CONFIG", "GET", "appendfsync")])[0]
    except redis.ResponseError:
        return "unknown"  # managed servers forbid CONFIG
    return found[1].decode() if found else "unknown"


def _leave_a_torn_end_behind(connection: Any, run: str) -> None:  # noqa: ANN401
    """Once in each run of the server: have it begin another file before anything is appended to the one it has read.

    A commit's effects are one transaction in the append-only file. A server that was killed while it wrote them cuts
    off the torn command when it starts, but may leave the transaction open (Redis; Valkey before its pull request
    4342). What is appended then would end it, and the start after that would apply the beginning of a commit that
    nobody was ever told of.
    """
    if _exchange(connection, [("GET", _RUN)])[0] == run.encode():
        return
    try:
        said = _exchange(connection, [("BGREWRITEAOF",)])[0]
    except redis.ResponseError as error:
        if "in progress" not in str(error):  # by another replica
            log.warning(
                "redis_file_kept", hint="allow BGREWRITEAOF, or repair the file before a start", error=str(error)
            )
    else:
        if b"scheduled" in said:
            raise redis.BusyLoadingError("LOADING Redis saves its data, and begins another append-only file after that")
    _exchange(connection, [("SET", _RUN, run)])


def _level(asked: str, append_only: bool, fsync: str) -> str:
    if asked == "fsync" and not (append_only and fsync == "always"):
        found = f"appendfsync is {fsync}" if append_only else "it has no append-only file"
        raise _Unfit(f"durability fsync needs `appendonly yes` and `appendfsync always` in Redis, but {found}")
    if not append_only:
        return "none (no append-only file)"
    return f"{asked} (appendonly {fsync})" if fsync != "unknown" else f"{asked} (appendonly, how often is unknown)"


def _code(error: redis.RedisError) -> str:
    """The word that names an error; before Redis 7 a script's error hides it within the text."""
    if error.status_code not in (None, "ERR"):
        return str(error.status_code)
    found = re.search(r"(?:^|-)([A-Z]+)\b", str(error))
    return found[1] if found is not None else ""


def _explained(error: redis.RedisError) -> str:
    """What went wrong, and what to do about it."""
    if isinstance(error, _Unfit):
        return str(error)
    meaning = _MEANINGS.get(_code(error))
    kinds = (text for kind, text in _KINDS if isinstance(error, kind))
    return f"{meaning or next(kinds, 'Redis refused')} ({error})"


_MEANINGS = {
    "OOM": "Redis is full and refuses writes: raise maxmemory, or close sessions",
    "READONLY": "this Redis is a read-only replica: name the primary",
    "LOADING": "Redis is still loading its data",
    "NOPERM": "Redis does not give this user the rights that the store needs",
    "MISCONF": "Redis can not save to its disk and refuses writes",
    "BUSY": "Redis is busy with another script",
}
_KINDS = (
    (redis.AuthenticationError, "Redis does not accept the user or password"),
    (redis.TimeoutError, "Redis does not answer in time"),
    (redis.ConnectionError, "Redis can not be reached"),
)


# ---------------------------------------------------------------------- how things are written


def _member(key: Key) -> str:
    return f"{key[0]}\0{key[1]}"


def _key_of(member: bytes) -> Key:
    tenant, _, id = member.decode().partition("\0")
    return (tenant, id)


def _head_key(key: Key) -> str:
    return f"recurra:{key[0]}/head:{key[1]}"


def _ids_key(tenant: str) -> str:
    return f"recurra:{tenant}/ids"


def _models_key(tenant: str) -> str:
    return f"recurra:{tenant}/models"


def _forks_key(key: Key, life: int) -> str:
    return f"recurra:{key[0]}/forks:{key[1]}:{life}"


def _reply_keys(tenant: str, scope: str) -> tuple[str, str]:
    return f"recurra:{tenant}/replies:{scope}", f"recurra:{tenant}/replied:{scope}"


def _mark(head: Head, previous: bytes) -> bytes:
    """What the script compares: it changes with every commit, and says whose commit came before."""
    fields = (head.epoch, head.position, head.commit_id.hex(), head.status[0], head.origin, previous.hex())
    return " ".join(map(str, fields)).encode() + b"\n"


def _seen(value: bytes | None) -> _Seen:
    mark, line, blob = (value or b"").partition(b"\n")
    return _Seen(_head.decode(blob), mark + line) if blob else _Seen(None, b"")


def _numerics_id(numerics: str) -> bytes:
    return hashlib.sha256(numerics.encode()).digest()[:6]


def _packed_segment(segment: Segment) -> bytes:
    flags = (segment.source == "generated") * _GENERATED + bool(segment.logprobs) * _LOGPROBS
    end, at = (n.to_bytes(6, "little") for n in (segment.end, segment.at_ms[0][1]))
    return _HEADER.pack(end, at, _numerics_id(segment.numerics), segment.count, flags) + segment.data + segment.logprobs


def _unpacked_segment(branch: str, packed: bytes, numerics: dict[bytes, str]) -> Segment:
    end, at, id, count, flags = _HEADER.unpack_from(packed)
    begin, stop = _HEADER.size, len(packed) - (4 * count if flags & _LOGPROBS else 0)
    return Segment(
        branch=branch,
        start=int.from_bytes(end, "little") - count,
        count=count,
        source="generated" if flags & _GENERATED else "fed",
        data=packed[begin:stop],
        numerics=numerics[id],
        at_ms=((count, int.from_bytes(at, "little")),),
        logprobs=packed[stop:],
    )


def _snapshot_command(name: str, snapshot: Snapshot) -> Command:
    value = _encoder.encode((snapshot.numerics, snapshot.data))
    return (name, snapshot.branch, f"{snapshot.position} {snapshot.graph}", value)


def _reply_value(reply: Reply) -> bytes:
    return f"{reply.at_ms} {reply.life} {int(reply.pending)} ".encode() + _encoder.encode(reply)


def _due(head: Head) -> int | None:
    """When something is to be done with a session: it expires, or its tombstone goes."""
    return head.expires_ms if head.status == "live" else head.updated_ms + TOMBSTONE_TTL_S * 1000


# ---------------------------------------------------------------------- the store


class RedisStore:
    """Sessions in a Redis or Valkey that any number of replicas share."""

    def __init__(self, url: str, durability: str = "commit", idempotency_ttl_s: int = 86_400) -> None:
        self._reply_ttl_s = idempotency_ttl_s
        self._heads: _Recent[Key, _Seen] = _Recent(CACHED_HEADS)
        self._lines: _Recent[str, Line] = _Recent(CACHED_LINES)
        self._acknowledged: _Recent[Key, _Acknowledged] = _Recent(ACKNOWLEDGED)
        self._numerics: dict[bytes, str] = {}
        self._link = _Link(url, durability)
        try:
            self._link.now_ms()
        except StoreError:
            self._link.close()
            raise

    @property
    def durability(self) -> str:
        """What the server promises: the level that was asked for, and how it writes its file."""
        return self._link.durability

    @property
    def run(self) -> str:
        """The server's run: another one may have come back with less than was acknowledged."""
        return self._link.run or ""

    def _now(self) -> int:
        return self._link.now_ms()

    # ------------------------------------------------------------------ committing

    def commit(self, commits: Sequence[Change], snapshots: Sequence[Snapshot] = ()) -> list[Result]:
        """Apply a group commit with one call of the script; one result a commit."""
        now = self._now()
        results: list[Result] = [Conflict(None)] * len(commits)
        waiting = list(enumerate(whole(commits)))
        loose = [_snapshot_command("loose", snapshot) for snapshot in snapshots]
        for _ in range(ROUNDS):
            due = self._judged(waiting, results, now)
            if not due and not loose:
                break
            answers = self._apply(due, loose, now)
            waiting = [
                one for part, answer in zip(due, answers, strict=True) for one in self._ended(part, answer, results)
            ]
            loose = []
        return [_as_of(result, now) for result in results]

    def _judged(self, waiting: Sequence[tuple[int, Commit]], results: list[Result], now: int) -> list[_Part]:
        """The parts that hold on the heads as they were last seen; the others' results are written."""
        due = []
        seen = self._seen([commit for _, commit in waiting])
        for index, commit in waiting:
            stored = seen[commit.head.key]
            source = seen[(commit.head.tenant, commit.source.id)].head if commit.source is not None else None
            results[index] = Conflict(stored.head)
            if holds(commit, stored.head, source, None, now):
                due.append(self._part(index, stamp(commit, stored.head, now), stored, now))
        return due

    def _seen(self, commits: Sequence[Commit]) -> dict[Key, _Seen]:
        """The stored heads that commits are judged by: from memory where it has the very head that is expected."""
        found: dict[Key, _Seen] = {}
        missing: set[Key] = set()
        for commit in commits:
            known = self._heads.get(commit.head.key)
            if known is not None and known.head is not None and known.head.fence == commit.expected:
                found[commit.head.key] = known
            else:
                missing.add(commit.head.key)
            if commit.source is not None:
                missing.add((commit.head.tenant, commit.source.id))
        return found | self._read_heads(sorted(missing))

    def _read_heads(self, keys: Sequence[Key]) -> dict[Key, _Seen]:
        if not keys:
            return {}
        values = self._link.ask(("MGET", *map(_head_key, keys)))[0]
        found = {key: _seen(value) for key, value in zip(keys, values, strict=True)}
        for key, seen in found.items():
            self._heads.put(key, seen)
        return found

    def _part(self, index: int, stamped: Commit, stored: _Seen, now: int) -> _Part:
        mark = _mark(stamped.head, stored.head.commit_id if stored.head is not None else b"")
        return _Part(
            key=_head_key(stamped.head.key),
            seen=stored.mark,
            commands=self._commands(stamped, stored.head, mark, now),
            source=_source(stamped),
            reply=_claim(stamped.head.tenant, stamped.reply, stored.head, stamped.over),
            index=index,
            commit=stamped,
            mark=mark,
        )

    def _commands(self, commit: Commit, stored: Head | None, mark: bytes, now: int) -> list[Command]:
        head = commit.head
        commands: list[Command] = [("SET", _head_key(head.key), mark + _encoder.encode(head))]
        if commit.left:
            commands.append(("leave", _member(head.key), commit.left))
        if head.status == "live":
            commands += _log_commands(commit)
            commands += _line_commands(commit, stored)
        commands += _index_commands(head, stored)
        if commit.reply is not None:
            commands.append(self._reply_command(head.tenant, commit.reply, now))
        return commands

    def _reply_command(self, tenant: str, reply: Reply, now: int) -> Command:
        most = REPLIES_KEPT if reply.scope else TENANT_REPLIES_KEPT
        oldest = now - self._reply_ttl_s * 1000
        keys = _reply_keys(tenant, reply.scope)
        return ("reply", *keys, reply.key, _reply_value(reply), most, self._reply_ttl_s + 60, oldest)

    def _apply(self, due: Sequence[_Part], loose: Sequence[Command], now: int) -> list[Any]:
        """Call the script; when its answer does not come, find out what it did."""
        batch = f"recurra:given-up:{secrets.token_hex(8)}"
        try:
            return self._call(batch, due, loose, now)
        except _Unclear as error:
            return self._settle(batch, due, str(error))

    def _call(self, batch: str, due: Sequence[_Part], loose: Sequence[Command], now: int) -> list[Any]:
        arguments = itertools.chain.from_iterable(part.arguments() for part in due)
        oldest = now - self._reply_ttl_s * 1000
        settings = (batch, oldest, SNAPSHOTS_KEPT, SNAPSHOT_SPACING)
        answers = self._link.call("commit", *settings, len(due), *arguments, len(loose), *_packed(loose))
        return list(answers)

    def _settle(self, batch: str, due: Sequence[_Part], problem: str) -> list[Any]:
        """What became of a call whose answer did not come: the heads tell, and it can not be applied later any more."""
        values = self._given_up(batch, ("MGET", *(part.key for part in due))) if due else []
        fates = [_fate(part, value or b"") for part, value in zip(due, values, strict=True)]
        if None in fates:
            raise CommitUnknown(f"it can not be told whether a commit was applied: {problem}")
        if True not in fates and any(
            value_of == part.seen for part, value_of in zip(due, map(_mark_of, values), strict=True)
        ):
            raise StoreError(f"nothing was committed: {problem}")
        return [1 if applied else [value or b""] for applied, value in zip(fates, values, strict=True)]

    def _given_up(self, batch: str, read: Command) -> Any:  # noqa: ANN401
        """Read in the moment after which a call can not be applied any more."""
        until = time.monotonic() + SETTLE_S
        while True:
            try:
                answer = self._link.ask(("MULTI",), ("SET", batch, 1, "EX", GIVEN_UP_S), read, ("EXEC",), again=False)[
                    -1
                ]
                if not isinstance(answer[0], redis.RedisError):
                    return answer[1]
                raise StoreError(str(answer[0]))
            except StoreError as error:
                if time.monotonic() >= until:
                    raise CommitUnknown(f"the store failed and can not be read: {error}") from error
            time.sleep(SETTLE_PAUSE_S)

    def _ended(self, part: _Part, answer: Any, results: list[Result]) -> Iterator[tuple[int, Commit]]:  # noqa: ANN401
        """Write a part's result; gives back what is to be judged again."""
        commit = part.commit
        assert commit is not None
        if answer == 1:
            results[part.index] = Applied(commit.head)
            self._take(commit.head, part.mark)
        elif answer != 0:
            seen = _seen(answer[0])
            self._heads.put(commit.head.key, seen)
            results[part.index] = Conflict(seen.head)
            if commit.expected is None:
                yield part.index, commit

    def _take(self, head: Head, mark: bytes) -> None:
        self._heads.put(head.key, _Seen(head, mark))
        known = _Acknowledged(head.epoch, head.position, head.status != "live", head.updated_ms, self.run)
        self._acknowledged.put(head.key, known)

    # ------------------------------------------------------------------ kept answers

    def keep(self, tenant: str, reply: Reply) -> bool:
        """Keep the answer of a request that committed nothing; False: its key is taken."""
        now = self._now()
        head = self._read_head((tenant, reply.scope)).head if reply.scope else None
        claim = (*_claim(tenant, reply, head)[:3], 0)
        life = reply.life or (head.life if head is not None else 0)
        reply = msgspec.structs.replace(reply, at_ms=now, life=life)
        part = _Part(commands=[self._reply_command(tenant, reply, now)], reply=claim)
        batch = f"recurra:given-up:{secrets.token_hex(8)}"
        try:
            return bool(self._call(batch, [part], [], now)[0] == 1)
        except _Unclear as error:
            if self._given_up(batch, ("HGET", *claim[:2])) == _reply_value(reply):
                return True
            raise StoreError(f"the answer was not kept: {error}") from error

    def reply(self, tenant: str, scope: str, key: str) -> Reply | None:
        """The answer kept under a key in the session's latest life, or in the tenant's own keys (scope "")."""
        value, stored = self._link.ask(
            ("HGET", _reply_keys(tenant, scope)[0], key), ("GET", _head_key((tenant, scope)))
        )
        if value is None:
            return None
        reply = _reply.decode(value.split(b" ", 3)[3])
        head = _seen(stored).head
        life = (head.life if head is not None else None) if scope else 0
        return reply if reply.life == life and reply.at_ms > self._now() - self._reply_ttl_s * 1000 else None

    # ------------------------------------------------------------------ reading

    def _read_head(self, key: Key) -> _Seen:
        return self._read_heads([key])[key]

    def head(self, key: Key, at_ms: int | None = None) -> Head | None:
        """The head of a session; raises RolledBack once when the server came back without what was acknowledged."""
        seen = self._read_head(key)
        self._compare(key, seen.head)
        return seen.head.at(self._now() if at_ms is None else at_ms) if seen.head is not None else None

    def peek(self, key: Key, at_ms: int | None = None) -> Unread:
        """Another replica may have moved the session: its head is always asked for."""
        return UNREAD

    def _compare(self, key: Key, found: Head | None) -> None:
        known = self._acknowledged.get(key)
        run = self.run
        if known is None or known.run == run:
            return
        stands = (found.epoch, found.position, found.status != "live") if found is not None else (0, 0, True)
        forgotten = known.ended or self._now() >= known.at_ms + TOMBSTONE_TTL_S * 1000
        if known[:3] <= stands or (found is None and forgotten):
            self._acknowledged.put(key, known._replace(run=run))
            return
        self._acknowledged.put(key, known._replace(position=stands[1], ended=stands[2], run=run))
        raise RolledBack(known[:2], stands[:2] if found is not None else None)

    def line(self, branch: str) -> Line:
        """What comes before a branch's own entries."""
        known = self._lines.get(branch)
        if known is not None:
            return known
        row = self._link.ask(("ZRANGE", _LINE + branch, 0, -1, "WITHSCORES"))[0]
        found = tuple((name.decode(), int(upto)) for name, upto in zip(row[::2], row[1::2], strict=True))
        if found:
            self._lines.put(branch, found)  # a branch never changes
        return found

    def log(self, branch: str, after: int, to: int) -> list[Segment]:
        """Positions after + 1 to `to` of a branch and its past, in order."""
        found = [
            cut(segment, first, last)
            for name, first, last in parts(self.line(branch), branch, after, to)
            for segment in self._segments(name, first, last)
        ]
        return join(found)

    def _segments(self, branch: str, after: int, to: int) -> Iterator[Segment]:
        """The segments of one branch, some at a time: a long log does not hold up everybody else."""
        while after < to:
            try:
                packed = self._link.call("log", branch, after, to, SLICE)
            except _Unclear as error:
                raise StoreError(str(error)) from error
            for one in packed:
                segment = _unpacked_segment(branch, one, self._names(one))
                after = segment.end
                if segment.start < to:
                    yield segment
            if len(packed) < SLICE:
                return

    def _names(self, packed: bytes) -> dict[bytes, str]:
        """The names of numerics; they are asked for once."""
        id = packed[12:18]
        if id not in self._numerics:
            name = self._link.ask(("HGET", _NUMERICS, id))[0]
            if name is None:
                raise StoreError("the log names numerics that the store does not know: Redis has lost a key")
            self._numerics[id] = name.decode()
        return self._numerics

    def snapshot(self, branch: str, below: int, graph: str) -> Snapshot | None:
        """The newest snapshot of a graph's state at a position less than `below`, of a branch or its past."""
        for name, position in reversed(self._positions(branch, -1, below - 1, graph)):
            value = self._link.ask(("HGET", _SNAPSHOTS + name, f"{position} {graph}"))[0]
            if value is not None:
                numerics, data = msgspec.msgpack.decode(value)
                return Snapshot(name, position, numerics, data, graph)
        return None

    def snapshots(self, branch: str, after: int, to: int, graph: str) -> list[int]:
        """Positions after + 1 to `to` at which there are snapshots, of a branch and its past, in order."""
        return sorted({position for _, position in self._positions(branch, after, to, graph)})

    def _positions(self, branch: str, after: int, to: int, graph: str) -> list[tuple[str, int]]:
        """(branch, position) of snapshots, oldest branch first, in order of position."""
        places = [*((name, min(upto, to)) for name, upto in self.line(branch)), (branch, to)]
        answers = self._link.ask(*(("HKEYS", _SNAPSHOTS + name) for name, _ in places))
        found = [
            (int(position), place, name)
            for place, ((name, upto), fields) in enumerate(zip(places, answers, strict=True))
            for position, of in (one.decode().split(" ", 1) for one in fields)
            if of == graph and after < int(position) <= upto
        ]
        return [(name, position) for position, _, name in sorted(found)]

    def heads(self, tenant: str, model: str | None, after: str, limit: int) -> list[Head]:
        """Live sessions in order of id."""
        found: list[Head] = []
        models = [model] if model is not None else self._models(tenant)
        while len(found) < limit and (ids := self._ids(tenant, models, after, limit)):
            found += [head for head in self._living([(tenant, id) for id in ids]) if head.model in models]
            after = ids[-1]
        return found[:limit]

    def _models(self, tenant: str) -> list[str]:
        return sorted(name.decode() for name in self._link.ask(("SMEMBERS", _models_key(tenant)))[0])

    def _ids(self, tenant: str, models: Sequence[str], after: str, limit: int) -> list[str]:
        """The next ids, over all models."""
        if not models:
            return []
        ranges = [(f"({model}\0{after}", f"({model}\1") for model in models]
        commands = (("ZRANGEBYLEX", _ids_key(tenant), *ends, "LIMIT", 0, limit) for ends in ranges)
        pages = ([member.partition(b"\0")[2].decode() for member in page] for page in self._link.ask(*commands))
        ids = (id for id, _ in itertools.groupby(heapq.merge(*pages)))
        return list(itertools.islice(ids, limit))

    def _living(self, keys: Sequence[Key]) -> list[Head]:
        if not keys:
            return []
        now = self._now()
        values = self._link.ask(("MGET", *map(_head_key, keys)))[0]
        heads = (_seen(value).head for value in values)
        return [head for head in heads if head is not None and head.at(now).status == "live"]

    def forks(self, key: Key, life: int) -> list[str]:
        """Ids of the live sessions that were forked from that life of a session."""
        ids = sorted(id.decode() for id in self._link.ask(("SMEMBERS", _forks_key(key, life)))[0])
        heads = self._living([(key[0], id) for id in ids])
        return [
            head.id
            for head in heads
            if head.parent is not None and (head.parent.session, head.parent.life) == (key[1], life)
        ]

    def lives(self, model: str, version: int) -> bool:
        """Whether any session of a model version lives; those that are due and not swept yet do not."""
        now = self._now()
        count, members = self._link.ask(
            ("HGET", _LIVES, f"{model}\0{version}"), ("ZRANGEBYSCORE", _DUE, "-inf", now, "LIMIT", 0, SWEPT)
        )
        heads = (seen.head for seen in self._read_heads([_key_of(member) for member in members]).values())
        live = [head for head in heads if head is not None and head.status == "live"]
        due = [head for head in live if (head.model, head.version) == (model, version)]
        return int(count or 0) > sum(head.at(now).status != "live" for head in due)

    def census(self) -> Mapping[tuple[str, int], int]:
        """How many sessions of each (model, version) live, on whatever replica."""
        found = self._link.ask(("HGETALL", _LIVES))[0]
        pairs = found.items() if isinstance(found, dict) else zip(found[::2], found[1::2], strict=True)
        named = ((bytes(field).decode().split("\0"), int(count)) for field, count in pairs)
        return {(model, int(version)): count for (model, version), count in named}

    def next_epoch(self, key: Key) -> int:
        """One more than every epoch that this id has had, as far as this process or the store know."""
        value, floor = self._link.ask(("GET", _head_key(key)), ("ZSCORE", _EPOCHS, "floor"))
        head = _seen(value).head
        known = self._acknowledged.get(key)
        return max(head.epoch if head is not None else int(floor or 0), known.epoch if known is not None else 0) + 1

    # ------------------------------------------------------------------ upkeep

    def sweep(self, busy: Collection[Key] = ()) -> int:
        """Expire what is due and forget old tombstones, a bounded number a call."""
        now = self._now()
        members = self._link.ask(("ZRANGEBYSCORE", _DUE, "-inf", now, "LIMIT", 0, SWEPT + len(busy)))[0]
        keys = [key for key in map(_key_of, members) if key not in busy]
        return sum(self._sweep(keys[begin : begin + GROUP], now) for begin in range(0, len(keys), GROUP))

    def _sweep(self, keys: Sequence[Key], now: int) -> int:
        values = self._link.ask(("MGET", *map(_head_key, keys)))[0]
        found = (part for key, value in zip(keys, values, strict=True) for part in self._swept(key, _seen(value), now))
        due = list(found)
        try:
            answers = self._call("", due, [], now)
        except _Unclear as error:
            raise StoreError(str(error)) from error  # what was not swept is still due
        for part in due:
            if part.commit is not None:
                self._heads.drop(part.commit.head.key)
        return sum(answer == 1 for answer in answers)

    def _swept(self, key: Key, seen: _Seen, now: int) -> Iterator[_Part]:
        head = seen.head
        if head is None:
            yield _Part(commands=[("ZREM", _DUE, _member(key))])
        elif head.status != "live" and head.updated_ms < now - TOMBSTONE_TTL_S * 1000:
            yield _Part(_head_key(key), seen.mark, _forget(head))
        elif head.status == "live" and (ended := head.at(now)).status == "expired":
            commit = Commit(head=ended, expected=head.fence, left=head.branch)
            yield self._part(0, commit, seen, now)

    def check(self) -> str | None:
        """None when the server takes writes, else what is wrong."""
        try:
            self._link.ask(("SET", "recurra:check", 1, "EX", 60))
        except StoreError as error:
            return str(error)
        return None

    def close(self) -> None:
        """Close the connections."""
        self._link.close()


def _as_of(result: Result, now: int) -> Result:
    return Conflict(result.head.at(now)) if isinstance(result, Conflict) and result.head is not None else result


def _mark_of(value: bytes | None) -> bytes:
    return _seen(value).mark


def _fate(part: _Part, value: bytes) -> bool | None:
    """Whether a part was applied, told by the head that is stored now; None: that can not be told."""
    mark, assigned = _mark_of(value), part.commit.head.commit_id.hex() if part.commit is not None else ""
    if mark == part.mark or _previous(mark) == assigned:
        return True
    return False if mark == part.seen or _previous(mark) == _commit_id(part.seen) else None


def _commit_id(mark: bytes) -> str:
    return mark.decode().split(" ")[2] if mark else ""


def _previous(mark: bytes) -> str:
    return mark.decode().rstrip("\n").split(" ")[5] if mark else ""


def _source(commit: Commit) -> Command:
    """What the script asks of the session that a fork leaves."""
    source = commit.source
    if source is None:
        return ("",)
    key = (commit.head.tenant, source.id)
    line = commit.branch.line if commit.branch is not None else ()
    left = source.branch if any(name == source.branch for name, _ in line) else ""
    return (_head_key(key), source.epoch, _member(key), left, commit.head.origin if line else "inf")


def _claim(tenant: str, reply: Reply | None, stored: Head | None, over: int = 0) -> Command:
    """What the script asks of a kept answer's key: whether it is taken in this life, and not by the head's own."""
    if reply is None:
        return ("",)
    life: Value = 0 if not reply.scope else stored.life if stored is not None and stored.life != over else ""
    generation = stored.generation if stored is not None else None
    mine = generation is not None and generation.key == reply.key
    return (_reply_keys(tenant, reply.scope)[0], reply.key, life, int(mine))


def _log_commands(commit: Commit) -> Iterator[Command]:
    for segment in commit.segments:
        yield ("RPUSH", _LOG + segment.branch, _packed_segment(segment))
    for numerics in {segment.numerics for segment in commit.segments}:
        yield ("HSET", _NUMERICS, _numerics_id(numerics), numerics)
    for snapshot in commit.snapshots:
        yield _snapshot_command("snapshot", snapshot)


def _line_commands(commit: Commit, stored: Head | None) -> Iterator[Command]:
    head, line = commit.head, commit.branch.line if commit.branch is not None else ()
    for begin in range(0, len(line), SLICE):
        some = line[begin : begin + SLICE]
        yield ("ZADD", _LINE + head.branch, *(value for name, upto in some for value in (upto, name)))
    if line or (head.origin and (stored is None or (stored.branch, stored.origin) != (head.branch, head.origin))):
        yield ("reach", _member(head.key), head.branch, head.origin)


def _index_commands(head: Head, stored: Head | None) -> Iterator[Command]:
    """What pages, counts, forks and the sweep are found by, where it changes."""
    before = stored if stored is not None and stored.status == "live" else None
    after = head if head.status == "live" else None
    if before is None or after is None or (before.model, before.version) != (after.model, after.version):
        yield from _listed(before, "ZREM", -1)
        yield from _listed(after, "ZADD", 1)
    if (before and before.parent) != (after and after.parent):
        yield from _forked(before, "SREM")
        yield from _forked(after, "SADD")
    yield from _scheduled(head, stored)


def _listed(head: Head | None, command: str, count: int) -> Iterator[Command]:
    if head is None:
        return
    member = f"{head.model}\0{head.id}"
    yield (command, _ids_key(head.tenant), *((0, member) if count > 0 else (member,)))
    yield ("HINCRBY", _LIVES, f"{head.model}\0{head.version}", count)
    if count > 0:
        yield ("SADD", _models_key(head.tenant), head.model)


def _forked(head: Head | None, command: str) -> Iterator[Command]:
    if head is not None and head.parent is not None:
        yield (command, _forks_key((head.tenant, head.parent.session), head.parent.life), head.id)


def _scheduled(head: Head, stored: Head | None) -> Iterator[Command]:
    due = _due(head)
    if due is not None:
        yield ("ZADD", _DUE, due, _member(head.key))
    elif stored is not None and _due(stored) is not None:
        yield ("ZREM", _DUE, _member(head.key))


def _forget(head: Head) -> list[Command]:
    """Drop a tombstone and its answers, but not how far its epochs went."""
    return [
        ("ZADD", _EPOCHS, "GT", head.epoch, "floor"),
        ("DEL", _head_key(head.key), *_reply_keys(head.tenant, head.id)),
        ("ZREM", _DUE, _member(head.key)),
    ]
