"""The Open Inference Protocol: Triton's own clients against the service, sequences as sessions."""

import asyncio
import gzip
import itertools
import json
import random
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from live import MakeServer, Server
from oip import (
    MODELS,
    Array,
    Doubler,
    Refused,
    array_of,
    client,
    error_of,
    outputs_of,
    posted,
    some_array,
    tensor,
    wanted,
)
from redis_server import RedisServer, server_binary
from tiny import TINY, newest, some_inputs

from service.bundle import Manifest
from service.tasks import Codec

JSON_OR_BINARY = pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])


@pytest.fixture(scope="session")
def manifests(models: Path) -> dict[str, Manifest]:
    return {name: newest(models, name).manifest for name in MODELS}


@pytest.fixture
def sync(server: Server) -> Iterator[triton.InferenceServerClient]:
    with client(server) as one:
        yield one


@pytest.fixture
def number() -> int:
    """A sequence id that no other test uses."""
    return random.SystemRandom().randrange(1, 2**64)


@pytest.fixture
def letters(manifests: dict[str, Manifest]) -> Manifest:
    return manifests["tiny-letters"]


def fed(one: triton.InferenceServerClient, manifest: Manifest, array: Array, **said: Any) -> Any:  # noqa: ANN401
    return one.infer(manifest.name, [tensor(manifest.inputs[0].name, array)], **said)


def message_of(refused: Callable[[], object], status: int = 400) -> str:
    """What the client's exception says of a refusal."""
    with pytest.raises(Refused) as found:
        refused()
    assert found.value.status() == str(status), found.value
    return str(found.value)


# ---------------------------------------------------------------------- what is served


def test_the_server_says_what_it_can_do(sync: triton.InferenceServerClient) -> None:
    assert sync.is_server_live() and sync.is_server_ready()
    said = sync.get_server_metadata()
    assert said["name"] == "recurra" and said["version"]
    assert {"sequence", "binary_tensor_data", "statistics", "model_configuration", "model_repository"} <= {
        *said["extensions"]
    }


@pytest.mark.parametrize("model", MODELS)
def test_metadata_is_batch_first(
    model: str, manifests: dict[str, Manifest], sync: triton.InferenceServerClient
) -> None:
    manifest, said = manifests[model], sync.get_model_metadata(model)
    assert said["versions"] == [str(version) for version in range(1, TINY[model] + 1)]
    assert said == sync.get_model_metadata(model, str(manifest.version))
    for kind, specs in (("inputs", manifest.inputs), ("outputs", manifest.outputs)):
        assert [(one["name"], one["shape"][:2], one["shape"][2:]) for one in said[kind]] == [
            (spec.name, [-1, -1], list(spec.shape[2:])) for spec in specs
        ]
    assert said["inputs"][0]["datatype"] == ("INT64" if manifest.symbols else "FP32")


@pytest.mark.parametrize("model", MODELS)
def test_the_config_has_the_states(
    model: str, manifests: dict[str, Manifest], sync: triton.InferenceServerClient
) -> None:
    said, manifest = sync.get_model_config(model), manifests[model]
    batching = said["sequence_batching"]
    assert said["max_batch_size"] == 128 and batching["max_sequence_idle_microseconds"] == 86_400_000_000
    assert batching["state"] == [
        {"input_name": s.input, "output_name": s.output, "data_type": "TYPE_FP32", "dims": list(s.row_shape)}
        for s in manifest.states
    ]
    assert [one["dims"] for one in said["output"]] == [[-1, *spec.shape[2:]] for spec in manifest.outputs]


def test_a_model_that_is_not_there_is_404_everywhere(server: Server, sync: triton.InferenceServerClient) -> None:
    assert sync.is_model_ready("tiny-tags") and sync.is_model_ready("tiny-tags", "2")
    assert not sync.is_model_ready("nothing") and not sync.is_model_ready("tiny-tags", "9")
    for path in ("", "/ready", "/config", "/stats", "/versions/1", "/versions/1/ready", "/versions/1/stats"):
        assert "there is no model 'nothing'" in error_of(server.http.get(f"/v2/models/nothing{path}"), 404)
    assert "tiny-letters" in error_of(posted(server, "nothing", {"inputs": []}), 404)
    assert "version 9" in error_of(server.http.get("/v2/models/tiny-tags/versions/9"), 404)
    error_of(server.http.get("/v2/models/tiny-tags/versions/latest"), 400)
    error_of(server.http.get("/v2/nothing"), 404)
    error_of(server.http.get("/v2/models/tiny-tags/infer"), 405)


