"""Graphs as strangers make them: exported by PyTorch both ways, written in onnxscript, and node by node."""

import importlib.util
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxscript import FLOAT, script
from onnxscript import opset18 as op

FEATURES, HIDDEN, OUTPUTS, LAYERS = 3, 8, 2, 2
CELLS = ("LSTM", "GRU", "RNN")


def silero() -> Path:
    """Silero VAD's own graph, from its wheel."""
    found = importlib.util.find_spec("silero_vad")
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "data" / "silero_vad.onnx"


# ---------------------------------------------------------------------- exported by PyTorch


def exported(
    cell: str,
    dynamo: bool,
    batch_first: bool = False,
    bidirectional: bool = False,
    states: bool = True,
    last_only: bool = False,
    fixed: tuple[int, int] | None = None,
) -> bytes:
    """A `torch.nn` layer with a linear head; `fixed`: (T, B) that the graph takes, else any."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kind: Any = getattr(torch.nn, cell)
            self.layer = kind(FEATURES, HIDDEN, LAYERS, batch_first=batch_first, bidirectional=bidirectional)
            self.head = torch.nn.Linear(HIDDEN * (1 + bidirectional), OUTPUTS)

        def forward(self, x: Any, h0: Any = None, c0: Any = None) -> Any:  # noqa: ANN401 (tensors)
            given = (h0, c0) if c0 is not None else h0
            y, after = self.layer(x, given)
            if last_only:
                y = y[:, -1] if batch_first else y[-1]
            if not states:
                return self.head(y)
            return self.head(y), *(after if cell == "LSTM" else (after,))

    torch.manual_seed(1)
    T, B = fixed or (4, 5)
    x = torch.zeros((B, T, FEATURES) if batch_first else (T, B, FEATURES))
    names = (["h0", "c0"] if cell == "LSTM" else ["h0"]) if states else []
    fed = [torch.zeros(LAYERS * (1 + bidirectional), B, HIDDEN) for _ in names]
    outputs = ["y", *(name.replace("0", "n") for name in names)]
    axes = {0: "batch", 1: "time"} if batch_first else {0: "time", 1: "batch"}
    answer = {0: "batch"} if last_only else axes
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        common: dict[str, Any] = {"input_names": ["x", *names], "output_names": outputs, "dynamo": dynamo}
        if dynamo:
            time, batch = torch.export.Dim("time"), torch.export.Dim("batch")
            free: Any = {"time": time, "batch": batch}
            shapes = ({i: free[axis] for i, axis in axes.items()}, *({1: batch} for _ in names))
            common |= {"dynamic_shapes": None if fixed else shapes, "external_data": False, "verbose": False}
        elif not fixed:
            common["dynamic_axes"] = {"x": axes, "y": answer, **{name: {1: "batch"} for name in names + outputs[1:]}}
        torch.onnx.export(Network().eval(), (x, *fed), str(path), **common)
        return path.read_bytes()


# ---------------------------------------------------------------------- written by hand


def weights(*shape: int, seed: int = 0, dtype: str = "float32") -> "np.ndarray[Any, Any]":
    return (np.random.default_rng(seed).standard_normal(shape) * 0.5).astype(dtype)


W_Z, W_N = (numpy_helper.from_array(weights(FEATURES, HIDDEN, seed=i)) for i in (1, 2))
U_Z, U_N = (numpy_helper.from_array(weights(HIDDEN, HIDDEN, seed=i)) for i in (3, 4))


@script()
def gru_step(x: FLOAT["batch", 3], memory: FLOAT["batch", 8]):  # type: ignore[valid-type,no-untyped-def] # noqa: ANN201, F821
    """One step of a GRU without a reset gate: no time axis."""
    z = op.Sigmoid(op.MatMul(x, op.Constant(value=W_Z)) + op.MatMul(memory, op.Constant(value=U_Z)))
    n = op.Tanh(op.MatMul(x, op.Constant(value=W_N)) + op.MatMul(memory, op.Constant(value=U_N)))
    new_memory = z * memory + (op.Constant(value_float=1.0) - z) * n
    y = op.ReduceSum(new_memory, op.Constant(value_ints=[1]), keepdims=1)
    return y, new_memory


def gru_in_onnxscript() -> bytes:
    return bytes(gru_step.to_model_proto().SerializeToString())


def lstm_by_hand(inputs: Sequence[str] = ("x", "s1", "s2"), outputs: Sequence[str] = ("a", "b")) -> bytes:
    """One step of an LSTM without a head, under names that say nothing: gives cell state and hidden state."""
    x, h, c = inputs
    cell, hidden = outputs
    nodes = [
        helper.make_node("Concat", [x, h], ["xh"], axis=1),
        helper.make_node("Gemm", ["xh", "w"], ["gates"]),
        helper.make_node("Split", ["gates"], ["i", "f", "o", "g"], axis=1, num_outputs=4),
        *(helper.make_node("Sigmoid", [name], [f"{name}s"]) for name in "ifo"),
        helper.make_node("Tanh", ["g"], ["gt"]),
        helper.make_node("Mul", ["fs", c], ["kept"]),
        helper.make_node("Mul", ["is", "gt"], ["new"]),
        helper.make_node("Add", ["kept", "new"], [cell]),
        helper.make_node("Tanh", [cell], ["ct"]),
        helper.make_node("Mul", ["os", "ct"], [hidden]),
    ]
    return model(
        nodes,
        {x: ("float32", ["batch", FEATURES]), h: ("float32", ["batch", HIDDEN]), c: ("float32", ["batch", HIDDEN])},
        {cell: ("float32", ["batch", HIDDEN]), hidden: ("float32", ["batch", HIDDEN])},
        {"w": weights(FEATURES + HIDDEN, 4 * HIDDEN, seed=7)},
    )


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[str, list[int | str | None]]],
    outputs: dict[str, tuple[str, list[int | str | None]]],
    initializers: "dict[str, np.ndarray[Any, Any]] | None" = None,
    domains: Sequence[str] = (),
) -> bytes:
    """A model of nodes."""
    graph = helper.make_graph(
        list(nodes),
        "hand",
        [value(name, *spec) for name, spec in inputs.items()],
        [value(name, *spec) for name, spec in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()],
    )
    opsets = [helper.make_opsetid("", 18), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def value(name: str, dtype: str, shape: list[int | str | None]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def rnn(dtype: str = "float32", batch: int | str = "batch", state_axes: str = "BH") -> bytes:
    """tanh(x W + h U), one step a call; `state_axes` "HB": the state's batch axis is the last."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Transpose", ["h"], ["hb"], perm=[1, 0])
        if state_axes == "HB"
        else helper.make_node("Identity", ["h"], ["hb"]),
        helper.make_node("MatMul", ["hb", "u"], ["hu"]),
        helper.make_node("Add", ["xw", "hu"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["y"]),
        helper.make_node("Transpose", ["y"], ["h_next"], perm=[1, 0])
        if state_axes == "HB"
        else helper.make_node("Identity", ["y"], ["h_next"]),
    ]
    state: list[int | str | None] = [HIDDEN, batch] if state_axes == "HB" else [batch, HIDDEN]
    return model(
        nodes,
        {"x": (dtype, [batch, FEATURES]), "h": (dtype, state)},
        {"y": (dtype, [batch, HIDDEN]), "h_next": (dtype, state)},
        {"w": weights(FEATURES, HIDDEN, seed=1, dtype=dtype), "u": weights(HIDDEN, HIDDEN, seed=2, dtype=dtype)},
    )


