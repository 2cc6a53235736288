"""One step of each cell as ONNX nodes, and the weights it multiplies with.

`drive` [B, G*H] is the input's share of the gates, biases included: a row of the folded table, or `x @ W_ih + b`.
The state's share is added by the cell. Gates lie along the last axis, G of them, each H wide.
"""

import torch
from torch import Tensor

from training.model import ModelConfig, RecurrentModel
from training.nodes import Nodes, layer_norm


def _lstm(step: Nodes, module: RecurrentModel, i: int, drive: str) -> tuple[str, str]:
    """gates [B, 4H] in the order i, f, o, g: c' = f c + i g, h' = o tanh(c')."""
    H = module.config.hidden
    gates = step.product(f"h{i}", *_hidden(module, i), drive)
    squashed, g = step.add_many("Split", gates, step.constant("lstm.split", [3 * H, H]), outputs=2, axis=1)
    i_gate, f_gate, o_gate = step.add_many("Split", step.add("Sigmoid", squashed), outputs=3, axis=1, num_outputs=3)
    new = step.add("Mul", i_gate, step.add("Tanh", g))
    c = step.add("Add", step.add("Mul", f_gate, f"c{i}"), new)
    return step.add("Mul", o_gate, step.add("Tanh", c)), c


def _gru(step: Nodes, module: RecurrentModel, i: int, drive: str) -> tuple[str]:
    """gates r, z, n: n = tanh(drive_n + r (W_hn h + b_hn)), h' = n + z (h - n)."""
    H, h = module.config.hidden, f"h{i}"
    sizes = step.constant("gru.split", [2 * H, H])
    recurrent = step.product(h, *_hidden(module, i), _gru_hidden_bias(step, module, i))
    drive_rz, drive_n = step.add_many("Split", drive, sizes, outputs=2, axis=1)
    recurrent_rz, recurrent_n = step.add_many("Split", recurrent, sizes, outputs=2, axis=1)
    rz = step.add("Sigmoid", step.add("Add", drive_rz, recurrent_rz))
    r, z = step.add_many("Split", rz, outputs=2, axis=1, num_outputs=2)
    n = step.add("Tanh", step.add("Add", drive_n, step.add("Mul", r, recurrent_n)))
    return (step.add("Add", n, step.add("Mul", z, step.add("Sub", h, n))),)


def _rnn(step: Nodes, module: RecurrentModel, i: int, drive: str) -> tuple[str]:
    """h' = tanh(drive + W_hh h)."""
    return (step.add("Tanh", step.product(f"h{i}", *_hidden(module, i), drive)),)


def _rnn_relu(step: Nodes, module: RecurrentModel, i: int, drive: str) -> tuple[str]:
    """h' = max(0, drive + W_hh h), which knows no bound."""
    return (step.add("Relu", step.linear(f"h{i}", *_hidden(module, i), drive)),)


def _leaky(step: Nodes, module: RecurrentModel, i: int, drive: str) -> tuple[str]:
    """h' = h + alpha (tanh(drive + W_hh h) - h)."""
    h = f"h{i}"
    new = step.add("Tanh", step.product(h, *_hidden(module, i), drive))
    moved = step.add("Mul", step.scalar(module.config.alpha), step.add("Sub", new, h))
    return (step.add("Add", h, moved),)


CELLS = {"lstm": _lstm, "gru": _gru, "rnn": _rnn, "rnn-relu": _rnn_relu, "leaky": _leaky}


def input_weight(module: RecurrentModel, i: int) -> tuple[Tensor, Tensor]:
    """Layer i's input weights [E, G*H] and the bias [G*H] that can be added before the gates are mixed."""
    weight, b_ih, b_hh = (parameter(module, f"{kind}_l{i}") for kind in ("weight_ih", "bias_ih", "bias_hh"))
    if module.config.cell == "gru":
        b_hh = b_hh.clone()
        b_hh[-module.config.hidden :] = 0
    return weight.T, b_ih + b_hh


def layer_drive(step: Nodes, module: RecurrentModel, i: int, x: str) -> str:
    """Layer i's drive from its input x [B, E]."""
    weight, bias = input_weight(module, i)
    multiply = step.product if reads_h(module.config, i) else step.linear
    return multiply(x, f"layer{i}.input", weight, step.constant(f"layer{i}.bias", bias))


def reads_h(config: ModelConfig, i: int) -> bool:
    """Whether layer i's input is the h of the layer below itself, and bounded: no sum, not normalised, no ReLU."""
    return i > 0 and not config.norm and not (config.skip and i > 1) and config.cell != "rnn-relu"


def layer_output(step: Nodes, module: RecurrentModel, i: int, below: str, h: str) -> tuple[str, str]:
    """The sum [B, H] that goes on to layer i + 1's, and what layer i + 1 or the head reads."""
    total = step.add("Add", below, h) if module.config.skip and i else h
    if not module.config.norm:
        return total, total
    return total, layer_norm(step, f"layer{i}.norm", module.rnn.norm(i), total)


def _hidden(module: RecurrentModel, i: int) -> tuple[str, Tensor]:
    """Name and value of layer i's recurrent weights [H, G*H]."""
    return f"layer{i}.hidden", parameter(module, f"weight_hh_l{i}").T


def _gru_hidden_bias(step: Nodes, module: RecurrentModel, i: int) -> str:
    """b_hn, which the reset gate scales, behind zeros: the other gates' biases are in the drive."""
    bias = parameter(module, f"bias_hh_l{i}").clone()
    bias[: -module.config.hidden] = 0
    return step.constant(f"layer{i}.reset_bias", bias)


def parameter(module: RecurrentModel, name: str) -> Tensor:
    """A weight or bias with its gates along axis 0; an lstm's i, f, g, o become i, f, o, g."""
    parameter: Tensor = module.rnn.get_parameter(name).detach()
    if module.config.cell != "lstm":
        return parameter
    i, f, g, o = parameter.chunk(4)
    return torch.cat((i, f, o, g))
