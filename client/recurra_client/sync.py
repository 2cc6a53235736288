"""The client that blocks."""

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
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


class Client:
    """A service; may be used by several threads. Close it, or use it as a context manager."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        retry: Retry | None = None,
        timeout_s: float = 60.0,
        http: httpx.Client | None = None,
    ) -> None:
        """`timeout_s`: until an answer, or a stream's next sign of life; `http`: a client with settings of your own."""
        self._retry = retry if retry is not None else Retry()
        self._http = (
            http if http is not None else httpx.Client(base_url=url, timeout=httpx.Timeout(timeout_s, connect=5))
        )
        self._http.headers["User-Agent"] = calls.USER_AGENT
        if api_key is not None:
            self._http.headers["Authorization"] = f"Bearer {api_key}"

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def session(
        self, id: str | None = None, *, model: str | None = None, version: int | None = None, keep: bool | None = None
    ) -> "Session":
        """A session, made by its first request if it does not live and `model` is given; asks nothing yet.

        As a context manager it is deleted at the block's end, unless it is to be kept: by default if it has an `id`.
        """
        return Session(self, id, model, version, keep if keep is not None else id is not None)

    def create(
        self,
        model: str,
        id: str | None = None,
        *,
        version: int | None = None,
        seed: int | None = None,
        ttl_s: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        keep: bool = True,
    ) -> "Session":
        """A new session at position 0; raises RecurraError `session_exists`."""
        session = calls.checked_id(id) if id is not None else None
        info = self.send(calls.create(model, session, version, seed, ttl_s, metadata))
        return Session(self, info.id, info.model, version, keep)

    def upload(self, id: str, data: bytes) -> "Session":
        """A new session from a state file: it goes on from the file's position."""
        info = self.send(calls.upload(calls.checked_id(id), data))
        return Session(self, info.id, info.model, None, True)

    def sessions(self, model: str | None = None) -> Iterator[SessionInfo]:
        """All sessions that live, in order of id."""
        cursor: str | int | None = None
        while True:
            page = self.send(calls.sessions(model, cursor))
            yield from page.entries
            cursor = page.next
            if cursor is None:
                return

    def models(self) -> list[dict[str, Any]]:
        """What is served."""
        return self.send(calls.models())

    def predict(
        self,
        model: str,
        sequences: Sequence[Inputs],
        *,
        predictions: Literal["last", "all"] = "last",
        version: int | None = None,
    ) -> list[list[Prediction]]:
        """Whole sequences without a session: a list of predictions each."""
        return self.send(calls.predict(model, sequences, predictions, version))

    def bulk(self, lines: Iterable[Line]) -> list[Steps | RecurraError]:
        """Feed many sessions in one request: what became of each line, in order.

        Lines of one session are fed in order; after one that was refused its later ones are not (code `skipped`).
        """
        batch, attempts = Batch(lines), Attempts(self._retry)
        while batch.open:
            try:
                pause = self._send_batch(batch, attempts)
            except httpx.TransportError as error:
                batch.settle()
                pause = attempts.lost(error) if batch.open else 0.0
            time.sleep(pause)
        return batch.answers()

    def _send_batch(self, batch: Batch, attempts: Attempts) -> float:
        """Send what is open; gives the pause before what is open then."""
        with self._http.stream("POST", PATH, content=batch.content(), headers=HEADERS) as response:
            if not response.is_success:
                response.read()
                return attempts.refused(response)
            for part in response.iter_bytes():
                if batch.feed(part):
                    attempts.succeed()
        refusal = batch.settle()
        if refusal is not None:
            return attempts.refused_with(refusal)
        return attempts.lost(None) if batch.open else 0.0

    def send(self, call: Call[T]) -> T:
        """Ask, again where that helps; raises RecurraError."""
        attempts = Attempts(self._retry, call.repeatable)
        while True:
            try:
                response = self._http.request(**calls.arguments(call))
            except httpx.TransportError as error:
                pause = attempts.lost(error)
            else:
                if response.is_success:
                    return call.read(response)
                pause = attempts.refused(response)
            time.sleep(pause)

    def follow(self, following: Following) -> Generator[Token, None, None]:
        """The tokens of a generate, over as many connections as it takes; raises RecurraError."""
        attempts = Attempts(self._retry)
        while following.done is None:
            method, path, headers, body = following.request()
            try:
                with self._http.stream(method, path, headers=headers, json=body) as response:
                    if response.status_code == 200:
                        events = Events()
                        for part in response.iter_bytes():
                            for token in following.tokens(events.feed(part)):
                                attempts.succeed()
                                yield token
                        pause = following.ended(attempts)
                    elif response.status_code == 204:
                        raise following.lost()
                    else:
                        response.read()
                        pause = attempts.refused(response)
            except httpx.TransportError as error:
                pause = attempts.lost(error) if following.done is None else 0.0
            time.sleep(pause)


