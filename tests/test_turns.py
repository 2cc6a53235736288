"""Turns: operations on one session run one after another, in order, and not too many wait."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from service.errors import Problem
from service.store.base import Key
from service.turns import MAX_WAITING, Place, Turn

KEY = ("", "s")
Turns = dict[Key, Turn]


def run(work: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401 (whatever the work gives)
    return asyncio.run(asyncio.wait_for(work, 10))


async def take(turns: Turns, order: list[int], number: int, wait_s: float = 5.0) -> None:
    async with Place(turns, KEY, wait_s):
        order.append(number)
        await asyncio.sleep(0)


async def hold(turns: Turns, wait_s: float = 5.0) -> Place:
    place = Place(turns, KEY, wait_s)
    await place.__aenter__()
    return place


def test_turns_come_in_order_of_arrival() -> None:
    async def work() -> list[int]:
        turns: Turns = {}
        order: list[int] = []
        await asyncio.gather(*(take(turns, order, i) for i in range(MAX_WAITING + 1)))
        assert turns == {}
        return order

    assert run(work()) == list(range(MAX_WAITING + 1))


def test_sessions_do_not_wait_for_each_other() -> None:
    async def work() -> None:
        turns: Turns = {}
        await hold(turns)
        async with Place(turns, ("", "other"), 0.1), Place(turns, ("tenant", "s"), 0.1):
            assert len(turns) == 3

    run(work())


def test_more_than_sixteen_waiting_are_busy() -> None:
    async def work() -> None:
        turns: Turns = {}
        order: list[int] = []
        first = await hold(turns)
        waiting = [asyncio.create_task(take(turns, order, i)) for i in range(MAX_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(Problem) as refused:
            await hold(turns)
        assert refused.value.code == "session_busy"
        first.leave()
        await asyncio.gather(*waiting)
        assert len(order) == MAX_WAITING and turns == {}

    run(work())


def test_one_that_waits_too_long_is_busy_and_leaves_the_queue() -> None:
    async def work() -> None:
        turns: Turns = {}
        first = await hold(turns)
        with pytest.raises(Problem) as refused:
            await hold(turns, 0.02)
        assert refused.value.code == "session_busy"
        first.leave()
        assert turns == {}
        (await hold(turns, 0.1)).leave()

    run(work())


def test_a_waiter_that_leaves_gives_its_place_up() -> None:
    async def work() -> list[int]:
        turns: Turns = {}
        order: list[int] = []
        first = await hold(turns)
        waiting = [asyncio.create_task(take(turns, order, i)) for i in range(3)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        await asyncio.sleep(0)
        first.leave()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert turns == {}
        return order

    assert run(work()) == [0, 2]


def test_a_turn_ends_with_its_block_also_by_an_exception() -> None:
    async def work() -> None:
        turns: Turns = {}
        with pytest.raises(RuntimeError):
            async with Place(turns, KEY, 1):
                raise RuntimeError
        assert turns == {}

    run(work())


def test_leaving_twice_is_leaving_once() -> None:
    async def work() -> None:
        turns: Turns = {}
        first = await hold(turns)
        second = asyncio.create_task(hold(turns))
        await asyncio.sleep(0)
        first.leave()
        first.leave()
        place = await second
        assert len(turns) == 1
        place.leave()
        assert turns == {}

    run(work())
