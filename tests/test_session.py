"""Sessions among replicas that move them, at the end of the process, and without their model."""

import asyncio
import gc
import shutil
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from contested import KEY, OTHER, Contested
from tiny import LETTERS

from service.errors import Problem
from service.feeding import Gathering, Inputs
from service.registry import Registry
from service.replies import MAX_RACES
from service.run import Reader
from service.session import Opening, Sessions
from service.settings import Settings
from service.store.base import Commit, Generation, Head
from service.store.memory import MemoryStore
from service.work.events import Column, Event, Listener

NEW = Opening(model="tiny-letters", seed=1)
GENERATION = Generation(0, 0, 20, 1.0, 0, 1.0, 0)


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    shutil.copytree(models / "tiny-letters", tmp_path / "models" / "tiny-letters")
    return tmp_path / "models"


Run = Callable[[Callable[[Sessions], Awaitable[Any]]], Any]


@pytest.fixture
def store() -> Contested:
    return Contested()


@pytest.fixture
def run(folder: Path, store: Contested) -> Iterator[Run]:
    """Runs a coroutine on sessions of their own, on an event loop and an engine of their own."""

    def run(work: Callable[[Sessions], Awaitable[Any]]) -> Any:  # noqa: ANN401 (whatever the work gives)
        async def inside() -> Any:  # noqa: ANN401
            loop = asyncio.get_running_loop()

            def post(events: list[tuple[Listener, Event]]) -> None:
                loop.call_soon_threadsafe(lambda: [listener(event) for listener, event in events])

            registry = Registry(Settings(models_dir=folder, store="memory"), store, post)
            registry.start()
            try:
                return await asyncio.wait_for(work(Sessions(registry, store, 0, 5.0)), 20)
            finally:
                await asyncio.to_thread(registry.stop)

        return asyncio.run(inside())

    yield run


async def feed(sessions: Sessions, text: str, opening: Opening = NEW) -> int:
    return (await sessions.replies.again(lambda: sessions.feed(KEY, Inputs(text), opening))).head.position


def logged(store: MemoryStore) -> list[int]:
    head = store.head(KEY)
    assert head is not None
    data = b"".join(segment.data for segment in store.log(head.branch, 0, head.position))
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


# ---------------------------------------------------------------------- races


@pytest.mark.parametrize("races", range(1, MAX_RACES + 1))
def test_a_feed_that_loses_a_race_is_run_again_on_what_won(races: int, run: Run, store: Contested) -> None:
    async def work(sessions: Sessions) -> int:
        await feed(sessions, "ab")
        store.races = races
        return await feed(sessions, "jj")

    assert run(work) == 4 + races
    a, b, j = (LETTERS.index(letter) for letter in "abj")
    assert logged(store) == [a, b, *[OTHER] * races, j, j]


def test_a_last_feed_that_loses_a_race_closes_after_what_won(run: Run, store: Contested) -> None:
    async def work(sessions: Sessions) -> Head:
        await feed(sessions, "ab")
        store.races = 2
        last = Inputs("jj", "outputs", closes=True)
        return (await sessions.replies.again(lambda: sessions.feed(KEY, last, NEW))).head

    closed = run(work)
    assert (closed.status, closed.position) == ("closed", 6) and store.head(KEY) == closed


def test_a_life_is_ended_once_and_another_is_left_alone(run: Run, store: Contested) -> None:
    async def work(sessions: Sessions) -> None:
        await feed(sessions, "ab")
        first = await sessions.head(KEY)
        store.races = 1
        await sessions.replies.again(lambda: sessions.end(first))
        await sessions.end(first)
        assert await feed(sessions, "abc", Opening("tiny-letters", lives=False)) == 3
        await sessions.end(first)
        assert (await sessions.head(KEY)).position == 3

    run(work)


def test_an_opening_may_want_a_life_or_none(run: Run) -> None:
    async def refusal(sessions: Sessions, lives: bool) -> str:
        with pytest.raises(Problem) as found:
            await feed(sessions, "ab", Opening("tiny-letters", lives=lives))
        return found.value.code

    async def work(sessions: Sessions) -> None:
        assert await refusal(sessions, lives=True) == "session_not_found"
        assert await feed(sessions, "ab", Opening("tiny-letters", lives=False)) == 2
        assert await refusal(sessions, lives=False) == "session_exists"
        assert await feed(sessions, "ab", Opening("tiny-letters", lives=True)) == 4

    run(work)


