"""What the gates do over a text or a series, in four panels.

lstm: forgetting f, new events g, new events weighted i g, updated memories c' = f c + i g.
gru: forgetting z, new events n, new events weighted (1 - z) n, updated memories h' = z h + (1 - z) n.
A forgetting of 1 keeps all, of 0 nothing. An rnn has no gates: its new events are its memories.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.bundle import Splitter
from training.data import DataError, to_ids
from training.look import pictures
from training.look.seen import LacksError, Seen, View
from training.model import RecurrentModel

FORGETTING, NEW, WEIGHTED, MEMORIES = "forgetting", "new events", "new events weighted", "updated memories"
STEPS, UNITS = 64, 32
Gates = dict[str, Tensor]
"""Panel -> [T, hidden]."""


def view(seen: Seen) -> View:
    """Units of the last layer, from those that keep most to those that keep least, over up to STEPS steps."""
    inputs, words = shown(seen)
    found = gates(seen.model, inputs)
    order = found[FORGETTING].mean(dim=0).argsort(descending=True)
    units = order[torch.linspace(0, len(order) - 1, min(UNITS, len(order))).long()]
    draw(seen, {name: values[:, units] for name, values in found.items()}, words)
    mean = float(found[FORGETTING].mean())
    keepers = float((found[FORGETTING].mean(dim=0) > 0.9).float().mean())
    return View(
        f"{len(inputs)} steps, {len(units)} units; forgetting is {mean:.2f} on average (1 keeps all),"
        f" {keepers:.0%} of the units keep more than 0.9",
        {"steps": len(inputs), "forgetting": mean, "keepers": keepers},
    )


def shown(seen: Seen) -> tuple[Tensor, list[str]]:
    """The inputs [T] or [T, F] to look at, and their names on the axis."""
    symbols = seen.corpus.symbols
    if not seen.text:
        inputs = seen.corpus.validation[0].inputs[:STEPS]
        return inputs, [symbols[i] for i in inputs.tolist()] if symbols else []
    if not symbols:
        raise DataError("this run takes numbers: it cannot look at a text")
    words = Splitter(**seen.meta["splitter"]).split(seen.text)[:STEPS]
    known = {symbol: i for i, symbol in enumerate(symbols)}
    missing = [word for word in words if word not in known]
    if missing:
        raise DataError(f"the model never saw {missing[0]!r}: look at a text of its own symbols")
    return to_ids(words, known), words


@torch.no_grad()
def gates(model: RecurrentModel, inputs: Tensor) -> Gates:
    """The last layer's gates at each step from a zero state, computed from the weights; checked against the model."""
    cell = model.config.cell
    if cell not in CELLS:
        raise LacksError(f"the cell {cell} has no gates")
    if model.config.bidirectional:
        raise LacksError("this model's layers run both ways")
    config = model.config
    below = stream = model.encoded(inputs[:, None], model.initial_state(1))[0][:, 0]
    for layer in range(config.layers):
        found, hidden = CELLS[cell](model, layer, below)
        stream = stream + hidden if config.skip and layer else hidden
        below = model.rnn.norm(layer)(stream) if config.norm else stream
    _, state = model(inputs[:, None], model.initial_state(1))
    if not torch.allclose(hidden[-1], state[0][-1, 0], atol=1e-3):
        raise LacksError("what the weights say is not what the model remembers")
    return found


def _lstm(model: RecurrentModel, layer: int, inputs: Tensor) -> tuple[Gates, Tensor]:
    drive, recurrent, bias = _weights(model, layer, inputs)
    h = c = torch.zeros(model.config.hidden)
    rows, hidden = [], []
    for x in drive:
        i, f, g, o = (x + recurrent @ h + bias).chunk(4)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        c = f * c + i * g
        h = o * torch.tanh(c)
        rows.append((f, g, i * g, c))
        hidden.append(h)
    return _panels(rows), torch.stack(hidden)


def _gru(model: RecurrentModel, layer: int, inputs: Tensor) -> tuple[Gates, Tensor]:
    drive, recurrent, bias = _weights(model, layer, inputs)
    h = torch.zeros(model.config.hidden)
    rows = []
    for x in drive:
        share = (recurrent @ h + bias).chunk(3)
        r, z = (torch.sigmoid(x.chunk(3)[i] + share[i]) for i in (0, 1))
        n = torch.tanh(x.chunk(3)[2] + r * share[2])
        h = z * h + (1 - z) * n
        rows.append((z, n, (1 - z) * n, h))
    found = _panels(rows)
    return found, found[MEMORIES]


CELLS = {"lstm": _lstm, "gru": _gru}


def _weights(model: RecurrentModel, layer: int, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The input's share of the gates [T, G*H] with its bias, and the state's weights and bias."""
    names = (f"{kind}_l{layer}" for kind in ("weight_ih", "bias_ih", "weight_hh", "bias_hh"))
    weight, bias, recurrent, recurrent_bias = (model.rnn.get_parameter(name) for name in names)
    return inputs @ weight.T + bias, recurrent, recurrent_bias


def _panels(rows: Sequence[tuple[Tensor, ...]]) -> Gates:
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    return dict(zip((FORGETTING, NEW, WEIGHTED, MEMORIES), columns, strict=True))


def draw(seen: Seen, found: Gates, words: list[str]) -> None:
    """A row of the panel a unit, a column a step."""
    figure, axes = pictures.panels(len(found), width=10, height=2.6)
    for ax, (name, values) in zip(axes, found.items(), strict=True):
        most = float(values.abs().max())
        colours, low, high = ("viridis", 0.0, 1.0) if name == FORGETTING else ("RdBu_r", -most, most)
        image = ax.imshow(values.T.numpy(), colours, aspect="auto", interpolation="nearest", vmin=low, vmax=high)
        figure.colorbar(image, ax=ax, pad=0.01)
        ax.set(title=name + (" (1 keeps, 0 forgets)" if name == FORGETTING else ""), ylabel="unit", yticks=[])
        ax.set_xticks([])
    if words:
        long = max(map(len, words)) > 1
        labels = ["␣" if word == " " else "⏎" if word == "\n" else word for word in words]
        axes[-1].set_xticks(range(len(words)), labels, rotation=90 if long else 0, fontsize=8, parse_math=False)
    else:
        axes[-1].set_xticks(range(0, len(next(iter(found.values()))), 8))
        axes[-1].set(xlabel="step")
    pictures.save(figure, seen.plot("gates"))
