"""The client to await; otherwise it is as the other."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar, Unpack, overload

import httpx

from recurra_client import calls
from recurra_client.bulk import HEADERS, PATH, Batch, Line
from recurra_client.calls import Call, Inputs, Options, Shown
from recurra_client.errors import RecurraError
from recurra_client.events import Events, Following
from recurra_client.results import (
    Done,
    Forecast,
    Generated,
    LogEntry,
    Prediction,
    SessionInfo,
    Steps,
    Token,
    Verified,
)
from recurra_client.retry import Attempts, Retry

T = TypeVar("T")


class AsyncClient:
    """A service; may be used by many tasks. Close it, or use it as a context manager."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        retry: Retry | None = None,
        timeout_s: float = 60.0,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        """`timeout_s`: until an answer, or a stream's next sign of life; `http`: a client with settings of your own."""
        self._retry = retry if retry is not None else Retry()
        self._http = (
            http if http is not None else httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(timeout_s, connect=5))
        )
        self._http.headers["User-Agent"] = calls.USER_AGENT
        if api_key is not None:
            self._http.headers["Authorization"] = f"Bearer {api_key}"

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def session(
        self, id: str | None = None, *, model: str | None = None, version: int | None = None, keep: bool | None = None
    ) -> "AsyncSession":
        """A session, made by its first request if it does not live and `model` is given; asks nothing yet.

        As a context manager it is deleted at the block's end, unless it is to be kept: by default if it has an `id`.
        """
        return AsyncSession(self, id, model, version, keep if keep is not None else id is not None)

    async def create(
        self,
        model: str,
        id: str | None = None,
        *,
        version: int | None = None,
        seed: int | None = None,
        ttl_s: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        keep: bool = True,
    ) -> "AsyncSession":
        """A new session at position 0; raises RecurraError `session_exists`."""
        session = calls.checked_id(id) if id is not None else None
        info = await self.send(calls.create(model, session, version, seed, ttl_s, metadata))
        return AsyncSession(self, info.id, info.model, version, keep)

    async def upload(self, id: str, data: bytes) -> "AsyncSession":
        """A new session from a state file: it goes on from the file's position."""
        info = await self.send(calls.upload(calls.checked_id(id), data))
        return AsyncSession(self, info.id, info.model, None, True)

    async def sessions(self, model: str | None = None) -> AsyncIterator[SessionInfo]:
        """All sessions that live, in order of id."""
        cursor: str | int | None = None
        while True:
            page = await self.send(calls.sessions(model, cursor))
            for entry in page.entries:
                yield entry
            cursor = page.next
            if cursor is None:
                return

    async def models(self) -> list[dict[str, Any]]:
        """What is served."""
        return await self.send(calls.models())

    async def predict(
        self,
        model: str,
        sequences: Sequence[Inputs],
        *,
        predictions: Literal["last", "all"] = "last",
        version: int | None = None,
    ) -> list[list[Prediction]]:
        """Whole sequences without a session: a list of predictions each."""
        return await self.send(calls.predict(model, sequences, predictions, version))

    async def bulk(self, lines: Iterable[Line]) -> list[Steps | RecurraError]:
        """Feed many sessions in one request: what became of each line, in order.

        Lines of one session are fed in order; after one that was refused its later ones are not (code `skipped`).
        """
        batch, attempts = Batch(lines), Attempts(self._retry)
        while batch.open:
            try:
                pause = await self._send_batch(batch, attempts)
            except httpx.TransportError as error:
                batch.settle()
                pause = attempts.lost(error) if batch.open else 0.0
            await asyncio.sleep(pause)
        return batch.answers()

    async def _send_batch(self, batch: Batch, attempts: Attempts) -> float:
        """Send what is open; gives the pause before what is open then."""
        async with self._http.stream("POST", PATH, content=batch.content(), headers=HEADERS) as response:
            if not response.is_success:
                await response.aread()
                return attempts.refused(response)
            async for part in response.aiter_bytes():
                if batch.feed(part):
                    attempts.succeed()
        refusal = batch.settle()
        if refusal is not None:
            return attempts.refused_with(refusal)
        return attempts.lost(None) if batch.open else 0.0

    async def send(self, call: Call[T]) -> T:
        """Ask, again where that helps; raises RecurraError."""
        attempts = Attempts(self._retry, call.repeatable)
        while True:
            try:
                response = await self._http.request(**calls.arguments(call))
            except httpx.TransportError as error:
                pause = attempts.lost(error)
            else:
                if response.is_success:
                    return call.read(response)
                pause = attempts.refused(response)
            await asyncio.sleep(pause)

    async def follow(self, following: Following) -> AsyncGenerator[Token, None]:
        """The tokens of a generate, over as many connections as it takes; raises RecurraError."""
        attempts = Attempts(self._retry)
        while following.done is None:
            method, path, headers, body = following.request()
            try:
                async with self._http.stream(method, path, headers=headers, json=body) as response:
                    if response.status_code == 200:
                        events = Events()
                        async for part in response.aiter_bytes():
                            for token in following.tokens(events.feed(part)):
                                attempts.succeed()
                                yield token
                        pause = following.ended(attempts)
                    elif response.status_code == 204:
                        raise following.lost()
                    else:
                        await response.aread()
                        pause = attempts.refused(response)
            except httpx.TransportError as error:
                pause = attempts.lost(error) if following.done is None else 0.0
            await asyncio.sleep(pause)


