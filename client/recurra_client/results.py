"""What the service answers, typed. Members that this version does not know are ignored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Json = Mapping[str, Any]
FinishReason = Literal["length", "stop", "cancelled"]


@dataclass(frozen=True, slots=True)
class Alternative:
    """A symbol that may come next."""

    token: int
    text: str
    logprob: float

    @classmethod
    def of(cls, found: Json) -> "Alternative":
        """From JSON."""
        return cls(found["token"], found["text"], found["logprob"])


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the network says at a position; which members there are depends on the model's task."""

    position: int
    surprise: float | None
    """how unexpected the input at this position was, in nats"""
    alternatives: tuple[Alternative, ...] | None
    """language models: most likely first"""
    label: str | None
    """classifiers"""
    probabilities: dict[str, float] | None
    mean: dict[str, float] | None
    """forecasters and regressors: by feature, in the data's own units"""
    quantiles: dict[float, dict[str, float]] | None
    outputs: dict[str, Any] | None
    """raw models: nested lists by the outputs' names"""

    @classmethod
    def of(cls, found: Json) -> "Prediction":
        """From JSON."""
        shown = found.get("alternatives")
        return cls(
            position=found["position"],
            surprise=found.get("surprise"),
            alternatives=tuple(map(Alternative.of, shown)) if shown is not None else None,
            label=found.get("label"),
            probabilities=found.get("probabilities"),
            mean=found.get("mean"),
            quantiles=_quantiles(found),
            outputs=found.get("outputs"),
        )


def _quantiles(found: Json) -> dict[float, dict[str, float]] | None:
    given = found.get("quantiles")
    return {float(level): values for level, values in given.items()} if given is not None else None


@dataclass(frozen=True, slots=True)
class Steps:
    """A sequence was fed."""

    session: str
    epoch: int
    position: int
    steps: int
    created: bool
    """whether the session was made by this request"""
    predictions: tuple[Prediction, ...]

    @property
    def last(self) -> Prediction:
        """The prediction at the last position."""
        return self.predictions[-1]

    @classmethod
    def of(cls, found: Json) -> "Steps":
        """From JSON."""
        return cls(
            found["session"],
            found["epoch"],
            found["position"],
            found["steps"],
            found.get("created", False),
            tuple(map(Prediction.of, found["predictions"])),
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """How many entries a generate took and made."""

    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, found: Json) -> "Usage":
        """From JSON."""
        return cls(found["prompt_tokens"], found["completion_tokens"])


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a stream."""

    position: int
    token: int
    text: str
    """empty while a character is not whole, or a stop string may be beginning"""
    logprob: float

    @classmethod
    def of(cls, found: Json) -> "Token":
        """From JSON."""
        return cls(found["position"], found["token"], found["text"], found["logprob"])


@dataclass(frozen=True, slots=True)
class Done:
    """How a stream has ended."""

    finish_reason: FinishReason
    epoch: int
    position: int
    usage: Usage
    text: str
    """text that was held back as the possible beginning of a stop string"""

    @classmethod
    def of(cls, found: Json) -> "Done":
        """From JSON."""
        usage = Usage.of(found["usage"])
        return cls(found["finish_reason"], found["epoch"], found["position"], usage, found.get("text", ""))


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token, and the most likely ones in its place."""

    token: int
    logprob: float
    alternatives: tuple[Alternative, ...]

    @classmethod
    def of(cls, found: Json) -> "TokenLogprobs":
        """From JSON."""
        return cls(found["token"], found["logprob"], tuple(map(Alternative.of, found["alternatives"])))


@dataclass(frozen=True, slots=True)
class Generated:
    """A generate that was not streamed."""

    session: str
    epoch: int
    position: int
    created: bool
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason
    usage: Usage

    @classmethod
    def of(cls, found: Json) -> "Generated":
        """From JSON."""
        shown = found.get("logprobs")
        return cls(
            found["session"],
            found["epoch"],
            found["position"],
            found.get("created", False),
            found["text"],
            tuple(found["tokens"]),
            tuple(map(TokenLogprobs.of, shown)) if shown is not None else None,
            found["finish_reason"],
            Usage.of(found["usage"]),
        )


@dataclass(frozen=True, slots=True)
class ForecastStep:
    """One step ahead."""

    step: int
    mean: dict[str, float]
    quantiles: dict[float, dict[str, float]] | None

    @classmethod
    def of(cls, found: Json) -> "ForecastStep":
        """From JSON."""
        return cls(found["step"], found["mean"], _quantiles(found))


@dataclass(frozen=True, slots=True)
class Forecast:
    """Steps ahead of where the session stands."""

    session: str
    epoch: int
    position: int
    steps: tuple[ForecastStep, ...]

    @classmethod
    def of(cls, found: Json) -> "Forecast":
        """From JSON."""
        return cls(found["session"], found["epoch"], found["position"], tuple(map(ForecastStep.of, found["forecast"])))


@dataclass(frozen=True, slots=True)
class Parent:
    """Where a session left the one it was forked from."""

    session: str
    position: int


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What the service says of a session; times as RFC 3339."""

    id: str
    model: str
    version: int
    epoch: int
    position: int
    seed: int
    created_at: str
    updated_at: str
    expires_at: str | None
    metadata: dict[str, Any]
    parent: Parent | None
    state_bytes: int

    @classmethod
    def of(cls, found: Json) -> "SessionInfo":
        """From JSON."""
        parent = found["parent"]
        return cls(
            id=found["id"],
            model=found["model"],
            version=found["version"],
            epoch=found["epoch"],
            position=found["position"],
            seed=found["seed"],
            created_at=found["created_at"],
            updated_at=found["updated_at"],
            expires_at=found["expires_at"],
            metadata=found["metadata"],
            parent=Parent(parent["session"], parent["position"]) if parent is not None else None,
            state_bytes=found["state_bytes"],
        )


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One input of a session, as it can be fed again."""

    position: int
    input: Any
    source: Literal["fed", "generated"]
    at: str

    @classmethod
    def of(cls, found: Json) -> "LogEntry":
        """From JSON."""
        return cls(found["position"], found["input"], found["source"], found["at"])


@dataclass(frozen=True, slots=True)
class Verified:
    """Whether a memory is what its log says; None when nothing could be compared."""

    verified: bool | None
    from_position: int
    to_position: int
    state_sha256: str
    reason: str | None
    differs_at: int | None

    @classmethod
    def of(cls, found: Json) -> "Verified":
        """From JSON."""
        return cls(
            found["verified"],
            found["from_position"],
            found["to_position"],
            found["state_sha256"],
            found.get("reason"),
            found.get("differs_at"),
        )
