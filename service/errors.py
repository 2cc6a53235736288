"""What can go wrong, by code; the HTTP side gives each code its status."""

from typing import Any


class Problem(Exception):
    """A refusal or failure that the client is told of: a code of the contract, a sentence, and extra members."""

    def __init__(self, code: str, detail: str, pointer: str | None = None, **members: object) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.members: dict[str, Any] = dict(members)
        if pointer is not None:
            self.members["errors"] = [{"detail": detail, "pointer": pointer}]


def invalid(detail: str, pointer: str) -> Problem:
    """422: a field is not what the model or the contract takes; `pointer` is its JSON pointer."""
    return Problem("invalid_input", detail, pointer)


def overloaded(detail: str) -> Problem:
    """503: the queue is full; nothing was done."""
    return Problem("overloaded", detail)


def not_ready(detail: str) -> Problem:
    """503: starting, draining, or the store can not be used; nothing was done."""
    return Problem("not_ready", detail)


class ClientLeft(Exception):
    """The client closed the connection before its answer was ready."""
