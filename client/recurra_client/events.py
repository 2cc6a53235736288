"""A stream of tokens as it comes, and how it goes on after it broke; nothing here sends."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from recurra_client.calls import given, new_key, of_session
from recurra_client.errors import RecurraError
from recurra_client.results import Done, Token
from recurra_client.retry import Attempts


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event."""

    name: str
    id: str
    data: str


class Events:
    """Server-sent events out of the parts of one answer (WHATWG HTML, 9.2); what is cut short at its end is dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._fields: dict[str, str] = {}

    def feed(self, part: bytes) -> Iterator[Event]:
        """The events that a part completes."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            found = self._take(line.removesuffix(b"\r").decode())
            if found is not None:
                yield found

    def _take(self, line: str) -> Event | None:
        if line.startswith(":"):
            return None
        if line:
            name, _, value = line.partition(":")
            self._fields[name] = value.removeprefix(" ")
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields:
            return None
        return Event(fields.get("event", "message"), fields.get("id", ""), fields["data"])


class Following:
    """A generate that is streamed, over as many connections as it takes: every token once, in order."""

    def __init__(self, session: str, body: Mapping[str, Any]) -> None:
        """`body`: that of the generate, with its Idempotency-Key as `key` if there is one."""
        self._session = session
        self._body = {**given(body), "stream": True}
        self._key = self._body.pop("key", None) or new_key()
        self._last_id: str | None = None
        self._position: int | None = None
        self._failure: RecurraError | None = None
        self.done: Done | None = None

    def request(self) -> tuple[str, str, dict[str, str], dict[str, Any] | None]:
        """Method, path, headers and body of what is asked next: the generate; once something came, what follows it."""
        headers = {"Accept": "text/event-stream"}
        if self._last_id is None:
            # With its key it is the same generate, however often it is asked for.
            headers["Idempotency-Key"] = f'"{self._key}"'
            return "POST", of_session(self._session, "/generate"), headers, self._body
        headers["Last-Event-ID"] = self._last_id
        return "GET", of_session(self._session, "/events"), headers, None

    def tokens(self, events: Iterable[Event]) -> Iterator[Token]:
        """The tokens of events that have not come before; raises RecurraError when some are missing."""
        for event in events:
            token = self._take(event)
            if token is not None:
                yield token

    def _take(self, event: Event) -> Token | None:
        data = json.loads(event.data)
        if event.name == "error":
            self._failure = RecurraError.of(data)
        if event.name == "done":
            self.done = Done.of(data)
        if event.name != "token":
            return None
        token = Token.of(data)
        if self._position is not None and token.position != self._position + 1:
            if token.position <= self._position:
                return None
            raise self.lost()
        self._position, self._last_id = token.position, event.id
        return token

    def ended(self, attempts: Attempts) -> float:
        """An answer has ended; gives the pause in s before the next one is asked for, or raises RecurraError."""
        failure, self._failure = self._failure, None
        if self.done is not None:
            return 0.0
        return attempts.refused_with(failure) if failure is not None else attempts.lost(None)

    def lost(self) -> RecurraError:
        """What is raised when the rest can not be had: somebody else has moved the session on."""
        return RecurraError("stream_lost", f"the generate is not there any more after position {self._position}")
