"""Tensors on the wire: numbers in JSON or raw little-endian bytes behind it, both ways.

Source: Triton's binary tensor data extension of the Open Inference Protocol.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import msgspec
import numpy as np
from fastapi import Response

from service.api.oip.formats import InferBody, Tensor, Wanted
from service.api.requests import too_large
from service.bundle import DTYPES
from service.errors import Problem, invalid
from service.state import Array

LENGTH_HEADER = "Inference-Header-Content-Length"

_KINDS = {"f": "FP", "i": "INT", "u": "UINT"}


def datatype(dtype: str) -> str:
    """The protocol's name of a manifest's dtype."""
    found = DTYPES[dtype]
    return "BOOL" if found.kind == "b" else f"{_KINDS[found.kind]}{8 * found.itemsize}"


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor as the door speaks of it: batch first; -1 is an axis of any length."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def datatype(self) -> str:
        """The protocol's name of its dtype."""
        return datatype(self.dtype)


# ---------------------------------------------------------------------- reading


def inflated(data: bytes, encoding: str, limit: int) -> bytes:
    """A compressed body, never more than `limit` bytes of it; raises Problem when it is none."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise Problem("unsupported_media_type", f"Content-Encoding {encoding[:32]!r}: gzip and deflate are understood")
    unpacking = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either, by its first bytes
    try:
        body = unpacking.decompress(data, limit + 1)
    except zlib.error as error:
        raise Problem("bad_request", f"the body is not {encoding}, as its Content-Encoding says") from error
    if len(body) > limit:
        raise too_large(limit)
    if not unpacking.eof or unpacking.unused_data:
        raise Problem("bad_request", f"the {encoding} body is cut short, or something follows it")
    return body


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it was read: what its JSON says, and the bytes behind it."""

    body: InferBody | None
    """None: there is no JSON, the bytes are the model's one input"""
    tail: bytes

    @property
    def id(self) -> str:
        """The request's id; "" when it has none."""
        return self.body.id if self.body is not None else ""

    @property
    def parameters(self) -> dict[str, Any]:
        """The request's parameters."""
        return self.body.parameters if self.body is not None else {}

    @property
    def outputs(self) -> list[Wanted]:
        """The outputs that are asked for; none: all."""
        return self.body.outputs if self.body is not None else []


def read(data: bytes, json_length: str | None) -> Asked:
    """A body whose first `json_length` bytes (None: all) are JSON; raises Problem or ValidationError."""
    length = _json_length(data, json_length)
    if length == 0:
        return Asked(None, data)
    body = InferBody.model_validate_json(data[:length])
    _refuse_reserved(body)
    return Asked(body, data[length:])


def arrays_of(asked: Asked, inputs: Sequence[Spec]) -> dict[str, Array]:
    """The inputs by name, batch first, by those that the model takes.

    Raises Problem saying which one does not fit, and how it should be.
    """
    if asked.body is None:
        return _read_raw(asked.tail, inputs[0])
    by_name = {spec.name: spec for spec in inputs}
    arrays: dict[str, Array] = {}
    tail, at = memoryview(asked.tail), 0
    for i, tensor in enumerate(asked.body.inputs):
        pointer = f"/inputs/{i}"
        spec = by_name.get(tensor.name)
        if spec is None:
            raise invalid(f"the model takes {', '.join(by_name)}, not {tensor.name[:64]!r}", f"{pointer}/name")
        if tensor.name in arrays:
            raise invalid(f"{tensor.name!r} is given twice", f"{pointer}/name")
        _check_form(tensor, spec, pointer)
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            arrays[tensor.name] = _of_numbers(tensor, spec, pointer)
        else:
            arrays[tensor.name] = _of_bytes(tail[at:], size, tensor, spec, pointer)
            at += size
    if at != len(tail):
        raise Problem("bad_request", f"{len(tail) - at} bytes follow the tensors that have a `binary_data_size`")
    return arrays


def _json_length(data: bytes, given: str | None) -> int:
    if given is None:
        return len(data)
    if not (given.isdecimal() and len(given) <= 12 and int(given) <= len(data)):
        detail = f"{LENGTH_HEADER} {given[:32]!r} is no number of bytes of the body, which has {len(data)}"
        raise Problem("bad_request", detail)
    return int(given)


