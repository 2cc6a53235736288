"""A trained model as one ONNX graph: `(inputs[T, B, ...], states) -> (outputs[T, B, ...], states)`.

A `Scan` over time runs one step of all layers and of the head. Every matrix product lives inside the step, so
its shape is [B, K] x [K, N] however a sequence is cut, and its right side is a constant, which ONNX Runtime packs
once and multiplies row by row in one order: neither chunking nor batching can change a bit. Outside the Scan stand
only operations whose result for one element does not depend on where it lies in the tensor. ONNX Runtime's Sin,
Cos, Log and Softplus are not of that kind (a vector's remainder takes another code path); Sigmoid, Tanh, Sqrt and plain
arithmetic are, so the former are built from the latter (measured, see docs/manifest.md; `parity.py` checks it).
"""

from math import factorial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch import nn

from training.cells import CELLS, input_weight, layer_drive, layer_output
from training.layers import GATES
from training.mel import FLOOR, SoundEncoder
from training.model import (
    ForecastHead,
    ModelConfig,
    OwnHead,
    RecurrentModel,
    ValueEncoder,
    carried_states,
    middle,
    state_names,
)
from training.nodes import Nodes, layer_norm, logarithm, odd_series, softplus

OPSET = 21
IR_VERSION = 10
FOLDED_BYTES = 32 * 2**20
ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "Relu", nn.Tanh: "Tanh", nn.Sigmoid: "Sigmoid"}
SINE = [(-1) ** k / factorial(2 * k + 1) for k in range(6)]

Signature = dict[str, tuple[str, list[int | str]]]


def build(module: RecurrentModel, step: type[Nodes] = Nodes) -> onnx.ModelProto:
    """The module as a checked ONNX model, its step written by `step`; inputs and outputs as in `signature`."""
    constants: dict[str, TensorProto] = {}
    nodes = Nodes("", constants)
    head = named_outputs(nodes, module, _scan(nodes, module, _entries(nodes, module), step("step.", constants)))
    for name, value in head.items():
        nodes.name(value, name)
    return finished(module, nodes)


