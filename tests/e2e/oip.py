"""What the tests of the Open Inference Protocol share: Triton's clients, tensors, and the network between."""

import socket
import threading
from contextlib import suppress
from typing import Any

import httpx
import numpy as np
import tritonclient.http as triton
from live import Server
from tiny import some_inputs
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from service.bundle import Manifest

MODELS = ("tiny-letters", "tiny-tags", "tiny-people", "tiny-weather", "tiny-single")

Refused = InferenceServerException
Array = np.ndarray[Any, np.dtype[Any]]


def client(server: Server, port: int | None = None) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(f"127.0.0.1:{port or server.settings['port']}")


def array_of(manifest: Manifest, inputs: list[Any]) -> Array:
    """A request's inputs as the model's tensor, [1, T, ...]."""
    spec = manifest.inputs[0]
    shape = [1, len(inputs), *(axis for axis in spec.shape if isinstance(axis, int))]
    return np.array(inputs, spec.dtype).reshape(shape)


def some_array(manifest: Manifest, steps: int, seed: int = 0) -> Array:
    return array_of(manifest, some_inputs(manifest, steps, seed))


def tensor(name: str, array: Array, binary: bool = True) -> triton.InferInput:
    given = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def wanted(manifest: Manifest, binary: bool) -> list[triton.InferRequestedOutput] | None:
    """All outputs in one form; as raw bytes they need not be listed."""
    if binary:
        return None
    return [triton.InferRequestedOutput(spec.name, binary_data=False) for spec in manifest.outputs]


def outputs_of(manifest: Manifest, result: Any) -> dict[str, Array]:  # noqa: ANN401 (either client's)
    """The outputs of one sequence, [T, ...] by name."""
    return {spec.name: result.as_numpy(spec.name)[0] for spec in manifest.outputs}


def posted(server: Server, model: str, body: Any, **headers: str) -> httpx.Response:  # noqa: ANN401 (any JSON)
    """An infer as any HTTP client sends it."""
    return server.http.post(f"/v2/models/{model}/infer", json=body, headers=headers)


def error_of(response: httpx.Response, status: int | None = None) -> str:
    """Check that a refusal is what Triton's clients can read; returns its message."""
    assert 400 <= response.status_code < 500, response.text
    assert status in (None, response.status_code), response.text
    assert response.headers["content-type"] == "application/problem+json"
    found = response.json()
    assert found["status"] == response.status_code and found["type"] and found["title"] and found["code"]
    assert isinstance(found["error"], str) and found["error"] == found["detail"]
    assert "Traceback" not in response.text and "/" + "work" not in response.text
    return str(found["error"])


class Doubler:
    """A network between client and server: what comes is sent on `copies` times, at once or one after another.

    That is what a server sees of a client that sends a POST again when the connection is lost after it was read.
    The client gets the last answer; with `lost` none of them, the connection is closed instead.
    """

    def __init__(self, upstream: int, copies: int = 2, together: bool = False, lost: bool = False) -> None:
        self.answers: list[bytes] = []
        self._upstream, self._copies, self._together, self._lost = upstream, copies, together, lost
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._threads: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Doubler":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(10)
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def _serve(self) -> None:
        while True:
            try:
                taken, _ = self._listening.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._forward, args=(taken,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _forward(self, taken: socket.socket) -> None:
        with taken, suppress(ConnectionError, EOFError):
            while True:
                request = _message(taken)
                if self._together:
                    senders = [threading.Thread(target=self._ask, args=(request,)) for _ in range(self._copies)]
                    for one in senders:
                        one.start()
                    for one in senders:
                        one.join(30)
                else:
                    for _ in range(self._copies):
                        self._ask(request)
                if self._lost:
                    return
                taken.sendall(self.answers[-1])

    def _ask(self, request: bytes) -> None:
        with socket.create_connection(("127.0.0.1", self._upstream), 30) as server:
            server.sendall(request)
            self.answers.append(_message(server))


def _message(source: socket.socket) -> bytes:
    """A whole HTTP message with a Content-Length; raises EOFError when there is no more."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _part(source)
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    length = int(lengths[0].partition(b":")[2]) if lengths else 0
    while len(body) < length:
        body += _part(source)
    return head + b"\r\n\r\n" + body


def _part(source: socket.socket) -> bytes:
    part = source.recv(65536)
    if not part:
        raise EOFError
    return part
