"""The service that everyone writes first: FastAPI, one call of the graph a request, a dict of states."""

import json
from collections.abc import Iterator

import numpy as np
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from benchmarks.bare import Array, Bare
from benchmarks.peers.start import serve
from service.bundle import Bundle


class Step(BaseModel):
    """A symbol for a session."""

    session: str
    token: int


def build(bundle: Bundle, threads: int) -> FastAPI:
    """The application."""
    app, graph = FastAPI(), Bare(bundle, threads)
    states: dict[str, list[Array]] = {}

    def run(session: str, token: int) -> Array:
        before = states[session] if session in states else graph.initial(1)
        outputs, states[session] = graph.step(np.array([[token]]), before)
        return np.asarray(outputs[0, 0])

    @app.post("/step")
    def step(body: Step) -> dict[str, float]:
        logits = run(body.session, body.token)
        best = int(logits.argmax())
        return {"token": best, "value": float(logits[best])}

    def tokens(body: Step) -> Iterator[str]:
        rng, token = np.random.default_rng(), body.token
        while True:
            logits = run(body.session, token)
            weights = np.exp(logits - logits.max(), dtype=np.float64)
            token = int(rng.choice(len(weights), p=weights / weights.sum()))
            yield f"event: token\ndata: {json.dumps({'token': token})}\n\n"

    @app.post("/generate")
    def generate(body: Step) -> StreamingResponse:
        return StreamingResponse(tokens(body), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    serve(build)