def counter(dtype: str = "int64") -> bytes:
    """Two inputs of two types, an integer state: counts the steps whose flag is set, weighs the signal with it."""
    nodes = [
        helper.make_node("Cast", ["flag"], ["one"], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype))),
        helper.make_node("Add", ["count", "one"], ["count_next"]),
        helper.make_node("Cast", ["count_next"], ["counted"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["counted", "last"], ["column"]),
        helper.make_node("Mul", ["signal", "column"], ["weighed"]),
    ]
    return model(
        nodes,
        {"signal": ("float32", ["n", 2]), "flag": ("bool", ["n"]), "count": (dtype, ["n"])},
        {"weighed": ("float32", ["n", 2]), "count_next": (dtype, ["n"])},
        {"last": np.array([1])},
    )


def mixing() -> bytes:
    """Sessions in one batch change each other: the batch's mean is taken off."""
    nodes = [
        helper.make_node("Add", ["x", "h"], ["sum"]),
        helper.make_node("ReduceMean", ["sum", "first"], ["mean"], keepdims=1),
        helper.make_node("Mul", ["mean", "little"], ["bit"]),
        helper.make_node("Sub", ["sum", "bit"], ["off"]),
        helper.make_node("Tanh", ["off"], ["h_next"]),
        helper.make_node("Identity", ["h_next"], ["y"]),
    ]
    axes: list[int | str | None] = ["batch", 4]
    return model(
        nodes,
        {"x": ("float32", axes), "h": ("float32", axes)},
        {"y": ("float32", axes), "h_next": ("float32", axes)},
        {"first": np.array([0]), "little": np.array(0.5, np.float32)},
    )


