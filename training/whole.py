"""Bidirectional models: whole sequences in one call, `inputs[T, B, ...] -> outputs[T, B, ...]`, and no state.

What such a model says of a step depends on all steps after it, so nothing can be streamed: the service gives it whole
sequences, one a call (`predict`), and its bits need not be the same in company. ONNX's own LSTM, GRU and RNN suffice.
"""

from __future__ import annotations

from typing import Any

import onnx
import torch
from torch import Tensor, nn

from training import graph, parity
from training.layers import NAMES
from training.model import OwnHead, RecurrentModel, ValueEncoder
from training.nodes import Nodes, layer_norm

LENGTHS = (1, 2, 7, 40)
OPS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN", "rnn-relu": "RNN"}
ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,), "rnn-relu": (0,)}
"""ONNX's gates in PyTorch's order: an lstm's i, o, f, g of i, f, g, o; a gru's z, r, n of r, z, n."""


def build(module: RecurrentModel) -> onnx.ModelProto:
    """The module as a checked ONNX model; raises ExportError for a cell that ONNX has no operator of."""
    if module.config.cell not in OPS:
        raise parity.ExportError(f"model.cell: a bidirectional {module.config.cell} is not exported")
    nodes = Nodes("", {})
    raw = _head(nodes, module, _layers(nodes, module, _entries(nodes, module)))
    for name, value in graph.named_outputs(nodes, module, raw).items():
        nodes.name(value, name)
    return graph.finished(module, nodes)


def check(module: RecurrentModel, onnx_bytes: bytes) -> dict[str, Any]:
    """The greatest difference from PyTorch over sequences of several lengths and batches; raises ExportError."""
    ours, theirs = parity.ort_step(onnx_bytes), parity.torch_step(module)
    greatest = 0.0
    for T in LENGTHS:
        for batch in parity.BATCHES:
            entries = parity.plausible_entries(module, T, batch)
            distance = parity.distance(module, ours(entries, {}), theirs(entries, {}))
            if not distance <= parity.TOLERANCE:
                raise parity.ExportError(
                    f"parity: outputs differ from PyTorch by {distance:.3g} at T={T}, B={batch}; "
                    f"at most {parity.TOLERANCE:g} is allowed"
                )
            greatest = max(greatest, distance)
    return {
        "parity": {"outputs": greatest, "tolerance": parity.TOLERANCE},
        "lengths": list(LENGTHS),
        "batches": list(parity.BATCHES),
        **parity.computed_with(),
    }


def _entries(nodes: Nodes, module: RecurrentModel) -> str:
    """Embedded symbols or encoded values [T, B, E]."""
    if isinstance(module.encoder, ValueEncoder):
        return graph.encode(nodes, module.encoder)
    assert isinstance(module.encoder, nn.Embedding)  # sound is heard step by step
    return nodes.add("Gather", nodes.constant("embedding", module.encoder.weight), "symbols", axis=0)


def _layers(nodes: Nodes, module: RecurrentModel, x: str) -> str:
    """[T, B, E] -> the top's output [T, B, 2 * H]."""
    config, stream = module.config, x
    for i in range(config.layers):
        h = _layer(nodes, module, i, x)
        stream = nodes.add("Add", stream, h) if config.skip and i else h
        x = layer_norm(nodes, f"layer{i}.norm", module.rnn.norm(i), stream) if config.norm else stream
    return x


def _layer(nodes: Nodes, module: RecurrentModel, i: int, x: str) -> str:
    """Both directions of layer i side by side: [T, B, E] -> [T, B, 2 * H]."""
    config = module.config
    both = [[_gates(module, f"{name}_l{i}{way}") for name in NAMES] for way in ("", "_reverse")]
    w_ih, w_hh, b_ih, b_hh = (torch.stack(pair) for pair in zip(*both, strict=True))
    weights = {"input": w_ih, "hidden": w_hh, "bias": torch.cat((b_ih, b_hh), dim=1)}
    named = [nodes.constant(f"layer{i}.{name}", weight) for name, weight in weights.items()]
    attributes: dict[str, Any] = {"hidden_size": config.hidden, "direction": "bidirectional"}
    if config.cell == "gru":
        attributes["linear_before_reset"] = 1
    if config.cell == "rnn-relu":
        attributes["activations"] = ["Relu", "Relu"]
    apart = nodes.add(OPS[config.cell], x, *named, **attributes)
    beside = nodes.add("Transpose", apart, perm=[0, 2, 1, 3])
    return nodes.add("Reshape", beside, nodes.constant("both", [0, 0, 2 * config.hidden]))


def _gates(module: RecurrentModel, name: str) -> Tensor:
    gates = torch.split(module.rnn.get_parameter(name).detach(), module.config.hidden)
    return torch.cat([gates[i] for i in ORDER[module.config.cell]])


def _head(nodes: Nodes, module: RecurrentModel, x: str) -> str:
    """[T, B, 2 * H] -> the head's raw values [T, B, N]."""
    assert not isinstance(module.head, OwnHead)  # those are never bidirectional
    linear = module.head.linear
    weight, bias = nodes.constant("head.weight", linear.weight.T), nodes.constant("head.bias", linear.bias)
    return nodes.add("Add", nodes.add("MatMul", x, weight), bias)
