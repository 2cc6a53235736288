"""A small writer of ONNX nodes, and the functions whose own ONNX operators would not keep the bits (`graph.py`)."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

ATANH = [1 / (2 * k + 1) for k in range(7)]

Array = np.ndarray[Any, np.dtype[Any]]
Attribute = int | float | str | list[int] | list[str] | onnx.GraphProto


class Nodes:
    """The nodes of a graph or of a Scan's body in the order they are added; both share one set of constants."""

    def __init__(self, prefix: str, constants: dict[str, TensorProto]) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants = constants

    def add(self, op: str, *inputs: str, **attributes: Attribute) -> str:
        """Add a node with one output and return the output's name."""
        return self.add_many(op, *inputs, outputs=1, **attributes)[0]

    def add_many(self, op: str, *inputs: str, outputs: int, **attributes: Attribute) -> list[str]:
        """Add a node with several outputs and return their names."""
        name = f"{self.prefix}{len(self.nodes)}.{op}"
        names = [f"{name}.{i}" for i in range(outputs)] if outputs > 1 else [name]
        node = helper.make_node(op, list(inputs), names, name=name)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return names

    def name(self, value: str, name: str) -> None:
        """Give a value the name by which the outside knows it, for good."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [name if known == value else known for known in names]

    def constant(self, name: str, values: Tensor | Array | list[float] | list[int]) -> str:
        """Store a constant under `name` (bytes as they are, floats as float32, integers as int64); return the name."""
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        wide = np.int64 if array.dtype.kind in "iu" else np.float32
        dtype = array.dtype if array.dtype.itemsize == 1 else np.dtype(wide)
        self.constants[name] = numpy_helper.from_array(np.array(array, dtype, order="C"), name)
        return name

    def scalar(self, value: float) -> str:
        """A float32 constant, stored once however often it is used."""
        return self.constant(f"scalar.{value!r}", np.array(value, np.float32))

    def linear(self, x: str, name: str, weight: Tensor, addend: str) -> str:
        """`x @ weight + addend`; x: [B, K], weight [K, N] stored under `name`, addend: [N] or [B, N]."""
        return self.add("Gemm", x, self.constant(name, weight), addend)

    def product(self, h: str, name: str, weight: Tensor, addend: str) -> str:
        """The same of a hidden state, which is known to lie in [-1, 1]."""
        return self.linear(h, name, weight, addend)


def layer_norm(nodes: Nodes, name: str, norm: nn.LayerNorm, x: str) -> str:
    """x [B, H] normalised row by row; each row's sums are made in one order, wherever it lies (measured)."""
    scale, bias = nodes.constant(f"{name}.scale", norm.weight), nodes.constant(f"{name}.bias", norm.bias)
    return nodes.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=norm.eps)


def odd_series(nodes: Nodes, x: str, coefficients: list[float]) -> str:
    """x * (c0 + c1 x^2 + c2 x^4 + ...) by Horner's rule."""
    square = nodes.add("Mul", x, x)
    total = nodes.scalar(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = nodes.add("Add", nodes.add("Mul", total, square), nodes.scalar(coefficient))
    return nodes.add("Mul", x, total)


def logarithm(nodes: Nodes, x: str) -> str:
    """log(x) = 32 * 2 atanh((r - 1) / (r + 1)), r the 32nd root of x; within 5e-6 for x from 1e-9 to 1e4."""
    root = x
    for _ in range(5):
        root = nodes.add("Sqrt", root)
    one = nodes.scalar(1.0)
    z = nodes.add("Div", nodes.add("Sub", root, one), nodes.add("Add", root, one))
    return odd_series(nodes, z, [64 * coefficient for coefficient in ATANH])


def softplus(nodes: Nodes, x: str) -> str:
    """log(1 + exp(x)) = max(x, 0) + 2 atanh(s / (2 - s)) with s = sigmoid(-|x|); within 3e-8."""
    s = nodes.add("Sigmoid", nodes.add("Neg", nodes.add("Abs", x)))
    z = nodes.add("Div", s, nodes.add("Sub", nodes.scalar(2.0), s))
    doubled = [2 * coefficient for coefficient in ATANH]
    return nodes.add("Add", nodes.add("Relu", x), odd_series(nodes, z, doubled))
