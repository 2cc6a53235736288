"""A forecaster in plain PyTorch: a boiler's temperature in the next minute, from temperature and load.

It knows nothing of Recurra. It leaves its weights in own_forecaster.pt, and in own_forecaster.npz what it says of some
sequences, both in the data's own units.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else ".")


class Forecaster(nn.Module):
    """The next temperature after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 24, num_layers=2, batch_first=True)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, T, 2] scaled values -> [N, T, 1] the next temperature, scaled."""
        hidden, _ = self.lstm(x)
        return self.head(self.norm(hidden))


def boiler(minutes: int, rng: np.random.Generator) -> np.ndarray:
    """[minutes, 2]: temperature in degrees Celsius, load in kilowatts."""
    load = 20 + 8 * np.sin(np.arange(minutes) / 30) + rng.normal(0, 1, minutes).cumsum() * 0.2
    temperature = np.full(minutes, 60.0)
    for t in range(1, minutes):
        temperature[t] = temperature[t - 1] + 0.1 * (40 + load[t - 1] - temperature[t - 1]) + rng.normal(0, 0.1)
    return np.stack([temperature, load], axis=1)


def main() -> None:
    """Train, and write down the weights and some answers."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = boiler(4000, np.random.default_rng(0))
    mean, scale = data.mean(axis=0), data.std(axis=0)  # what scikit-learn's StandardScaler keeps as mean_ and scale_
    scaled = torch.tensor((data - mean) / scale, dtype=torch.float32)
    model = Forecaster()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        starts = torch.randint(0, len(scaled) - 65, (16,))
        batch = torch.stack([scaled[s : s + 65] for s in starts])
        loss = nn.functional.mse_loss(model(batch[:, :-1]), batch[:, 1:, :1])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"squared error {loss.item():.4f} of a variance of 1; mean {mean.tolist()}, scale {scale.tolist()}")
    values = np.stack([boiler(40, np.random.default_rng(seed)) for seed in range(1, 5)]).astype(np.float32)
    with torch.no_grad():
        said = model(torch.tensor((values - mean) / scale, dtype=torch.float32)).numpy()
    torch.save(model.state_dict(), OUT / "own_forecaster.pt")
    np.savez(OUT / "own_forecaster.npz", values=values, predictions=said * scale[0] + mean[0])


if __name__ == "__main__":
    main()
