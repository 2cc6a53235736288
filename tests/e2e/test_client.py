"""The Python client on the real server: every method, both kinds; cuts, kills and refusals change nothing."""

import asyncio
import pickle
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
from faulty_wire import Fate, FaultyWire
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import MakeServer, Server

from recurra_client import AsyncClient, Client, Line, RecurraError, Retry, Session, Steps, Stream
from recurra_client.events import Events

LETTERS = "tiny-letters"
WEATHER = "tiny-weather"
PATIENT = Retry(patience_s=30, first_s=0.005, most_s=0.1)
LONG = {"max_tokens": 3000, "seed": 5}


class Awaited:
    """The client that blocks, in the clothes of the other: so that every test is for both."""

    def __init__(self, inner: Any) -> None:  # noqa: ANN401 (a client or a session)
        self._inner = inner

    async def __aenter__(self) -> "Awaited":
        return Awaited(self._inner.__enter__())

    async def __aexit__(self, *error: Any) -> None:  # noqa: ANN401
        self._inner.__exit__(*error)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        found = getattr(self._inner, name)
        return self._calling(found) if callable(found) else found

    def _calling(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if method.__name__ == "session":
                return Awaited(method(*args, **kwargs))
            if method.__name__ in ("log", "sessions"):
                return _each(method(*args, **kwargs))
            if kwargs.get("stream"):
                return AwaitedStream(method(*args, **kwargs))
            return _later(method, *args, **kwargs)

        return call


class AwaitedStream(Awaited):
    """A stream likewise."""

    async def __aenter__(self) -> "AwaitedStream":
        return self

    def __aiter__(self) -> AsyncIterator[Any]:
        return _each(self._inner)


async def _each(found: Iterator[Any]) -> AsyncIterator[Any]:
    for one in found:
        yield one


async def _later(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    found = method(*args, **kwargs)
    return Awaited(found) if isinstance(found, Session) else found


KINDS = ("sync", "async")


def using(kind: str, url: str, work: Callable[[Any], Awaitable[Any]], **options: Any) -> Any:  # noqa: ANN401
    """Run work with a client of a kind."""

    async def run() -> Any:  # noqa: ANN401
        options.setdefault("retry", PATIENT)
        client = AsyncClient(url, **options) if kind == "async" else Awaited(Client(url, **options))
        async with client as open_client:
            return await work(open_client)

    return asyncio.run(run())


async def tokens_of(stream: Any) -> list[int]:  # noqa: ANN401
    return [token.token async for token in stream]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---------------------------------------------------------------------- what there is


def test_steps_forecast_log_and_state(kind: str, server: Server, name: str) -> None:
    async def work(client: Any) -> None:  # noqa: ANN401
        async with client.session(name, model=WEATHER) as s:
            first = await s.steps([[11.0, 8], [12.0, 9]], predictions="all")
            assert (first.session, first.position, first.steps, first.created) == (name, 2, 2, True)
            assert [one.position for one in first.predictions] == [1, 2]
            assert first.last.mean is not None and set(first.last.mean) == {"temperature"}
            assert first.last.quantiles is not None and 0.5 in first.last.quantiles
            assert first.last.surprise is not None and first.last.label is None
            again = await s.steps([{"temperature": 12.5, "hour": 10}], position=2)
            assert (again.position, again.created) == (3, False)
            ahead = await s.forecast(2, future=[{"hour": 11}, {"hour": 12}])
            assert [one.step for one in ahead.steps] == [1, 2] and "temperature" in ahead.steps[0].mean
            assert [entry.position async for entry in s.log()] == [1, 2, 3]
            assert [entry.source async for entry in s.log(after=2)] == ["fed"]
            copied = await client.upload(f"{name}-copy", await s.state())
            assert (await copied.info()).position == 3
            assert (await s.verify()).verified is not False
            told = await s.update(metadata={"a": 1}, ttl_s=60)
            assert told.metadata == {"a": 1} and told.expires_at is not None and told.parent is None
        assert (await s.info()).position == 3  # it has a name: it outlives the block

    using(kind, server.url, work)


def test_texts_forks_rewinds_and_migrations(kind: str, server: Server, name: str) -> None:
    async def work(client: Any) -> None:  # noqa: ANN401
        s = await client.create(LETTERS, name, seed=7, metadata={"x": 1}, ttl_s=3600)
        assert (await s.steps("abc")).last.alternatives[0].logprob <= 0
        text = await s.generate("d", max_tokens=5, logprobs=2, temperature=0.5, top_k=4, top_p=0.9, stop=["zz"])
        assert len(text.tokens) == 5 and text.finish_reason == "length" and text.usage.prompt_tokens == 1
        assert [len(one.alternatives) for one in text.logprobs] == [2] * 5
        child = await s.fork(f"{name}-child", position=3)
        told = await child.info()
        assert (told.position, told.parent.session, told.parent.position) == (3, name, 3)
        assert (await s.rewind(1)).position == 1
        assert (await s.cancel()).position == 1
        await child.delete()
        with pytest.raises(RecurraError) as gone:
            await child.info()
        assert (gone.value.code, gone.value.status, gone.value.problem["position"]) == ("session_closed", 410, 3)
        tags = await client.create("tiny-tags", version=1)
        await tags.steps(["go", "left"])
        assert (await tags.migrate(2)).version == 2
        assert (await tags.steps(["go"])).position == 3
        ids = [one.id async for one in client.sessions(LETTERS)]
        assert name in ids and tags.id not in ids
        assert LETTERS in {one["id"] for one in await client.models()}
        predicted = await client.predict(LETTERS, ["ab", "c"], predictions="all")
        assert [len(one) for one in predicted] == [2, 1]
        labels = await client.predict("tiny-people", ["anna lost her keys"])
        assert labels[0][0].label is not None and sum(labels[0][0].probabilities.values()) == pytest.approx(1)

    using(kind, server.url, work)


def test_a_session_without_a_name_ends_with_its_block(kind: str, server: Server) -> None:
    async def work(client: Any) -> None:  # noqa: ANN401
        async with client.session(model=LETTERS) as s:
            await s.steps("abc")
        async with client.session(model=LETTERS):
            pass  # never made
        with pytest.raises(RecurraError, match="session_closed"):
            await s.info()
        async with client.session(model=LETTERS, keep=True) as kept:
            await kept.steps("a")
        assert (await kept.info()).position == 1
        with pytest.raises(RecurraError, match="unknown_symbol"):
            async with client.session(model=LETTERS) as bad:
                await bad.steps("?")

    using(kind, server.url, work)


def test_a_stream(kind: str, server: Server, name: str) -> None:
    async def work(client: Any) -> None:  # noqa: ANN401
        whole = await client.session(f"{name}-whole", model=LETTERS).generate("ab", max_tokens=40, seed=3)
        stream = client.session(name, model=LETTERS).generate("ab", stream=True, max_tokens=40, seed=3)
        seen = [token async for token in stream]
        assert [token.token for token in seen] == list(whole.tokens)
        assert [token.position for token in seen] == list(range(3, 43))
        assert stream.text == whole.text == "".join(token.text for token in seen)
        assert (stream.done.finish_reason, stream.done.position, stream.done.usage.prompt_tokens) == ("length", 42, 2)

    using(kind, server.url, work)


def test_a_stream_that_is_left_is_suspended(kind: str, server: Server, name: str) -> None:
    async def work(client: Any) -> None:  # noqa: ANN401
        s = client.session(name, model=LETTERS)
        async with s.generate("ab", stream=True, max_tokens=20_000, seed=3) as stream:
            async for token in stream:
                if token.position == 30:
                    break
        assert stream.done is None
        assert 30 <= (await s.cancel()).position < 20_002
        assert (await s.steps("a")).steps == 1

    using(kind, server.url, work)


def test_bulk(kind: str, server: Server, name: str) -> None:
    async def work(client: Any) -> None:  # noqa: ANN401
        lines = [
            *(Line(f"{name}-{i % 7}", "ab", model=LETTERS, predictions="none") for i in range(70)),
            Line(f"{name}-bad", "?", model=LETTERS),
            Line(f"{name}-bad", "a", model=LETTERS),
            Line(f"{name}-0", "a", position=3),
            Line(f"{name}-0", "a"),
        ]
        answers = await client.bulk(lines)
        assert [one.position for one in answers[:70]] == [2 * (i // 7 + 1) for i in range(70)]
        assert [one.code for one in answers[70:]] == ["unknown_symbol", "skipped", "position_mismatch", "skipped"]
        assert answers[72].problem["position"] == 20
        assert await client.bulk([]) == []

    using(kind, server.url, work)


# ---------------------------------------------------------------------- refusals


def test_errors_are_one_class_with_the_problem(kind: str, server: Server, name: str) -> None:
    async def work(client: Any) -> None:  # noqa: ANN401
        s = client.session(name, model=LETTERS)
        await s.steps("abc")
        with pytest.raises(RecurraError) as found:
            await s.steps("abc", position=1)
        assert (found.value.code, found.value.status, found.value.problem["position"]) == ("position_mismatch", 409, 3)
        assert found.value.detail in str(found.value)
        assert pickle.loads(pickle.dumps(found.value)).problem == found.value.problem
        with pytest.raises(RecurraError, match="model_not_found"):
            await client.create("none")
        with pytest.raises(RecurraError, match="task_mismatch"):
            await tokens_of(client.session(f"{name}-w", model=WEATHER).generate([[1.0, 2]], stream=True))
        for bad in ("", "..", "a/b", "a b", "x" * 129, "ä", "a\n"):
            with pytest.raises(ValueError):
                client.session(bad)

    using(kind, server.url, work)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_is_refused_for_now_is_asked_again_with_the_same_key(
    status: int, kind: str, server: Server, wire: FaultyWire, name: str
) -> None:
    wire.fates.extend([Fate("busy", status)] * 3)

    async def work(client: Any) -> None:  # noqa: ANN401
        assert (await client.session(name, model=LETTERS).steps("abc")).position == 3

    using(kind, wire.url, work)
    keys = {line for head in wire.asked for line in head.split(b"\r\n") if line.lower().startswith(b"idempotency-key")}
    assert len(wire.asked) == 3 and len(keys) == 1
    assert all(b"recurra-client/" in head for head in wire.asked)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(form: str, kind: str, wire: FaultyWire, name: str) -> None:
    at = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
    wire.fates.append(Fate("busy", 503, "1" if form == "seconds" else at))

    async def work(client: Any) -> float:  # noqa: ANN401
        began = time.monotonic()
        await client.session(name, model=LETTERS).steps("abc")
        return time.monotonic() - began

    assert using(kind, wire.url, work) >= 1


def test_patience_has_an_end(kind: str, wire: FaultyWire, name: str) -> None:
    async def steps(client: Any) -> None:  # noqa: ANN401
        await client.session(name, model=LETTERS).steps("abc")

    async def stream(client: Any) -> None:  # noqa: ANN401
        await tokens_of(client.session(name, model=LETTERS).generate("a", stream=True))

    async def bulk(client: Any) -> None:  # noqa: ANN401
        await client.bulk([Line(name, "a", model=LETTERS)])

    for work in (steps, stream, bulk):
        wire.fates.extend([Fate("busy", 503, "3600")])
        with pytest.raises(RecurraError) as found:
            using(kind, wire.url, work)
        assert (found.value.code, found.value.status) == ("overloaded", 503)
        wire.fates.extend([Fate("refuse")] * 10_000)
        with pytest.raises(RecurraError) as lost:
            using(kind, wire.url, work, retry=Retry(patience_s=0.2, first_s=0.01))
        assert (lost.value.code, lost.value.status) == ("unreachable", 0)
        wire.fates.clear()


def test_a_state_file_whose_answer_is_lost_is_not_sent_twice(
    kind: str, server: Server, wire: FaultyWire, name: str
) -> None:
    server.steps(name, "abc", model=LETTERS)

    async def work(client: Any) -> None:  # noqa: ANN401
        data = server.state_file(name)
        wire.fates.append(Fate("lose_answer"))
        with pytest.raises(RecurraError, match="unreachable"):
            await client.upload(f"{name}-2", data)
        wire.fates.extend([Fate("busy", 503)])
        assert (await (await client.upload(f"{name}-3", data)).info()).position == 3

    using(kind, wire.url, work, http=None)


# ---------------------------------------------------------------------- cuts


@pytest.fixture(scope="module")
def _wire(server: Server) -> Iterator[FaultyWire]:
    one = FaultyWire(int(str(server.settings["port"])))
    yield one
    one.close()


@pytest.fixture
def wire(_wire: FaultyWire) -> FaultyWire:
    _wire.fates.clear()
    _wire.asked.clear()
    return _wire


FATES = st.one_of(
    st.just(Fate("refuse")),
    st.just(Fate("lose_answer")),
    st.builds(Fate, st.just("cut_request"), st.integers(0, 400)),
    st.builds(Fate, st.just("cut_answer"), st.integers(0, 6000)),
    st.builds(Fate, st.just("busy"), st.sampled_from([429, 502, 503, 504])),
)
TEXT = st.text("abcdefghij", min_size=1, max_size=20)
OPERATIONS = st.one_of(
    st.tuples(st.just("steps"), TEXT),
    st.tuples(st.just("generate"), st.integers(1, 40)),
    st.tuples(st.just("stream"), st.integers(1, 300)),
    st.tuples(st.just("bulk"), st.lists(TEXT, min_size=1, max_size=5)),
    st.tuples(st.just("rewind"), st.integers(0, 10)),
    st.tuples(st.just("fork"), st.just(0)),
)


async def do(client: Any, name: str, operations: list[tuple[str, Any]]) -> list[Any]:  # noqa: ANN401
    """What the operations answer, with no word of the session's name."""
    s, found = client.session(name, model=LETTERS), [(await client.create(LETTERS, name, seed=11)).id == name]
    for operation, given_ in operations:
        if operation == "steps":
            answer = await s.steps(given_)
            found.append((answer.position, answer.epoch, answer.predictions))
        elif operation == "generate":
            written = await s.generate("a", max_tokens=given_)
            found.append((written.position, written.tokens, written.text))
        elif operation == "stream":
            stream = s.generate("b", max_tokens=given_, stream=True)
            found.append(([(one.position, one.token, one.text) async for one in stream], stream.done))
        elif operation == "bulk":
            answers = await client.bulk([Line(name, one) for one in given_])
            found.append([(one.position, one.predictions) for one in answers])
        elif operation == "rewind":
            found.append((await s.rewind(min(given_, (await s.info()).position))).position)
        else:
            child = await s.fork(f"{name}-fork-{len(found)}", seed=3)
            found.append((await child.steps("a")).position)
    entries = [(entry.position, entry.input, entry.source) async for entry in s.log()]
    return [*found, entries, (await s.verify()).verified is not False]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(OPERATIONS, min_size=1, max_size=5), fates=st.lists(FATES, max_size=12))
def test_whatever_happens_to_the_connections_nothing_changes(
    kind: str, operations: list[tuple[str, Any]], fates: list[Fate], server: Server, wire: FaultyWire
) -> None:
    wire.fates.clear()
    name = f"wire-{time.monotonic_ns()}"
    unbroken = using("sync", server.url, lambda client: do(client, name, operations))
    wire.fates.extend(fates)
    assert using(kind, wire.url, lambda client: do(client, f"{name}-cut", operations)) == unbroken


def test_a_stream_of_many_pieces_is_whole(kind: str, server: Server, wire: FaultyWire, name: str) -> None:
    whole = server.generate(f"{name}-whole", model=LETTERS, inputs="e", **LONG)
    wire.fates.extend(Fate("cut_answer", 200 + 997 * i) for i in range(20))

    async def work(client: Any) -> None:  # noqa: ANN401
        stream = client.session(name, model=LETTERS).generate("e", stream=True, **LONG)
        assert await tokens_of(stream) == whole["tokens"]
        assert stream.text == whole["text"]

    using(kind, wire.url, work)
    assert not wire.fates
    assert server.position(name) == 3001


@pytest.mark.parametrize("status", [503, 500])
def test_an_error_within_a_stream_is_raised_unless_it_passes(
    status: int, kind: str, server: Server, wire: FaultyWire, name: str
) -> None:
    wire.fates.extend([Fate("error_event", status), Fate("cut_answer", 3000), Fate("error_event", status)])

    async def work(client: Any) -> list[int]:  # noqa: ANN401
        return await tokens_of(client.session(name, model=LETTERS).generate("e", stream=True, **LONG))

    if status == 503:
        whole = server.generate(f"{name}-whole", model=LETTERS, inputs="e", **LONG)
        assert using(kind, wire.url, work) == whole["tokens"] and not wire.fates
    else:
        with pytest.raises(RecurraError) as found:
            using(kind, wire.url, work)
        assert (found.value.code, found.value.status) == ("overloaded", 500)


def test_another_that_moves_the_session_ends_the_stream_with_an_error_or_as_cancelled(
    kind: str, server: Server, name: str
) -> None:
    async def work(client: Any, rewinds: bool) -> Any:  # noqa: ANN401
        session = f"{name}-{rewinds}"
        stream = client.session(session, model=LETTERS).generate("e", stream=True, max_tokens=20_000, seed=2)
        async for token in stream:
            if token.position == 40:
                server.ok(server.post(f"/v1/sessions/{session}/cancel", {}))
                if rewinds:
                    server.rewind(session, 20)
        return stream.done

    done = using(kind, server.url, lambda client: work(client, False))
    assert done.finish_reason == "cancelled" and done.position == server.position(f"{name}-False")


# ---------------------------------------------------------------------- kill -9


def test_a_stream_survives_kill_9(kind: str, mortal: Server, server: Server, name: str) -> None:
    whole = server.generate(f"{name}-whole", model=LETTERS, inputs="e", max_tokens=3000, seed=5)

    async def work(client: Any) -> None:  # noqa: ANN401
        stream = client.session(name, model=LETTERS).generate("e", stream=True, **LONG)
        seen = []
        async for token in stream:
            seen.append(token.token)
            if len(seen) in (100, 1500):
                mortal.restart()
        assert seen == whole["tokens"] and stream.done.finish_reason == "length"

    using(kind, mortal.url, work)
    assert [entry["input"] for entry in mortal.log_of(name)] == ["e", *whole["text"]]
    assert mortal.position(name) == 3001


@pytest.mark.slow
def test_no_step_is_doubled_or_lost_by_kills_under_load(kind: str, fresh: MakeServer) -> None:
    one = fresh().start()
    fed: dict[str, list[float]] = {f"pump-{i}": [] for i in range(3)}
    over = threading.Event()

    def pump(name: str) -> None:
        async def work(client: Any) -> None:  # noqa: ANN401
            s = client.session(name, model="tiny-single")
            while not over.is_set():
                value = float(len(fed[name]))
                answer = await s.steps([[value]])
                fed[name].append(value)
                assert answer.position == len(fed[name])

        using(kind, one.url, work)

    def crowd() -> None:
        async def work(client: Any) -> None:  # noqa: ANN401
            position = 0
            while not over.is_set():
                answers = await client.bulk([Line(f"crowd-{i % 5}", "ab", model=LETTERS) for i in range(20)])
                assert all(isinstance(answer, Steps) for answer in answers)
                position += 8
                assert answers[-1].position == position

        using(kind, one.url, work)

    failures: list[BaseException] = []

    def guarded(work: Callable[..., None], *args: str) -> threading.Thread:
        def run() -> None:
            try:
                work(*args)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    threads = [*(guarded(pump, name) for name in fed), guarded(crowd)]
    for _ in range(3):
        before = {name: len(values) for name, values in fed.items()}
        end = time.monotonic() + 30
        while any(len(values) < before[name] + 5 for name, values in fed.items()) and not failures:
            assert time.monotonic() < end
            time.sleep(0.01)
        one.restart()
    over.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []
    for name, values in fed.items():
        assert [
            entry["input"][0] if isinstance(entry["input"], list) else entry["input"] for entry in one.log_of(name)
        ] == values


# ---------------------------------------------------------------------- parts


@given(st.lists(st.text(min_size=1), min_size=1), st.data())
@settings(max_examples=50, deadline=None)
def test_events_come_out_whole_however_they_are_cut(texts: list[str], data: st.DataObject) -> None:
    cleaned = [text.replace("\n", " ").replace("\r", " ") for text in texts]
    raw = b"".join(f"event: token\nid: 1.{i}\n: ping\ndata: {text}\n\n".encode() for i, text in enumerate(cleaned))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=10)))
    events = Events()
    found = [e for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) for e in events.feed(raw[a:b])]
    assert [event.data for event in found] == cleaned
    assert [event.id for event in found] == [f"1.{i}" for i in range(len(cleaned))]
    assert list(Events().feed(raw[:-1])) == found[:-1]  # the last one is not complete


def test_the_package_needs_httpx_alone_and_is_typed() -> None:
    import tomllib
    from pathlib import Path

    import recurra_client

    folder = Path(recurra_client.__file__).parent
    project = tomllib.loads((folder.parent / "pyproject.toml").read_text())["project"]
    assert [one.split(">=")[0] for one in project["dependencies"]] == ["httpx"]
    assert (folder / "py.typed").exists()
    assert recurra_client.calls.USER_AGENT.endswith("/" + project["version"])  # type: ignore[attr-defined]
    assert isinstance(Stream, type) and issubclass(RecurraError, Exception) and httpx
