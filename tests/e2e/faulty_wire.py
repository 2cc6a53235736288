"""A proxy that does to connections what it is told to: cuts, loses answers, refuses."""

import socket
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

STEP = 65536


@dataclass(frozen=True)
class Fate:
    """What becomes of one connection; when the fates are used up, connections are passed on whole."""

    kind: Literal["refuse", "cut_request", "lose_answer", "cut_answer", "busy", "error_event"]
    amount: int = 0
    """bytes that pass before the cut; the status of `busy` and `error_event`"""
    retry_after: str = "0"


class FaultyWire:
    """Forwards a port of 127.0.0.1 to a server's."""

    def __init__(self, upstream: int) -> None:
        self.fates: deque[Fate] = deque()
        self.asked: list[bytes] = []
        """the heads of the requests that were answered `busy`, and whatever else was read of them"""
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            fate = self.fates.popleft() if self.fates else None
            threading.Thread(target=self._connection, args=(client, fate), daemon=True).start()

    def _connection(self, client: socket.socket, fate: Fate | None) -> None:
        with client, suppress(OSError):
            if fate is not None and fate.kind == "refuse":
                return
            if fate is not None and fate.kind in ("busy", "error_event"):
                self._refuse(client, fate)
                return
            with socket.create_connection(("127.0.0.1", self._upstream)) as server:
                kind = fate.kind if fate is not None else ""
                amount = fate.amount if fate is not None else 0
                back = threading.Thread(target=_pump, args=(server, client, _limit(kind, amount, "answer")))
                back.start()
                _pump(client, server, amount if kind == "cut_request" else None)
                back.join()

    def _refuse(self, client: socket.socket, fate: Fate) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            request += client.recv(STEP)
        self.asked.append(request)
        body = b'{"code":"overloaded","detail":"try again"}'
        status, kind = fate.amount, "application/problem+json"
        if fate.kind == "error_event":
            body = b'event: error\ndata: {"code":"overloaded","detail":"later","status":%d}\n\n' % status
            status, kind = 200, "text/event-stream"
        client.sendall(
            b"HTTP/1.1 %d Said\r\nRetry-After: %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n"
            b"Connection: close\r\n\r\n%s" % (status, fate.retry_after.encode(), kind.encode(), len(body), body)
        )
        client.shutdown(socket.SHUT_WR)
        while client.recv(STEP):  # or what is still on its way would reset the connection
            pass


def _limit(kind: str, amount: int, what: str) -> int | None:
    return {"lose_answer": 0, f"cut_{what}": amount}.get(kind)


def _pump(source: socket.socket, sink: socket.socket, limit: int | None) -> None:
    """Pass on, up to a limit: then both ends are told that it is over."""
    try:
        passed = 0
        while part := source.recv(STEP):
            if limit is not None and passed + len(part) > limit:
                sink.sendall(part[: limit - passed])
                break
            sink.sendall(part)
            passed += len(part)
        else:
            if limit is None:
                sink.shutdown(socket.SHUT_WR)
                return
    except OSError:
        pass
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
