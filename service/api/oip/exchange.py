"""What a model is given and what it answers, batch first: shared by both kinds of infer."""

import asyncio
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from fastapi import Response

from service.api.oip.tensors import (
    Asked,
    Spec,
    arrays_of,
    written,
)
from service.bundle import Manifest, TensorSpec
from service.errors import invalid
from service.registry import Model
from service.state import Array
from service.tasks import Output

BESIDE_BYTES = 64 * 1024
"""larger bodies are read, and larger answers written, beside the event loop"""

P = ParamSpec("P")
T = TypeVar("T")


def inputs_of(manifest: Manifest) -> list[Spec]:
    """The model's inputs, batch first."""
    return [_batch_first(spec) for spec in manifest.inputs]


def outputs_of(manifest: Manifest) -> list[Spec]:
    """The model's outputs, batch first."""
    return [_batch_first(spec) for spec in manifest.outputs]


def states_of(manifest: Manifest) -> tuple[list[Spec], list[Spec]]:
    """The states before and after, batch first."""
    before = [Spec(spec.input, spec.dtype, (-1, *spec.row_shape)) for spec in manifest.session_states]
    return before, [Spec(spec.output, spec.dtype, (-1, *spec.row_shape)) for spec in manifest.session_states]


def _batch_first(spec: TensorSpec) -> Spec:
    return Spec(spec.name, spec.dtype, (-1, -1, *(axis for axis in spec.shape if isinstance(axis, int))))


async def beside(size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Work on that many bytes: on many of them beside the event loop."""
    if size > BESIDE_BYTES:
        return await asyncio.to_thread(work, *args, **kwargs)
    return work(*args, **kwargs)


async def arrays_in(asked: Asked, manifest: Manifest) -> dict[str, Array]:
    """The inputs by name, the states among them."""
    inputs = [*inputs_of(manifest), *states_of(manifest)[0]]
    size = len(asked.tail) + sum(len(tensor.data or ()) for tensor in (asked.body.inputs if asked.body else ()))
    return await beside(size, arrays_of, asked, inputs)


def steps_in(arrays: dict[str, Array], spec: Spec) -> Array:
    """The input that steps are made of, [B, T, ...]."""
    if spec.name not in arrays:
        raise invalid(f"input {spec.name!r} is missing", "/inputs")
    return arrays[spec.name]


def bound(model: Model, steps: int) -> None:
    """Raise Problem when the answer to so many steps would be too large."""
    most = model.most_steps(0)
    if steps > most:
        raise invalid(f"at most {most} steps a request: send them in parts", "/inputs/0/shape")


async def answer(
    model: Model, asked: Asked, said: dict[str, Any], outputs: Output, specs: list[Spec], raw: dict[str, bool]
) -> Response:
    """The answer: which model it is of, what else is said, and the outputs that are asked for (`raw`, in order)."""
    manifest = model.bundle.manifest
    head: dict[str, Any] = {"id": asked.id} if asked.id else {}
    head |= {"model_name": manifest.name, "model_version": str(manifest.version), **said}
    return await beside(sum(array.nbytes for array in outputs.values()), written, head, outputs, specs, raw)
