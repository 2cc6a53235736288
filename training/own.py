"""Weights that were trained elsewhere, as the network that they are: cell, layers and sizes come from their shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from training.model import ModelConfig, OwnHead, RecurrentModel, ValueEncoder
from training.parity import ExportError
from training.spec import Norm, Spec

HOLDERS = ("state_dict", "model_state_dict", "model", "net", "weights")
"""where a checkpoint keeps its state dict"""
WRAPPERS = ("module.", "_orig_mod.")
"""what DataParallel and torch.compile put before every key"""
SHOWN = 12
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
}
LOGITS = ("softmax", "log_softmax")
"""at a head's end: the service works with what comes before, and shows probabilities"""
CELLS = {4: "lstm", 3: "gru", 1: "rnn"}
"""by gates"""

Weights = Mapping[str, Tensor]


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors or a .pt file; nothing but tensors is read; raises ExportError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ExportError(f"weights: {path.name} is not there") from error
    except (SafetensorError, OSError) as error:
        raise ExportError(f"weights: {path.name} is not a safetensors file that can be read") from error
    except Exception as error:  # torch.load raises many types, and its message suggests to run what is in the file
        raise ExportError(
            f"weights: {path.name} holds more than tensors, or no weights at all; code in a file is never run: "
            "save `model.state_dict()`, best with safetensors"
        ) from error
    return state_dict(found, path.name)


def state_dict(found: object, where: str = "the module") -> dict[str, Tensor]:
    """The state dict in what a checkpoint holds: itself, or under a usual key; raises ExportError."""
    if isinstance(found, Mapping) and not _only_tensors(found):
        found = next((found[key] for key in HOLDERS if isinstance(found.get(key), Mapping)), found)
    if not isinstance(found, Mapping) or not _only_tensors(found):
        raise ExportError(f"weights: {where} holds no state dict, neither itself nor under {', '.join(HOLDERS)}")
    weights = {str(key): value for key, value in found.items()}
    for wrapper in WRAPPERS:
        if all(key.startswith(wrapper) for key in weights):
            weights = {key.removeprefix(wrapper): value for key, value in weights.items()}
    return weights


def _only_tensors(found: Mapping[Any, Any]) -> bool:
    return bool(found) and all(isinstance(value, Tensor) for value in found.values())


def told_by(module: nn.Module, spec: Spec) -> Spec:
    """The spec with what a module says and its weights do not: a relu cell, the eps of a LayerNorm."""
    parts = dict(module.named_modules())
    relu = any(getattr(part, "nonlinearity", "") == "relu" for part in parts.values())
    head: list[str | Norm] = []
    for item in spec.head:
        part = parts.get(item) if isinstance(item, str) else None
        head.append(Norm(layer=str(item), eps=part.eps) if isinstance(part, nn.LayerNorm) else item)
    return spec.model_copy(update={"head": head, "nonlinearity": "relu" if relu else spec.nonlinearity})


def build(weights: Weights, spec: Spec) -> tuple[RecurrentModel, dict[str, Any]]:
    """The network of the weights, and what a run's meta.json would say of it; raises ExportError naming a key."""
    taken = _Taken(weights, spec.ignore)
    symbols = _symbols(spec)
    embedding = taken.get(spec.embedding, "weight", 2) if spec.embedding is not None else None
    if embedding is not None and len(embedding) != len(symbols):
        raise ExportError(f"weights: {taken.last!r} has {len(embedding)} rows, but there are {len(symbols)} symbols")
    layers = _recurrent(taken, spec, len(spec.features) if embedding is None else embedding.shape[1])
    config = _config(spec, layers, symbols, embedding)
    head = _head(taken, spec, config)
    taken.refuse_leftovers()
    module = RecurrentModel(config)
    module.head = head
    with torch.no_grad():
        _fill(module, layers, embedding, spec)
    return module.eval(), _meta(spec, symbols)


