"""Taking turns: operations that change one session run one after another, in order of arrival."""

import asyncio

from service.errors import Problem
from service.store.base import Key, now_ms

MAX_WAITING = 16


class Turn:
    """Who may change a session now, and who waits for it."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0
        self.since_ms = now_ms()


class Place:
    """A place in a session's queue, and its turn once it has come."""

    def __init__(
        self, turns: dict[Key, Turn], key: Key, wait_s: float, urgent: bool = False, what: str = "session"
    ) -> None:
        self._what = f"{what} {key[1]!r}"
        self._turns = turns
        self._key = key
        self._wait_s = wait_s
        self._urgent = urgent
        self._turn: Turn | None = None

    async def __aenter__(self) -> "Place":
        turn = self._turns.setdefault(self._key, Turn())
        if turn.users > MAX_WAITING and not self._urgent:
            raise Problem("session_busy", f"{MAX_WAITING} operations wait for {self._what}; try again later")
        turn.users += 1
        try:
            async with asyncio.timeout(self._wait_s):
                await turn.lock.acquire()
        except BaseException as error:
            self._release(turn)
            if isinstance(error, TimeoutError):
                raise Problem("session_busy", f"waited {self._wait_s:g} s for {self._what}") from error
            raise
        self._turn = turn
        return self

    async def __aexit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Give the turn to the next."""
        if self._turn is not None:
            turn, self._turn = self._turn, None
            turn.lock.release()
            self._release(turn)

    def _release(self, turn: Turn) -> None:
        turn.users -= 1
        if turn.users == 0:
            del self._turns[self._key]
