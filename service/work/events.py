"""What becomes of a piece of work: the events that reach its listener on the event loop."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from service.errors import Problem
from service.state import Array, Row
from service.store.base import Generation, Head
from service.tasks import Output


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


@dataclass(frozen=True, slots=True)
class Done:
    """The work is done; `head` is the session's head after it (None without a session)."""

    head: Head | None
    outputs: Output = field(default_factory=dict)
    """outputs at the positions asked for, [n, ...] by name"""
    before: Output | None = None
    """the output at the position before those"""
    row: Row = ()
    entries: Array = field(default_factory=lambda: np.empty(0))
    """the entries as they were fed, nulls filled"""
    created: bool = False
    generation: Generation | None = None
    rest: str = ""
    """text of a generate that was held back as the possible beginning of a stop string"""
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """One token was drawn and, in a session, committed."""

    position: int
    token: int
    text: str
    logprob: float
    alternatives: list[dict[str, object]] | None = None


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


Event = Done | Token | Failed | LostRace | Suspended
Listener = Callable[[Event], None]
