"""The next thing one writes: FastAPI, with what waits put into one call of the graph."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from benchmarks.bare import Array, Bare
from benchmarks.peers.start import serve
from service.bundle import Bundle

MAX_BATCH = 64

Answer = dict[str, float]


class Step(BaseModel):
    """A symbol for a session."""

    session: str
    token: int


def build(bundle: Bundle, threads: int) -> FastAPI:
    """The application."""
    graph, axes = Bare(bundle, threads), [state.stack_axis for state in bundle.manifest.states]
    states: dict[str, list[Array]] = {}
    waiting: asyncio.Queue[tuple[Step, asyncio.Future[Answer]]] = asyncio.Queue()

    def run(sessions: list[str], tokens: list[int]) -> list[Answer]:
        rows = [states.get(session) or graph.initial(1) for session in sessions]
        stacked = [np.concatenate(arrays, axis) for arrays, axis in zip(zip(*rows, strict=True), axes, strict=True)]
        outputs, after = graph.step(np.array([tokens]), stacked)
        parts = [np.split(array, len(rows), axis) for array, axis in zip(after, axes, strict=True)]
        states.update(zip(sessions, map(list, zip(*parts, strict=True)), strict=True))
        best = outputs[0].argmax(-1)
        values = outputs[0][np.arange(len(rows)), best]
        return [{"token": t, "value": v} for t, v in zip(best.tolist(), values.tolist(), strict=True)]

    async def work() -> None:
        while True:
            batch = [await waiting.get()]
            while not waiting.empty() and len(batch) < MAX_BATCH:
                batch.append(waiting.get_nowait())
            answers = await asyncio.to_thread(run, [one.session for one, _ in batch], [one.token for one, _ in batch])
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(work())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/step")
    async def step(body: Step) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        waiting.put_nowait((body, future))
        return await future

    @app.post("/steps")
    async def steps(request: Request) -> Response:
        lines = [Step.model_validate_json(line) for line in (await request.body()).splitlines()]
        answers = await asyncio.to_thread(run, [line.session for line in lines], [line.token for line in lines])
        said = [json.dumps({"session": a.session, **b}) for a, b in zip(lines, answers, strict=True)]
        return Response("\n".join(said), media_type="application/x-ndjson")

    return app


if __name__ == "__main__":
    serve(build)