def test_what_is_not_supported_says_so(sync: triton.InferenceServerClient) -> None:
    for ask in (
        sync.get_trace_settings,
        sync.update_trace_settings,
        lambda: sync.get_trace_settings("tiny-tags"),
        sync.get_log_settings,
        lambda: sync.update_log_settings({"log_verbose_level": 1}),
        sync.get_system_shared_memory_status,
        lambda: sync.register_system_shared_memory("a", "/a", 8),
        sync.get_cuda_shared_memory_status,
        sync.unregister_cuda_shared_memory,
    ):
        assert "not supported" in message_of(ask, 501)
    assert "/parameters/config" in message_of(lambda: sync.load_model("tiny-tags", config="{}"))


def test_statistics_move(sync: triton.InferenceServerClient, manifests: dict[str, Manifest], number: int) -> None:
    def stats() -> Any:  # noqa: ANN401 (any JSON)
        (found,) = sync.get_inference_statistics("tiny-single", "1")["model_stats"]
        return found

    manifest, before = manifests["tiny-single"], stats()
    for i in range(3):
        fed(sync, manifest, some_array(manifest, 1), sequence_id=number, sequence_start=i == 0)
    message_of(lambda: fed(sync, manifest, some_array(manifest, 1), sequence_id=number, sequence_start=True))
    after = stats()

    def grown(*path: str) -> int:
        old, new = before, after
        for part in path:
            old, new = old[part], new[part]
        return int(new - old)

    assert grown("inference_count") == grown("execution_count") == 3
    assert grown("inference_stats", "success", "count") == 3 and grown("inference_stats", "fail", "count") == 1
    assert grown("inference_stats", "compute_infer", "count") == 3
    assert grown("inference_stats", "compute_infer", "ns") > 0 and grown("inference_stats", "success", "ns") > 0
    assert after["last_inference"] > 1_700_000_000_000
    one_row = next(one for one in after["batch_stats"] if one["batch_size"] == 1)
    assert one_row["compute_infer"]["count"] >= 3
    everything = sync.get_inference_statistics()["model_stats"]
    assert {(one["name"], one["version"]) for one in everything} >= {("tiny-tags", "1"), ("tiny-tags", "2")}


def test_models_are_unloaded_and_loaded(fresh: MakeServer, letters: Manifest) -> None:
    with client(fresh().start()) as one:
        fed(one, letters, some_array(letters, 2), sequence_id=1, sequence_start=True)
        assert "tiny-letters/1" in message_of(lambda: one.unload_model("tiny-letters"))
        fed(one, letters, some_array(letters, 2), sequence_id=1, sequence_end=True)
        one.unload_model("tiny-letters")
        assert not one.is_model_ready("tiny-letters")
        message_of(lambda: one.unload_model("tiny-letters"), 404)
        listed = {entry["name"]: entry for entry in one.get_model_repository_index()}
        assert (listed["tiny-letters"]["state"], listed["tiny-letters"]["reason"]) == ("UNAVAILABLE", "unloaded")
        assert (listed["tiny-people"]["state"], listed["tiny-people"]["version"]) == ("READY", "1")
        one.load_model("tiny-letters")
        assert one.is_model_ready("tiny-letters")
        assert fed(one, letters, some_array(letters, 2)).as_numpy("logits").shape == (1, 2, 13)
        message_of(lambda: one.load_model("nothing"), 404)


def test_the_index_can_be_of_what_is_served(server: Server) -> None:
    found = server.ok(server.http.post("/v2/repository/index", json={"ready": True}))
    assert {one["state"] for one in found} == {"READY"} and {one["name"] for one in found} >= set(MODELS)


# ---------------------------------------------------------------------- sequences are sessions


