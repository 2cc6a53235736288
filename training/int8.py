"""int8: products with a hidden state as integer products whose scales are fixed at the export.

A tanh-bounded h lies in [-1, 1], so it is counted in steps of 1/63 without a look at the batch: a session's numbers
can not depend on its neighbours, and integers add up to the same sum in any order. Weights have one scale a column.
All else stays float32: states, biases, gates, value inputs, the embedding and the head (docs/decisions/0010-int8.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor, nn

from training.cells import input_weight, parameter, reads_h
from training.model import RecurrentModel, State
from training.nodes import Array, Nodes

STEPS = 63
ZERO = 64
"""h = (count - 64) / 63, as uint8: two products of at most 127 x 127 fit the 16 bits that CPUs without VNNI add in."""
WEIGHT_STEPS = 127
STEP = torch.tensor(1 / STEPS)


class Int8Nodes(Nodes):
    """Nodes whose products with an h are integer products; each h is rounded once."""

    def __init__(self, prefix: str, constants: dict[str, TensorProto]) -> None:
        super().__init__(prefix, constants)
        self._rounded: dict[str, str] = {}

    def product(self, h: str, name: str, weight: Tensor, addend: str) -> str:
        """`h @ weight + addend`; h: [B, K] in [-1, 1], addend: [N] or [B, N]."""
        columns, scale = quantised(weight)
        zero = self.constant("int8.zero", np.array(ZERO, np.uint8))
        total = self.add("MatMulInteger", self._round(h, zero), self.constant(name, columns), zero)
        scales = self.constant(f"{name}.scale", scale / STEPS)
        return self.add("Add", self.add("Mul", self.add("Cast", total, to=TensorProto.FLOAT), scales), addend)

    def _round(self, h: str, zero: str) -> str:
        if h not in self._rounded:
            self._rounded[h] = self.add("QuantizeLinear", h, self.scalar(1 / STEPS), zero)
        return self._rounded[h]


def quantised(weight: Tensor) -> tuple[Array, Array]:
    """[K, N] -> int8 [K, N] and the float64 scale of each column [N]: weight = int8 * scale."""
    columns = weight.detach().cpu().double().numpy()
    scale = np.abs(columns).max(axis=0) / WEIGHT_STEPS
    scale[scale == 0] = 1
    return np.rint(columns / scale).astype(np.int8), scale


class Columns:
    """Weights [K, N] as int8 with one scale a column; called, the product with a rounded h."""

    def __init__(self, weight: Tensor) -> None:
        columns, scale = quantised(weight)
        # whole numbers below 2^24 are exact in float32, whatever the order they are added in
        exact = torch.float32 if len(columns) * STEPS * WEIGHT_STEPS < 2**24 else torch.float64
        self.columns = torch.from_numpy(columns).to(exact)
        self.scale = torch.from_numpy((scale / STEPS).astype(np.float32))

    def __call__(self, h: Tensor) -> Tensor:
        """[B, K] in [-1, 1] -> [B, N]."""
        rounded = torch.round(h / STEP).to(self.columns.dtype)
        return (rounded @ self.columns).float() * self.scale


class Int8Rnn(nn.Module):
    """What the graph computes, in PyTorch: the layers on rounded h and weights."""

    def __init__(self, module: RecurrentModel) -> None:
        super().__init__()
        config = module.config
        self.config, self.norms = config, copy.deepcopy(module.rnn.norms)
        drives = [input_weight(module, i) for i in range(config.layers)]
        self.entry, self.biases = drives[0][0], [bias for _, bias in drives]
        self.below = [_product(weight, reads_h(config, i)) for i, (weight, _) in enumerate(drives)][1:]
        self.before = [Columns(parameter(module, f"weight_hh_l{i}").T) for i in range(config.layers)]
        self.reset_biases = [parameter(module, f"bias_hh_l{i}")[-config.hidden :] for i in range(config.layers)]

    def forward(self, x: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """[T, B, E] and the state -> the top's output [T, B, H], state'."""
        rows, tops = list(zip(*(tensor.unbind() for tensor in state), strict=True)), []
        for drive in x @ self.entry + self.biases[0]:
            rows, top = self._step(drive, rows)
            tops.append(top)
        return torch.stack(tops), tuple(torch.stack(tensors) for tensors in zip(*rows, strict=True))

    def _step(self, drive: Tensor, rows: list[State]) -> tuple[list[State], Tensor]:
        """One step of all layers -> their states, the top's output; a row is a layer's states."""
        after: list[State] = []
        x = stream = drive
        for i, row in enumerate(rows):
            if i:
                drive = self.below[i - 1](x) + self.biases[i]
            after.append(self._cell(i, drive, self.before[i](row[0]), row))
            h = after[-1][0]
            stream = stream + h if self.config.skip and i else h
            x = self.norms[i](stream) if self.config.norm else stream
        return after, x

    def _cell(self, i: int, drive: Tensor, recurrent: Tensor, row: State) -> State:
        """A layer's states after a step; `recurrent` is the state's share of the gates."""
        cell = self.config.cell
        if cell == "rnn":
            return (torch.tanh(drive + recurrent),)
        if cell == "leaky":
            return (row[0] + self.config.alpha * (torch.tanh(drive + recurrent) - row[0]),)
        if cell == "gru":
            drives, recurrents = drive.chunk(3, dim=1), recurrent.chunk(3, dim=1)
            r, z = (torch.sigmoid(drives[gate] + recurrents[gate]) for gate in (0, 1))
            n = torch.tanh(drives[2] + r * (recurrents[2] + self.reset_biases[i]))
            return (n + z * (row[0] - n),)
        *gates, g = (drive + recurrent).chunk(4, dim=1)
        i_gate, f_gate, o_gate = map(torch.sigmoid, gates)
        c = f_gate * row[1] + i_gate * torch.tanh(g)
        return o_gate * torch.tanh(c), c


def _product(weight: Tensor, rounded: bool) -> Callable[[Tensor], Tensor]:
    """The product with weights [K, N]: of a rounded h, or of any x in float32."""
    return Columns(weight) if rounded else lambda x: x @ weight


def simulated(module: RecurrentModel) -> RecurrentModel:
    """The same network in int8, still a module; for the export's checks and figures."""
    twin = copy.deepcopy(module)
    twin.add_module("rnn", Int8Rnn(module))
    return twin.eval()