def test_a_feed_gives_up_after_too_many_races_and_feeds_nothing(run: Run, store: Contested) -> None:
    async def work(sessions: Sessions) -> None:
        await feed(sessions, "ab")
        store.races = MAX_RACES + 1
        await feed(sessions, "jj")

    with pytest.raises(Problem) as found:
        run(work)
    assert found.value.code == "session_busy"
    assert len(logged(store)) == 2 + MAX_RACES + 1


def test_a_fenced_feed_that_loses_a_race_is_told_the_true_position(run: Run, store: Contested) -> None:
    async def work(sessions: Sessions) -> None:
        await feed(sessions, "ab")
        store.races = 1
        await feed(sessions, "jj", Opening(position=2))

    with pytest.raises(Problem) as found:
        run(work)
    assert found.value.code == "position_mismatch" and found.value.members["position"] == 3
    assert len(logged(store)) == 3


def test_a_generate_that_loses_the_race_for_its_first_token_is_begun_again(run: Run, store: Contested) -> None:
    async def work(sessions: Sessions) -> Head | None:
        await feed(sessions, "ab")
        store.races = 1

        async def begin() -> Reader:
            reader = Reader(await sessions.generate(KEY, "c", GENERATION, Opening()))
            await reader.begun()
            return reader

        return (await (await sessions.replies.again(begin)).finish()).head

    head = run(work)
    assert head is not None and head.position == len(logged(store)) == 2 + 1 + 1 + 20


def test_a_generate_that_loses_a_later_race_ends_where_it_stood(run: Run, store: Contested) -> None:
    async def work(sessions: Sessions) -> Any:  # noqa: ANN401
        long = msgspec.structs.replace(GENERATION, max_tokens=100_000)
        reader = Reader(await sessions.generate(KEY, "c", long, NEW))
        await reader.begun()
        store.races = 1
        return (await reader.finish()), reader.run.tokens

    done, tokens = run(work)
    assert done.generation.finish_reason == "cancelled" and done.generation.end == tokens[-1].position
    assert len(logged(store)) == 1 + len(tokens) + 1


def test_a_change_that_loses_a_race_is_made_on_what_won(run: Run, store: Contested) -> None:
    async def work(sessions: Sessions) -> Head:
        await feed(sessions, "ab")
        store.races = 2
        return await sessions.replies.again(lambda: sessions.update(KEY, {"a": 1}, None))

    head = run(work)
    assert head.position == 4 and head.metadata == {"a": 1}


# ---------------------------------------------------------------------- memory


async def is_freed(left: "weakref.ref[Any]") -> bool:
    """Whether something goes by itself; the engine's thread lets go of it at the end of its tick."""
    for _ in range(200):
        if left() is None:
            return True
        await asyncio.sleep(0.01)
    return False


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_a_feed_that_has_ended_is_freed_without_garbage_collection(run: Run) -> None:
    async def work(sessions: Sessions) -> bool:
        feeding = sessions.feed_now(KEY, Inputs("ab"), NEW)
        assert feeding is not None
        left = weakref.ref(feeding.work)
        await feeding.outcome()
        return await is_freed(left)

    assert run(work)


class Teller:
    """Who asks for steps in columns, and notes what becomes of them."""

    def __init__(self) -> None:
        self.together: list[list[Any]] = []
        self.alone: list[tuple[Any, Event]] = []
        self._news = asyncio.Event()

    def fed(self, gathering: Gathering, column: Column) -> None:
        self.together.append([gathering.whose[i] for i in column.which])
        self._news.set()

    def ended(self, gathering: Gathering, i: int, event: Event) -> None:
        self.alone.append((gathering.whose[i], event))
        self._news.set()

    async def told(self, count: int) -> None:
        while sum(map(len, self.together)) + len(self.alone) < count:
            self._news.clear()
            await self._news.wait()


class Asked(msgspec.Struct):
    """A step that is asked for."""

    inputs: object
    model: str | None = None
    position: int | None = None


def test_steps_of_one_turn_of_the_event_loop_go_together(run: Run) -> None:
    async def work(sessions: Sessions) -> Any:  # noqa: ANN401
        keys = [("", f"s{i}") for i in range(5)]
        for key in keys:
            await sessions.feed(key, Inputs("a"), NEW)
        one, other = Teller(), Teller()
        for i, key in enumerate(keys):
            assert sessions.step(key, Asked([i], "tiny-letters", 1), one if i < 3 else other, i) is not None
        assert sessions.step(keys[0], Asked([0]), one, 9) is None, "its session is busy"
        await one.told(3)
        await other.told(2)
        heads = [await sessions.head(key) for key in keys]
        return one.together, other.together, [head.position for head in heads], len(sessions._turns)

    assert run(work) == ([[0, 1, 2]], [[3, 4]], [2] * 5, 0)


