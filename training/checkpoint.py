"""One directory holds a whole run: `last/` to go on from, `best/` to export; safetensors and JSON, no pickle.

A directory is written beside its place and renamed, so that a crash leaves either the old one or the new one.
"""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.model import ModelConfig, RecurrentModel, State
from training.publish import sync

LAST, BEST = "last", "best"
TIED = "head.linear.weight"


class CheckpointError(ValueError):
    """A run that cannot be read or continued; the message says why and what to do."""


@dataclass
class Progress:
    """How far a run is; plain numbers, stored as JSON."""

    step: int = 0
    epoch: int = 0
    chunk: int = 0
    """Batches of this epoch that are done."""
    minutes: float = 0.0
    """Time spent in training and its evaluations, over all starts of the run."""
    symbols: int = 0
    """Time steps learnt from, over all rows."""
    best: float | None = None
    best_step: int = 0
    clipped: int = 0
    """Steps whose gradient was clipped."""
    ended: bool = False
    """No signal stopped it."""


def save_best(run: Path, model: RecurrentModel, meta: dict[str, Any]) -> None:
    """Weights and meta.json of the best model so far."""
    _replace(run / BEST, {"model.safetensors": weights(model)}, {"meta.json": meta})


def save_last(
    run: Path,
    model: RecurrentModel,
    optimiser: torch.optim.Optimizer,
    state: State,
    rng: Tensor,
    progress: Progress,
    meta: dict[str, Any],
    average: RecurrentModel | None = None,
) -> None:
    """Everything that an unbroken run would have in memory; rng: [N], or [processes, N]."""
    carried = {f"carried.{i}": tensor.detach().contiguous() for i, tensor in enumerate(state)}
    tensors = {
        "model.safetensors": weights(model),
        "optimiser.safetensors": optimiser_tensors(optimiser),
        "state.safetensors": {**carried, "rng": rng},
    }
    if average is not None:
        tensors["average.safetensors"] = weights(average)
    _replace(run / LAST, tensors, {"meta.json": meta, "progress.json": vars(progress)})


def load_last(
    run: Path, model: RecurrentModel, optimiser: torch.optim.Optimizer, average: RecurrentModel | None = None
) -> tuple[State, Tensor, Progress]:
    """Put a run's newest checkpoint back: weights, optimiser; returns (carried state, rng, progress).

    An average that the run did not have begins with its weights.
    """
    folder = find(run, LAST)
    load_weights(folder, model)
    restore_optimiser(optimiser, load_file(folder / "optimiser.safetensors"))
    tensors = load_file(folder / "state.safetensors")
    rng = tensors.pop("rng")
    if average is not None:
        name = "average" if (folder / "average.safetensors").is_file() else "model"
        load_weights(folder, average, f"{name}.safetensors")
    progress = Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
    return tuple(tensors[f"carried.{i}"] for i in range(len(tensors))), rng, progress


def load_model(run: Path, which: str = BEST) -> tuple[RecurrentModel, dict[str, Any]]:
    """The trained module in evaluation mode, and meta.json."""
    folder = find(run, which)
    meta = read_meta(run, which)
    model = RecurrentModel(ModelConfig.from_json(meta["model"]))
    load_weights(folder, model)
    return model.eval(), meta


def read_meta(run: Path, which: str = BEST) -> dict[str, Any]:
    """A checkpoint's meta.json."""
    meta: dict[str, Any] = json.loads((find(run, which) / "meta.json").read_text(encoding="utf-8"))
    return meta


def find(run: Path, which: str) -> Path:
    """The checkpoint folder; takes the old one where a crash came between two renames."""
    for folder in (run / which, run / f"{which}.old"):
        if (folder / "meta.json").is_file():
            return folder
    raise CheckpointError(f"{run} holds no {which!r} checkpoint: train first, or give another run folder")


def refuse_mismatch(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise unless a resumed run has the model, symbols, features and labels that it began with."""
    old = {**old, "model": ModelConfig.from_json(old["model"]).to_json()}  # with the keys that came later
    for key in ("task", "model", "symbols", "features", "targets", "labels", "quantiles"):
        if json.loads(json.dumps(old[key])) != json.loads(json.dumps(new[key])):
            raise CheckpointError(
                f"cannot resume: {key} differs. {difference(key, old[key], new[key])}; give the run's own data and "
                "recipe, or another --out"
            )
    if old["data"]["sha256"] != new["data"]["sha256"]:
        raise CheckpointError(f"cannot resume: the data changed ({old['data']['source']} has another sha256)")


def difference(key: str, old: Any, new: Any) -> str:  # noqa: ANN401 (any JSON)
    """What a run has and what it is given now, in a few words."""
    if key in ("symbols", "labels"):
        gone, added = sorted(set(old) - set(new)), sorted(set(new) - set(old))
        return f"The run knows {len(old)}, the data has {len(new)}; gone {gone[:10]}, new {added[:10]}"
    return f"The run has {old!r}, now it is {new!r}"


def weights(model: RecurrentModel) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied weights once, as the embedding."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tied:
        del tensors[TIED]
    return tensors


def load_weights(folder: Path, model: RecurrentModel, file: str = "model.safetensors") -> None:
    """Strict: a missing, extra or misshapen tensor raises."""
    tensors = load_file(folder / file)
    if model.config.tied and "encoder.weight" in tensors:
        tensors[TIED] = tensors["encoder.weight"]
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} holds another model: {error}") from error


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments and step counts as `<parameter number>.<name>`."""
    state = optimiser.state_dict()["state"]
    return {f"{i}.{name}": value.contiguous() for i, values in state.items() for name, value in values.items()}


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimiser_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def environment() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
    }


def write_json(path: Path, data: Any) -> None:  # noqa: ANN401 (any JSON)
    """Atomically: beside its place, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(temporary)
    temporary.replace(path)


def _replace(folder: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, Any]) -> None:
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, content in tensors.items():
            save_file(content, temporary / name)
            sync(temporary / name)
        for name, data in texts.items():
            write_json(temporary / name, data)
        sync(temporary)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{folder} cannot be written: {error}. What was saved before is whole: make room on the disk, then --resume"
        ) from error
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