def doubtful(p: str, q: str) -> bytes:
    """Two states of one shape that nothing tells apart: each is worked out of both."""
    nodes = [
        helper.make_node("Concat", ["x", p, q], ["all"], axis=1),
        helper.make_node("MatMul", ["all", "v"], ["one"]),
        helper.make_node("MatMul", ["all", "w"], ["two"]),
        helper.make_node("Tanh", ["one"], ["r"]),
        helper.make_node("Tanh", ["two"], ["s"]),
        helper.make_node("Mul", ["r", "s"], ["y"]),
    ]
    state: tuple[str, list[int | str | None]] = ("float32", ["batch", HIDDEN])
    return model(
        nodes,
        {"x": ("float32", ["batch", FEATURES]), p: state, q: state},
        {"y": state, "r": state, "s": state},
        {name: weights(FEATURES + 2 * HIDDEN, HIDDEN, seed=i) for i, name in enumerate("vw")},
    )


def with_lengths() -> bytes:
    """An LSTM operator that is told how many steps each session has."""
    gates = 4 * HIDDEN
    nodes = [
        helper.make_node("LSTM", ["x", "w", "r", "", "lengths", "h", "c"], ["all", "hn", "cn"], hidden_size=HIDDEN),
        helper.make_node("Squeeze", ["all", "directions"], ["y"]),
    ]
    state: list[int | str | None] = [1, "batch", HIDDEN]
    return model(
        nodes,
        {
            "lengths": ("int32", ["batch"]),
            "c": ("float32", state),
            "x": ("float32", ["time", "batch", FEATURES]),
            "h": ("float32", state),
        },
        {"y": ("float32", ["time", "batch", HIDDEN]), "cn": ("float32", state), "hn": ("float32", state)},
        {
            "w": weights(1, gates, FEATURES, seed=1),
            "r": weights(1, gates, HIDDEN, seed=2),
            "directions": np.array([1]),
        },
    )


def with_functions(count: int, calls: int, itself: bool = False) -> bytes:
    """A model whose functions call each other, or themselves."""
    found = onnx.load_model_from_string(rnn())
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    for i in range(count):
        inner = f"f{i}" if itself else f"f{i + 1}"
        kind, domain = ("Tanh", "") if i == count - 1 and not itself else (inner, "own")
        body = [
            helper.make_node(kind, ["a" if j == 0 else f"v{j - 1}"], [f"v{j}"], domain=domain) for j in range(calls)
        ]
        found.functions.append(helper.make_function("own", f"f{i}", ["a"], [f"v{calls - 1}"], body, opsets))
    found.opset_import.append(opsets[1])
    for node in found.graph.node:
        if node.op_type == "Tanh":
            node.op_type, node.domain = "f0", "own"
    return bytes(found.SerializeToString())