class Stream(Iterator[Token]):
    """Tokens as they are committed; it resumes by itself. Leaving it early leaves the generate suspended."""

    def __init__(self, client: Client, following: Following) -> None:
        self._following = following
        self._tokens = client.follow(following)
        self._texts: list[str] = []

    def __next__(self) -> Token:
        token = next(self._tokens)
        self._texts.append(token.text)
        return token

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; the generate is suspended where it stands."""
        self._tokens.close()

    @property
    def done(self) -> Done | None:
        """How it ended, once it has."""
        return self._following.done

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts) + (self.done.text if self.done is not None else "")


class Session:
    """One memory of one model."""

    def __init__(self, client: Client, id: str | None, model: str | None, version: int | None, keep: bool) -> None:
        self.id = calls.checked_id(id) if id is not None else calls.new_key()
        self._client = client
        self._opening: dict[str, Any] = {"model": model, "version": version}
        self._keep = keep

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._keep:
            try:
                self.delete()
            except RecurraError as problem:
                if error is None and problem.status not in (404, 410):
                    raise

    def steps(
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
        return self._client.send(calls.steps(self.id, {**body, **self._opening}, key))

    @overload
    def generate(
        self, inputs: Inputs | None = None, *, stream: Literal[True], **options: Unpack[Options]
    ) -> "Stream": ...
    @overload
    def generate(
        self, inputs: Inputs | None = None, *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Generated: ...
    def generate(
        self, inputs: Inputs | None = None, *, stream: bool = False, **options: Unpack[Options]
    ) -> "Stream | Generated":
        """Draw tokens and go on remembering; as a stream each comes once it is committed."""
        body = {"inputs": inputs, **options, **self._opening}
        if stream:
            return Stream(self._client, Following(self.id, body))
        return self._client.send(calls.generate(self.id, body))

    def forecast(
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
        return self._client.send(calls.forecast(self.id, body))

    def fork(self, id: str | None = None, *, position: int | None = None, seed: int | None = None) -> "Session":
        """A new session whose past is this one's, up to a position."""
        child = calls.checked_id(id) if id is not None else None
        info = self._client.send(calls.fork(self.id, child, position, seed))
        return Session(self._client, info.id, None, None, True)

    def rewind(self, position: int) -> SessionInfo:
        """Go back to a position."""
        return self._client.send(calls.rewind(self.id, position))

    def migrate(self, version: int) -> SessionInfo:
        """Move to another version of the model."""
        info = self._client.send(calls.migrate(self.id, version))
        self._opening["version"] = version
        return info

    def cancel(self) -> SessionInfo:
        """End a running or suspended generate where it stands."""
        return self._client.send(calls.cancel(self.id))

    def verify(self, position: int | None = None) -> Verified:
        """Fold the log again and compare."""
        return self._client.send(calls.verify(self.id, position))

    def log(self, after: int | None = None) -> Iterator[LogEntry]:
        """Its inputs, in order."""
        begin: str | int | None = after
        while True:
            page = self._client.send(calls.log(self.id, begin))
            yield from page.entries
            begin = page.next
            if begin is None:
                return

    def state(self, position: int | None = None) -> bytes:
        """The memory itself, as a safetensors file; `Client.upload` goes on from it."""
        return self._client.send(calls.state(self.id, position))

    def info(self) -> SessionInfo:
        """What the service says of it."""
        return self._client.send(calls.info(self.id))

    def update(self, *, metadata: Mapping[str, Any] | None = None, ttl_s: int | None = None) -> SessionInfo:
        """Change what is said of it."""
        return self._client.send(calls.update(self.id, metadata, ttl_s))

    def delete(self, *, forks: bool = False) -> None:
        """Close it; with `forks` those that left it too."""
        self._client.send(calls.delete(self.id, forks))