class _Taken:
    """The weights, and which of them have found their place."""

    def __init__(self, weights: Weights, ignored: Sequence[str]) -> None:
        self._weights = weights
        self._left = [key for key in weights if not key.startswith(tuple(ignored))]
        self.last = ""
        """the key that was taken last"""

    def has(self, prefix: str, name: str) -> bool:
        """Whether there is such a key."""
        return joined(prefix, name) in self._weights

    def rank(self, prefix: str, name: str) -> int:
        """How many axes a tensor has."""
        return self._weights[joined(prefix, name)].dim()

    def starting(self, prefix: str) -> list[str]:
        """What follows a prefix, of all keys that have it."""
        begin = joined(prefix, "")
        return [key.removeprefix(begin) for key in self._weights if key.startswith(begin)]

    def get(self, prefix: str, name: str, axes: int) -> Tensor:
        """A tensor as float32; raises ExportError when it is missing, of another rank, or holds no finite numbers."""
        self.last = key = joined(prefix, name)
        found = self._weights.get(key)
        if found is None:
            there = ", ".join(map(repr, list(self._weights)[:SHOWN])) + (", ..." if len(self._weights) > SHOWN else "")
            raise ExportError(f"weights: there is no {key!r}; there are {there}")
        if not found.is_floating_point() or found.dim() != axes or not found.numel():
            shape = list(found.shape)
            raise ExportError(f"weights: {key!r} is {found.dtype} {shape}; floating point with {axes} axes is needed")
        if not torch.isfinite(found).all():
            raise ExportError(f"weights: {key!r} holds a number that is not finite")
        if key in self._left:
            self._left.remove(key)
        return found.detach().cpu().float()

    def shaped(self, prefix: str, name: str, shape: Sequence[int]) -> Tensor:
        """The same, of just this shape."""
        found = self.get(prefix, name, len(shape))
        if list(found.shape) != list(shape):
            raise ExportError(f"weights: {self.last!r} is {list(found.shape)}, but {list(shape)} is needed")
        return found

    def refuse_leftovers(self) -> None:
        """Raise ExportError naming the keys that nothing in the spec has asked for."""
        if self._left:
            more = f" and {len(self._left) - SHOWN} more" if len(self._left) > SHOWN else ""
            keys = ", ".join(map(repr, self._left[:SHOWN]))
            raise ExportError(
                f"weights: nothing in the spec takes {keys}{more}; what is no part of the network goes into ignore"
            )


def joined(prefix: str, name: str) -> str:
    """The key of a tensor of a layer."""
    return f"{prefix.rstrip('.')}.{name}" if prefix else name


# ---------------------------------------------------------------------- recurrent layers


class _Layer:
    """One recurrent layer's tensors; absent biases are zeros, which add nothing."""

    def __init__(self, taken: _Taken, prefix: str, end: str) -> None:
        self.hh = taken.get(prefix, f"weight_hh{end}", 2)
        self.key = taken.last
        rows, self.hidden = self.hh.shape
        self.gates, rest = divmod(rows, self.hidden)
        if rest or self.gates not in CELLS:
            raise ExportError(
                f"weights: {self.key!r} is {list(self.hh.shape)}: {rows / self.hidden:g} gates, but an lstm has 4, "
                "a gru 3, an rnn 1"
            )
        self.ih = taken.get(prefix, f"weight_ih{end}", 2)
        if len(self.ih) != rows:
            raise ExportError(f"weights: {taken.last!r} has {len(self.ih)} rows, but {self.key!r} has {rows}")
        self.ih_key = taken.last
        biased = any(taken.has(prefix, f"bias_{kind}{end}") for kind in ("ih", "hh"))
        self.biases = [
            taken.shaped(prefix, f"bias_{kind}{end}", [rows]) if biased else torch.zeros(rows) for kind in ("ih", "hh")
        ]


