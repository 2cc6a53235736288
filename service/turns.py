"""Taking turns: operations that change one session run one after another, in order of arrival."""

import asyncio
from contextlib import suppress

from service.errors import Problem
from service.store.base import Key, now_ms

MAX_WAITING = 16


class Turn:
    """Who may change a session now, and who waits for it."""

    __slots__ = ("since_ms", "users", "waiting")

    def __init__(self, since_ms: int) -> None:
        self.users = 1
        """the one whose turn it is, and those who wait"""
        self.waiting: list[asyncio.Future[None]] = []
        self.since_ms = since_ms


def leave(turns: dict[Key, Turn], key: Key) -> None:
    """Give the turn to the next."""
    turn = turns[key]
    turn.users -= 1
    while turn.waiting:
        called = turn.waiting.pop(0)
        if not called.done():
            called.set_result(None)
            return
    del turns[key]


class Place:
    """A place in a session's queue, and its turn once it has come."""

    __slots__ = ("_counted", "_key", "_turns", "_urgent", "_wait_s", "_what")

    def __init__(
        self, turns: dict[Key, Turn], key: Key, wait_s: float, urgent: bool = False, what: str = "session"
    ) -> None:
        self._what = what
        self._turns = turns
        self._key = key
        self._wait_s = wait_s
        self._urgent = urgent
        self._counted = False
        """whether it is among the users of the session's turn"""

    def take(self) -> bool:
        """Take the turn if nobody has it."""
        if self._key in self._turns:
            return False
        self._turns[self._key] = Turn(now_ms())
        self._counted = True
        return True

    async def __aenter__(self) -> "Place":
        if not self.take():
            await self._queue(self._turns[self._key])
        return self

    async def __aexit__(self, *_: object) -> None:
        self.leave()

    async def _queue(self, turn: Turn) -> None:
        if turn.users > MAX_WAITING and not self._urgent:
            raise Problem("session_busy", f"{MAX_WAITING} operations wait for {self._name}; try again later")
        turn.users += 1
        self._counted = True
        called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        turn.waiting.append(called)
        try:
            async with asyncio.timeout(self._wait_s):
                await called
        except BaseException as error:
            self._give_up(turn, called)
            if isinstance(error, TimeoutError):
                raise Problem("session_busy", f"waited {self._wait_s:g} s for {self._name}") from error
            raise

    def _give_up(self, turn: Turn, called: "asyncio.Future[None]") -> None:
        if not called.cancelled():
            self.leave()  # the turn came at the same moment: the next one takes it
            return
        self._counted = False
        turn.users -= 1
        with suppress(ValueError):  # passed over already by one that has left
            turn.waiting.remove(called)

    @property
    def _name(self) -> str:
        return f"{self._what} {self._key[1]!r}"

    def leave(self) -> None:
        """Give the turn to the next."""
        if self._counted:
            self._counted = False
            leave(self._turns, self._key)
