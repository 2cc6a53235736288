"""A classifier in plain PyTorch: how a machine is, from the last 24 readings of its vibration.

It knows nothing of Recurra. It was trained on windows: its state begins at zero for each 24 readings, and is not
carried on. It leaves its weights in own_classifier.safetensors, what it says of some windows in own_classifier.npz, and
in own_labelled.npz long sequences with what is right at each step.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
WINDOW = 24
LABELS = ["quiet", "rough", "failing"]
LOW, HIGH = -0.5, 1.5


class Classifier(nn.Module):
    """A score for each label, from a window."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(1, 24, batch_first=True)
        self.out = nn.Linear(24, len(LABELS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 24, 1] scaled readings -> [N, 3] scores at the last."""
        hidden, _ = self.rnn(x)
        return self.out(hidden[:, -1])


def machine(readings: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Vibration [readings] in m/s2, and at each the number of the label: how often it knocked in the last 24."""
    rates = np.repeat(rng.choice([0.02, 0.18, 0.5], size=readings // 60 + 1), 60)[:readings]
    knocks = rng.random(readings) < rates
    counts = np.convolve(knocks, np.ones(WINDOW))[:readings]
    return knocks + rng.normal(0, 0.1, readings), np.digitize(counts, [2.5, 7.5])


def main() -> None:
    """Train, and write down the weights, some answers, and labelled sequences."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    vibration, labels = machine(20_000, np.random.default_rng(0))
    scaled = torch.tensor((vibration - LOW) / (HIGH - LOW), dtype=torch.float32)
    windows, truth = scaled.unfold(0, WINDOW, 1), torch.tensor(labels)[WINDOW - 1 :]
    model = Classifier()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(250):
        chosen = torch.randint(0, len(windows), (64,))
        loss = nn.functional.cross_entropy(model(windows[chosen, :, None]), truth[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"cross entropy {loss.item():.3f}")
    later, known = machine(2000, np.random.default_rng(1))
    some = np.stack([later[end - WINDOW : end] for end in range(100, 140)])[:, :, None]
    inputs = ((some - LOW) / (HIGH - LOW)).astype(np.float32)
    with torch.no_grad():
        outputs = model(torch.tensor(inputs)).numpy()
    save_file(model.state_dict(), OUT / "own_classifier.safetensors")
    np.savez(OUT / "own_classifier.npz", inputs=inputs, outputs=outputs)
    np.savez(OUT / "own_labelled.npz", values=later[None, :, None], labels=known[None])


if __name__ == "__main__":
    main()
