"""Infer on a sequence: its next steps. A sequence is a session of the model in the URL.

Source: Triton's sequence extension of the Open Inference Protocol.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from fastapi import Request, Response

from service.api.oip.exchange import answer, arrays_in, bound, inputs_of, outputs_of, states_of, steps_in
from service.api.oip.tensors import Asked, check_outputs, raw_of
from service.api.requests import SESSION_ID, history_of, key_of, replayed, sessions_of, visit_of
from service.bundle import DTYPES
from service.errors import Problem, invalid
from service.feeding import Inputs, head_of
from service.registry import Model
from service.session import Opening
from service.settings import Settings
from service.state import Array
from service.store.base import Key, Reply
from service.tasks import Output
from service.work.events import Done
from service.work.feed import MAX_BODY_KEPT, KeptAnswer, Keyed

_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end", "sequence_restart")
MAX_SEQUENCE_ID = 1024
"""characters of a sequence's id; longer than a session's are digested"""
MOST_KEPT_OF_AN_END = 16 * MAX_BODY_KEPT
"""the answer to a sequence's last step can not be worked out again: more of it is kept"""


class _Kept(msgspec.Struct):
    """What is kept of an answer: whose, where the sequence stood, and the outputs' bytes, [T, ...] by name."""

    version: int
    position: int
    predictions: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Step:
    """What a request says of its sequence."""

    id: int | str
    start: bool
    end: bool
    restart: bool
    position: int | None


def step_of(parameters: dict[str, Any]) -> Step | None:
    """What a request's parameters say of its sequence; None: it has none. Raises Problem when they can not be read."""
    unknown = [name for name in parameters if name.startswith("sequence_") and name not in _SEQUENCE]
    if unknown:
        raise invalid(f"parameter {unknown[0][:64]!r} is not known; there are {', '.join(_SEQUENCE)}", "/parameters")
    start, end, restart = (_flag(parameters, name) for name in _SEQUENCE[1:])
    position = parameters.get("position")
    if position is not None and not (type(position) is int and 0 <= position <= 2**53):
        raise invalid("Unable to parse 'position': it is the number of steps taken, from 0", "/parameters/position")
    id = parameters.get("sequence_id")
    if id is None and not (start or end or restart or position is not None):
        return None
    if id is None or (id in (0, "") and not isinstance(id, bool)):
        raise invalid(
            "a step of a sequence must specify a non-zero or non-empty correlation ID: set sequence_id",
            "/parameters/sequence_id",
        )
    number = type(id) is int and 0 < id < 2**64
    if not number and not (isinstance(id, str) and len(id) <= MAX_SEQUENCE_ID):
        detail = f"it is a positive integer below 2**64, or a string of at most {MAX_SEQUENCE_ID} characters"
        raise invalid(f"Unable to parse 'sequence_id': {detail}", "/parameters/sequence_id")
    if restart and not start:
        raise invalid("sequence_restart goes with sequence_start", "/parameters/sequence_restart")
    if start and position:
        raise invalid(f"a sequence that starts stands at position 0, not {position}", "/parameters/position")
    return Step(id, start, end, restart, position)


