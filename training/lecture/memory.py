"""Back-propagation through time keeps every step until the way back: memory grows with T, unless it is truncated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from training.lecture.finding import Finding, Setting
from training.look import pictures
from training.look.memory import MIB, kept_bytes

BATCH, UNITS, CHUNK = 8, 64, 64


def run(setting: Setting) -> Finding:
    """Bytes that autograd keeps by T: over the whole sequence, and in chunks of 64 steps with the state carried."""
    torch.manual_seed(setting.seed)
    lengths = (64, 128, 256) if setting.quick else (64, 128, 256, 512, 1024, 2048)
    model = nn.LSTM(UNITS, UNITS)
    whole = [kept_bytes(forward(model, torch.randn(T, BATCH, UNITS)), model) for T in lengths]
    truncated = [max(chunks(model, torch.randn(T, BATCH, UNITS))) for T in lengths]
    figure, (axes,) = pictures.panels(1)
    drawn = {
        "through the whole sequence": (lengths, [value / MIB for value in whole]),
        f"truncated, {CHUNK} steps at a time": (lengths, [value / MIB for value in truncated]),
    }
    pictures.lines(axes, drawn, "steps T of the sequence", "MiB kept for the way back", marker="o")
    setting.draw(figure, "memory")
    ratio = whole[-1] / whole[0] / (lengths[-1] / lengths[0])
    return Finding(
        "The memory of back-propagation through time grows in proportion to T; truncated it does not grow",
        0.9 < ratio < 1.1 and max(truncated) <= 1.05 * min(truncated),
        {
            "kibibytes a step": (whole[-1] - whole[0]) / (lengths[-1] - lengths[0]) / 1024,
            f"MiB at T = {lengths[0]}": whole[0] / MIB,
            f"MiB at T = {lengths[-1]}": whole[-1] / MIB,
            f"MiB at T = {lengths[-1]}, truncated": truncated[-1] / MIB,
        },
        [f"lstm of {UNITS} units, batch {BATCH}, float32; what autograd saves, weights left out"],
    )


def forward(model: nn.LSTM, inputs: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Callable[[], Tensor]:
    """A forward pass whose loss needs every step."""
    return lambda: model(inputs, state)[0].square().mean()


def chunks(model: nn.LSTM, inputs: Tensor) -> list[int]:
    """Bytes kept for each chunk; the state goes on, its history does not."""
    state: tuple[Tensor, Tensor] | None = None
    kept = []
    for start in range(0, len(inputs), CHUNK):
        part = inputs[start : start + CHUNK].clone()  # a view would count for the whole sequence
        kept.append(kept_bytes(forward(model, part, state), model))
        with torch.no_grad():
            _, state = model(part, state)
    return kept
