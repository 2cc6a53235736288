"""The recurrent layers of a model, one over another: what each computes, what lies between them, how they begin.

Parameters have the names of `nn.LSTM`'s (`weight_ih_l0`, ...), and each layer runs in PyTorch's own fused function.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from training.model import ModelConfig, State

GATES = {"lstm": 4, "gru": 3, "rnn": 1, "rnn-relu": 1, "leaky": 1}
STARTS = ("orthogonal", "identity")
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Layers(nn.Module):
    """Layers of one cell: [T, B, E] and the state -> the top's output [T, B, H], state'.

    With `skip` the output of a layer is added to what it was given (from layer 1 on), with `norm` the sum is normalised
    before the next layer or the head reads it. While training, what a layer reads from the one below is dropped out,
    and with `weight_dropout` so are recurrent weights, once a chunk (Merity et al. 2017, arXiv 1708.02182).
    """

    def __init__(self, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.ways = ("", "_reverse") if config.bidirectional else ("",)
        rows = GATES[config.cell] * config.hidden
        for i in range(config.layers):
            columns = config.width if i else width
            for way in self.ways:
                for name, shape in zip(NAMES, ((rows, columns), (rows, config.hidden), (rows,), (rows,)), strict=True):
                    self.register_parameter(f"{name}_l{i}{way}", nn.Parameter(torch.empty(shape)))
        bound = 1 / math.sqrt(config.hidden)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(config.layers if config.norm else 0))
        self._start()

    def forward(self, x: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """[T, B, E], each state [layers, B, H] -> [T, B, H], state'.

        Bidirectional: -> [T, B, 2 * H]; the second half comes from each row's end, where it begins at zero.
        """
        config, afters = self.config, []
        stream = x
        for i in range(config.layers):
            if i:
                x = drop(x, config.dropout, self.training, config.locked)
            before = tuple(tensor[i : i + 1] for tensor in state)
            hidden, after = self._layer(i, x, before)
            if config.bidirectional:
                zero = tuple(torch.zeros_like(tensor) for tensor in before)
                back, _ = self._layer(i, turned(x, lengths), zero, "_reverse")
                hidden = torch.cat((hidden, turned(back, lengths)), dim=-1)
            afters.append(after)
            stream = stream + hidden if config.skip and i else hidden
            x = self.norms[i](stream) if config.norm else stream
        return x, tuple(torch.cat(tensors) for tensors in zip(*afters, strict=True))

    def norm(self, i: int) -> nn.LayerNorm:
        """What normalises the output of layer i."""
        norm = self.norms[i]
        assert isinstance(norm, nn.LayerNorm)
        return norm

    def _layer(self, i: int, x: Tensor, state: State, way: str = "") -> tuple[Tensor, State]:
        """Layer i: [T, B, E], each state [1, B, H] -> [T, B, H], state'."""
        weights: list[Tensor] = [self.get_parameter(f"{name}_l{i}{way}") for name in NAMES]
        weights[1] = drop(weights[1], self.config.weight_dropout, self.training)
        if self.config.cell == "leaky":
            return _leaky(x, state[0], weights, self.config.alpha)
        if self.config.cell == "lstm":
            hidden, *after = torch.lstm(x, list(state), weights, True, 1, 0.0, self.training, False, False)
            return hidden, tuple(after)
        run = {"gru": torch.gru, "rnn": torch.rnn_tanh, "rnn-relu": torch.rnn_relu}[self.config.cell]
        hidden, h = run(x, state[0], weights, True, 1, 0.0, self.training, False, False)
        return hidden, (h,)

    def _start(self) -> None:
        """Recurrent weights orthogonal or identity, gate by gate, and gates that begin open for long memories.

        The orthogonal start took 0.06 bits per character off a 2 x 384 LSTM after 1,500 steps. The identity is the
        start of Le, Jaitly, Hinton 2015 (arXiv 1504.00941). With `chrono` = T the forget gates of an lstm, and the
        update gates of a gru, are spread over memories of 1 to T steps (Tallec, Ollivier 2018, arXiv 1804.11188).
        """
        config, H = self.config, self.config.hidden
        for i, way in itertools.product(range(config.layers), self.ways):
            _, w_hh, b_ih, b_hh = (self.get_parameter(f"{name}_l{i}{way}").data for name in NAMES)
            for gate in torch.split(w_hh, H):
                nn.init.orthogonal_(gate) if config.start == "orthogonal" else nn.init.eye_(gate)
            if config.cell == "lstm" or config.start == "identity":
                b_ih.zero_()
                b_hh.zero_()  # torch adds two biases, so only one of them opens the gate
            keep = slice(H, 2 * H)  # an lstm's f in the order i, f, g, o; a gru's z in the order r, z, n
            if config.chrono:
                b_hh[keep] = 0
                b_ih[keep] = torch.empty(H).uniform_(1, config.chrono - 1).log()
                if config.cell == "lstm":
                    b_ih[:H] = -b_ih[keep]
            elif config.cell == "lstm":
                b_ih[keep] = config.forget_bias


def drop(x: Tensor, share: float, training: bool, locked: bool = False) -> Tensor:
    """Dropout; locked: of [T, B, H] by one mask for all steps of a chunk (Gal, Ghahramani 2016, arXiv 1512.05287)."""
    if not training or not share:  # PyTorch would draw a mask for a share of 0 too
        return x
    return x * F.dropout(x.new_ones(1, *x.shape[1:]), share) if locked else F.dropout(x, share)


def turned(x: Tensor, lengths: Tensor | None) -> Tensor:
    """[T, B, E] with each row's first `lengths` steps in reverse order, its padding where it was; all T if None."""
    if lengths is None:
        return x.flip(0)
    t = torch.arange(len(x), device=x.device)[:, None]
    source = torch.where(t < lengths, lengths - 1 - t, t)
    return x.gather(0, source[..., None].expand_as(x))


def _leaky(x: Tensor, h: Tensor, weights: list[Tensor], alpha: float) -> tuple[Tensor, State]:
    """h' = h + alpha (tanh(W x + U h + b) - h): a fixed share of the past stays at every step."""
    w_ih, w_hh, b_ih, b_hh = weights
    hidden = []
    for drive in F.linear(x, w_ih, b_ih + b_hh):
        h = h + alpha * (torch.tanh(drive + h @ w_hh.T) - h)
        hidden.append(h[0])
    return torch.stack(hidden), (h,)
