"""Plain steps of many lines or connections: read without pydantic, and answered together.

What is plain here is a subset of what a `StepsBody` may say, and means the same; anything else is read by pydantic.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec

from service.api.sessions import Shown, fed_answer, steps_answer
from service.feeding import done_at, fed_of, shown_together
from service.registry import Model
from service.work.events import Column

T = TypeVar("T")


class PlainStep(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """One step, and what is shown of it; the fields are those of `StepsBody`, but two."""

    version: ClassVar[None] = None
    seed: ClassVar[None] = None

    inputs: Any
    position: Annotated[int, msgspec.Meta(ge=0, le=2**53)] | None = None
    predictions: Literal["last", "all", "none"] = "last"
    alternatives: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 5
    model: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] | None = None


class PlainLine(PlainStep, forbid_unknown_fields=True, gc=False, kw_only=True):
    """The same for the session that it names."""

    session: str


_STEP, _LINE = msgspec.json.Decoder(PlainStep), msgspec.json.Decoder(PlainLine)


def plain_step(body: bytes) -> PlainStep | None:
    """A body that says one step, as far as can be seen; None: pydantic has to see it."""
    return _read(_STEP, body)


def plain_line(raw: bytes) -> PlainLine | None:
    """The same for a line of many sessions'."""
    return _read(_LINE, raw)


def _read(decoder: msgspec.json.Decoder[T], data: bytes) -> T | None:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def answers(model: Model, column: Column, asked: Sequence[Shown]) -> list[dict[str, Any]]:
    """The answers to those of a column; `asked`: one a place."""
    wanted = [None if one.predictions == "none" else one.alternatives for one in asked]
    shown = shown_together(model, column, wanted)
    found: list[dict[str, Any]] = []
    for i, (head, created, prediction) in enumerate(zip(column.heads, column.created, shown, strict=True)):
        if prediction is not None:
            found.append(fed_answer(head, 1, created, [prediction]))
        elif wanted[i] is None:
            found.append(fed_answer(head, 1, created, []))
        else:
            found.append(steps_answer(fed_of(model, done_at(column, i, True)), asked[i]))
    return found