@pytest.mark.parametrize(
    "asked",
    [
        Asked([99]),
        Asked("?"),
        Asked("ab"),
        Asked([]),
        Asked([1], "another"),
        Asked([1], None, 7),
    ],
)
def test_what_is_no_plain_step_does_not_begin(asked: Asked, run: Run) -> None:
    async def work(sessions: Sessions) -> Any:  # noqa: ANN401
        await sessions.feed(KEY, Inputs("a"), NEW)
        begun = [sessions.step(key, asked, Teller(), 0) for key in (KEY, ("", "new"))]
        return begun, len(sessions._turns)

    assert run(work) == ([None, None], 0)


def test_a_step_that_nobody_waits_for_is_not_fed(run: Run) -> None:
    async def work(sessions: Sessions) -> Any:  # noqa: ANN401
        keys = [("", f"s{i}") for i in range(3)]
        for key in keys:
            await sessions.feed(key, Inputs("a"), NEW)
        teller = Teller()
        gatherings = [sessions.step(key, Asked([1]), teller, i) for i, key in enumerate(keys)]
        assert gatherings[0] is not None
        gatherings[0].drop((1,))
        await teller.told(3)
        positions = [(await sessions.head(key)).position for key in keys]
        return teller.together, [whose for whose, _ in teller.alone], positions, len(sessions._turns)

    assert run(work) == ([[0, 2]], [1], [2, 1, 2], 0)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("dropped", [False, True])
def test_steps_that_have_ended_are_freed_without_garbage_collection(dropped: bool, run: Run) -> None:
    async def work(sessions: Sessions) -> bool:
        await sessions.feed(KEY, Inputs("a"), NEW)
        teller = Teller()
        gathering = sessions.step(KEY, Asked([1]), teller, 0)
        assert gathering is not None
        if dropped:
            gathering.drop((0,))
        left = weakref.ref(gathering)
        del gathering
        await teller.told(1)
        assert len(teller.alone) == dropped
        return await is_freed(left)

    assert run(work)


# ---------------------------------------------------------------------- the end of the process


def test_a_service_that_stops_refuses_new_work_and_suspends_generates(run: Run, store: Contested) -> None:
    async def work(sessions: Sessions) -> Any:  # noqa: ANN401
        long = msgspec.structs.replace(GENERATION, max_tokens=100_000)
        begun = await sessions.generate(KEY, "a", long, NEW)
        reader = Reader(begun)
        await reader.begun()
        await sessions.drain(5.0)
        for refused in (feed(sessions, "a"), sessions.delete(KEY), sessions.generate(KEY, None, long, NEW)):
            with pytest.raises(Problem) as found:
                await refused
            assert found.value.code == "not_ready"
        await begun.ended()
        reader.close()
        return begun

    begun = run(work)
    head = store.head(KEY)
    assert begun.suspended and head is not None and head.generation is not None
    assert head.generation.finish_reason is None and head.position == begun.tokens[-1].position


def test_a_sweep_leaves_sessions_with_work_alone(run: Run, store: Contested) -> None:
    async def work(sessions: Sessions) -> tuple[str, str]:
        opening = Opening(model="tiny-letters", ttl_s=1)
        await sessions.create(KEY, opening)
        await sessions.create(("", "idle"), opening)
        async with sessions.turn(KEY):
            await asyncio.sleep(1.05)
            await sessions.sweep()
            busy = await sessions.head(KEY)
        idle = store.head(("", "idle"), at_ms=0)
        assert idle is not None
        return busy.status, idle.status

    assert run(work) == ("live", "expired")


# ---------------------------------------------------------------------- models


def test_a_session_keeps_its_graph_not_only_its_version(run: Run, store: Contested, folder: Path) -> None:
    """A bundle whose graph is another one under the same number is not the session's model."""

    async def work(sessions: Sessions) -> None:
        await feed(sessions, "ab")
        head = store.head(KEY)
        assert head is not None
        store.commit([Commit(msgspec.structs.replace(head, graph="0" * 64), head.fence)])
        await feed(sessions, "c")

    with pytest.raises(Problem) as found:
        run(work)
    assert found.value.code == "not_ready"