def _flag(parameters: dict[str, Any], name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise invalid(f"Unable to parse '{name}': it is true or false", f"/parameters/{name}")
    return value


def session_id(model: str, id: int | str) -> str:
    """The id of the session that a sequence is: the number, the string, or its digest where it is no session's id."""
    if isinstance(id, int):
        return f"oip.{model}.i{id}"
    plain = f"oip.{model}.s.{id}"
    return plain if re.fullmatch(SESSION_ID, plain) else f"oip.{model}.h{hashlib.sha256(id.encode()).hexdigest()[:32]}"


async def infer(request: Request, model: Model, version: int | None, asked: Asked, step: Step, data: bytes) -> Response:
    """The next steps of a sequence; a live one has them from the version that it is pinned to."""
    name = model.bundle.manifest.name
    sessions, key = sessions_of(request), key_of(request, session_id(name, step.id))
    head = await sessions.stored(key)
    if head is not None and head.status == "live" and head.model == name and version is None:
        model = sessions.model_of(head)
    arrays = await arrays_in(asked, model.bundle.manifest)
    return await Sequence(request, key, model, version, asked, arrays, step, data).answer()


def _metadata(session: str, id: int | str) -> dict[str, object] | None:
    """The sequence's own id, where the session's does not say it."""
    return None if session.endswith((f".i{id}", f".s.{id}")) else {"sequence_id": id}


class Sequence:
    """The next steps of a sequence: one request's feed of its session."""

    def __init__(
        self,
        request: Request,
        key: Key,
        model: Model,
        version: int | None,
        asked: Asked,
        arrays: dict[str, Array],
        step: Step,
        data: bytes,
    ) -> None:
        self._request = request
        self._sessions = sessions_of(request)
        self._settings: Settings = request.app.state.settings
        self._key = key
        self._model = model
        self._name = model.bundle.manifest.name
        self._version = version
        self._asked = asked
        self._step = step
        self._keyed = self._keyed_of(data)
        self._over = 0
        self._raw = self._outputs_of(arrays)
        self._array = self._steps(arrays)
        visit_of(request).take(len(self._array))

    def _keyed_of(self, data: bytes) -> Keyed | None:
        """The request's id as an idempotency key."""
        id = self._asked.id
        if not id:
            return None
        if not id.isprintable():
            raise invalid("the id of a step is an idempotency key: printable characters only", "/id")
        digest = hashlib.sha256(f"{self._request.url.path}\n".encode() + data).digest()[:16]
        return Keyed(*self._key, id, digest)

    def _outputs_of(self, arrays: dict[str, Array]) -> dict[str, bool]:
        manifest = self._model.bundle.manifest
        before, after = states_of(manifest)
        wanted = {one.name for one in self._asked.outputs}
        if any(spec.name in arrays for spec in before) or any(spec.name in wanted for spec in after):
            detail = "the service keeps the state of a sequence: leave it out, or leave sequence_id out"
            raise invalid(f"{detail}; look at it with GET /v1/sessions/{self._key[1]}/state", "/inputs")
        outputs = outputs_of(manifest)
        check_outputs(self._asked.outputs, [spec.name for spec in outputs])
        return raw_of(self._asked, outputs)

    def _steps(self, arrays: dict[str, Array]) -> Array:
        """The steps to feed, [T, ...]."""
        array = steps_in(arrays, inputs_of(self._model.bundle.manifest)[0])
        if len(array) != 1:
            raise invalid(
                f"inference request to model '{self._name}' must specify batch-size 1 due to requirements of sequence "
                f"batcher; {len(array)} were given: send each sequence's steps by themselves",
                "/inputs/0/shape/0",
            )
        bound(self._model, array.shape[1])
        return np.asarray(array[0])

    async def answer(self) -> Response:
        """Feed the steps, once; the last ones close the sequence."""
        holds = self._still_holds if self._step.start else None
        try:
            return await self._sessions.replies.once(self._keyed, self._fresh, self._replay, holds)
        except Problem as problem:
            raise self._explained(problem) from problem

    async def _still_holds(self, reply: Reply) -> bool:
        """Whether an answer kept under a start's id is its own: a new life may use the ids of the one before again."""
        same = self._keyed is not None and reply.digest == self._keyed.digest
        holds = same or not self._restarts if await self._lives() else same and self._step.end
        self._over = 0 if holds else reply.life
        return holds

    @property
    def _restarts(self) -> bool:
        return self._step.restart or self._settings.oip_start == "restart"

    async def _fresh(self) -> Response:
        step = self._step
        if step.start and self._restarts:
            head = await self._sessions.stored(self._key)
            if head is not None and head.status == "live":
                await self._sessions.end(head)
        opening = Opening(
            self._name,
            self._version,
            position=step.position,
            ttl_s=self._settings.oip_idle_s,
            metadata=_metadata(self._key[1], self._step.id),
            lives=not step.start,
        )
        kept = self._kept if self._keyed is not None else None
        inputs = Inputs(self._array, "outputs", 0, kept, closes=step.end)
        fed = await self._sessions.feed(self._key, inputs, opening)
        return await self._written(fed.model, fed.done.outputs, fed.head.position)

    def _kept(self, model: Model) -> KeptAnswer:
        assert self._keyed is not None
        most = MOST_KEPT_OF_AN_END if self._step.end else MAX_BODY_KEPT
        return KeptAnswer(self._keyed, self._answer_kept, most, self._over)

    def _answer_kept(self, done: Done) -> dict[str, object]:
        outputs = {name: np.ascontiguousarray(done.outputs[name]).tobytes() for name in self._raw}
        head = head_of(done)
        return {"version": head.version, "position": head.position, "predictions": outputs}

    async def _replay(self, reply: Reply) -> Response:
        """The answer that the request with this id got before; nothing is fed."""
        if reply.kind == "body":
            kept = msgspec.json.decode(reply.body, type=_Kept)
            model, position = self._sessions.registry.get(self._name, kept.version), kept.position
            outputs = self._arrays(model, kept.predictions)
        elif self._step.end and not await self._lives():
            detail = "this step was taken and has ended the sequence; its answer was too large to be kept"
            raise Problem("log_truncated", detail)
        else:
            model, done = await history_of(self._request).outputs(self._key, reply, reply.end, len(self._array))
            outputs, position = done.outputs, reply.end
        return replayed(await self._written(model, outputs, position))

    def _arrays(self, model: Model, kept: dict[str, bytes]) -> Output:
        specs = {spec.name: spec for spec in outputs_of(model.bundle.manifest)}
        return {
            name: np.frombuffer(data, DTYPES[specs[name].dtype]).reshape(-1, *specs[name].shape[2:])
            for name, data in kept.items()
        }

    async def _written(self, model: Model, outputs: Output, position: int) -> Response:
        said = {"parameters": {"session": self._key[1], "position": position}}
        batch = {name: array[None] for name, array in outputs.items()}
        return await answer(model, self._asked, said, batch, outputs_of(model.bundle.manifest), self._raw)

    async def _lives(self) -> bool:
        head = await self._sessions.stored(self._key)
        return head is not None and head.status == "live"

    def _explained(self, problem: Problem) -> Problem:
        """A refusal in the words of the protocol, with what to do about it."""
        # 42 and '42' are two sequences.
        id = self._step.id if isinstance(self._step.id, int) else repr(self._step.id[:64])
        what = f"sequence {id} of model '{self._name}'"
        at = problem.members.get("position")
        match problem.code:
            case "session_not_found":
                detail = (
                    f"inference request for sequence {id} to model '{self._name}' must specify the START "
                    "flag on the first request of the sequence: there is none with this id, so set sequence_start"
                )
            case "session_closed":
                detail = f"{what} has ended, at position {at}: set sequence_start to begin a new one under this id"
            case "session_expired":
                detail = (
                    f"{what} has expired, at position {at}, for it was idle too long (RECURRA_OIP_IDLE_S is "
                    f"{self._settings.oip_idle_s} s): set sequence_start to begin a new one under this id"
                )
            case "session_exists":
                detail = (
                    f"{what} lives, at position {at}: go on without sequence_start, end it with sequence_end, or begin "
                    "anew with the parameter sequence_restart (for every start: RECURRA_OIP_START=restart)"
                )
            case "model_mismatch":
                detail = f"{what} was begun with another version: leave the version out of the path"
            case "position_mismatch":
                detail = f"{what} stands at position {at}, not {self._step.position}: nothing was fed"
            case "idempotency_key_reused":
                detail = (
                    f"the id {self._asked.id[:64]!r} was used for another step of {what}: give each step an id of "
                    "its own, or none"
                )
            case _:
                return problem
        return Problem(problem.code, detail, **problem.members)
