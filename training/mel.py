"""How sound is heard: hops of samples become log-mel features, and the overlap of their windows is a state.

The samples of a window that lie before its hop are kept from step to step, so that features do not depend on how a
sound is cut into calls. What is here in PyTorch stands in the exported graph as matrix products (`graph.py`): the
service knows nothing of sound (docs/decisions/0019-sound.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.bundle import Sound

FLOOR = 1e-9
"""Added to a band's power, of which a sine of full scale has about 1: silence is -90 dB."""

Array = NDArray[np.float64]


class SoundEncoder(nn.Module):
    """[T, B, hop] samples between -1 and 1 -> standardised log-mel features [T, B, mels]."""

    basis: Tensor
    bands: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, sound: Sound, noise: float = 0.0) -> None:
        super().__init__()
        self.sound, self.noise, self.width = sound, noise, sound.mels
        basis, bands = spectrum(sound)
        self.register_buffer("basis", torch.tensor(basis, dtype=torch.float32), persistent=False)
        self.register_buffer("bands", torch.tensor(bands, dtype=torch.float32), persistent=False)
        self.register_buffer("mean", torch.zeros(sound.mels))
        self.register_buffer("scale", torch.ones(sound.mels))

    def forward(self, samples: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """[T, B, hop], the samples before them [1, B, window - hop] -> [T, B, mels], the last window - hop samples."""
        heard, after = self.log_mel(samples, before)
        features = (heard - self.mean) / self.scale
        if self.training and self.noise:
            features = features + self.noise * torch.randn_like(features)
        return features, after

    def log_mel(self, samples: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """The same without mean and scale; in float32 also where the layers are in bf16."""
        sound, overlap = self.sound, self.sound.window - self.sound.hop
        with torch.autocast(samples.device.type, enabled=False):
            line = torch.cat((before[0], samples.transpose(0, 1).flatten(1)), dim=1)
            windows = line.unfold(1, sound.window, sound.hop).transpose(0, 1)
            power = (windows @ self.basis).square() @ self.bands
            return torch.log(power + FLOOR), line[:, -overlap:][None]

    @torch.no_grad()
    def fit(self, sounds: Iterable[Tensor]) -> None:
        """Mean and scale of each band over sounds [N, hop], each from silence."""
        total, steps = torch.zeros(2, self.width, dtype=torch.float64), 0
        for sound in sounds:
            heard = self.log_mel(sound[:, None], sound.new_zeros(1, 1, self.sound.window - self.sound.hop))[0].double()
            total += torch.stack((heard.sum(dim=(0, 1)), heard.square().sum(dim=(0, 1))))
            steps += len(sound)
        mean, square = total / max(1, steps)
        self.mean.copy_(mean)
        self.scale.copy_((square - mean.square()).clamp(min=1e-6).sqrt())


def spectrum(sound: Sound) -> tuple[Array, Array]:
    """The Fourier transform of a Hann window [window, 2 * bins], and bands of its squares [2 * bins, mels].

    The window adds up to 2, so that a sine of amplitude 1 has a power of 1 where it lies in the middle of a bin.
    """
    size = 2 ** math.ceil(math.log2(sound.window))
    window = np.hanning(sound.window + 2)[1:-1]
    angles = 2 * np.pi / size * np.outer(np.arange(sound.window), np.arange(size // 2 + 1))
    basis = np.concatenate((np.cos(angles), np.sin(angles)), axis=1) * (2 * window / window.sum())[:, None]
    bands = triangles(sound, size)
    return basis, np.concatenate((bands, bands))


def triangles(sound: Sound, size: int) -> Array:
    """[bins, mels]: triangles of height 1 over frequency, their peaks equally far apart in mel (O'Shaughnessy 1987)."""
    highest = 2595 * math.log10(1 + sound.rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, highest, sound.mels + 2) / 2595) - 1)
    frequencies = np.arange(size // 2 + 1)[:, None] * sound.rate / size
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    bands: Array = np.maximum(0, np.minimum(rising, falling))
    if not bands.any(axis=0).all():
        raise ValueError(
            f"data.mels is {sound.mels}: some bands lie between two frequencies that a window of {sound.window} "
            "samples tells apart; lower data.mels or raise data.window_ms"
        )
    return bands