class Told:
    """One sequence and a native session that is fed the same: each chunk's outputs must give the native predictions."""

    def __init__(self, server: Server, manifest: Manifest, number: int, seed: int) -> None:
        rng = random.Random(seed)
        self.manifest, self.number = manifest, number
        self.inputs = some_inputs(manifest, rng.randint(1, 40), seed)
        cuts = sorted({0, len(self.inputs), *(rng.randrange(len(self.inputs)) for _ in range(4))})
        self.chunks = [self.inputs[a:b] for a, b in itertools.pairwise(cuts)]
        self.ends = bool(seed % 2)
        self._server, self._codec = server, Codec(manifest)
        self._before: dict[str, Array] | None = None
        self._position = 0

    @property
    def native(self) -> str:
        return f"native-{self.number}"

    def said(self, chunk: int) -> dict[str, Any]:
        last = chunk == len(self.chunks) - 1
        return {"sequence_id": self.number, "sequence_start": chunk == 0, "sequence_end": self.ends and last}

    def tensors(self, chunk: int, binary: bool) -> list[triton.InferInput]:
        return [tensor(self.manifest.inputs[0].name, array_of(self.manifest, self.chunks[chunk]), binary)]

    def compare(self, chunk: int, result: Any) -> None:  # noqa: ANN401 (either client's)
        outputs = outputs_of(self.manifest, result)
        entries = self._codec.encode(self.chunks[chunk])
        mine = self._codec.predictions(outputs, self._position + 1, self._before, entries, 5)
        theirs = self._server.steps(self.native, self.chunks[chunk], model=self.manifest.name, predictions="all")
        assert msgspec.to_builtins(mine) == theirs["predictions"]
        self._position += len(entries)
        self._before = {name: array[-1] for name, array in outputs.items()}
        assert result.get_response()["parameters"]["position"] == self._position == theirs["position"]

    def finish(self) -> None:
        session = f"oip.{self.manifest.name}.i{self.number}"
        if self.ends:
            assert self._server.http.get(f"/v1/sessions/{session}").json()["code"] == "session_closed"
        else:
            assert self._server.state(session) == self._server.state(self.native)
            assert self._server.verify(session)["verified"] is not False


def told(server: Server, manifests: dict[str, Manifest], count: int, base: int) -> list[Told]:
    first = random.SystemRandom().randrange(1, 2**62)
    return [Told(server, manifests[MODELS[i % len(MODELS)]], first + i, base + i) for i in range(count)]


@JSON_OR_BINARY
def test_interleaved_sequences_are_native_sessions(
    binary: bool, server: Server, manifests: dict[str, Manifest], sync: triton.InferenceServerClient
) -> None:
    sequences = told(server, manifests, 100, 1000 * binary)
    left = dict.fromkeys(range(len(sequences)), 0)
    rng = random.Random(7)
    while left:
        i = rng.choice(list(left))
        one, chunk = sequences[i], left[i]
        given = one.tensors(chunk, binary)
        result = sync.infer(one.manifest.name, given, outputs=wanted(one.manifest, binary), **one.said(chunk))
        one.compare(chunk, result)
        left[i] += 1
        if left[i] == len(one.chunks):
            one.finish()
            del left[i]


@JSON_OR_BINARY
def test_concurrent_sequences_are_native_sessions(binary: bool, server: Server, manifests: dict[str, Manifest]) -> None:
    sequences = told(server, manifests, 100, 5000 + 1000 * binary)

    async def run(many: triton_aio.InferenceServerClient, one: Told) -> list[Any]:
        return [
            await many.infer(
                one.manifest.name, one.tensors(i, binary), outputs=wanted(one.manifest, binary), **one.said(i)
            )
            for i in range(len(one.chunks))
        ]

    async def all_at_once() -> list[list[Any]]:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.settings['port']}") as many:
            return await asyncio.gather(*(run(many, one) for one in sequences))

    for one, results in zip(sequences, asyncio.run(all_at_once()), strict=True):
        for chunk, result in enumerate(results):
            one.compare(chunk, result)
        one.finish()


def test_numbers_strings_and_digests_are_sequences_of_their_own(
    server: Server, sync: triton.InferenceServerClient, letters: Manifest, name: str
) -> None:
    ids = {
        42: "oip.tiny-letters.i42",
        "42": "oip.tiny-letters.s.42",
        f"pump:{name}": f"oip.tiny-letters.s.pump:{name}",
        f"über {name}/\n": None,
        "x" * 500: None,
    }
    for i, (id, session) in enumerate(ids.items()):
        result = fed(sync, letters, some_array(letters, i + 1), sequence_id=id, sequence_start=True)
        found = result.get_response()["parameters"]["session"]
        assert found == session or (session is None and found.startswith("oip.tiny-letters.h") and len(found) == 50)
        assert server.session(found)["metadata"] == ({} if session is not None else {"sequence_id": id})
        assert server.position(found) == i + 1
        fed(sync, letters, some_array(letters, 1), sequence_id=id, sequence_end=True)


def test_a_sequence_expires_when_it_is_idle(fresh: MakeServer, letters: Manifest) -> None:
    server = fresh(oip_idle_s=1, store="memory").start()
    with client(server) as one:
        assert one.get_model_config("tiny-letters")["sequence_batching"]["max_sequence_idle_microseconds"] == 1_000_000
        fed(one, letters, some_array(letters, 2), sequence_id=5, sequence_start=True)
        assert server.session("oip.tiny-letters.i5")["expires_at"] is not None
        end = time.monotonic() + 20
        while server.http.get("/v1/sessions/oip.tiny-letters.i5").status_code == 200:
            assert time.monotonic() < end
            time.sleep(0.05)
        message = message_of(lambda: fed(one, letters, some_array(letters, 2), sequence_id=5))
        assert "expired, at position 2" in message and "sequence_start" in message and "RECURRA_OIP_IDLE_S" in message
        assert position_of(fed(one, letters, some_array(letters, 3), sequence_id=5, sequence_start=True)) == 3