def finished(module: RecurrentModel, nodes: Nodes) -> onnx.ModelProto:
    """The nodes as a checked model with the module's inputs and outputs."""
    inputs, outputs = signature(module)
    graph = helper.make_graph(
        nodes.nodes, "step", _infos(inputs), _infos(outputs), initializer=list(nodes.constants.values())
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="recurra",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def signature(module: RecurrentModel) -> tuple[Signature, Signature]:
    """Inputs and outputs of the graph, states included: name -> (dtype, axes), time-major."""
    config = module.config
    states: Signature = {
        name: ("float32", [rows, "B", width]) for name, (rows, width) in carried_states(config).items()
    }
    after: Signature = {f"{name}_next": spec for name, spec in states.items()}
    if config.vocabulary:
        entries: Signature = {"symbols": ("int64", ["T", "B"])}
    else:
        entries = {"values": ("float32", ["T", "B", len(config.periods)])}
    return entries | states, _outputs(module) | after


def _outputs(module: RecurrentModel) -> Signature:
    K, Q = len(module.config.columns), len(module.config.quantiles)
    if not module.config.targets:
        labels = module.config.vocabulary if module.config.task == "language-model" else module.config.labels
        return {"logits": ("float32", ["T", "B", labels])}
    quantiles: Signature = {"quantiles": ("float32", ["T", "B", Q, K])} if Q else {}
    return {"mean": ("float32", ["T", "B", K]), **quantiles}


def _infos(signature: Signature) -> list[onnx.ValueInfoProto]:
    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    return [helper.make_tensor_value_info(name, types[dtype], axes) for name, (dtype, axes) in signature.items()]


def _entries(nodes: Nodes, module: RecurrentModel) -> str:
    """What the Scan reads at each step: rows of the folded table [T, B, G*H], or encoded values [T, B, E]."""
    if isinstance(module.encoder, ValueEncoder):
        return encode(nodes, module.encoder)
    if isinstance(module.encoder, SoundEncoder):
        return heard(nodes, module.encoder)
    table = _folded_table(nodes, module) if folded(module.config) else _embedding(nodes, module.encoder)
    return nodes.add("Gather", table, "symbols", axis=0)


def folded(config: ModelConfig) -> bool:
    """Whether the embedding is multiplied with layer 0's input weights at the export: fast, and large where V is."""
    return 0 < config.vocabulary * GATES[config.cell] * config.hidden * 4 <= FOLDED_BYTES


def _embedding(nodes: Nodes, encoder: nn.Embedding) -> str:
    return nodes.constant("embedding", encoder.weight)


def _folded_table(nodes: Nodes, module: RecurrentModel) -> str:
    """Embedding, input weights and bias of layer 0 as one table [V, G*H]."""
    weight, bias = input_weight(module, 0)
    assert isinstance(module.encoder, nn.Embedding)
    table = module.encoder.weight.detach().double() @ weight.double() + bias.double()
    return nodes.constant("layer0.table", table.float())


def encode(nodes: Nodes, encoder: ValueEncoder) -> str:
    """values [T, B, F] -> plain features standardised, then a (sin, cos) pair per periodic one: [T, B, E]."""
    parts = []
    if encoder.plain:
        columns = encoder.plain
        mean = nodes.constant("encoder.mean", encoder.mean[columns])
        scale = nodes.constant("encoder.scale", encoder.scale[columns])
        plain = nodes.add("Gather", "values", nodes.constant("encoder.plain", columns), axis=2)
        parts.append(nodes.add("Div", nodes.add("Sub", plain, mean), scale))
    if encoder.periodic:
        parts.append(_waves(nodes, encoder))
    return nodes.add("Concat", *parts, axis=2) if len(parts) > 1 else parts[0]


def _waves(nodes: Nodes, encoder: ValueEncoder) -> str:
    """sin and cos of 2 pi x / period, [T, B, 2P]; as cos(2 pi t) = sin(2 pi (1/4 - |t - round(t)|))."""
    columns = [column for column in encoder.periodic for _ in ("sin", "cos")]
    x = nodes.add("Gather", "values", nodes.constant("encoder.periodic", columns), axis=2)
    period = nodes.constant("encoder.period", encoder.period[columns])
    turns = nodes.add("Div", nodes.add("Mod", x, period, fmod=1), period)
    lag = nodes.constant("encoder.lag", [0.25, 0.0] * len(encoder.periodic))
    lagged = nodes.add("Sub", turns, lag)
    from_peak = nodes.add("Abs", nodes.add("Sub", lagged, nodes.add("Round", lagged)))
    quarter = nodes.add("Sub", nodes.scalar(0.25), from_peak)
    return odd_series(nodes, nodes.add("Mul", quarter, nodes.scalar(2 * np.pi)), SINE)


def heard(nodes: Nodes, encoder: SoundEncoder) -> str:
    """values [T, B, hop] -> standardised log-mel features [T, B, mels]; names `samples_next`.

    A Scan of its own holds the products, so that the logarithms are taken of all steps at once.
    """
    before = nodes.add("Gather", "samples", _index(nodes, 0), axis=0)
    after, power = nodes.add_many("Scan", before, "values", outputs=2, body=_hearing(nodes, encoder), num_scan_inputs=1)
    nodes.name(nodes.add("Unsqueeze", after, nodes.constant("sound.axis", [0])), "samples_next")
    log_mel = logarithm(nodes, nodes.add("Add", power, nodes.scalar(FLOOR)))
    mean, scale = nodes.constant("encoder.mean", encoder.mean), nodes.constant("encoder.scale", encoder.scale)
    return nodes.add("Div", nodes.add("Sub", log_mel, mean), scale)


def _hearing(nodes: Nodes, encoder: SoundEncoder) -> onnx.GraphProto:
    """The Scan's body: the samples before [B, window - hop], a hop [B, hop] -> samples', the bands' power [B, mels]."""
    sound, step = encoder.sound, Nodes("sound.", nodes.constants)
    window = step.add("Concat", "before", "hop", axis=1)
    spectrum = step.add("Gemm", window, step.constant("sound.basis", encoder.basis))
    power = step.add("Gemm", step.add("Mul", spectrum, spectrum), step.constant("sound.bands", encoder.bands))
    ends = [step.constant(f"sound.{name}", [value]) for name, value in (("hop", sound.hop), ("end", sound.window))]
    after = step.add("Slice", window, *ends, step.constant("sound.along", [1]))
    step.name(after, "after")
    step.name(power, "power")
    overlap = ["B", sound.window - sound.hop]
    return helper.make_graph(
        step.nodes,
        "hearing",
        [_float_info("before", overlap), _float_info("hop", ["B", sound.hop])],
        [_float_info("after", overlap), _float_info("power", ["B", sound.mels])],
    )


def _scan(nodes: Nodes, module: RecurrentModel, entries: str, step: Nodes) -> str:
    """Run the step over time; names `<state>_next` and returns the head's raw values [T, B, N]."""
    names, layers = state_names(module.config.cell), range(module.config.layers)
    before = [[nodes.add("Gather", name, _index(nodes, i), axis=0) for i in layers] for name in names]
    flat = [value for values in before for value in values]
    *after, raw = nodes.add_many(
        "Scan", *flat, entries, outputs=len(flat) + 1, body=_step(module, step), num_scan_inputs=1
    )
    for i, name in enumerate(names):
        rows = nodes.add("Concat", *after[i * len(layers) : (i + 1) * len(layers)], axis=0)
        shape = nodes.constant("states.shape", [len(layers), -1, module.config.hidden])
        nodes.name(nodes.add("Reshape", rows, shape), f"{name}_next")
    return raw


def _index(nodes: Nodes, i: int) -> str:
    return nodes.constant(f"index.{i}", np.array(i))


def _step(module: RecurrentModel, step: Nodes) -> onnx.GraphProto:
    """The Scan's body, one step of all layers: states [B, H] each, entry -> states', raw head values [B, N]."""
    config = module.config
    names = state_names(config.cell)
    befores = [f"{name}{i}" for name in names for i in range(config.layers)]
    x = stream = "entry"
    afters: dict[str, str] = {}
    for i in range(config.layers):
        drive = x if i == 0 and folded(config) else layer_drive(step, module, i, x)
        states = CELLS[config.cell](step, module, i, drive)
        afters.update({f"{name}{i}": value for name, value in zip(names, states, strict=True)})
        stream, x = layer_output(step, module, i, stream, states[0])
    raw = _layers(step, module, x)
    for name in befores:
        step.name(afters[name], f"{name}_next")
    step.name(raw, "raw")
    return helper.make_graph(
        step.nodes,
        "cell",
        [_float_info(name, ["B", config.hidden]) for name in befores] + [_float_info("entry", ["B", None])],
        [_float_info(f"{name}_next", ["B", config.hidden]) for name in befores] + [_float_info("raw", ["B", None])],
    )


def _layers(step: Nodes, module: RecurrentModel, x: str) -> str:
    """The head's layers, one after another: x [B, H] -> raw values [B, N]."""
    if not isinstance(module.head, OwnHead):
        return _layer(step, "head", module.head.linear, x)
    for i, layer in enumerate(module.head.layers):
        x = _layer(step, f"head.{i}", layer, x)
    return x if len(module.head.layers) else step.add("Identity", x)


def _layer(step: Nodes, name: str, layer: nn.Module, x: str) -> str:
    match layer:
        case nn.Linear():
            return step.linear(x, f"{name}.weight", layer.weight.T, step.constant(f"{name}.bias", layer.bias))
        case nn.LayerNorm():
            return layer_norm(step, name, layer, x)
        case nn.SiLU():
            return step.add("Mul", x, step.add("Sigmoid", x))
        case nn.LeakyReLU():
            return step.add("LeakyRelu", x, alpha=layer.negative_slope)
        case _:
            return step.add(ACTIVATIONS[type(layer)], x)


def _float_info(name: str, axes: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, axes)


def named_outputs(nodes: Nodes, module: RecurrentModel, raw: str) -> dict[str, str]:
    """Raw head values [T, B, N] -> the task's outputs."""
    head = module.head
    if isinstance(head, OwnHead) and head.targets:
        return _own_forecast(nodes, head, raw)
    return _forecast(nodes, head, raw) if isinstance(head, ForecastHead) else {"logits": raw}


def _own_forecast(nodes: Nodes, head: OwnHead, raw: str) -> dict[str, str]:
    """[T, B, M * K] in any order -> mean [T, B, K], quantiles [T, B, Q, K] in the data's own units."""
    rows, K, Q = len(head.order) // head.targets, head.targets, head.quantiles
    raw = nodes.add("Gather", raw, nodes.constant("head.order", head.order), axis=2)
    scaled = nodes.add("Reshape", raw, nodes.constant("head.shape", [0, 0, rows, K]))
    values = nodes.add("Mul", scaled, nodes.constant("head.target_scale", head.target_scale))
    values = nodes.add("Add", values, nodes.constant("head.target_mean", head.target_mean))
    outputs = {"mean": nodes.add("Gather", values, nodes.constant("head.mean_at", np.array(head.mean_at)), axis=2)}
    if Q:
        last = nodes.constant("head.quantiles", list(range(rows - Q, rows)))
        outputs["quantiles"] = nodes.add("Gather", values, last, axis=2)
    return outputs


def _forecast(nodes: Nodes, head: ForecastHead, raw: str) -> dict[str, str]:
    """[T, B, K * (1 + Q)] -> mean [T, B, K], quantiles [T, B, Q, K] in the data's own units."""
    K, Q = len(head.targets), head.quantiles
    scale = nodes.constant("head.scale", head.target_scale)
    offset = _offset(nodes, head)
    if not Q:
        return {"mean": nodes.add("Add", offset, nodes.add("Mul", raw, scale))}
    sizes = nodes.constant("head.split", [K, Q * K])
    mean, steps = nodes.add_many("Split", raw, sizes, outputs=2, axis=2)
    rungs = nodes.add("Mul", _calibrated(nodes, head, _ladder(nodes, steps, K, Q)), scale)
    row_offset = nodes.add("Unsqueeze", offset, nodes.constant("head.axis", [-2])) if head.residual else offset
    return {
        "mean": nodes.add("Add", offset, nodes.add("Mul", mean, scale)),
        "quantiles": nodes.add("Add", row_offset, rungs),
    }


def _ladder(nodes: Nodes, steps: str, K: int, Q: int) -> str:
    """[T, B, Q * K] -> [T, B, Q, K]: the first quantile as it is, each next one a softplus higher."""
    if Q > 1:
        sizes = nodes.constant("head.rungs", [K, (Q - 1) * K])
        base, increments = nodes.add_many("Split", steps, sizes, outputs=2, axis=2)
        steps = nodes.add("Concat", base, softplus(nodes, increments), axis=2)
    rungs = nodes.add("Reshape", steps, nodes.constant("head.shape", [0, 0, Q, K]))
    return nodes.add("CumSum", rungs, nodes.constant("head.cumsum", np.array(2)))


def _calibrated(nodes: Nodes, head: ForecastHead, ladder: str) -> str:
    """[T, B, Q, K] as `ForecastHead.stretched` has it."""
    Q = head.quantiles
    if bool((head.stretch == 1).all()):
        return ladder
    each = nodes.add_many("Split", ladder, nodes.constant("head.each", [1] * Q), outputs=Q, axis=2)
    low, high = middle(Q)
    centre = nodes.add("Mul", nodes.add("Add", each[low], each[high]), nodes.scalar(0.5))
    apart = nodes.add("Mul", nodes.add("Sub", ladder, centre), nodes.constant("head.stretch", head.stretch))
    moved = nodes.add("Add", apart, centre)
    rungs = nodes.add_many("Split", moved, nodes.constant("head.each", [1] * Q), outputs=Q, axis=2)
    for i in range(1, Q):
        rungs[i] = nodes.add("Max", rungs[i - 1], rungs[i])
    return nodes.add("Concat", *rungs, axis=2)


def _offset(nodes: Nodes, head: ForecastHead) -> str:
    """What a prediction is counted from: the input's own targets [T, B, K] if residual, else their means [K]."""
    if head.residual:
        return nodes.add("Gather", "values", nodes.constant("head.targets", head.targets), axis=2)
    return nodes.constant("head.mean", head.target_mean)