class AsyncStream(AsyncIterator[Token]):
    """Tokens as they are committed; it resumes by itself. Leaving it early leaves the generate suspended."""

    def __init__(self, client: AsyncClient, following: Following) -> None:
        self._following = following
        self._tokens = client.follow(following)
        self._texts: list[str] = []

    async def __anext__(self) -> Token:
        token = await anext(self._tokens)
        self._texts.append(token.text)
        return token

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop reading; the generate is suspended where it stands."""
        await self._tokens.aclose()

    @property
    def done(self) -> Done | None:
        """How it ended, once it has."""
        return self._following.done

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts) + (self.done.text if self.done is not None else "")


class AsyncSession:
    """One memory of one model."""

    def __init__(self, client: AsyncClient, id: str | None, model: str | None, version: int | None, keep: bool) -> None:
        self.id = calls.checked_id(id) if id is not None else calls.new_key()
        self._client = client
        self._opening: dict[str, Any] = {"model": model, "version": version}
        self._keep = keep

    async def __aenter__(self) -> "AsyncSession":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if not self._keep:
            try:
                await self.delete()
            except RecurraError as problem:
                if error is None and problem.status not in (404, 410):
                    raise

    async def steps(
        self,
        inputs: Inputs,
        *,
        predictions: Shown = "last",
        alternatives: int | None = None,
        position: int | None = None,
        key: str | None = None,
    ) -> Steps:
        """Feed a sequence, all of it or nothing. `position`: refuse unless the session stands there."""
        body = {"inputs": inputs, "predictions": predictions, "alternatives": alternatives, "position": position}
        return await self._client.send(calls.steps(self.id, {**body, **self._opening}, key))

    @overload
    def generate(
        self, inputs: Inputs | None = None, *, stream: Literal[True], **options: Unpack[Options]
    ) -> "AsyncStream": ...
    @overload
    def generate(
        self, inputs: Inputs | None = None, *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Awaitable[Generated]: ...
    def generate(
        self, inputs: Inputs | None = None, *, stream: bool = False, **options: Unpack[Options]
    ) -> "AsyncStream | Awaitable[Generated]":
        """Draw tokens and go on remembering; as a stream each comes once it is committed."""
        body = {"inputs": inputs, **options, **self._opening}
        if stream:
            return AsyncStream(self._client, Following(self.id, body))
        return self._client.send(calls.generate(self.id, body))

    async def forecast(
        self,
        horizon: int,
        *,
        samples: int | None = None,
        quantiles: Sequence[float] | None = None,
        future: Sequence[Mapping[str, Any]] | None = None,
        seed: int | None = None,
    ) -> Forecast:
        """Steps ahead on a copy; the session does not change. `future`: the features that it does not predict."""
        body = {"horizon": horizon, "samples": samples, "quantiles": quantiles, "future": future, "seed": seed}
        return await self._client.send(calls.forecast(self.id, body))

    async def fork(
        self, id: str | None = None, *, position: int | None = None, seed: int | None = None
    ) -> "AsyncSession":
        """A new session whose past is this one's, up to a position."""
        child = calls.checked_id(id) if id is not None else None
        info = await self._client.send(calls.fork(self.id, child, position, seed))
        return AsyncSession(self._client, info.id, None, None, True)

    async def rewind(self, position: int) -> SessionInfo:
        """Go back to a position."""
        return await self._client.send(calls.rewind(self.id, position))

    async def migrate(self, version: int) -> SessionInfo:
        """Move to another version of the model."""
        info = await self._client.send(calls.migrate(self.id, version))
        self._opening["version"] = version
        return info

    async def cancel(self) -> SessionInfo:
        """End a running or suspended generate where it stands."""
        return await self._client.send(calls.cancel(self.id))

    async def verify(self, position: int | None = None) -> Verified:
        """Fold the log again and compare."""
        return await self._client.send(calls.verify(self.id, position))

    async def log(self, after: int | None = None) -> AsyncIterator[LogEntry]:
        """Its inputs, in order."""
        begin: str | int | None = after
        while True:
            page = await self._client.send(calls.log(self.id, begin))
            for entry in page.entries:
                yield entry
            begin = page.next
            if begin is None:
                return

    async def state(self, position: int | None = None) -> bytes:
        """The memory itself, as a safetensors file; `Client.upload` goes on from it."""
        return await self._client.send(calls.state(self.id, position))

    async def info(self) -> SessionInfo:
        """What the service says of it."""
        return await self._client.send(calls.info(self.id))

    async def update(self, *, metadata: Mapping[str, Any] | None = None, ttl_s: int | None = None) -> SessionInfo:
        """Change what is said of it."""
        return await self._client.send(calls.update(self.id, metadata, ttl_s))

    async def delete(self, *, forks: bool = False) -> None:
        """Close it; with `forks` those that left it too."""
        await self._client.send(calls.delete(self.id, forks))
