"""Answering a request once: what a key was answered before, and trying again after a lost race."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from service import metrics
from service.errors import Problem
from service.run import Race
from service.store.base import Key, Reply, Store
from service.turns import Place, Turn
from service.work.feed import MAX_BODY_KEPT, Keyed

T = TypeVar("T")

MAX_RACES = 3


class Replies:
    """The answers that are kept under idempotency keys."""

    def __init__(self, store: Store, wait_s: float) -> None:
        self._store = store
        self._wait_s = wait_s
        self._claims: dict[Key, Turn] = {}

    async def once(
        self,
        keyed: Keyed | None,
        fresh: Callable[[], Awaitable[T]],
        replay: Callable[[Reply], Awaitable[T]],
        holds: Callable[[Reply], Awaitable[bool]] | None = None,
    ) -> T:
        """What the key was answered before, or else the fresh answer; a second request waits for the first.

        After a lost race the key is looked up again, and the work is tried again if nothing of it was kept.
        `holds` says whether what was kept still counts; by default it always does.
        """
        if keyed is None:
            return await self.again(fresh)
        claim = (f"{keyed.tenant}\0{keyed.scope}", keyed.key)
        async with Place(self._claims, claim, self._wait_s, what="the request with the key"):

            async def found_or_fresh() -> T:
                found = await self.find((keyed.tenant, keyed.scope), keyed.key)
                if found is None or (holds is not None and not await holds(found)):
                    return await fresh()
                if found.digest != keyed.digest:
                    raise Problem("idempotency_key_reused", f"the key {keyed.key!r} was used for another request")
                metrics.REPLAYS.inc()
                return await replay(found)

            return await self.again(found_or_fresh)

    async def again(self, fresh: Callable[[], Awaitable[T]]) -> T:
        """Work that commits once; tried again after a lost race."""
        for _ in range(MAX_RACES + 1):
            try:
                return await fresh()
            except Race:
                continue
        raise Problem("session_busy", "others keep moving the session; try again")

    async def find(self, scope: Key, key: str) -> Reply | None:
        """What is kept under a key of a session, or of the tenant (its id is then "")."""
        return await asyncio.to_thread(self._store.reply, *scope, key)

    async def keep(self, keyed: Keyed | None, body: bytes) -> None:
        """Keep the answer of a request that commits nothing, if it has a key and the answer is small."""
        if keyed is not None and len(body) <= MAX_BODY_KEPT:
            reply = Reply(keyed.scope, keyed.key, keyed.digest, "body", body=body.rstrip(b"\n"))
            await asyncio.to_thread(self._store.keep, keyed.tenant, reply)
