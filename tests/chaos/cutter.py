"""A proxy that reads a request whole and then, now and then, cuts the connection."""

import asyncio
import random
import threading
from contextlib import suppress

FATES = {"pass": 94, "before": 1, "after": 2, "answer": 2, "middle": 1}
"""whole; cut before the server sees it; after it was sent; before its answer; within its answer"""

BROKEN = (OSError, asyncio.IncompleteReadError)


class Cutter:
    """Forwards a port of 127.0.0.1 to a server's, on a thread of its own."""

    def __init__(self, upstream: int, seed: int) -> None:
        self.cuts = 0
        self.port = 0
        self._upstream = upstream
        self._rng = random.Random(seed)
        self._started = threading.Event()
        self._open: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def start(self) -> "Cutter":
        self._thread.start()
        assert self._started.wait(10)
        return self

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = int(server.sockets[0].getsockname()[1])
        self._started.set()
        await self._stop.wait()
        server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def _accept(self, client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._forward(client, answers))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _forward(self, client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        try:
            answered, server = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:
            answers.close()
            return
        fate = ["pass"]
        pump = asyncio.create_task(_pump(answered, answers, fate))
        try:
            await self._requests(client, server, fate)
        except BROKEN:
            pass
        finally:
            server.close()
            answers.close()
            await asyncio.gather(pump, return_exceptions=True)

    async def _requests(self, client: asyncio.StreamReader, server: asyncio.StreamWriter, fate: list[str]) -> None:
        while True:
            request = await _whole_request(client)
            fate[0] = self._rng.choices(list(FATES), list(FATES.values()))[0]
            self.cuts += fate[0] != "pass"
            if fate[0] == "before":
                return
            server.write(request)
            await server.drain()
            if fate[0] == "after":
                return


async def _whole_request(client: asyncio.StreamReader) -> bytes:
    head = await client.readuntil(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return head + await client.readexactly(int(lengths[0].partition(b":")[2]) if lengths else 0)


async def _pump(server: asyncio.StreamReader, answers: asyncio.StreamWriter, fate: list[str]) -> None:
    with suppress(*BROKEN):
        while part := await server.read(65536):
            if fate[0] == "answer":
                break
            if fate[0] == "middle":
                answers.write(part[: len(part) // 2])
                break
            answers.write(part)
            await answers.drain()
    answers.close()
