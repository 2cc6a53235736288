"""The cells side by side, as they begin: rnn, leaky, gru and lstm, plain or with chrono start.

Chrono start (Tallec and Ollivier, Can recurrent neural networks warp time?, 2018): the gate that keeps begins at
log u, u uniform between 1 and T - 1, so that units forget after 1 to T steps. A leaky cell's fixed share of news is
1 / (1 + u), what such a gate would let in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

KINDS = ("rnn", "leaky", "gru", "lstm")
WITH_CHRONO = ("leaky", "gru", "lstm")
LEAK = 0.5
"""A plain leaky cell's share of news."""

State = tuple[Tensor, ...]


class Leaky(nn.Module):
    """h' = h + a (tanh(V x + U h + b) - h) with a fixed share a of news, a unit each; the signature of nn.RNN."""

    share: Tensor

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.step = nn.RNNCell(inputs, units)
        self.register_buffer("share", torch.full((units,), LEAK))

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[T, B, inputs], [1, B, units] -> [T, B, units], [1, B, units]."""
        h = inputs.new_zeros(inputs.shape[1], len(self.share)) if state is None else state[0]
        hidden = []
        for x in inputs:
            h = torch.lerp(h, self.step(x, h), self.share)
            hidden.append(h)
        return torch.stack(hidden), h[None]


Cell = nn.RNN | nn.GRU | nn.LSTM | Leaky


def cell(kind: str, inputs: int, units: int, chrono: int = 0) -> Cell:
    """PyTorch's own start; with `chrono` T > 2 the gate that keeps begins for memories of up to T steps."""
    made: Cell = {"rnn": nn.RNN, "leaky": Leaky, "gru": nn.GRU, "lstm": nn.LSTM}[kind](inputs, units)
    if chrono:
        start(made, units, torch.empty(units).uniform_(1, chrono - 1))
    return made


@torch.no_grad()
def start(made: Cell, units: int, steps: Tensor) -> None:
    """Chrono start for memories of so many steps, a unit each; torch adds two biases, so one of them is zeroed."""
    if isinstance(made, Leaky):
        made.share.copy_(1 / (1 + steps))
        return
    ours, zeroed = (made.get_parameter(name).view(-1, units) for name in ("bias_ih_l0", "bias_hh_l0"))
    if isinstance(made, nn.LSTM):
        zeroed[:2] = 0
        ours[0], ours[1] = -steps.log(), steps.log()
    elif isinstance(made, nn.GRU):
        zeroed[1] = 0
        ours[1] = steps.log()
