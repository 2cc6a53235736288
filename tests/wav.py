"""Short sounds for tests: chirps that rise, fall or stay, as WAV files."""

import math
import random
import wave
from collections.abc import Sequence
from pathlib import Path

RATE = 8000
LABELS = ("falling", "rising", "steady")


def chirp(label: str, rng: random.Random, rate: int = RATE) -> list[float]:
    """A fifth to a third of a second of a tone that moves over an octave, or does not."""
    count, low, turns = int(rate * rng.uniform(0.2, 0.33)), rng.uniform(400, 900), 0.0
    samples = []
    for i in range(count):
        share = i / count
        turns += low * {"rising": 1 + share, "falling": 2 - share, "steady": 1.5}[label] / rate
        samples.append(0.4 * math.sin(2 * math.pi * turns) + rng.gauss(0, 0.01))
    return samples


def write(path: Path, samples: Sequence[float], rate: int = RATE, width: int = 2, channels: int = 1) -> Path:
    """PCM of `width` bytes; each channel has the same samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    full = 2 ** (8 * width - 1)
    whole = [max(-full, min(full - 1, round(sample * full))) for sample in samples]
    frames = [number + 128 if width == 1 else number for number in whole for _ in range(channels)]
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(b"".join(number.to_bytes(width, "little", signed=width > 1) for number in frames))
    return path


def chirps(folder: Path, each: int = 8) -> Path:
    """A folder of each label's recordings, `each` a label."""
    rng = random.Random(4)
    for label in LABELS:
        for i in range(each):
            write(folder / label / f"{i}.wav", chirp(label, rng))
    return folder
