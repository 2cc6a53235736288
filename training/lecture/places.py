"""Fixed sizes: labels are wanted at every place, of sequences longer than those that were learnt from.

The stream is noise with a mark "a" or "b" now and then, about twice in a sequence however long it is; the label at
each place is the mark seen last. A network over a window takes just its window, a convolution takes any length and
sees as far as its kernels reach, a recurrent network carries what it saw.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.lecture.finding import Finding, Setting
from training.look import pictures

LEARNT = 20
"""Steps of the sequences learnt from, and the window of the mlp."""
KINDS = 3
REACH = 22
"""What the convolution sees: 1 + 3 (1 + 2 + 4)."""


class WindowMlp(nn.Module):
    """A label from the last LEARNT steps: [N, LEARNT, 3] -> [N, 2], and nothing else fits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(LEARNT * KINDS, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, windows: Tensor) -> Tensor:
        """One label a window."""
        labels: Tensor = self.layers(windows.flatten(1))
        return labels

    def at_every_place(self, inputs: Tensor) -> Tensor:
        """[B, L, 3] -> [B, L, 2]: the window is slid along, a call a place, nothing before the beginning."""
        padded = F.pad(inputs, (0, 0, LEARNT - 1, 0))
        slid = padded.unfold(1, LEARNT, 1).transpose(2, 3)
        labels: Tensor = self(slid.flatten(0, 1)).unflatten(0, inputs.shape[:2])
        return labels


class Cnn(nn.Module):
    """Causal convolutions of width 4, spread 1, 2 and 4: [B, L, 3] -> [B, L, 2]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (KINDS, 24, 24, 24)
        self.layers = nn.ModuleList(
            nn.Conv1d(widths[i], widths[i + 1], 4, dilation=2**i) for i in range(len(widths) - 1)
        )
        self.output = nn.Linear(widths[-1], 2)

    def at_every_place(self, inputs: Tensor) -> Tensor:
        """A label at each place."""
        x = inputs.transpose(1, 2)
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(F.pad(x, (3 * 2**i, 0))))
        labels: Tensor = self.output(x.transpose(1, 2))
        return labels


class Recurrent(nn.Module):
    """[B, L, 3] -> [B, L, 2]."""

    def __init__(self, cell: type[nn.RNN] | type[nn.LSTM]) -> None:
        super().__init__()
        self.cell = cell(KINDS, 24, batch_first=True)
        self.output = nn.Linear(24, 2)

    def at_every_place(self, inputs: Tensor) -> Tensor:
        """A label at each place."""
        labels: Tensor = self.output(self.cell(inputs)[0])
        return labels


Network = WindowMlp | Cnn | Recurrent


def run(setting: Setting) -> Finding:
    """Share of the places that are labelled right, by the sequences' length."""
    torch.manual_seed(setting.seed)
    networks: dict[str, Network] = {
        "mlp, window of 20": WindowMlp(),
        f"cnn, reach of {REACH}": Cnn(),
        "rnn": Recurrent(nn.RNN),
        "lstm": Recurrent(nn.LSTM),
    }
    lengths = (20, 80, 160) if setting.quick else (20, 40, 80, 160, 320)
    right = {name: learn_and_test(network, lengths, setting) for name, network in networks.items()}
    figure, (axes,) = pictures.panels(1)
    drawn = {name: (lengths, values) for name, values in right.items()}
    pictures.lines(axes, drawn, "length of the sequence (learnt from: 20)", "places right", x_scale="log", marker="o")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    setting.draw(figure, "places")
    ends = {name: values[-1] for name, values in right.items()}
    figures = {f"{name}: right at {lengths[0]}": values[0] for name, values in right.items()}
    figures |= {f"{name}: right at {lengths[-1]}": value for name, value in ends.items()}
    mlp, cnn, _, lstm = ends.values()
    return Finding(
        "Windows and convolutions have a fixed reach; a recurrent network labels every place of longer sequences",
        refuses(networks["mlp, window of 20"], lengths[-1]) and lstm > max(mlp, cnn) + 0.1,
        figures,
        [f"the mlp itself refuses {lengths[-1]} steps; its figures are of the window slid along, a call a place"],
    )


def learn_and_test(network: Network, lengths: tuple[int, ...], setting: Setting) -> list[float]:
    """Learn on sequences of LEARNT steps; the share of places right at each length."""
    generator = torch.Generator().manual_seed(setting.seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(250 if setting.quick else 1500):
        inputs, labels = marked(64, LEARNT, generator)
        loss = F.cross_entropy(network.at_every_place(inputs).flatten(0, 1), labels.flatten())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
    found = []
    with torch.no_grad():
        for length in lengths:
            inputs, labels = marked(100 if setting.quick else 500, length, generator)
            found.append(float((network.at_every_place(inputs).argmax(-1) == labels).float().mean()))
    return found


def marked(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences [count, length, 3] that begin with a mark, and the label [count, length] of each place."""
    marks = torch.rand(count, length, generator=generator) < 2 / length
    marks[:, 0] = True
    kinds = torch.randint(0, 2, (count, length), generator=generator)
    places = torch.where(marks, torch.arange(length), 0).cummax(dim=1).values
    labels = kinds.gather(1, places)
    inputs = F.one_hot(torch.where(marks, kinds, KINDS - 1), KINDS).float()
    return inputs, labels


def refuses(network: Network, length: int) -> bool:
    """Whether a sequence of that length fits the network as it is."""
    try:
        network(torch.zeros(1, length, KINDS))
    except RuntimeError:
        return True
    return False