def position_of(result: Any) -> int:  # noqa: ANN401 (either client's)
    return int(result.get_response()["parameters"]["position"])


def test_a_sequence_survives_the_process(mortal: Server, letters: Manifest, number: int) -> None:
    with client(mortal) as one:
        fed(one, letters, some_array(letters, 7), sequence_id=number, sequence_start=True)
    mortal.restart()
    with client(mortal) as one:
        assert position_of(fed(one, letters, some_array(letters, 1), sequence_id=number)) == 8


def test_a_sequence_keeps_its_version(server: Server, sync: triton.InferenceServerClient, number: int) -> None:
    given = [tensor("symbols", np.array([[1, 2]], np.int64))]
    begun = sync.infer("tiny-tags", given, model_version="1", sequence_id=number, sequence_start=True)
    again = sync.infer("tiny-tags", given, sequence_id=number)
    assert begun.get_response()["model_version"] == again.get_response()["model_version"] == "1"
    message = message_of(lambda: sync.infer("tiny-tags", given, model_version="2", sequence_id=number))
    assert "leave the version out" in message and server.position(f"oip.tiny-tags.i{number}") == 4


# ---------------------------------------------------------------------- refusals say what to do


def test_refusals_say_what_to_do(
    server: Server, sync: triton.InferenceServerClient, letters: Manifest, number: int
) -> None:
    array, session = some_array(letters, 2), f"oip.tiny-letters.i{number}"

    def refusal(array: Array = array, **said: Any) -> str:  # noqa: ANN401
        return message_of(lambda: fed(sync, letters, array, **{"sequence_id": number, **said}))

    missing = refusal()
    assert f"sequence {number}" in missing and "must specify the START flag" in missing and "sequence_start" in missing
    fed(sync, letters, array, sequence_id=number, sequence_start=True)
    live = refusal(sequence_start=True)
    assert "lives, at position 2" in live and "sequence_restart" in live and "RECURRA_OIP_START=restart" in live
    assert "the model takes INT64: convert it" in refusal(array.astype(np.float32))
    assert "the model takes INT64: convert it" in refusal(array.astype(np.int32))
    for shape in ((2,), (1, 2, 1), (1, 0), (0, 2)):
        assert "must have [-1, -1]" in refusal(np.zeros(shape, np.int64))
    assert "must specify batch-size 1" in refusal(np.zeros((3, 2), np.int64))
    assert "not in 0..12" in refusal(np.array([[5, 13]], np.int64)) and "number 1" in refusal(
        np.array([[5, -1]], np.int64)
    )
    assert "stands at position 2, not 9" in refusal(parameters={"position": 9})
    assert "Unable to parse 'sequence_id'" in refusal(sequence_id=-1)
    assert server.position(session) == 2
    assert position_of(fed(sync, letters, array, sequence_id=number, parameters={"position": 2})) == 4
    fed(sync, letters, array, sequence_id=number, sequence_end=True)
    ended = refusal()
    assert "has ended, at position 6" in ended and "sequence_start" in ended and len({missing, live, ended}) == 3
    assert "has ended" in refusal(sequence_end=True)
    assert position_of(fed(sync, letters, array, sequence_id=number, sequence_start=True)) == 2


