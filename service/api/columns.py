"""Plain steps of many lines in columns: read without pydantic, and answered together.

What is plain here is a subset of what a `StepsBody` may say, and means the same; anything else is read by pydantic.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from service.api.responses import line_of
from service.api.sessions import answer_line, fed_answer
from service.feeding import done_at, fed_of, shown_together
from service.registry import Model
from service.work.events import Column


class PlainStep(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """One step, and what is shown of it; the fields are those of `StepsBody`."""

    inputs: Any
    position: int | None = None
    predictions: Literal["last", "all", "none"] = "last"
    alternatives: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 5
    model: str | None = None


class PlainLine(PlainStep, forbid_unknown_fields=True, gc=False, kw_only=True):
    """The same for the session that it names."""

    session: str


def answers(model: Model, column: Column, asked: Sequence[PlainStep]) -> list[bytes]:
    """The answers to those of a column, each a line of JSON; `asked`: one a place."""
    wanted = [None if one.predictions == "none" else one.alternatives for one in asked]
    shown = shown_together(model, column, wanted)
    found: list[bytes] = []
    for i, (head, created, prediction) in enumerate(zip(column.heads, column.created, shown, strict=True)):
        if prediction is None and wanted[i] is not None:
            found.append(answer_line(fed_of(model, done_at(column, i, True)), asked[i]))
        else:
            found.append(line_of(fed_answer(head, 1, created, [prediction] if prediction is not None else [])))
    return found
