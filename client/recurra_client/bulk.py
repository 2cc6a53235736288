"""Many sessions in one request: what is sent, what was answered, and what has to be sent again."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from recurra_client.calls import Inputs, Shown, checked_id, given, new_key
from recurra_client.errors import RecurraError
from recurra_client.results import Steps
from recurra_client.retry import AGAIN

PATH = "/v1/steps"
HEADERS = {"Content-Type": "application/x-ndjson"}


@dataclass(frozen=True, slots=True)
class Line:
    """A sequence to feed, and into which session."""

    session: str
    inputs: Inputs
    model: str | None = None
    version: int | None = None
    position: int | None = None
    predictions: Shown = "last"
    alternatives: int | None = None
    key: str | None = None
    """one is made, unless it is given"""


class Batch:
    """The lines of one request: each is fed once, however often it has to be sent."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self._lines = [(checked_id(line.session), json.dumps(_body(line), allow_nan=False)) for line in lines]
        self._answers: list[Steps | RecurraError | None] = [None] * len(self._lines)
        self._asked: list[int] = []
        self._rest = b""

    @property
    def open(self) -> bool:
        """Whether there are lines without an answer."""
        return None in self._answers

    def content(self) -> bytes:
        """The body of the next request: the lines without an answer."""
        self._asked = [i for i, answer in enumerate(self._answers) if answer is None]
        self._rest = b""
        return "".join(f"{self._lines[i][1]}\n" for i in self._asked).encode()

    def feed(self, part: bytes) -> int:
        """Take a part of the answer; gives how many of its lines say that something was fed."""
        fed = 0
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            found = json.loads(line)
            answer = RecurraError.of(found["error"]) if "error" in found else Steps.of(found)
            self._answers[self._asked.pop(0)] = answer
            fed += isinstance(answer, Steps)
        return fed

    def settle(self) -> RecurraError | None:
        """Call when an answer has ended, or broken off: lines that are to be sent again have no answer then.

        Gives one of the refusals that call for it, None when there is none.
        """
        again: RecurraError | None = None
        for numbers in self._of_each_session():
            refused = next((n for n, i in enumerate(numbers) if isinstance(self._answers[i], RecurraError)), None)
            if refused is None:
                continue
            error = self._answers[numbers[refused]]
            assert isinstance(error, RecurraError)
            if error.status in AGAIN:
                again = error
                for i in numbers[refused:]:  # those after it were not run
                    self._answers[i] = None
            else:
                self._skip(numbers[refused + 1 :])
        return again

    def _skip(self, numbers: list[int]) -> None:
        for i in numbers:
            if self._answers[i] is None:
                self._answers[i] = RecurraError("skipped", "an earlier line of the same session was refused", 424)

    def _of_each_session(self) -> Iterator[list[int]]:
        found: dict[str, list[int]] = {}
        for i, (session, _) in enumerate(self._lines):
            found.setdefault(session, []).append(i)
        return iter(found.values())

    def answers(self) -> list[Steps | RecurraError]:
        """One a line, in order, once no line is open."""
        return [answer for answer in self._answers if answer is not None]


def _body(line: Line) -> Mapping[str, Any]:
    return given(
        {
            "session": line.session,
            "inputs": line.inputs,
            "model": line.model,
            "version": line.version,
            "position": line.position,
            "predictions": line.predictions,
            "alternatives": line.alternatives,
            "key": line.key if line.key is not None else new_key(),
        }
    )