def _recurrent(taken: _Taken, spec: Spec, width: int) -> list[_Layer]:
    prefixes = [spec.recurrent] if isinstance(spec.recurrent, str) else spec.recurrent
    layers = [layer for prefix in prefixes for layer in _layers(taken, prefix)]
    first = layers[0]
    for i, layer in enumerate(layers):
        if (layer.gates, layer.hidden) != (first.gates, first.hidden):
            raise ExportError(
                f"weights: {layer.key!r} is a layer of {layer.hidden} {CELLS[layer.gates]} units above one of "
                f"{first.hidden} {CELLS[first.gates]} units; all layers must be alike"
            )
        needed = first.hidden if i else width
        if layer.ih.shape[1] != needed:
            what = "the layer below has" if i else "the embedding has" if spec.embedding is not None else "features are"
            raise ExportError(f"weights: {layer.ih_key!r} takes {layer.ih.shape[1]} inputs, but {needed} {what}")
    return layers


def _layers(taken: _Taken, prefix: str) -> list[_Layer]:
    names = taken.starting(prefix)
    odd = {"_reverse": "bidirectional: it needs a sequence's end before it can say anything of its beginning"}
    odd |= {"weight_hr": "projected (proj_size), which is not supported"}
    for name in names:
        for mark, reason in odd.items():
            if mark in name and name.startswith(("weight_", "bias_")):
                raise ExportError(f"weights: {joined(prefix, name)!r}: the layer is {reason}")
    found = [match[1] for name in names if (match := re.fullmatch(r"weight_hh(_l\d+|)", name))]
    count = max(len(found), 1)
    ends = [""] if found == [""] else [f"_l{i}" for i in range(count)]
    return [_Layer(taken, prefix, end) for end in ends]


def _config(spec: Spec, layers: Sequence[_Layer], symbols: Sequence[str], embedding: Tensor | None) -> ModelConfig:
    cell = CELLS[layers[0].gates]
    if spec.nonlinearity == "relu":
        if cell != "rnn":
            raise ExportError(f"spec: nonlinearity: {layers[0].key!r} is of an {cell}, which has none to choose")
        cell = "rnn-relu"
    return ModelConfig(
        task=spec.task,
        cell=cell,
        layers=len(layers),
        hidden=layers[0].hidden,
        embedding=embedding.shape[1] if embedding is not None else 0,
        vocabulary=len(symbols),
        periods=(0.0,) * len(spec.features),
        targets=tuple(range(len(spec.targets))),
        quantiles=tuple(spec.quantiles),
        labels=len(spec.labels),
    )


def _fill(module: RecurrentModel, layers: Sequence[_Layer], embedding: Tensor | None, spec: Spec) -> None:
    for i, layer in enumerate(layers):
        for name, value in (("weight_ih", layer.ih), ("weight_hh", layer.hh), *zip(BIASES, layer.biases, strict=True)):
            module.rnn.get_parameter(f"{name}_l{i}").copy_(value)
    if isinstance(module.encoder, ValueEncoder):
        module.encoder.mean.copy_(torch.tensor([feature.offset for feature in spec.features], dtype=torch.float64))
        module.encoder.scale.copy_(torch.tensor([feature.factor for feature in spec.features], dtype=torch.float64))
    elif isinstance(module.encoder, nn.Embedding) and embedding is not None:
        module.encoder.weight.copy_(embedding)


BIASES = ("bias_ih", "bias_hh")

# ---------------------------------------------------------------------- head


def _head(taken: _Taken, spec: Spec, config: ModelConfig) -> OwnHead:
    layers: list[nn.Module] = []
    width = config.hidden
    for i, item in enumerate(spec.head):
        if item in LOGITS and not taken.has(str(item), "weight"):
            if i + 1 < len(spec.head) or spec.targets:
                raise ExportError(f"spec: head: {item} comes last, and only where there are labels or symbols")
            break
        layers.append(_head_layer(taken, item, width))
        if isinstance(layers[-1], nn.Linear):
            width = layers[-1].out_features
    head = OwnHead(layers, config)
    _arrange(head, spec, width)
    return head


