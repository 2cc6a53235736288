"""Back-propagation through time written out, against autograd.

h(t) = tanh(V x(t) + U h(t-1)), o(t) = W h(t), and the loss is half the squared distance of o from y over all steps.
V weighs the input, U updates the memory, W makes the output.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from training.lecture.finding import Finding, Setting
from training.look import pictures

Array = NDArray[np.float64]
Weights = tuple[Array, Array, Array]
"""V [H, I], U [H, H], W [O, H]."""


def gradients(V: Array, U: Array, W: Array, x: Array, y: Array) -> Weights:
    """dLoss/dV, dU, dW for x [T, I] and y [T, O], from h(0) = 0."""
    h = [np.zeros(len(U))]
    for x_t in x:
        h.append(np.tanh(V @ x_t + U @ h[-1]))
    dV, dU, dW = np.zeros_like(V), np.zeros_like(U), np.zeros_like(W)
    from_later = np.zeros(len(U))
    for t in reversed(range(len(x))):
        before, now = h[t], h[t + 1]
        d_output = W @ now - y[t]
        dW += np.outer(d_output, now)
        d_now = W.T @ d_output + from_later
        d_sum = d_now * (1 - now**2)
        dV += np.outer(d_sum, x[t])
        dU += np.outer(d_sum, before)
        from_later = U.T @ d_sum
    return dV, dU, dW


def by_autograd(V: Array, U: Array, W: Array, x: Array, y: Array) -> Weights:
    """The same from torch."""
    weights = [torch.tensor(weight, requires_grad=True) for weight in (V, U, W)]
    tV, tU, tW = weights
    h, loss = torch.zeros(len(U), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x_t, y_t in zip(torch.from_numpy(x), torch.from_numpy(y), strict=True):
        h = torch.tanh(tV @ x_t + tU @ h)
        loss = loss + 0.5 * (tW @ h - y_t).square().sum()
    dV, dU, dW = (gradient.numpy() for gradient in torch.autograd.grad(loss, weights))
    return dV, dU, dW


def run(setting: Setting) -> Finding:
    """The greatest difference by T, as a share of the greatest gradient."""
    lengths = (5, 20, 80) if setting.quick else (5, 10, 20, 40, 80, 160, 320)
    rng = np.random.default_rng(setting.seed)
    apart: dict[str, list[float]] = {"V": [], "U": [], "W": []}
    for steps in lengths:
        V, U, W = (rng.normal(0, 0.4, shape) for shape in ((8, 3), (8, 8), (2, 8)))
        x, y = rng.normal(size=(steps, 3)), rng.normal(size=(steps, 2))
        pairs = zip(apart, gradients(V, U, W, x, y), by_autograd(V, U, W, x, y), strict=True)
        for name, ours, theirs in pairs:
            apart[name].append(float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    figure, (axes,) = pictures.panels(1)
    drawn = {f"d{name}": (lengths, [max(value, 1e-17) for value in values]) for name, values in apart.items()}
    pictures.lines(
        axes, drawn, "steps T", "greatest difference / greatest gradient", x_scale="log", y_scale="log", marker="o"
    )
    axes.set(ylim=(1e-17, 1e-5))
    axes.axhline(1e-6, color="gray", linestyle=":")
    setting.draw(figure, "bptt")
    figures = {f"d{name}: greatest relative difference": max(values) for name, values in apart.items()}
    return Finding("The gradients written out are those of autograd", max(figures.values()) < 1e-6, figures)
