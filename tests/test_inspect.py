"""Strangers' graphs: states and axes are found, bundles answer as ONNX Runtime does, hostile files are refused."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from foreign_graphs import (
    CASES,
    HIDDEN,
    VAD_ANSWERS,
    Case,
    cases,
    counter,
    doubtful,
    exported,
    lstm_by_hand,
    mixing,
    model,
    rnn,
    silero,
    silero_by_hand,
    speech,
    value,
    weights,
    whole_graphs,
    with_functions,
    with_lengths,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from service import state
from service.bundle import Bundle, BundleError, Manifest, load
from service.errors import Problem
from service.foreign import ForeignRunner
from service.tasks import Codec
from service.window import open_runner
from training.foreign.add import add
from training.foreign.graph import GraphError, read
from training.foreign.inspect import Findings, inspect
from training.foreign.pairs import shared_stem
from training.foreign.spec import read_spec
from training.foreign.trial import Unknown

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def strangers() -> dict[str, Case]:
    return cases()


def saved(folder: Path, graph: bytes) -> Path:
    (folder / "model.onnx").write_bytes(graph)
    return folder / "model.onnx"


def found_in(folder: Path, graph: bytes, *answers: str) -> Findings:
    return inspect(read(saved(folder, graph)), read_spec(None, answers).graph)


def added(folder: Path, graph: bytes, *answers: str, spec: str = "") -> Bundle:
    (folder / "spec.toml").write_text(spec)
    path, _ = add(saved(folder, graph), folder / "models", "stranger", read_spec(folder / "spec.toml", answers))
    return load(path)


def pairs_of(found: Findings) -> dict[str, str]:
    return {pair.input: pair.output for pair, _ in found.called.states}


# ---------------------------------------------------------------------- what is found


@pytest.mark.parametrize("name", CASES)
def test_states_and_axes_are_found(name: str, strangers: dict[str, Case], tmp_path: Path) -> None:
    case = strangers[name]
    found = found_in(tmp_path, case.graph, *case.answers)
    assert pairs_of(found) == {name: output for name, (output, _) in case.states.items()}
    assert {one.name: one.axes for one in found.called.inputs} == case.axes
    assert found.streamable
    assert found.called.batched == case.batched or name == "mixing"
    if not case.batched:
        assert found.batching == "alone" and any("one by one" in note for note in found.notes)


@pytest.mark.parametrize("name", CASES)
def test_a_bundle_of_it_answers_as_onnxruntime_does(name: str, strangers: dict[str, Case], tmp_path: Path) -> None:
    case = strangers[name]
    runner = open_runner(added(tmp_path, case.graph, *case.answers), 1)
    codec = Codec(runner.manifest)
    steps = [case.some_steps(9, seed) for seed in range(5)]
    entries = np.stack([codec.encode(one) for one in steps], axis=1)
    zero = [state.initial_row(runner.manifest.states)] * 5
    first = runner.run(entries[:4], zero)
    second = runner.run(entries[4:], first.rows)
    tolerance = 2e-3 if name == "half" else 1e-6
    for i, one in enumerate(steps):
        expected, states = case.run(one)
        for output in case.outputs:
            served = np.concatenate([part.outputs[output][:, i] for part in (first, second)])
            np.testing.assert_allclose(served, [answer[output] for answer in expected], tolerance, tolerance)
        for spec, array in zip(runner.manifest.states, second.rows[i], strict=True):
            np.testing.assert_allclose(array, states[spec.input].reshape(array.shape), tolerance, tolerance)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_order_of_inputs_and_outputs_says_nothing(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    rng, shuffled = np.random.default_rng(seed), onnx.load_model_from_string(lstm_by_hand())
    for side in (shuffled.graph.input, shuffled.graph.output):
        values = list(side)
        del side[:]
        side.extend(values[i] for i in rng.permutation(len(values)))
    found = found_in(tmp_path_factory.mktemp("shuffled"), shuffled.SerializeToString())
    assert pairs_of(found) == {"s1": "b", "s2": "a"}


def test_a_recurrent_operator_is_believed_before_names(tmp_path: Path) -> None:
    graph = onnx.load_model_from_string(exported("LSTM", dynamo=False))
    for value_ in graph.graph.output:
        value_.name = {"hn": "cn", "cn": "hn"}.get(value_.name, value_.name)
    for node in graph.graph.node:
        for i, name in enumerate(node.output):
            node.output[i] = {"hn": "cn", "cn": "hn"}.get(name, name)
    assert pairs_of(found_in(tmp_path, graph.SerializeToString())) == {"h0": "cn", "c0": "hn"}


@pytest.mark.parametrize(
    ("a", "b", "stem"),
    [
        ("h", "h_next", "h"),
        ("h0", "hn", "h"),
        ("state", "stateN", "state"),
        ("initial_h", "Y_h", "h"),
        ("new_state1", "state1", "state1"),
        ("new_state1", "state2", ""),
        ("encoder.cache_in", "encoder.cache_out", "encoder.cache"),
        ("prevHidden", "hidden", "hidden"),
        ("past_key", "present_key", "key"),
        ("input", "output", ""),
        ("x", "y", ""),
    ],
)
def test_what_two_names_have_in_common(a: str, b: str, stem: str) -> None:
    assert shared_stem(a, b) == stem


@pytest.mark.parametrize("name", ["both-ways-lstm", "both-ways-gru", "stateless", "stateless-last"])
def test_what_looks_ahead_or_gives_no_state_takes_whole_sequences(name: str, tmp_path: Path) -> None:
    bundle = added(tmp_path, whole_graphs()[name])
    assert not bundle.manifest.streamable
    runner = open_runner(bundle, 1)
    sequences = np.empty((1, 2), object)
    for i, length in enumerate((5, 9)):
        sequences[0, i] = np.random.default_rng(i).standard_normal((length, 3)).astype(np.float32)
    folded = runner.run(sequences, [state.initial_row(bundle.manifest.states)] * 2)
    assert folded.finite
    lengths = [len(folded.outputs["y"][0, i]) for i in range(2)]
    assert lengths == ([1, 1] if name == "stateless-last" else [5, 9])


def test_both_ways_over_a_fixed_number_of_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="from the end to the beginning"):
        found_in(tmp_path, exported("LSTM", dynamo=False, bidirectional=True, fixed=(4, 1)))


def test_a_graph_without_memory_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Tanh", ["x"], ["y"])]
    graph = model(nodes, {"x": ("float32", ["n", 3])}, {"y": ("float32", ["n", 3])})
    with pytest.raises(GraphError, match="states"):
        found_in(tmp_path, graph)


@pytest.mark.parametrize(("p", "q"), [("p", "q"), ("state_p", "state_q")])
def test_states_that_nothing_tells_apart_are_asked_for(p: str, q: str, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"states|--set states"):
        found_in(tmp_path, doubtful(p, q))
    said = json.dumps([{"input": q, "output": "r"}, {"input": p, "output": "s"}])
    found = found_in(tmp_path, doubtful(p, q), f"states={said}")
    assert pairs_of(found) == {q: "r", p: "s"} and [one.name for one in found.called.outputs] == ["y"]


def test_functions_of_a_models_own_are_looked_into(tmp_path: Path) -> None:
    assert pairs_of(found_in(tmp_path, with_functions(3, 2))) == {"h": "h_next"}


def test_a_number_of_steps_that_is_an_input_is_fixed_to_one(tmp_path: Path) -> None:
    with pytest.raises(Unknown) as asked:
        found_in(tmp_path, with_lengths())
    assert set(asked.value.questions) == {"constants.lengths"}
    with pytest.raises(GraphError, match="do not go on"):
        found_in(tmp_path, with_lengths(), "constants.lengths=1")
    bundle = added(tmp_path, with_lengths(), "constants.lengths=1", "sizes.x.0=1")
    assert {spec.input: spec.output for spec in bundle.manifest.states} == {"h": "hn", "c": "cn"}
    assert [spec.row_shape for spec in bundle.manifest.inputs] == [(3,)]
    assert open_runner(bundle, 1).batches_exactly


def test_states_that_are_named_wrongly_are_refused(tmp_path: Path) -> None:
    wrong = '{"input": "h0", "output": "cn"}, {"input": "c0", "output": "hn"}'
    with pytest.raises(GraphError, match="do not go on"):
        found_in(tmp_path, exported("LSTM", dynamo=False), f"states=[{wrong}]")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("constants.rate=1", "'rate'"),
        ("sizes.x.7=3", "axes 0 to 1"),
        ("sizes.y.0=3", "'y'"),
        ("sizes.x.0=0", "at least 1"),
        ('outputs=["z"]', "'z'"),
        ("context.z=3", "context.z"),
        ("batching=sometimes", "batching"),
        ("colour=red", "colour"),
        ("constants", "KEY=VALUE"),
    ],
)
def test_answers_that_do_not_fit_are_named(answer: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=said):
        added(tmp_path, rnn(), answer)


def test_an_owner_may_let_sessions_share_calls_that_change_bits(tmp_path: Path) -> None:
    runner = open_runner(added(tmp_path, mixing(), "batching=together"), 1)
    assert runner.manifest.foreign is not None and runner.manifest.foreign.batching == "together"
    zero = [state.initial_row(runner.manifest.states)] * 2
    entries = np.ones((1, 2, 4), np.float32)
    entries[0, 1] = 3
    assert not np.array_equal(
        runner.run(entries, zero).outputs["y"][0, 0], runner.run(entries[:, :1], zero[:1]).outputs["y"][0, 0]
    )


def test_a_batch_of_one_can_not_be_shared(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="batch of 1"):
        added(tmp_path, rnn(batch=1), "batching=together")


# ---------------------------------------------------------------------- Silero VAD


def test_silero_asks_for_what_is_not_in_it() -> None:
    with pytest.raises(Unknown) as asked:
        inspect(read(silero()), read_spec(None).graph)
    assert set(asked.value.questions) == {"constants.sr"}
    with pytest.raises(Unknown) as asked:
        inspect(read(silero()), read_spec(None, ["constants.sr=16000"]).graph)
    assert set(asked.value.questions) == {"sizes.input.1"}


def test_silero_answers_as_its_own_wrapper_does(tmp_path: Path) -> None:
    runner = open_runner(added(tmp_path, silero().read_bytes(), *VAD_ANSWERS), 1)
    assert {spec.name: spec.row_shape for spec in runner.manifest.states} == {"state": (2, 128), "input_context": (64,)}
    audio = [speech(3, seed) for seed in range(3)]
    entries = np.stack([one[: len(one) // 512 * 512].reshape(-1, 512) for one in audio], axis=1)
    folded = runner.run(entries, [state.initial_row(runner.manifest.states)] * 3)
    for i, one in enumerate(audio):
        expected = silero_by_hand(one)
        np.testing.assert_allclose(folded.outputs["output"][:, i, 0], expected, rtol=0, atol=1e-6)
        assert max(expected) > 0.5, "the test's audio is no speech"


# ---------------------------------------------------------------------- with a spec


def test_a_forecaster_in_the_datas_own_units(strangers: dict[str, Case], tmp_path: Path) -> None:
    spec = """
        task = "forecaster"
        features = [{ name = "t", unit = "°C", mean = 10, scale = 4 }, { name = "p" }, { name = "q", fill = "last" }]
        targets = [{ name = "t", unit = "°C", mean = 10, scale = 4 }, { name = "p", scale = 2 }]
    """
    graph = exported("GRU", dynamo=False)
    runner = open_runner(added(tmp_path, graph, spec=spec), 1)
    codec = Codec(runner.manifest)
    entries = codec.fill(codec.encode([[12, 1, 0.5], {"t": 8, "p": 2, "q": None}]), None)
    mean = runner.run(entries[:, None], [state.initial_row(runner.manifest.states)]).outputs["mean"]
    case = strangers["script-gru-tb"]
    expected, _ = case.run([{"x": [(t - 10) / 4, p, q]} for t, p, q in entries.tolist()])
    np.testing.assert_allclose(mean[:, 0], [one["y"] * [4, 2] + [10, 0] for one in expected], 1e-5, 1e-5)
    shown = codec.predictions({"mean": mean[:, 0]}, 1, None, entries, 0)
    assert list(shown[0]["mean"]) == ["t", "p"]


@pytest.mark.parametrize("gives", ["logits", "probabilities"])
def test_a_classifier(gives: str, strangers: dict[str, Case], tmp_path: Path) -> None:
    spec = f'task = "classifier"\nlabels = ["no", "yes"]\ngives = "{gives}"\n'
    graph = onnx.load_model_from_string(exported("RNN", dynamo=False))
    if gives == "probabilities":
        for node in graph.graph.node:
            for i, name in enumerate(node.output):
                node.output[i] = "scores" if name == "y" else name
        graph.graph.node.append(helper.make_node("Softmax", ["scores"], ["y"], axis=-1))
    bundle = added(tmp_path, graph.SerializeToString(), spec=spec)
    runner, codec = open_runner(bundle, 1), Codec(bundle.manifest)
    entries = codec.encode([[0.1, -0.2, 0.3], [1, 2, 3]])
    folded = runner.run(entries[:, None], [state.initial_row(bundle.manifest.states)])
    shown = codec.predictions({n: a[:, 0] for n, a in folded.outputs.items()}, 1, None, entries, 0)
    scores = [one["y"] for one in strangers["script-rnn-tb"].run([{"x": row} for row in entries.tolist()])[0]]
    for one, score in zip(shown, scores, strict=True):
        expected = np.exp(score) / np.exp(score).sum()
        np.testing.assert_allclose(list(one["probabilities"].values()), expected, 1e-5)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ('task = "oracle"', "task"),
        ('task = "forecaster"', "features and targets"),
        ('task = "classifier"', "labels"),
        ('task = "classifier"\nlabels = ["a", "b", "c"]', "logits"),
        ('task = "classifier"\nlabels = ["a", "b"]\noutput = "z"', "which of 'y'"),
        ('task = "classifier"\nlabels = ["a", "b"]\ngives = "probability"', "not one probability"),
        ('task = "forecaster"\nfeatures = [{ name = "a" }]\ntargets = [{ name = "a" }]', "1 are named"),
        ("[graph]\nconstants = 5", "constants"),
        ("task = ", "spec.toml"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(spec: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=said):
        added(tmp_path, exported("GRU", dynamo=False), spec=spec)
    assert not list((tmp_path / "models").glob("*/*"))


# ---------------------------------------------------------------------- hostile files


def external(location: str, **more: str) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        graph = onnx.load_model_from_string(rnn())
        tensor = graph.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in {"location": location, **more}.items():
            tensor.external_data.add(key=key, value=text)
        (folder / "link.bin").symlink_to("/etc/hostname")
        (folder / "few.bin").write_bytes(b"1234")
        return bytes(graph.SerializeToString())

    return make


def changed(how: Callable[[onnx.ModelProto], object]) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        graph = onnx.load_model_from_string(rnn())
        how(graph)
        return bytes(graph.SerializeToString())

    return make


def cycle(graph: onnx.ModelProto) -> None:
    graph.graph.node.append(helper.make_node("Add", ["around", "y"], ["about"]))
    graph.graph.node.append(helper.make_node("Tanh", ["about"], ["around"]))


def huge(shape: list[int | str]) -> Callable[[onnx.ModelProto], None]:
    def change(graph: onnx.ModelProto) -> None:
        graph.graph.input.append(value("blob", "float32", list(shape)))
        graph.graph.node.append(helper.make_node("ReduceMax", ["blob"], ["top"], keepdims=0))
        graph.graph.output.append(value("top", "float32", []))

    return change


def claims_two_gigabytes(graph: onnx.ModelProto) -> None:
    graph.graph.initializer[0].dims[:] = [2**20, 2**11]


HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty": (lambda _: b"", "not an ONNX model"),
    "text": (lambda _: b"not a graph at all", "not an ONNX model"),
    "cut": (lambda _: rnn()[:200], "not|is made by no node|valid"),
    "absolute-path": (external("/etc/passwd"), "outside"),
    "parent-path": (external("../secret.bin"), "outside"),
    "hidden-parent-path": (external("a/../../secret.bin"), "outside"),
    "link": (external("link.bin"), "outside"),
    "missing-data": (external("nowhere.bin"), "missing"),
    "data-beyond-the-file": (external("few.bin", offset="2", length="96"), "beyond"),
    "negative-offset": (external("few.bin", offset="-1"), "not described|beyond"),
    "offset-of-words": (external("few.bin", offset="first"), "not described"),
    "strange-key": (external("few.bin", run="rm"), "not described"),
    "custom-op": (
        changed(lambda m: m.graph.node.append(helper.make_node("Evil", ["y"], ["z"], domain="my.ops"))),
        "my.ops::Evil",
    ),
    "unknown-op": (changed(lambda m: m.graph.node.append(helper.make_node("Evil", ["y"], ["z"]))), "valid|load"),
    "missing-output": (
        changed(lambda m: m.graph.output.append(value("z", "float32", ["batch", 1]))),
        "'z' is made by no",
    ),
    "missing-input": (
        changed(lambda m: m.graph.node.append(helper.make_node("Tanh", ["q"], ["z"]))),
        "'q' is made by no",
    ),
    "cycle": (changed(cycle), "'around' needs itself"),
    "made-twice": (changed(lambda m: m.graph.node.append(helper.make_node("Tanh", ["x"], ["y"]))), "'y' is made twice"),
    "a-function-that-calls-itself": (lambda _: with_functions(1, 1, itself=True), "'f0' calls itself"),
    "functions-without-bounds": (lambda _: with_functions(60, 10), "more than 1000000 nodes"),
    "huge-step": (changed(huge([1, 2**31])), "larger than 64 MiB|valid"),
    "claims-two-gigabytes": (changed(claims_two_gigabytes), "valid|load"),
    "no-opset": (changed(lambda m: m.ClearField("opset_import")), "valid|load"),
    "strings": (
        lambda _: model(
            [helper.make_node("Identity", ["x"], ["y"])], {"x": ("str", ["n", 1])}, {"y": ("str", ["n", 1])}
        ),
        "tensors of",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    make, said = HOSTILE[name]
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(b"x" * 4096)
    with pytest.raises(GraphError, match=said) as refused:
        added(folder, make(folder))
    assert str(tmp_path) not in str(refused.value)
    assert not list((folder / "models").glob("*/*"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"gone\.onnx"):
        read(tmp_path / "gone.onnx")


def test_a_file_of_two_gigabytes_is_not_even_read(tmp_path: Path) -> None:
    with (tmp_path / "model.onnx").open("wb") as file:
        file.truncate(2**31)  # sparse
    with pytest.raises(GraphError, match="larger than 2 GB"):
        read(tmp_path / "model.onnx")


def test_data_beside_the_file_is_taken_in(tmp_path: Path) -> None:
    graph = onnx.load_model_from_string(rnn())
    tensor = graph.graph.initializer[0]
    (tmp_path / "weights.bin").write_bytes(b"pad." + tensor.raw_data)
    length = len(tensor.raw_data)
    made = external("weights.bin", offset="4", length=str(length))(tmp_path)
    bundle = added(tmp_path, made)
    kept = onnx.load(bundle.graph, load_external_data=False).graph.initializer[0]
    assert kept.data_location == TensorProto.DEFAULT and len(kept.raw_data) == length
    assert isinstance(open_runner(bundle, 1), ForeignRunner)


# ---------------------------------------------------------------------- bundles that lie


def lying(bundle: Bundle, **more: Any) -> Bundle:  # noqa: ANN401 (parts of a manifest)
    return Bundle(Manifest.model_validate(bundle.manifest.model_dump(mode="json") | more), bundle.path)


@pytest.mark.parametrize(
    "more",
    [
        {"inputs": [{"name": "signal", "dtype": "float32", "shape": ["B", 3]}]},
        {"foreign": {"constants": [{"name": "flag", "dtype": "bool", "shape": ["B"], "value": [1, 2, 3]}]}},
        {"foreign": None},
        {"states": []},
    ],
)
def test_a_manifest_that_lies_about_a_foreign_graph_is_refused(more: dict[str, Any], tmp_path: Path) -> None:
    bundle = added(tmp_path, counter())
    with pytest.raises((BundleError, ValueError)):
        open_runner(lying(bundle, **more), 1)


def test_a_golden_example_of_another_graph_is_refused(tmp_path: Path) -> None:
    bundle = added(tmp_path, rnn())
    graph = onnx.load(bundle.graph)
    graph.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights(3, HIDDEN, seed=99), "w"))
    bundle.graph.write_bytes(graph.SerializeToString())
    with pytest.raises(BundleError, match="golden"):
        open_runner(bundle, 1)


# ---------------------------------------------------------------------- inputs of raw models

BAD_INPUTS: list[Any] = [
    None,
    5,
    "text",
    [],
    [1.0],
    [[1.0, 2.0]],
    [[1.0, 2.0, 3.0, 4.0]],
    [[[1.0, 2.0, 3.0]]],
    [[1.0, 2.0, "3"]],
    [[1.0, 2.0, None]],
    [[1.0, 2.0, True]],
    [[1.0, 2.0, float("nan")]],
    [[1.0, 2.0, float("inf")]],
    [[1.0, 2.0, 1e39]],
    [[1.0, 2.0, 10**400]],
    [[1.0, 2.0, 3.0], [1.0]],
    [{"x": [1.0, 2.0, 3.0]}, 5],
    {"y": [[1.0, 2.0, 3.0]]},
    {"x": [[1.0, 2.0, 3.0]], "y": []},
    {"x": 5},
    {},
]


@pytest.mark.parametrize("inputs", BAD_INPUTS)
def test_inputs_that_do_not_fit_are_refused(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> None:  # noqa: ANN401
    with pytest.raises(Problem) as refused:
        _codec(tmp_path_factory).encode(inputs)
    assert refused.value.code == "invalid_input"
    assert refused.value.members["errors"][0]["pointer"].startswith("/inputs")


_codecs: list[Codec] = []


def _codec(folders: pytest.TempPathFactory) -> Codec:
    if not _codecs:
        _codecs.append(Codec(added(folders.mktemp("codec"), rnn()).manifest))
    return _codecs[0]


@given(
    rows=st.lists(
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3), min_size=1
    )
)
@settings(max_examples=50, deadline=None)
def test_what_is_logged_can_be_fed_again(rows: list[list[float]], tmp_path_factory: pytest.TempPathFactory) -> None:
    codec = _codec(tmp_path_factory)
    entries = codec.encode({"x": rows})
    assert codec.decode(codec.entries(entries.tobytes())) == rows
    assert codec.encode(codec.decode(entries)).tobytes() == entries.tobytes()


def test_several_inputs_are_one_entry(tmp_path: Path) -> None:
    codec = Codec(added(tmp_path, counter()).manifest)
    columns = {"signal": [[1, 2], [3, 4]], "flag": [True, False]}
    steps = [{"signal": [1, 2], "flag": True}, {"signal": [3, 4], "flag": False}]
    entries = codec.encode(columns)
    assert entries.tobytes() == codec.encode(steps).tobytes()
    assert codec.decode(codec.entries(entries.tobytes())) == steps
    for bad in ({"signal": [[1, 2]], "flag": [True, False]}, {"signal": [[1, 2]], "flag": [1]}, [[1, 2]]):
        with pytest.raises(Problem):
            codec.encode(bad)


# ---------------------------------------------------------------------- the commands


def recurra(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


def test_inspect_writes_the_manifest_and_add_publishes(tmp_path: Path) -> None:
    graph = saved(tmp_path, counter())
    looked = recurra("inspect", str(graph))
    assert looked.returncode == 0, looked.stderr
    manifest = Manifest.model_validate(json.loads(looked.stdout))
    assert [spec.name for spec in manifest.states] == ["count"]
    done = recurra("add", str(graph), "--name", "clicks", "--models", str(tmp_path / "models"))
    assert done.stdout.strip() == str(tmp_path / "models" / "clicks" / "1"), done.stderr
    changing = ("name", "created", "files", "training")
    published = load(tmp_path / "models" / "clicks" / "1").manifest.model_dump()
    assert {k: v for k, v in published.items() if k not in changing} == {
        k: v for k, v in manifest.model_dump().items() if k not in changing
    }


def test_what_is_not_found_is_asked_for_in_one_line_each() -> None:
    done = recurra("inspect", str(silero()))
    assert done.returncode == 1 and done.stdout == ""
    assert "--set constants.sr=..." in done.stderr and "Traceback" not in done.stderr


def test_graphs_are_added_without_torch(tmp_path: Path) -> None:
    code = f"""
import sys, cli
sys.modules["torch"] = None
cli.app(["add", {str(saved(tmp_path, rnn()))!r}, "--name", "x", "--models", {str(tmp_path)!r}], prog_name="recurra")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_on_a_terminal_it_asks() -> None:
    here, there = pty.openpty()
    command = [sys.executable, "-m", "cli", "inspect", str(silero())]
    asking = subprocess.Popen(command, cwd=ROOT, stdin=there, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.close(there)
    os.write(here, b"16000\n576\n")
    said, asked = asking.communicate(timeout=120)
    os.close(here)
    assert asking.returncode == 0, asked
    assert [one.value for one in Manifest.model_validate_json(said).foreign.constants] == [16000]
    assert "'sr'" in asked and "axis 1 of 'input'" in asked and "--set sizes.input.1=576" in asked
