"""What is put around a stranger's graph where its owner asks for it: context, scaling, outputs as the task names them.

Everything else about a foreign graph is said in the manifest, and the graph stays as it is.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from service.bundle import DTYPES
from training.foreign.graph import GraphError, names, rename
from training.foreign.inspect import Findings
from training.foreign.spec import Scaled, Spec
from training.foreign.trial import Named

LEAST_OPSET = 13


def with_context(model: ModelProto, context: Mapping[str, int]) -> ModelProto:
    """The graph with the end of each step put before the next one, carried as a state of its own.

    Some models are run so by their own library: Silero VAD wants the last 64 samples before the next 512.
    """
    if not context:
        return model
    adapted = _copy(model, "context")
    for name, count in context.items():
        value = next((one for one in adapted.graph.input if one.name == name), None)
        if value is None or count < 1 or not value.type.tensor_type.shape.dim:
            raise GraphError(f"context.{name}: an input and how many of its numbers are needed")
        _put_before(adapted.graph, value, count)
    return adapted


def _put_before(graph: GraphProto, value: ValueInfoProto, count: int) -> None:
    name, dims = value.name, value.type.tensor_type.shape.dim
    context, following, joined = _free(graph, f"{name}_context", f"{name}_context_next", f"{name}_joined")
    rename(graph, name, joined)
    if dims[-1].dim_value:
        if dims[-1].dim_value <= count:
            raise GraphError(f"context.{name}: a step has {dims[-1].dim_value} numbers with its context")
        dims[-1].dim_value -= count
    for i, dim in enumerate(dims[:-1]):
        if not dim.dim_value and not dim.dim_param:
            dim.dim_param = f"{name}_axis_{i}"
    if sum(1 for dim in dims[:-1] if not dim.dim_value) > 1:
        raise GraphError(f"context.{name}: only an input that takes one step a call can have it")
    shape = [dim.dim_value or dim.dim_param for dim in dims[:-1]]
    dtype = value.type.tensor_type.elem_type
    numbers = {"starts": [-count], "ends": [2**31 - 1], "axes": [-1]}
    constants = {part: _constant(graph, f"{name}_context_{part}", np.array(n)) for part, n in numbers.items()}
    graph.input.append(helper.make_tensor_value_info(context, dtype, [*shape, count]))
    graph.output.append(helper.make_tensor_value_info(following, dtype, [*shape, count]))
    _first(
        graph,
        helper.make_node("Concat", [context, name], [joined], axis=-1),
        helper.make_node("Slice", [joined, *constants.values()], [following]),
    )


def for_task(findings: Findings, spec: Spec) -> tuple[ModelProto, tuple[str, ...] | None]:
    """The graph with the task's own outputs, in the data's own units; and their names (None: all that there are)."""
    if spec.task == "raw":
        return findings.model, spec.graph.outputs
    adapted = _copy(findings.model, "a task")
    graph, called = adapted.graph, findings.called
    if spec.features:
        if len(called.inputs) != 1:
            raise GraphError(f"features: the graph has {len(called.inputs)} inputs, and features are those of one")
        _scale_input(graph, called.inputs[0], spec.features)
    answer = _chosen(called.outputs, spec.output, "output")
    if spec.task == "classifier":
        return adapted, (_classes(graph, answer, spec),)
    _give(graph, answer, "mean", spec.targets)
    if not spec.quantiles:
        return adapted, ("mean",)
    _give(graph, _chosen(called.outputs, spec.quantiles_output, "quantiles_output"), "quantiles", spec.targets)
    return adapted, ("mean", "quantiles")


def _chosen(outputs: Sequence[Named], name: str, key: str) -> Named:
    found = [one for one in outputs if one.name == name or not name]
    if len(found) != 1:
        raise GraphError(f"{key}: which of {', '.join(repr(one.name) for one in outputs)} is it?")
    return found[0]


def _scale_input(graph: GraphProto, one: Named, features: Sequence[Scaled]) -> None:
    if int(np.prod(one.row)) != len(features):
        raise GraphError(
            f"features: {len(features)} are named, but a step of {one.name!r} has the shape {list(one.row)}"
        )
    if not _are_scaled(features):
        return
    dtype = _needs_last_axis(one, len(features))
    centred, scaled = _free(graph, f"{one.name}_centred", f"{one.name}_scaled")
    rename(graph, one.name, scaled)
    mean = _constant(graph, f"{one.name}_mean", np.array([f.mean for f in features], dtype))
    scale = _constant(graph, f"{one.name}_scale", np.array([f.scale for f in features], dtype))
    _first(
        graph,
        helper.make_node("Sub", [one.name, mean], [centred]),
        helper.make_node("Div", [centred, scale], [scaled]),
    )


def _are_scaled(parts: Sequence[Scaled]) -> bool:
    return any(part.mean != 0 or part.scale != 1 for part in parts)


def _needs_last_axis(one: Named, count: int) -> "np.dtype[np.generic]":
    if one.axes[-1] != count or DTYPES[one.dtype].kind != "f":
        raise GraphError(f"scaling: the last axis of {one.name!r} {list(one.axes)} must be the {count} values")
    return DTYPES[one.dtype]


def _give(graph: GraphProto, one: Named, name: str, targets: Sequence[Scaled]) -> None:
    """An output in the data's own units, by the task's name."""
    source = _without_output(graph, one, name)
    if _are_scaled(targets):
        dtype = _needs_last_axis(one, len(targets))
        wide, given = _free(graph, f"{name}_wide", f"{name}_given")
        scale = _constant(graph, f"{name}_scale", np.array([t.scale for t in targets], dtype))
        mean = _constant(graph, f"{name}_mean", np.array([t.mean for t in targets], dtype))
        graph.node.append(helper.make_node("Mul", [source, scale], [wide]))
        graph.node.append(helper.make_node("Add", [wide, mean], [given]))
        source = given
    graph.node.append(helper.make_node("Identity", [source], [name]))
    _declare(graph, name, one)


def _classes(graph: GraphProto, one: Named, spec: Spec) -> str:
    """A classifier's output by its name, `logits` or `probabilities`, which it returns."""
    name = "logits" if spec.gives == "logits" else "probabilities"
    if spec.gives == "probability":
        one = _both(graph, one)
    source = _without_output(graph, one, name)
    graph.node.append(helper.make_node("Identity", [source], [name]))
    _declare(graph, name, one)
    return name


