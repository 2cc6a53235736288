"""The limit of HTTP: an ASGI application under uvicorn that reads a request and answers the same bytes each time."""

from typing import Any

from benchmarks.peers.start import serve

ANSWER = b'{"session":"00000000","epoch":1,"position":1,"steps":1,"predictions":[{"token":1,"value":0.123456}]}'
HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(ANSWER)).encode())]


async def app(scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401 (ASGI)
    """Answer without looking."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": ANSWER})


if __name__ == "__main__":
    serve(lambda bundle, threads: app)
