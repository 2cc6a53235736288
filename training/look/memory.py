"""What back-propagation through time keeps in memory until the way back, by the number of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from training.config import recipe_from
from training.device import bf16_runs
from training.look import lags, pictures
from training.look.seen import Seen, View

LENGTHS = (16, 32, 64, 128, 256, 512)
MIB = 2**20


def view(seen: Seen) -> View:
    """Bytes by T at the run's own batch; the chunk that the run learnt from is marked.

    In the run's own precision, or in fp32 where this processor can not: another one may have learnt it.
    """
    recipe = recipe_from(seen.meta["recipe"])
    train, bf16 = recipe.train, recipe.train.precision == "bf16"
    lacking = bf16 and not bf16_runs("cpu", recipe.model.cell)
    kept = {steps: training_bytes(seen, steps, train.batch, bf16 and not lacking) for steps in LENGTHS}
    each = (kept[LENGTHS[-1]] - kept[LENGTHS[0]]) / (LENGTHS[-1] - LENGTHS[0])
    figure, (axes,) = pictures.panels(1)
    pictures.lines(
        axes,
        {"kept for the way back": (list(kept), [value / MIB for value in kept.values()])},
        "steps T of a chunk",
        f"MiB at a batch of {train.batch}",
        marker="o",
    )
    axes.axvline(train.steps, color="tab:red", linestyle=":", label=f"this run's chunks, T = {train.steps}")
    axes.set(ylim=(0, None))
    axes.legend(fontsize="small")
    pictures.save(figure, seen.plot("memory"))
    instead = ", in fp32: torch runs no lstm in bf16 on this processor" if lacking else ""
    return View(
        f"{each / MIB:.3f} MiB for every step of a chunk at a batch of {train.batch}{instead}",
        {"bytes": {str(steps): value for steps, value in kept.items()}, "bytes_per_step": each, "batch": train.batch},
    )


def training_bytes(seen: Seen, steps: int, rows: int, bf16: bool) -> int:
    """What one forward pass over `steps` of so many rows keeps, the loss included."""
    batch = lags.windows(seen.corpus.train, min(steps, longest(seen)), rows)
    repeats = -(-steps // len(batch.inputs))
    inputs, targets, weights = (
        tensor.repeat(repeats, *[1] * (tensor.ndim - 1))[:steps]
        for tensor in (batch.inputs, batch.targets, batch.weights)
    )
    whole = type(batch)(inputs, targets, weights, fresh=batch.fresh, spans=batch.spans)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs, _ = seen.model(whole.inputs, seen.model.initial_state(rows))
        return seen.task.losses(seen.model, outputs, whole)[0]

    seen.model.train()
    kept = kept_bytes(forward, seen.model)
    seen.model.eval()
    return kept


def longest(seen: Seen) -> int:
    """Steps of the longest training sequence."""
    return max(map(len, seen.corpus.train))


def kept_bytes(forward: Callable[[], Any], module: nn.Module) -> int:
    """Bytes of all that autograd keeps of a forward pass, each storage once, the module's own tensors left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # an address must not be given out again while we count

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    del result
    return sum(found.values())