def _both(graph: GraphProto, one: Named) -> Named:
    """The probabilities of both labels where the graph gives the second one's."""
    if int(np.prod(one.row)) != 1 or DTYPES[one.dtype].kind != "f":
        raise GraphError(f"gives: {one.name!r} is {one.dtype} {list(one.row)} a step, not one probability")
    source, axes, dtype = one.name, one.axes, DTYPES[one.dtype]
    if axes[-1:] != (1,):
        (column,) = _free(graph, "probability_column")
        graph.node.append(helper.make_node("Unsqueeze", [source, _constant(graph, "last", np.array([-1]))], [column]))
        source, axes = column, (*axes, 1)
    other, both = _free(graph, "probability_other", "probability_both")
    unit = _constant(graph, "probability_unit", np.array(1, dtype))
    graph.node.append(helper.make_node("Sub", [unit, source], [other]))
    graph.node.append(helper.make_node("Concat", [other, source], [both], axis=-1))
    return Named(both, one.dtype, (*axes[:-1], 2))


# ---------------------------------------------------------------------- helpers


def _copy(model: ModelProto, what: str) -> ModelProto:
    opset = max((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), default=0)
    if opset < LEAST_OPSET:
        raise GraphError(f"{what} needs opset {LEAST_OPSET} or newer, the graph has {opset}: export it again")
    copied = ModelProto()
    copied.CopyFrom(model)
    return copied


def _free(graph: GraphProto, *wanted: str) -> list[str]:
    """Names as wanted, or with a number where they are taken."""
    taken, found = names(graph), []
    for name in wanted:
        number = 0
        while (free := f"{name}_{number}" if number else name) in taken:
            number += 1
        found.append(free)
    return found


def _constant(graph: GraphProto, name: str, value: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> str:
    (free,) = _free(graph, name)
    graph.initializer.append(numpy_helper.from_array(value, free))
    return free


def _first(graph: GraphProto, *nodes: NodeProto) -> None:
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def _without_output(graph: GraphProto, one: Named, name: str) -> str:
    """Make room for an output: whatever is called so within gets another name; returns what the old one is called."""
    source = one.name
    for value in list(graph.output):
        if value.name == name:
            graph.output.remove(value)
    if name in names(graph):
        (inner,) = _free(graph, f"{name}_within")
        rename(graph, name, inner)
        if source == name:
            source = inner
    return source


def _declare(graph: GraphProto, name: str, one: Named) -> None:
    dtype = helper.np_dtype_to_tensor_dtype(DTYPES[one.dtype])
    # What the axes are called here means nothing to the graph.
    shape = [f"{name}_{axis}" if isinstance(axis, str) else axis for axis in one.axes]
    graph.output.append(helper.make_tensor_value_info(name, dtype, shape))