def scan() -> bytes:
    """An RNN in a `Scan` over batch-first input, two states that are passed on in the other order."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["x_t", "w"], ["xw"]),
            helper.make_node("MatMul", ["p_in", "u"], ["hu"]),
            helper.make_node("Add", ["xw", "hu"], ["sum"]),
            helper.make_node("Tanh", ["sum"], ["p_out"]),
            helper.make_node("Mul", ["q_in", "half"], ["old"]),
            helper.make_node("Add", ["old", "p_out"], ["q_out"]),
            helper.make_node("Identity", ["q_out"], ["y_t"]),
        ],
        "body",
        [value(name, "float32", [None, HIDDEN]) for name in ("p_in", "q_in")]
        + [value("x_t", "float32", [None, FEATURES])],
        [value(name, "float32", [None, HIDDEN]) for name in ("p_out", "q_out", "y_t")],
    )
    nodes = [
        helper.make_node(
            "Scan",
            ["fast", "slow", "signal"],
            ["one", "two", "answer"],
            body=body,
            num_scan_inputs=1,
            scan_input_axes=[1],
            scan_output_axes=[1],
        )
    ]
    return model(
        nodes,
        {
            "signal": ("float32", [None, None, FEATURES]),
            "slow": ("float32", [None, HIDDEN]),
            "fast": ("float32", [None, HIDDEN]),
        },
        {
            "two": ("float32", [None, HIDDEN]),
            "answer": ("float32", [None, None, HIDDEN]),
            "one": ("float32", [None, HIDDEN]),
        },
        {
            "w": weights(FEATURES, HIDDEN, seed=1),
            "u": weights(HIDDEN, HIDDEN, seed=2),
            "half": np.array(0.5, np.float32),
        },
    )


# ---------------------------------------------------------------------- what they are


class Case:
    """A graph, what is to be found in it, and how it is run by hand: one step of one session."""

    def __init__(
        self,
        graph: bytes,
        states: dict[str, tuple[str, tuple[int, ...]]],
        inputs: dict[str, tuple[int, ...]],
        outputs: dict[str, tuple[int, ...]],
        axes: dict[str, tuple[int | str, ...]],
        batched: bool = True,
        answers: Sequence[str] = (),
    ) -> None:
        """`states`: input -> (output, shape of one session); `inputs`, `outputs`: shape of one step outside."""
        self.graph, self.states, self.inputs, self.outputs = graph, states, inputs, outputs
        self.axes, self.batched, self.answers = axes, batched, answers

    def run(self, steps: Sequence[dict[str, Any]]) -> "tuple[list[dict[str, Any]], dict[str, np.ndarray[Any, Any]]]":
        """The outputs at each step and the states after them, from ONNX Runtime itself."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(self.graph, options, providers=["CPUExecutionProvider"])
        types = {node.name: _NUMPY[node.type] for node in session.get_inputs()}
        state = {name: np.zeros(shape, types[name]) for name, (_, shape) in self.states.items()}
        shapes = {n: tuple(1 if isinstance(a, str) else a for a in self.axes[n]) for n in self.inputs}
        answered = []
        for step in steps:
            feed = {name: np.array(step[name], types[name]).reshape(shapes[name]) for name in self.inputs}
            wanted = [*self.outputs, *(output for output, _ in self.states.values())]
            found = session.run(wanted, {**feed, **state})
            answered.append({n: a.reshape(self.outputs[n]) for n, a in zip(self.outputs, found, strict=False)})
            state = dict(zip(self.states, found[len(self.outputs) :], strict=True))
        return answered, state

    def some_steps(self, count: int, seed: int = 0) -> list[dict[str, Any]]:
        """Plausible inputs as a request holds them, a step each."""
        rng = np.random.default_rng(seed)
        return [
            {
                name: bool(rng.integers(2)) if name == "flag" else rng.standard_normal(shape).astype("float16").tolist()
                for name, shape in self.inputs.items()
            }
            for _ in range(count)
        ]