def _read_raw(data: bytes, spec: Spec) -> dict[str, Array]:
    """The bytes of the model's one input: a batch of one sequence."""
    step = DTYPES[spec.dtype].itemsize * prod(spec.shape[2:])
    if not data or len(data) % step:
        raise Problem("bad_request", f"a raw body holds steps of {step} bytes ({spec.datatype}); it has {len(data)}")
    shape = [1, len(data) // step, *spec.shape[2:]]
    tensor = Tensor(name=spec.name, shape=shape, datatype=spec.datatype)
    return {spec.name: _of_bytes(memoryview(data), len(data), tensor, spec, "")}


def _refuse_reserved(body: InferBody) -> None:
    given = [body.parameters, *(one.parameters for one in body.inputs), *(one.parameters for one in body.outputs)]
    for parameters in given:
        for name in parameters:
            if name.startswith("triton_"):
                raise invalid(f"parameter {name[:64]!r}: names that begin with triton_ are reserved", "/parameters")
            if name.startswith("shared_memory_"):
                raise invalid("shared memory is not supported: send the tensors in the body", "/parameters")


def _check_form(tensor: Tensor, spec: Spec, pointer: str) -> None:
    """Raise Problem unless type and shape are those of the model."""
    if tensor.datatype != spec.datatype:
        detail = f"input {spec.name!r} is given as {tensor.datatype!r} but the model takes {spec.datatype}: convert it"
        raise invalid(detail, f"{pointer}/datatype")
    same = len(tensor.shape) == len(spec.shape)
    if not same or any(b not in (-1, a) for a, b in zip(tensor.shape, spec.shape, strict=True)) or 0 in tensor.shape:
        detail = f"input {spec.name!r} has the shape {tensor.shape} but must have {list(spec.shape)}, where -1 is any"
        raise invalid(f"{detail} length of at least 1; the batch comes first", f"{pointer}/shape")


def _of_bytes(data: memoryview, size: object, tensor: Tensor, spec: Spec, pointer: str) -> Array:
    dtype = DTYPES[spec.dtype].newbyteorder("<")
    needed = prod(tensor.shape) * dtype.itemsize
    if tensor.data is not None:
        raise invalid(f"input {spec.name!r} has both `data` and `binary_data_size`", pointer)
    if type(size) is not int or size != needed:
        detail = f"input {spec.name!r} of the shape {tensor.shape} has {needed} bytes, not {str(size)[:32]}"
        raise invalid(detail, f"{pointer}/parameters/binary_data_size")
    if needed > len(data):
        raise invalid(f"the body ends within input {spec.name!r}: {len(data)} of {needed} bytes are there", pointer)
    return np.frombuffer(data[:needed], dtype).reshape(tensor.shape)


def _of_numbers(tensor: Tensor, spec: Spec, pointer: str) -> Array:
    pointer += "/data"
    if tensor.data is None:
        raise invalid(f"input {spec.name!r} has neither `data` nor `binary_data_size`", pointer)
    numbers = tensor.data
    for _ in tensor.shape[1:]:
        if set(map(type, numbers)) == {list}:
            numbers = list(chain.from_iterable(numbers))
    dtype = DTYPES[spec.dtype]
    takes: set[type] = {int, float} if dtype.kind == "f" else {bool} if dtype.kind == "b" else {int}
    if not set(map(type, numbers)) <= takes:
        raise invalid(
            f"input {spec.name!r} is {spec.datatype}: its data is numbers of that type, nothing else", pointer
        )
    if len(numbers) != prod(tensor.shape):
        detail = f"input {spec.name!r} of the shape {tensor.shape} has {prod(tensor.shape)} numbers, not {len(numbers)}"
        raise invalid(detail, pointer)
    try:
        with np.errstate(over="ignore"):  # what does not fit is found as infinite
            return np.array(numbers, dtype).reshape(tensor.shape)
    except OverflowError as error:
        raise invalid(f"input {spec.name!r}: a number does not fit {spec.datatype}", pointer) from error


# ---------------------------------------------------------------------- writing


def raw_of(asked: Asked, outputs: Sequence[Spec]) -> dict[str, bool]:
    """The outputs that are asked for, in order, and whether each is wanted as raw bytes; `outputs`: by default."""
    default = asked.body is None or _raw(asked.parameters, "binary_data_output", False, "/parameters")
    if not asked.outputs:
        return {spec.name: default for spec in outputs}
    return {
        wanted.name: _raw(wanted.parameters, "binary_data", default, f"/outputs/{i}/parameters")
        for i, wanted in enumerate(asked.outputs)
    }


def _raw(parameters: dict[str, Any], name: str, default: bool, pointer: str) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise invalid(f"{name} is true or false", f"{pointer}/{name}")
    return value


def check_outputs(wanted: Sequence[Wanted], there: Sequence[str]) -> None:
    """Raise Problem when an output is asked for that there is not."""
    seen: set[str] = set()
    for i, one in enumerate(wanted):
        if one.name not in there or one.name in seen:
            detail = f"the outputs are {', '.join(there)}, each once; asked for was {one.name[:64]!r}"
            raise invalid(detail, f"/outputs/{i}/name")
        if one.parameters.get("classification"):
            raise invalid("classification is not supported: take the output and sort it", f"/outputs/{i}/parameters")
        seen.add(one.name)


def written(said: dict[str, Any], outputs: dict[str, Array], specs: Sequence[Spec], raw: dict[str, bool]) -> Response:
    """The answer: what is said, and the outputs [B, T, ...] by name, in the order of `raw`."""
    types = {spec.name: spec for spec in specs}
    listed, tail = [], []
    for name, as_bytes in raw.items():
        array, spec = outputs[name], types[name]
        one: dict[str, Any] = {"name": name, "datatype": spec.datatype, "shape": list(array.shape)}
        if as_bytes:
            tail.append(np.ascontiguousarray(array, DTYPES[spec.dtype].newbyteorder("<")).tobytes())
            one["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            one["data"] = array.ravel().tolist()
        listed.append(one)
    head = msgspec.json.encode({**said, "outputs": listed})
    if not tail:
        return Response(head, media_type="application/json")
    headers = {LENGTH_HEADER: str(len(head))}
    return Response(b"".join((head, *tail)), headers=headers, media_type="application/octet-stream")
