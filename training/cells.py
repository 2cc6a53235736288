"""One step of each cell as ONNX nodes, and the weights it multiplies with.

`drive` [B, G*H] is the input's share of the gates, biases included: a row of the folded table, or `x @ W_ih + b`.
The state's share is added by the cell. Gates lie along the last axis, G of them, each H wide.
"""

import torch
from torch import Tensor

from training.model import RecurrentModel
from training.nodes import Nodes


def _lstm(step: Nodes, module: RecurrentModel, i: int, drive: str) -> tuple[str, str]:
    """gates [B, 4H] in the order i, f, o, g: c' = f c + i g, h' = o tanh(c')."""
    H = module.config.hidden
    gates = step.linear(f"h{i}", _hidden_weight(step, module, i), drive)
    squashed, g = step.add_many("Split", gates, step.constant("lstm.split", [3 * H, H]), outputs=2, axis=1)
    i_gate, f_gate, o_gate = step.add_many("Split", step.add("Sigmoid", squashed), outputs=3, axis=1, num_outputs=3)
    new = step.add("Mul", i_gate, step.add("Tanh", g))
    c = step.add("Add", step.add("Mul", f_gate, f"c{i}"), new)
    return step.add("Mul", o_gate, step.add("Tanh", c)), c


def _gru(step: Nodes, module: RecurrentModel, i: int, drive: str) -> tuple[str]:
    """gates r, z, n: n = tanh(drive_n + r (W_hn h + b_hn)), h' = n + z (h - n)."""
    H, h = module.config.hidden, f"h{i}"
    sizes = step.constant("gru.split", [2 * H, H])
    recurrent = step.linear(h, _hidden_weight(step, module, i), _gru_hidden_bias(step, module, i))
    drive_rz, drive_n = step.add_many("Split", drive, sizes, outputs=2, axis=1)
    recurrent_rz, recurrent_n = step.add_many("Split", recurrent, sizes, outputs=2, axis=1)
    rz = step.add("Sigmoid", step.add("Add", drive_rz, recurrent_rz))
    r, z = step.add_many("Split", rz, outputs=2, axis=1, num_outputs=2)
    n = step.add("Tanh", step.add("Add", drive_n, step.add("Mul", r, recurrent_n)))
    return (step.add("Add", n, step.add("Mul", z, step.add("Sub", h, n))),)


def _rnn(step: Nodes, module: RecurrentModel, i: int, drive: str) -> tuple[str]:
    """h' = tanh(drive + W_hh h)."""
    return (step.add("Tanh", step.linear(f"h{i}", _hidden_weight(step, module, i), drive)),)


CELLS = {"lstm": _lstm, "gru": _gru, "rnn": _rnn}


def input_weight(module: RecurrentModel, i: int) -> tuple[Tensor, Tensor]:
    """Layer i's input weights [E, G*H] and the bias [G*H] that can be added before the gates are mixed."""
    weight, b_ih, b_hh = (_parameter(module, f"{kind}_l{i}") for kind in ("weight_ih", "bias_ih", "bias_hh"))
    if module.config.cell == "gru":
        b_hh = b_hh.clone()
        b_hh[-module.config.hidden :] = 0
    return weight.T, b_ih + b_hh


def input_constants(step: Nodes, module: RecurrentModel, i: int) -> tuple[str, str]:
    """Layer i's input weights and bias as constants, for layers whose input is not folded into a table."""
    weight, bias = input_weight(module, i)
    return step.constant(f"layer{i}.input", weight), step.constant(f"layer{i}.bias", bias)


def _hidden_weight(step: Nodes, module: RecurrentModel, i: int) -> str:
    """Layer i's recurrent weights [H, G*H]."""
    return step.constant(f"layer{i}.hidden", _parameter(module, f"weight_hh_l{i}").T)


def _gru_hidden_bias(step: Nodes, module: RecurrentModel, i: int) -> str:
    """b_hn, which the reset gate scales, behind zeros: the other gates' biases are in the drive."""
    bias = _parameter(module, f"bias_hh_l{i}").clone()
    bias[: -module.config.hidden] = 0
    return step.constant(f"layer{i}.reset_bias", bias)


def _parameter(module: RecurrentModel, name: str) -> Tensor:
    """A weight or bias with its gates along axis 0; an lstm's i, f, g, o become i, f, o, g."""
    parameter: Tensor = module.rnn.get_parameter(name).detach()
    if module.config.cell != "lstm":
        return parameter
    i, f, g, o = parameter.chunk(4)
    return torch.cat((i, f, o, g))