_NUMPY = {"tensor(float)": "float32", "tensor(double)": "float64"}
_NUMPY |= {f"tensor({name})": name for name in ("float16", "int64", "int32", "bool")}


def cases() -> dict[str, Case]:
    """Every graph that can be streamed, by name."""
    found: dict[str, Case] = {}
    B, T = "B", "T"
    for cell in CELLS:
        names = {"h0": ("hn", (LAYERS, 1, HIDDEN))} | ({"c0": ("cn", (LAYERS, 1, HIDDEN))} if cell == "LSTM" else {})
        for first in (False, True):
            axes: tuple[int | str, ...] = (B, T, FEATURES) if first else (T, B, FEATURES)
            graph = exported(cell, dynamo=False, batch_first=first)
            found[f"script-{cell.lower()}-{''.join(map(str, axes[:2])).lower()}"] = Case(
                graph, names, {"x": (FEATURES,)}, {"y": (OUTPUTS,)}, {"x": axes}
            )
        # This exporter fixes the number of steps in the head's reshape: an entry holds them all.
        found[f"dynamo-{cell.lower()}"] = Case(
            exported(cell, dynamo=True), names, {"x": (4, FEATURES)}, {"y": (4, OUTPUTS)}, {"x": (4, B, FEATURES)}
        )
        found[f"dynamo-{cell.lower()}-one"] = Case(
            exported(cell, dynamo=True, batch_first=True, fixed=(1, 1)),
            names,
            {"x": (FEATURES,)},
            {"y": (OUTPUTS,)},
            {"x": (T, B, FEATURES)},
            batched=False,
        )
    row, memory = (1, HIDDEN), {"x": (B, FEATURES)}
    found |= {
        "last-output": Case(
            exported("GRU", dynamo=False, last_only=True),
            {"h0": ("hn", (LAYERS, 1, HIDDEN))},
            {"x": (FEATURES,)},
            {"y": (OUTPUTS,)},
            {"x": (T, B, FEATURES)},
        ),
        "onnxscript-gru": Case(
            gru_in_onnxscript(), {"memory": ("new_memory", row)}, {"x": (FEATURES,)}, {"y": (1,)}, memory
        ),
        "hand-lstm": Case(
            lstm_by_hand(), {"s1": ("b", row), "s2": ("a", row)}, {"x": (FEATURES,)}, {"b": (HIDDEN,)}, memory
        ),
        "half": Case(rnn("float16"), {"h": ("h_next", row)}, {"x": (FEATURES,)}, {"y": (HIDDEN,)}, memory),
        "double": Case(rnn("float64"), {"h": ("h_next", row)}, {"x": (FEATURES,)}, {"y": (HIDDEN,)}, memory),
        "batch-of-one": Case(
            rnn(batch=1), {"h": ("h_next", row)}, {"x": (FEATURES,)}, {"y": (HIDDEN,)}, memory, batched=False
        ),
        "batch-last": Case(
            rnn(state_axes="HB"), {"h": ("h_next", (HIDDEN, 1))}, {"x": (FEATURES,)}, {"y": (HIDDEN,)}, memory
        ),
        "counter": Case(
            counter(),
            {"count": ("count_next", (1,))},
            {"signal": (2,), "flag": ()},
            {"weighed": (2,)},
            {"signal": (B, 2), "flag": (B,)},
        ),
        "counter-32": Case(
            counter("int32"),
            {"count": ("count_next", (1,))},
            {"signal": (2,), "flag": ()},
            {"weighed": (2,)},
            {"signal": (B, 2), "flag": (B,)},
        ),
        "mixing": Case(mixing(), {"h": ("h_next", (1, 4))}, {"x": (4,)}, {"y": (4,)}, {"x": (B, 4)}, batched=False),
        "vad-sequence": Case(
            silero().with_name("silero_vad_16k_sequence.onnx").read_bytes(),
            {"h": ("hn", (1, 1, 128)), "c": ("cn", (1, 1, 128))},
            {"input": (576,)},
            {"speech_probs": ()},
            {"input": (T, 576)},
            batched=False,
        ),
        "scan": Case(
            scan(),
            {"fast": ("one", row), "slow": ("two", row)},
            {"signal": (FEATURES,)},
            {"answer": (HIDDEN,)},
            {"signal": (B, T, FEATURES)},
        ),
    }
    return found


