"""Labelled recordings: a folder of WAV files whose sub-folders are the labels, or a labels.csv beside them.

A recording is cut into hops of samples, a hop a step; what is heard of it is the model's own affair (`mel.py`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import wave
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.bundle import Sound
from training.config import DataRecipe
from training.data import Corpus, DataError, Feature, Sequence, file_sha256
from training.labelled import weights_of
from training.mel import spectrum

LABELS = "labels.csv"
PARTS = ("train", "validation", "test")
HELD_BYTES = 2**30
"""recordings are held in memory, four bytes a sample"""
LONGEST = 8192
"""samples of a window: the graph holds a matrix of so many rows and columns"""
SHUFFLE = 7
"""seed of the order in which recordings are dealt to the parts"""

Samples = NDArray[np.float32]


def folder(path: Path, data: DataRecipe) -> Corpus:
    """Every recording of a folder with its label at each step; whole recordings are dealt to the three parts."""
    named = _listed(path) if (path / LABELS).is_file() else _in_folders(path)
    labels = sorted({label for label, _ in named.values()})
    if len(labels) < 2:
        raise DataError(
            f"{path} has recordings of one label, {labels[0]!r}: a classifier needs two or more. Give each label a "
            f"folder of its own, or name the labels in {LABELS}"
        )
    dealt = _dealt(path, named, data)
    recordings, rate = _recordings(path, list(named))
    sound = _sound(rate, data)
    known = {label: i for i, label in enumerate(labels)}
    parts: dict[str, list[Sequence]] = {part: [] for part in PARTS}
    for name, samples in recordings.items():
        inputs = hops(samples, sound.hop)
        targets = torch.full((len(inputs),), known[named[name][0]], dtype=torch.int64)
        parts[dealt[name]].append(Sequence(name, inputs, targets, weights_of(len(inputs), data.later)))
    seconds = sum(map(len, recordings.values())) / rate
    note = f"{len(recordings)} recordings of {len(labels)} labels, {seconds:,.1f} s at {rate} Hz, {sound.hop} a step"
    return Corpus(
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        input_kind="values",
        source=path.name,
        sha256=_sha256(path, list(named)),
        features=[Feature(f"sample_{i + 1}", "full scale") for i in range(sound.hop)],
        labels=labels,
        whole=True,
        sound=sound,
        notes=[note],
    )


def hops(samples: Samples, hop: int) -> Tensor:
    """[N] samples -> [steps, hop], the last step filled up with silence."""
    steps = -(-len(samples) // hop)
    filled = np.zeros(steps * hop, np.float32)
    filled[: len(samples)] = samples
    return torch.from_numpy(filled.reshape(steps, hop))


def read_wav(path: Path) -> tuple[Samples, int]:
    """The samples of a WAV file between -1 and 1, its channels mixed to one, and its rate."""
    try:
        with wave.open(str(path), "rb") as file:
            rate, channels, width, frames = (
                file.getframerate(),
                file.getnchannels(),
                file.getsampwidth(),
                file.getnframes(),
            )
            if width > 4:
                raise wave.Error(f"{8 * width} bits a sample")
            raw = file.readframes(frames)
    except (wave.Error, EOFError, RuntimeError) as error:  # the last of a chunk that says it is longer than the file
        raise DataError(
            f"{path} can not be read as WAV ({str(error) or 'it ends too soon'}): only PCM of 8, 16, 24 or 32 bits is; "
            f"ffmpeg -i {path.name} -c:a pcm_s16le new.wav writes it so"
        ) from error
    if not frames:
        raise DataError(f"{path} holds no sound: leave it out")
    if len(raw) != frames * channels * width:
        raise DataError(f"{path} is cut off: {len(raw):,} bytes of {frames * channels * width:,}; copy it again")
    mixed: Samples = _numbers(raw, width).reshape(frames, channels).mean(axis=1, dtype=np.float32)
    return mixed, rate


def _numbers(raw: bytes, width: int) -> Samples:
    """PCM of one to four bytes a sample, little-endian; one byte is unsigned."""
    if width == 1:
        return (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / np.float32(128)
    wide = np.zeros((len(raw) // width, 4), np.uint8)
    wide[:, 4 - width :] = np.frombuffer(raw, np.uint8).reshape(-1, width)
    numbers: Samples = (wide.view("<i4")[:, 0] / 2**31).astype(np.float32)
    return numbers


def _in_folders(path: Path) -> dict[str, tuple[str, str]]:
    """File -> (the sub-folder that it is in, no part)."""
    found = sorted(file for file in path.glob("*/**/*") if file.suffix.lower() == ".wav" and file.is_file())
    if not found:
        raise DataError(
            f"{path} holds no recordings: put the WAV files of each label into a folder of its name, or list them in "
            f"{LABELS} with the columns file and label"
        )
    return {str(file.relative_to(path)): (file.relative_to(path).parts[0], "") for file in found}


def _listed(path: Path) -> dict[str, tuple[str, str]]:
    """File -> (label, part) as labels.csv has them; the part is empty where it has none."""
    try:
        text = (path / LABELS).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path / LABELS} is not UTF-8 (byte {error.start}): convert it first") from error
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows or not {"file", "label"} <= rows[0].keys():
        raise DataError(f"{path / LABELS} needs the columns file and label, and a row a recording")
    named: dict[str, tuple[str, str]] = {}
    for i, row in enumerate(rows):
        name, label, part = (row.get(column) or "" for column in ("file", "label", "part"))
        if not label or part not in ("", *PARTS) or bool(part) != bool(rows[0].get("part")):
            raise DataError(
                f"{path / LABELS}: row {i + 2} needs a label, and the column part, where there is one, "
                f"{', '.join(PARTS)} in every row"
            )
        if not (path / name).is_file() or not (path / name).resolve().is_relative_to(path.resolve()):
            raise DataError(f"{path / LABELS}: row {i + 2} names {name!r}, which is no file in that folder")
        named[name] = (label, part)
    return named


def _dealt(path: Path, named: Mapping[str, tuple[str, str]], data: DataRecipe) -> dict[str, str]:
    """File -> part: as labels.csv says, else some of each label for every part by chance, always the same chance."""
    if next(iter(named.values()))[1]:
        dealt = {name: part for name, (_, part) in named.items()}
        if missing := [part for part in PARTS if part not in dealt.values()]:
            raise DataError(f"{path / LABELS} deals nothing to {missing[0]}: each of {', '.join(PARTS)} needs some")
        return dealt
    rng, dealt = np.random.default_rng(SHUFFLE), {}
    for label in sorted({label for label, _ in named.values()}):
        names = [name for name, (own, _) in named.items() if own == label]
        tested, validated = (max(1, round(len(names) * share)) for share in (data.test, data.validation))
        if len(names) <= tested + validated:
            raise DataError(
                f"{path}: {len(names)} recordings of {label!r} are too few for three parts: give some more (3 or more)"
            )
        order = rng.permutation(len(names)).tolist()
        for place, i in enumerate(order):
            dealt[names[i]] = PARTS[2] if place < tested else PARTS[1] if place < tested + validated else PARTS[0]
    return dealt


def _recordings(path: Path, names: list[str]) -> tuple[dict[str, Samples], int]:
    """Every file's samples, and the rate that they have in common."""
    if (size := sum((path / name).stat().st_size for name in names)) > HELD_BYTES:
        raise DataError(
            f"{path} has {size / 2**30:.1f} GiB of recordings, too much to hold in memory: give a part of it"
        )
    found: dict[str, Samples] = {}
    first = 0
    for name in names:
        found[name], rate = read_wav(path / name)
        first = first or rate
        if rate != first:
            raise DataError(
                f"{path / name} has {rate} samples a second and {names[0]} {first}: they must be the same; "
                f"ffmpeg -i {Path(name).name} -ar {first} new.wav"
            )
    return found, first


def _sound(rate: int, data: DataRecipe) -> Sound:
    hop, window = (round(rate * ms / 1000) for ms in (data.hop_ms, data.window_ms))
    if not 0 < hop < window <= LONGEST or data.mels < 1:
        raise DataError(
            f"data.hop_ms = {data.hop_ms:g}, data.window_ms = {data.window_ms:g}, data.mels = {data.mels}: at {rate} "
            f"samples a second a hop needs one at least, a window more than a hop and at most {LONGEST}, and mels are "
            "1 or more"
        )
    sound = Sound(rate=rate, hop=hop, window=window, mels=data.mels)
    try:
        spectrum(sound)
    except ValueError as error:
        raise DataError(str(error)) from error
    return sound


def _sha256(path: Path, names: list[str]) -> str:
    """Of all names and contents; of the labels too."""
    listed = [LABELS] if (path / LABELS).is_file() else []
    found = hashlib.sha256()
    for name in [*listed, *names]:
        found.update(f"{name} {file_sha256(path / name)}\n".encode())
    return found.hexdigest()