@pytest.mark.parametrize("how", ["parameter", "setting"])
def test_a_start_may_take_the_place_of_what_lives(
    how: str, server: Server, fresh: MakeServer, letters: Manifest
) -> None:
    asked = fresh(oip_start="restart", store="memory").start() if how == "setting" else server
    said: dict[str, Any] = {"sequence_id": 777, "sequence_start": True}
    if how == "parameter":
        said["parameters"] = {"sequence_restart": True}
    with client(asked) as one:
        first = fed(one, letters, some_array(letters, 5), **said)
        fed(one, letters, some_array(letters, 5, seed=1), sequence_id=777)
        second = fed(one, letters, some_array(letters, 5), **said)
        assert position_of(first) == position_of(second) == 5 == asked.position("oip.tiny-letters.i777")
        assert np.array_equal(first.as_numpy("logits"), second.as_numpy("logits"))


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"sequence_start": True}, "correlation ID"),
        ({"sequence_id": 0}, "correlation ID"),
        ({"sequence_id": ""}, "correlation ID"),
        ({"sequence_id": True}, "Unable to parse 'sequence_id'"),
        ({"sequence_id": 1.5}, "Unable to parse 'sequence_id'"),
        ({"sequence_id": 2**64}, "Unable to parse 'sequence_id'"),
        ({"sequence_id": [1]}, "Unable to parse 'sequence_id'"),
        ({"sequence_id": "x" * 2000}, "Unable to parse 'sequence_id'"),
        ({"sequence_id": 1, "sequence_start": 1}, "Unable to parse 'sequence_start'"),
        ({"sequence_id": 1, "sequence_end": "yes"}, "Unable to parse 'sequence_end'"),
        ({"sequence_id": 1, "sequence_begin": True}, "'sequence_begin' is not known"),
        ({"sequence_id": 1, "position": -1}, "Unable to parse 'position'"),
        ({"sequence_id": 1, "position": True}, "Unable to parse 'position'"),
        ({"sequence_id": 1, "sequence_start": True, "position": 5}, "position 0"),
        ({"sequence_id": 1, "sequence_restart": True}, "goes with sequence_start"),
        ({"triton_enable_empty_final_response": True}, "reserved"),
        ({"binary_data_output": "yes"}, "binary_data_output is true or false"),
    ],
)
def test_parameters_that_can_not_be_read(parameters: dict[str, Any], says: str, server: Server) -> None:
    given = {"name": "symbols", "shape": [1, 1], "datatype": "INT64", "data": [0]}
    body = {"parameters": parameters, "inputs": [given]}
    assert says in error_of(posted(server, "tiny-letters", body), 400)


def test_parameters_of_others_pass(server: Server, number: int) -> None:
    given = {"name": "symbols", "shape": [1, 1], "datatype": "INT64", "data": [0], "unknown": 1}
    parameters = {"sequence_id": number, "sequence_start": True, "priority": 2, "timeout": 5, "mine": {"a": 1}}
    answer = server.ok(posted(server, "tiny-letters", {"parameters": parameters, "inputs": [given], "unknown": 1}))
    assert answer["outputs"][0]["shape"] == [1, 1, 13] and len(answer["outputs"][0]["data"]) == 13


# ---------------------------------------------------------------------- steps that are sent again


@pytest.mark.parametrize("together", [False, True], ids=["one-after-another", "at-once"])
def test_a_step_that_is_sent_again_is_taken_once(
    together: bool, server: Server, letters: Manifest, number: int
) -> None:
    """As geventhttpclient below 2.6 sends a POST again, silently, when its connection is lost before the answer."""
    session, reference = f"oip.tiny-letters.i{number}", f"once-{number}"
    steps = [some_inputs(letters, count, seed=count) for count in (3, 1, 5, 2)]
    with Doubler(int(str(server.settings["port"])), 3, together) as network, client(server, network.port) as one:
        for i, inputs in enumerate(steps):
            result = fed(
                one,
                letters,
                array_of(letters, inputs),
                request_id=f"step-{i}",
                sequence_id=number,
                sequence_start=i == 0,
                sequence_end=i == len(steps) - 1,
            )
            bodies = {answer.partition(b"\r\n\r\n")[2] for answer in network.answers[3 * i :]}
            replayed = [b"idempotent-replayed: true" in answer.lower() for answer in network.answers[3 * i :]]
            assert len(bodies) == 1 and sorted(replayed) == [False, True, True]
            server.steps(reference, inputs, model="tiny-letters")
            assert position_of(result) == server.position(reference)
            if i < len(steps) - 1:
                assert server.state(session) == server.state(reference)
    assert server.http.get(f"/v1/sessions/{session}").json()["code"] == "session_closed"


def test_a_lost_answer_can_be_asked_for_again(server: Server, letters: Manifest, number: int) -> None:
    array = some_array(letters, 4)
    said: dict[str, Any] = {"sequence_id": number, "sequence_start": True, "request_id": "first"}
    with Doubler(int(str(server.settings["port"])), 1, lost=True) as network:  # noqa: SIM117
        with client(server, network.port) as one, pytest.raises(Exception):  # noqa: B017 (its library's own)
            fed(one, letters, array, **said)
    assert server.position(f"oip.tiny-letters.i{number}") == 4
    with client(server) as one:
        result = fed(one, letters, array, **said)
        assert position_of(result) == 4 == server.position(f"oip.tiny-letters.i{number}")
        assert network.answers[0].endswith(result.as_numpy("logits").tobytes())