CASES = (
    *(f"script-{cell}-{axes}" for cell in ("lstm", "gru", "rnn") for axes in ("tb", "bt")),
    *(f"dynamo-{cell}{one}" for cell in ("lstm", "gru", "rnn") for one in ("", "-one")),
    *("last-output", "onnxscript-gru", "hand-lstm", "half", "double", "batch-of-one", "batch-last"),
    *("counter", "counter-32", "mixing", "vad-sequence", "scan"),
)
"""their names, so that tests are collected without building them"""


def whole_graphs() -> dict[str, bytes]:
    """Graphs that can not be streamed."""
    return {
        "both-ways-lstm": exported("LSTM", dynamo=False, bidirectional=True),
        "both-ways-gru": exported("GRU", dynamo=False, batch_first=True, bidirectional=True),
        "stateless": exported("LSTM", dynamo=False, batch_first=True, states=False),
        "stateless-last": exported("GRU", dynamo=False, batch_first=True, states=False, last_only=True),
    }


VAD_ANSWERS = ("constants.sr=16000", "sizes.input.1=512", "context.input=64")


def silero_by_hand(audio: "np.ndarray[Any, Any]") -> list[float]:
    """Speech probability of each 512 samples at 16 kHz, as Silero's own wrapper works it out: with 64 before them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(silero()), providers=["CPUExecutionProvider"])
    state, context, found = np.zeros((2, 1, 128), np.float32), np.zeros((1, 64), np.float32), []
    for begin in range(0, len(audio) - 511, 512):
        chunk = np.concatenate([context, audio[None, begin : begin + 512]], axis=1)
        probability, state = session.run(None, {"input": chunk, "state": state, "sr": np.array(16000)})
        context = chunk[:, -64:]
        found.append(float(probability[0, 0]))
    return found


def speech(seconds: float, seed: int) -> "np.ndarray[Any, Any]":
    """Something like speech at 16 kHz: a buzzing source through moving formants in bursts, noise in between."""
    rng = np.random.default_rng(seed)
    n = int(seconds * 16000)
    t = np.arange(n) / 16000
    pitch = 110 + 40 * rng.random() + 15 * np.sin(2 * np.pi * (1.5 + rng.random()) * t)
    phase = 2 * np.pi * np.cumsum(pitch) / 16000
    formants = [500 + 250 * np.sin(2 * np.pi * 2.1 * t), 1500 + 500 * np.sin(2 * np.pi * 1.3 * t), 2500 + 0 * t]
    voice = np.zeros(n)
    for k in range(1, 30):
        weight = sum(np.exp(-(((k * pitch - formant) / 180) ** 2)) for formant in formants) + 0.02
        voice += weight * np.sin(k * phase)
    bursts = (np.sin(2 * np.pi * 0.4 * t + 6 * rng.random()) > 0) * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * t))
    sound = 0.25 * voice * bursts + 0.004 * rng.standard_normal(n)
    return np.asarray(sound / max(1.0, np.abs(sound).max()), np.float32)
