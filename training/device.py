"""Where a run computes, and in what precision: what `auto` stands for on this machine."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch

from training.config import Recipe, RecipeError

BF16_HIDDEN = 128
"""On a CPU with AVX512-BF16 it is 1.1 to 2.4 times as fast from here on; an rnn or gru of 64 is slower in bf16."""


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with this machine's device and precision instead of `auto`; RecipeError for what it lacks."""
    device = recipe.train.device
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if available(name))
    if not available(device):
        raise RecipeError(f"train.device is {device}, but torch finds no such device here: use auto or cpu")
    if device == "cuda":  # the layers' weights are apart, so that one can be dropped out or tied; cuDNN joins them
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous")
    precision = recipe.train.precision
    if precision == "auto":
        precision = "bf16" if bf16_pays(device, recipe.model.cell, recipe.model.hidden) else "fp32"
    if recipe.train.precision == "bf16" and not bf16_runs(device, recipe.model.cell):
        raise RecipeError("train.precision is bf16, but torch runs no lstm in it on this processor: use auto or fp32")
    return replace(recipe, train=replace(recipe.train, device=device, precision=precision))


def available(device: str) -> bool:
    """Whether torch can use it here."""
    if device == "cuda":
        return torch.cuda.is_available()
    return device == "cpu" or torch.backends.mps.is_available()


def bf16_runs(device: str, cell: str) -> bool:
    """Whether bf16 autocast works there at all: on CPUs without AVX-512 oneDNN has no LSTM in it."""
    if device != "cpu" or cell != "lstm":
        return True
    with torch.random.fork_rng(devices=[]):  # a run's random numbers do not depend on this
        layer = torch.nn.LSTM(8, 8)
    try:
        with torch.autocast(device, torch.bfloat16):
            layer(torch.zeros(2, 2, 8))
    except RuntimeError:
        return False
    return True


def bf16_pays(device: str, cell: str, hidden: int) -> bool:
    """Whether bf16 autocast is known to be faster there: hardware that multiplies in it, and large products."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    in_hardware = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return device == "cpu" and in_hardware and cell != "leaky" and hidden >= BF16_HIDDEN