def test_without_an_id_a_position_is_the_fence(server: Server, letters: Manifest, number: int) -> None:
    array = some_array(letters, 2)
    with client(server) as one:
        fed(one, letters, array, sequence_id=number, sequence_start=True)
    with Doubler(int(str(server.settings["port"]))) as network, client(server, network.port) as one:
        said = {"sequence_id": number, "parameters": {"position": 2}}
        assert "stands at position 4, not 2" in message_of(lambda: fed(one, letters, array, **said))
    assert server.position(f"oip.tiny-letters.i{number}") == 4


def test_an_id_is_of_one_step(sync: triton.InferenceServerClient, letters: Manifest, number: int) -> None:
    fed(sync, letters, some_array(letters, 2), request_id="a", sequence_id=number, sequence_start=True)
    again = {"request_id": "a", "sequence_id": number}
    message = message_of(lambda: fed(sync, letters, some_array(letters, 3), **again))
    assert "give each step an id of its own" in message
    long = message_of(lambda: fed(sync, letters, some_array(letters, 3), request_id="a" * 300, sequence_id=number))
    assert "/id" in long
    assert "printable" in message_of(
        lambda: fed(sync, letters, some_array(letters, 3), request_id="a\tb", sequence_id=number)
    )


def test_a_new_life_may_use_the_same_ids(sync: triton.InferenceServerClient, letters: Manifest, number: int) -> None:
    """A client that counts its requests from 1 does so again when it is started again."""

    def run(seed: int) -> list[Array]:
        steps = [some_array(letters, 2, seed), some_array(letters, 2, seed + 1), some_array(letters, 1, seed + 2)]
        return [
            fed(
                sync,
                letters,
                array,
                request_id=f"{i}",
                sequence_id=number,
                sequence_start=i == 0,
                sequence_end=i == 2,
            ).as_numpy("logits")
            for i, array in enumerate(steps)
        ]

    first, other, again = run(1), run(50), run(1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@JSON_OR_BINARY
@pytest.mark.parametrize("steps", [10, 400, 8000])
@pytest.mark.parametrize("ends", [False, True])
def test_an_answer_of_any_size_is_given_again(
    binary: bool, steps: int, ends: bool, server: Server, letters: Manifest, number: int
) -> None:
    """Small ones are kept, large ones worked out again from the log; of a last step more is kept."""
    said = {"request_id": "big", "sequence_id": number, "sequence_start": True, "sequence_end": ends}
    given = [tensor("symbols", some_array(letters, steps), binary)]
    with client(server) as one:

        def ask() -> Any:  # noqa: ANN401
            return one.infer("tiny-letters", given, outputs=wanted(letters, binary), **said)

        first = ask()
        if not ends and steps == 400:
            fed(one, letters, some_array(letters, 3), sequence_id=number)  # it is of the step, not of the head
        if ends and steps == 8000:
            message = message_of(ask)
            assert "was taken and has ended the sequence" in message
        else:
            again = ask()
            assert position_of(again) == position_of(first) == steps
            assert np.array_equal(first.as_numpy("logits"), again.as_numpy("logits"))


@pytest.mark.parametrize("store", ["memory", "redis"])
def test_a_last_step_closes_in_every_store(store: str, fresh: MakeServer, tmp_path: Path, letters: Manifest) -> None:
    if store == "redis" and server_binary() is None:
        pytest.skip("no Redis-compatible server")
    kept = RedisServer(tmp_path / "redis").start() if store == "redis" else None
    try:
        server = fresh(store=kept.url if kept is not None else store).start()
        with client(server) as one:
            for said in ({}, {"request_id": "1"}):
                fed(one, letters, some_array(letters, 2), sequence_id=9, sequence_start=True)
                fed(one, letters, some_array(letters, 50), sequence_id=9)
                last = fed(one, letters, some_array(letters, 3), sequence_id=9, sequence_end=True, **said)
                assert position_of(last) == 55
                assert "has ended, at position 55" in message_of(
                    lambda: fed(one, letters, some_array(letters, 2), sequence_id=9)
                )
                whole = fed(one, letters, some_array(letters, 2), sequence_id=9, sequence_start=True, sequence_end=True)
                assert position_of(whole) == 2
        assert server.metric("recurra_sessions_resident", model="tiny-letters") == 0
    finally:
        if kept is not None:
            kept.kill()


# ---------------------------------------------------------------------- without a sequence


@JSON_OR_BINARY
@pytest.mark.parametrize("model", MODELS)
def test_without_a_sequence_nothing_is_kept(
    model: str, binary: bool, server: Server, manifests: dict[str, Manifest], sync: triton.InferenceServerClient
) -> None:
    manifest, codec = manifests[model], Codec(manifests[model])
    sequences = [some_inputs(manifest, 6, seed) for seed in range(3)]
    before = server.ok(server.http.get("/v1/sessions?limit=1000"))["data"]
    batch = np.concatenate([array_of(manifest, one) for one in sequences])
    result = sync.infer(model, [tensor(manifest.inputs[0].name, batch, binary)], outputs=wanted(manifest, binary))
    native = server.ok(server.post(f"/v1/models/{model}/predict", {"sequences": sequences, "predictions": "all"}))
    for i, one in enumerate(sequences):
        outputs = {spec.name: result.as_numpy(spec.name)[i] for spec in manifest.outputs}
        mine = codec.predictions(outputs, 1, None, codec.encode(one), 5)
        assert msgspec.to_builtins(mine) == native["predictions"][i]
    assert server.ok(server.http.get("/v1/sessions?limit=1000"))["data"] == before


@JSON_OR_BINARY
@pytest.mark.parametrize("model", MODELS)
def test_states_go_in_and_out(
    model: str, binary: bool, manifests: dict[str, Manifest], sync: triton.InferenceServerClient
) -> None:
    manifest = manifests[model]
    name = manifest.inputs[0].name
    batch = np.concatenate([some_array(manifest, 9, seed) for seed in range(4)])
    everything = [spec.name for spec in manifest.outputs] + [spec.output for spec in manifest.states]
    asked = [triton.InferRequestedOutput(one, binary_data=binary) for one in everything]
    whole = sync.infer(model, [tensor(name, batch, binary)], outputs=asked)
    first = sync.infer(model, [tensor(name, batch[:, :5], binary)], outputs=asked)
    states = [tensor(spec.input, first.as_numpy(spec.output), binary) for spec in manifest.states]
    second = sync.infer(model, [tensor(name, batch[:, 5:], binary), *states], outputs=None if binary else asked)
    for spec in manifest.outputs:
        parts = [first.as_numpy(spec.name), second.as_numpy(spec.name)]
        assert np.array_equal(np.concatenate(parts, axis=1), whole.as_numpy(spec.name))
    for state in manifest.states:
        assert whole.as_numpy(state.output).shape == (4, *state.row_shape)
        assert np.array_equal(second.as_numpy(state.output), whole.as_numpy(state.output))


def test_states_must_fit(sync: triton.InferenceServerClient, letters: Manifest, number: int) -> None:
    given = tensor("symbols", some_array(letters, 2))
    h, c = (np.zeros((1, 2, 16), np.float32) for _ in range(2))
    names = [spec.input for spec in letters.states]

    def refusal(*states: tuple[str, Array], **said: Any) -> str:  # noqa: ANN401
        return message_of(lambda: sync.infer("tiny-letters", [given, *(tensor(*one) for one in states)], **said))

    assert "all states or none" in refusal((names[0], h))
    assert "of 2 sequences, the input of 1" in refusal((names[0], h), (names[1], c.repeat(2, axis=0)))
    assert "must have [-1, 2, 16]" in refusal((names[0], h), (names[1], c[:, 0]))
    assert "must be finite" in refusal((names[0], h), (names[1], np.full_like(c, np.inf)))
    assert "given twice" in refusal((names[0], h), (names[0], h))
    keeps = refusal((names[0], h), (names[1], c), sequence_id=number, sequence_start=True)
    assert "the service keeps the state of a sequence" in keeps
    asked = [triton.InferRequestedOutput(letters.states[0].output)]
    assert "keeps the state" in message_of(
        lambda: sync.infer("tiny-letters", [given], outputs=asked, sequence_id=number, sequence_start=True)
    )
    assert "at most 128 sequences" in message_of(lambda: fed(sync, letters, np.zeros((129, 1), np.int64)))


# ---------------------------------------------------------------------- forms of bodies


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_bodies(encoding: str, sync: triton.InferenceServerClient, letters: Manifest, number: int) -> None:
    array = some_array(letters, 100)
    plain = fed(sync, letters, array)
    packed = fed(sync, letters, array, request_compression_algorithm=encoding, response_compression_algorithm=encoding)
    assert np.array_equal(plain.as_numpy("logits"), packed.as_numpy("logits"))


def test_a_body_without_json_is_the_one_input(server: Server, letters: Manifest) -> None:
    array = some_array(letters, 5)
    response = server.http.post(
        "/v2/models/tiny-letters/infer",
        content=array.tobytes(),
        headers={"Inference-Header-Content-Length": "0", "Content-Type": "application/octet-stream"},
    )
    assert response.status_code == 200
    length = int(response.headers["inference-header-content-length"])
    assert json.loads(response.content[:length])["outputs"][0]["shape"] == [1, 5, 13]
    with client(server) as one:
        assert response.content[length:] == fed(one, letters, array).as_numpy("logits").tobytes()


def test_outputs_in_either_form_and_any_order(
    sync: triton.InferenceServerClient, manifests: dict[str, Manifest]
) -> None:
    manifest = manifests["tiny-weather"]
    asked = [
        triton.InferRequestedOutput("quantiles", binary_data=True),
        triton.InferRequestedOutput("mean", binary_data=False),
    ]
    mixed = fed(sync, manifest, some_array(manifest, 3), outputs=asked)
    assert [one["name"] for one in mixed.get_response()["outputs"]] == ["quantiles", "mean"]
    plain = fed(sync, manifest, some_array(manifest, 3))
    for name in ("mean", "quantiles"):
        assert np.array_equal(mixed.as_numpy(name), plain.as_numpy(name))
    one = fed(sync, manifest, some_array(manifest, 3), outputs=asked[1:])
    assert [found["name"] for found in one.get_response()["outputs"]] == ["mean"]
    for bad in (["nothing"], ["mean", "mean"]):
        refused = [triton.InferRequestedOutput(name) for name in bad]
        message = message_of(lambda asked=refused: fed(sync, manifest, some_array(manifest, 3), outputs=asked))  # type: ignore[misc]
        assert "the outputs are mean, quantiles" in message
    classes = [triton.InferRequestedOutput("mean", class_count=2)]
    assert "classification is not supported" in message_of(
        lambda: fed(sync, manifest, some_array(manifest, 3), outputs=classes)
    )


@pytest.mark.parametrize("nested", [[[0, 1, 2]], [0, 1, 2], [[0], [1], [2]]])
def test_data_is_flat_or_nested(nested: list[Any], server: Server) -> None:
    given = {"name": "symbols", "shape": [1, 3], "datatype": "INT64", "data": nested}
    flat = {**given, "data": [0, 1, 2]}
    answer = server.ok(posted(server, "tiny-letters", {"id": "mine", "inputs": [given]}))
    assert answer["id"] == "mine" and answer["model_version"] == "1"
    assert answer["outputs"] == server.ok(posted(server, "tiny-letters", {"inputs": [flat]}))["outputs"]


def test_what_is_compressed_is_bounded(server: Server) -> None:
    headers = {"Content-Encoding": "gzip"}
    path = "/v2/models/tiny-letters/infer"
    bomb = gzip.compress(b" " * 50_000_000)
    assert len(bomb) < 100_000
    assert "100000 bytes" in error_of(server.http.post(path, content=bomb, headers=headers), 413)
    good = gzip.compress(b"{}")
    for bad in (b"", b"{}", good[:-5], good + b"x", zlib.compress(b"{}")[:-3]):
        error_of(server.http.post(path, content=bad, headers=headers), 400)
    error_of(server.http.post(path, content=good, headers={"Content-Encoding": "br"}), 415)


# ---------------------------------------------------------------------- the page


def test_the_openapi_page_lists_the_protocol(server: Server) -> None:
    paths = {p: item for p, item in server.ok(server.http.get("/openapi.json"))["paths"].items() if p.startswith("/v2")}
    of_a_model = [
        f"/v2/models/{{model}}{version}{tail}"
        for version in ("", "/versions/{version}")
        for tail in ("", "/ready", "/config", "/stats", "/infer")
    ]
    of_the_server = [
        "",
        "/health/live",
        "/health/ready",
        "/models/stats",
        "/repository/index",
        "/repository/models/{model}/load",
        "/repository/models/{model}/unload",
    ]
    refused = ["/logging", "/trace/setting", "/models/{model}/trace/setting", "/{kind}sharedmemory/{rest}"]
    assert set(paths) == {*of_a_model, *(f"/v2{path}" for path in of_the_server), *(f"/v2{path}" for path in refused)}
    infer = paths["/v2/models/{model}/versions/{version}/infer"]["post"]
    assert {one["name"] for one in infer["parameters"]} == {"model", "version", "Inference-Header-Content-Length"}
    assert set(infer["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
    assert infer["requestBody"]["content"]["application/json"]["examples"]
    assert set(infer["responses"]) == {"200", "400", "404", "413", "415", "500", "503", "default"}
    for path, item in paths.items():
        for said in item.values():
            for status, response in said["responses"].items():
                if status != "200":
                    assert set(response["content"]) == {"application/problem+json"}, path
                    schema = response["content"]["application/problem+json"]["schema"]
                    assert schema["properties"]["error"]["type"] == "string", path