def _head_layer(taken: _Taken, item: str | Norm, width: int) -> nn.Module:
    prefix, eps = (item.layer, item.eps) if isinstance(item, Norm) else (item, 1e-5)
    if not taken.has(prefix, "weight") and prefix in ACTIVATIONS:
        return ACTIVATIONS[prefix]()
    if not taken.has(prefix, "weight"):
        known = ", ".join([*ACTIVATIONS, *LOGITS])
        raise ExportError(
            f"spec: head: there is no {joined(prefix, 'weight')!r} in the weights; activations are {known}"
        )
    if taken.rank(prefix, "weight") == 1:
        norm = nn.LayerNorm(width, eps=eps)
        with torch.no_grad():
            norm.weight.copy_(taken.shaped(prefix, "weight", [width]))
            norm.bias.copy_(taken.shaped(prefix, "bias", [width]) if taken.has(prefix, "bias") else torch.zeros(width))
        return norm
    weight = taken.get(prefix, "weight", 2)
    if weight.shape[1] != width:
        raise ExportError(f"weights: {taken.last!r} takes {weight.shape[1]} numbers, but {width} come from before it")
    linear = nn.Linear(width, len(weight))
    with torch.no_grad():
        linear.weight.copy_(weight)
        bias = taken.has(prefix, "bias")
        linear.bias.copy_(taken.shaped(prefix, "bias", [len(weight)]) if bias else torch.zeros(len(weight)))
    return linear


def _arrange(head: OwnHead, spec: Spec, width: int) -> None:
    """Which of the head's numbers is which; raises ExportError when there are too few or too many."""
    if not spec.targets:
        wanted = len(spec.labels) or len(_symbols(spec))
        if width != wanted:
            what = "labels" if spec.labels else "symbols"
            raise ExportError(f"spec: head: it ends in {width} numbers, but there are {wanted} {what}")
        return
    K, Q = len(spec.targets), len(spec.quantiles)
    rows = 1 if not Q else Q if width == K * Q else 1 + Q
    if width != K * rows:
        choice = f"{K}" if not Q else f"{K * Q} ({Q} quantiles of {K} targets) or {K * (1 + Q)} (with the mean before)"
        raise ExportError(f"spec: head: it ends in {width} numbers, but {choice} are needed")
    if Q and rows == Q:
        if 0.5 not in spec.quantiles:
            raise ExportError("spec: quantiles: without a mean in the head the median stands for it: 0.5 is needed")
        head.mean_at = spec.quantiles.index(0.5)
    order = torch.arange(width)
    head.order = order if spec.order == "quantiles" else order.reshape(K, rows).T.flatten().clone()
    with torch.no_grad():
        head.target_mean.copy_(torch.tensor([target.offset for target in spec.targets], dtype=torch.float64))
        head.target_scale.copy_(torch.tensor([target.factor for target in spec.targets], dtype=torch.float64))


# ---------------------------------------------------------------------- what a manifest says


def _symbols(spec: Spec) -> list[str]:
    """The vocabulary; a string is one of characters."""
    return list(spec.symbols) if isinstance(spec.symbols, str | list) else []


def _meta(spec: Spec, symbols: Sequence[str]) -> dict[str, Any]:
    memory = spec.memory if isinstance(spec.memory, str | None) else spec.memory.model_dump()
    features = [feature.feature().model_dump() for feature in spec.features]
    targets = [target.target().model_dump() for target in spec.targets]
    meta = {"memory": memory, "features": features, "targets": targets, "labels": spec.labels}
    if not symbols:
        return {**meta, "input_kind": "values", "symbols": []}
    characters = all(len(symbol) == 1 for symbol in symbols)
    kind = "characters" if characters else "words"
    splitter = spec.splitter.model_dump() if spec.splitter is not None else {"kind": kind, "lowercase": False}
    start = {"start_symbol": spec.start_symbol, "splitter": splitter}
    return {**meta, **start, "input_kind": "text" if characters else "symbols", "symbols": list(symbols)}
