"""What becomes of a piece of work: the events that reach its listener on the event loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from service.errors import Problem
from service.state import Array, Row
from service.store.base import Generation, Head
from service.tasks import Alternative, Output

NOTHING: Array = np.empty(0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What folding a log again has shown."""

    verified: bool | None
    """None: nothing could be compared"""
    from_position: int
    to_position: int
    state_sha256: str
    reason: Literal["nothing_to_compare", "numerics_changed"] | None = None
    differs_at: int | None = None
    """the first position whose state is another"""


class Done(msgspec.Struct, frozen=True):
    """The work is done; `head` is the session's head after it (None without a session)."""

    head: Head | None
    outputs: Output = {}
    """outputs at the positions asked for, [n, ...] by name"""
    before: Output | None = None
    """the output at the position before those"""
    row: Row = ()
    entries: Array = NOTHING
    """the entries as they were fed, nulls filled"""
    created: bool = False
    generation: Generation | None = None
    rest: str = ""
    """text of a generate that was held back as the possible beginning of a stop string"""
    verdict: Verdict | None = None


class Token(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One token that was drawn and, in a session, committed."""

    position: int
    token: int
    text: str
    logprob: float
    alternatives: list[Alternative] | None = None


class Tokens(msgspec.Struct, frozen=True, gc=False):
    """The tokens of one tick: `first` is the position of the first."""

    first: int
    ids: list[int]
    logprobs: list[float]
    texts: list[str]
    alternatives: list[list[Alternative]] | None = None

    def each(self) -> list[Token]:
        """One after another."""
        columns = zip(self.ids, self.texts, self.logprobs, strict=True)
        if self.alternatives is None:
            return [Token(at, *one) for at, one in enumerate(columns, self.first)]
        shown = zip(columns, self.alternatives, strict=True)
        return [Token(at, *one, alternatives) for at, (one, alternatives) in enumerate(shown, self.first)]


@dataclass(frozen=True, slots=True)
class Failed:
    """The work was refused or failed; the session is as it was."""

    problem: Problem


@dataclass(frozen=True, slots=True)
class LostRace:
    """Another replica moved the session first; nothing of this commit was kept."""

    head: Head | None


@dataclass(frozen=True, slots=True)
class Suspended:
    """A generate stopped before its end because nobody reads it any more."""

    head: Head | None


class Column(msgspec.Struct, frozen=True):
    """Feeds of one entry that were committed in one tick, a place in each column for each."""

    which: Sequence[int]
    """their numbers among those that were asked for together, growing"""
    heads: Sequence[Head]
    created: Sequence[bool]
    entries: Array
    """[n, ...]"""
    outputs: Output
    """[n, ...] by name"""
    before: Output
    """the outputs at the positions before, NaN where there were none; those that a prediction is judged by"""


Event = Column | Done | Tokens | Failed | LostRace | Suspended
Listener = Callable[[Event], None]
