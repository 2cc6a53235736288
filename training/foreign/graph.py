"""Reading a stranger's ONNX file: what is refused, and how its values flow.

Refused are files that reach outside of their folder, ask for operators that ONNX Runtime does not bring, or are not
a graph at all; the message says which rule is broken.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path

import onnx
import onnx.inliner
import onnx.shape_inference
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_tensor

from training.publish import ExportError

MAX_BYTES = 2**31 - 1
"""what one protobuf message can hold"""
MAX_FUNCTIONS, MAX_NODES = 500, 1_000_000
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})


class GraphError(ExportError):
    """A graph that must not be published; the message says why."""


# ---------------------------------------------------------------------- reading


def read(path: Path) -> ModelProto:
    """The model in a file, whole: data beside it is taken in. Raises GraphError."""
    if not path.is_file():
        raise GraphError(f"{path.name}: there is no such file")
    if path.stat().st_size > MAX_BYTES:
        raise GraphError(f"{path.name} is larger than 2 GB, which no ONNX file can be: its weights belong beside it")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf's own type
        raise GraphError(f"{path.name} is not an ONNX model") from error
    if not model.graph.output:
        raise GraphError(f"{path.name} is not an ONNX model: it has no outputs")
    _take_in(model, path.parent)
    _check_operators(model)
    _check_functions(model)
    _check_names(model.graph)
    try:
        if not all(value.HasField("type") for value in model.graph.output):  # onnxscript leaves it out
            model = onnx.shape_inference.infer_shapes(model)
        onnx.checker.check_model(model)
    except Exception as error:  # the checker raises types of its own, and of protobuf
        raise GraphError(f"{path.name} is not valid: {str(error).strip().splitlines()[0][:300]}") from error
    return model


def _take_in(model: ModelProto, folder: Path) -> None:
    """Load the tensors whose data lies beside the file; raises GraphError for data anywhere else."""
    outside = [t for t in tensors(model) if t.data_location == TensorProto.EXTERNAL]
    total = model.ByteSize()
    for tensor in outside:
        total += _check_place(tensor, folder)
        if total > MAX_BYTES:
            raise GraphError("with its external data the model is larger than 2 GB")
    for tensor in outside:
        try:
            load_external_data_for_tensor(tensor, str(folder))
        except Exception as error:
            raise GraphError(f"the external data of {tensor.name!r} can not be read") from error


def _check_place(tensor: TensorProto, folder: Path) -> int:
    """Bytes of a tensor's external data; raises GraphError unless it is a file in the model's own folder."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            info = ExternalDataInfo(tensor)
    except (ValueError, TypeError, Warning) as error:
        raise GraphError(f"the external data of {tensor.name!r} is not described as ONNX does it") from error
    place = Path(str(info.location))
    here = folder.resolve()
    if place.is_absolute() or ".." in place.parts or not (here / place).resolve().is_relative_to(here):
        raise GraphError(f"the external data of {tensor.name!r} lies outside of the model's folder")
    if not (here / place).is_file():
        raise GraphError(f"the external data of {tensor.name!r} is missing: {place.name}")
    size = (here / place).stat().st_size
    offset, length = info.offset or 0, info.length if info.length is not None else size - (info.offset or 0)
    if offset < 0 or length < 0 or offset + length > size:
        raise GraphError(f"the external data of {tensor.name!r} reaches beyond its file")
    return int(length)


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model: weights, constants, those of subgraphs and functions."""
    for graph in graphs(model.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        yield from (t for node in graph.node for t in _tensors_of(node))
    for function in model.functions:
        for node in function.node:
            yield from _tensors_of(node)
            for attribute in node.attribute:
                for graph in _subgraphs(attribute):
                    yield from (t for inner in graphs(graph) for t in inner.initializer)


def _tensors_of(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            yield attribute.t
        yield from attribute.tensors


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and all graphs within."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in _subgraphs(attribute):
                yield from graphs(inner)


def _subgraphs(attribute: AttributeProto) -> Iterator[GraphProto]:
    if attribute.type == AttributeProto.GRAPH:
        yield attribute.g
    yield from attribute.graphs


def _check_operators(model: ModelProto) -> None:
    own = {(function.domain, function.name) for function in model.functions}
    nodes = [node for graph in graphs(model.graph) for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    custom = {f"{n.domain}::{n.op_type}" for n in nodes if n.domain not in DOMAINS and (n.domain, n.op_type) not in own}
    if custom:
        raise GraphError(f"operators that ONNX Runtime does not bring: {', '.join(sorted(custom)[:10])}")


def _check_functions(model: ModelProto) -> None:
    """No function of the model's own calls itself, and written out they are not beyond all bounds."""
    bodies = {(f.domain, f.name): f.node for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(key: tuple[str, str], above: tuple[tuple[str, str], ...]) -> int:
        if key in above:
            raise GraphError(f"the function {key[1][:80]!r} calls itself")
        if key not in sizes:
            called = [(node.domain, node.op_type) for node in bodies[key]]
            sizes[key] = sum(1 if one not in bodies else size(one, (*above, key)) for one in called)
        return sizes[key]

    if len(bodies) > MAX_FUNCTIONS:
        raise GraphError(f"the model has more than {MAX_FUNCTIONS} functions of its own")
    nodes = [(node.domain, node.op_type) for graph in graphs(model.graph) for node in graph.node]
    if sum(size(one, ()) if one in bodies else 1 for one in [*nodes, *bodies]) > MAX_NODES:
        raise GraphError(f"with its functions written out the graph has more than {MAX_NODES} nodes")


def _check_names(graph: GraphProto) -> None:
    """Every value is made once and before it is used, and every output is made."""
    made = {value.name for value in graph.input} | {value.name for value in graph.initializer}
    made |= {sparse.values.name for sparse in graph.sparse_initializer}
    later = {name for node in graph.node for name in node.output if name}
    for node in graph.node:
        for name in node.output:
            if name and name in made:
                raise GraphError(f"the value {name[:80]!r} is made twice")
        missing = [name for name in node.input if name and name not in made]
        if missing:
            why = "needs itself, or comes after its use" if missing[0] in later else "is made by no node"
            raise GraphError(f"the value {missing[0][:80]!r} {why}")
        made |= set(node.output)
    for value in graph.output:
        if value.name not in made:
            raise GraphError(f"the output {value.name[:80]!r} is made by no node")
    names = [value.name for value in graph.input] + [value.name for value in graph.output]
    if len(set(names)) != len(names):
        raise GraphError("two inputs or outputs have the same name")


def rename(graph: GraphProto, old: str, new: str, keep: Callable[[NodeProto], bool] = lambda _: False) -> None:
    """Call a value otherwise wherever it is used or made, but for inputs, outputs and the nodes to `keep`."""
    for inner in graphs(graph):
        for node in inner.node:
            if keep(node):
                continue
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    if name == old:
                        names[i] = new
        if inner is not graph:
            for value in inner.output:
                if value.name == old:
                    value.name = new


def names(graph: GraphProto) -> set[str]:
    """Every name that is taken by a value."""
    found: set[str] = set()
    for inner in graphs(graph):
        found |= {value.name for value in (*inner.input, *inner.output, *inner.initializer)}
        found |= {name for node in inner.node for name in (*node.input, *node.output)}
    return found


# ---------------------------------------------------------------------- flow

CARRIED, MOVED, PLAIN, MIXED = 0.1, 0.001, 1.0, 10.0
"""What a step of a value's way costs: through a recurrent operator's own state, moved about, in elementwise
arithmetic, mixed with others by a product or anything else"""

_FIRST_ONLY = frozenset({"Slice", "Squeeze", "Unsqueeze", "Reshape", "Gather", "Split", "Expand"})
_MOVES = _FIRST_ONLY | {"Identity", "Transpose", "Concat", "Cast", "Flatten"}
_PLAIN = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Sum", "Where", "Max", "Min", "Clip", "Tanh", "Sigmoid", "Relu"})
_PLAIN |= {"HardSigmoid", "LeakyRelu", "Elu", "Softsign", "Softplus"}
_CUT = frozenset({"Shape", "Size"})
_STATES_OF = {"LSTM": {5: 1, 6: 2}, "GRU": {5: 1}, "RNN": {5: 1}}
"""Which output of a recurrent operator goes on from which input"""


@dataclass
class Flow:
    """How values reach each other: from each value to the next ones, at a cost."""

    next: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    looks_back: bool = False
    """whether a recurrent operator runs from the end to the beginning"""

    def add(self, source: str, target: str, cost: float) -> None:
        """A step of the way."""
        self.next.setdefault(source, []).append((target, cost))

    def costs(self, source: str) -> dict[str, float]:
        """The cheapest way to each value that is reached."""
        found: dict[str, float] = {}
        waiting = [(0.0, source)]
        while waiting:
            cost, name = heappop(waiting)
            if name in found:
                continue
            found[name] = cost
            for target, step in self.next.get(name, ()):
                if target not in found:
                    heappush(waiting, (cost + step, target))
        return found


def flow(model: ModelProto) -> Flow:
    """How the values of a model's graph reach each other."""
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    found = Flow()
    _walk(model.graph, found, {}, "")
    return found


def _walk(graph: GraphProto, found: Flow, outer: dict[str, str], prefix: str) -> None:
    """Add a graph's nodes; names within a subgraph get a prefix, as two branches may use the same."""
    scope = dict(outer)
    for value in (*graph.input, *graph.initializer):
        scope[value.name] = prefix + value.name
    for number, node in enumerate(graph.node):
        sources = [scope.get(name, name) if name else "" for name in node.input]
        for name in node.output:
            scope[name] = prefix + name
        targets = [scope[name] if name else "" for name in node.output]
        _step(node, found, sources, targets, scope, f"{prefix}{number}.")
    if prefix:
        for i, value in enumerate(graph.output):
            found.add(scope.get(value.name, value.name), f"{prefix}out{i}", 0.0)


def _step(
    node: NodeProto, found: Flow, sources: list[str], targets: list[str], scope: dict[str, str], prefix: str
) -> None:
    kind = node.op_type
    if kind in _CUT:
        return
    if kind == "If":
        for branch, attribute in enumerate(a for a in node.attribute if a.type == AttributeProto.GRAPH):
            _walk(attribute.g, found, scope, f"{prefix}{branch}.")
            for i, target in enumerate(targets):
                found.add(f"{prefix}{branch}.out{i}", target, 0.0)
        return
    carried = dict(_STATES_OF.get(kind, {}))
    if kind == "Scan":
        bodies = next(a.i for a in node.attribute if a.name == "num_scan_inputs")
        carried = {i: i for i in range(len(sources) - bodies)}
    if kind == "Loop":
        carried = {2 + i: i for i in range(len(sources) - 2)}
    if kind in _STATES_OF and any(a.name == "direction" and a.s != b"forward" for a in node.attribute):
        found.looks_back = True
    captured = [scope[name] for attribute in node.attribute for name in _captured(attribute) if name in scope]
    for i, source in enumerate([*sources, *captured]):
        for j, target in enumerate(targets):
            if source and target:
                found.add(source, target, _cost(kind, i, j, carried, len(sources)))


def _captured(attribute: AttributeProto) -> Iterator[str]:
    """Names that a loop's body takes from outside."""
    for graph in _subgraphs(attribute):
        for inner in graphs(graph):
            for node in inner.node:
                yield from node.input


def _cost(kind: str, i: int, j: int, carried: dict[int, int], own: int) -> float:
    if carried.get(i) == j and i < own:
        return CARRIED
    if kind in _MOVES:
        return MOVED if i == 0 or kind not in _FIRST_ONLY else MIXED
    return PLAIN if kind in _PLAIN else MIXED
