"""The export's checks: PyTorch and ONNX Runtime agree, and neither chunking nor batching changes a bit.

Whatever fails raises ExportError with the check's name and figure; what passes becomes `manifest.checks`.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import onnxruntime
import torch

from training.mel import SoundEncoder
from training.model import ForecastHead, OwnHead, RecurrentModel, ValueEncoder, carried_states
from training.publish import ExportError as ExportError
from training.publish import cpu_kind

BATCHES = (1, 2, 7, 64)
CHUNKS = (1, 5, 2, 17, 8)
THREADS = (1, 2)
CUTS = 3
TOLERANCE = 1e-4
INT8_TOLERANCE = 0.05
BEYOND = 0.01
"""An h of an int8 model may be rounded to the other side; so few of its values may be further off than TOLERANCE."""

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, Array]
Step = Callable[[Array, Tensors], tuple[Tensors, Tensors]]
"""(entries [T, B, ...], states) -> (outputs [T, B, ...], states), each by name."""


def check(module: RecurrentModel, graph: bytes, int8: bool = False) -> dict[str, Any]:
    """Run every check of `graph` against `module` and return the figures; raises ExportError."""
    steps = [ort_step(graph, threads) for threads in THREADS]
    parity = check_steps(module, steps[0]) if int8 else check_parity(module, steps[0])
    for step in steps:
        check_chunks(module, step)
        check_batches(module, step)
    return {
        "parity": {**parity, "tolerance": INT8_TOLERANCE if int8 else TOLERANCE, "units": _units(module)},
        "chunk_invariant": True,
        "batch_invariant": True,
        "thread_invariant": threads_agree(module, steps),
        "batches": list(BATCHES),
        "chunks": list(CHUNKS),
        "threads": list(THREADS),
        **computed_with(),
    }


def computed_with() -> dict[str, str]:
    """What the figures of a check depend on."""
    return {"onnxruntime": onnxruntime.__version__, "torch": str(torch.__version__), "cpu": cpu_kind()}


def check_parity(module: RecurrentModel, step: Step) -> dict[str, float]:
    """Greatest difference from PyTorch over carried chunks at every B: {"outputs", "states"}."""
    greatest = {"outputs": 0.0, "states": 0.0}
    for batch in BATCHES:
        entries = plausible_entries(module, sum(CHUNKS), batch)
        ours = carry(step, entries, CHUNKS, zero_states(module, batch))
        theirs = carry(torch_step(module), entries, CHUNKS, zero_states(module, batch))
        for (outputs, states), (expected, expected_states) in zip(ours, theirs, strict=True):
            _raise_greatest(greatest, "outputs", _output_distance(module, outputs, expected), batch)
            _raise_greatest(greatest, "states", _state_distance(states, expected_states), batch)
    return greatest


def check_steps(module: RecurrentModel, step: Step) -> dict[str, float]:
    """Every step of an int8 graph against the module's from the same state: {"outputs", "states", "beyond"}.

    Carried on, one h that was rounded to the other side would become many, so the graph's own state is carried.
    """
    apart: dict[str, list[Array]] = {"outputs": [], "states": []}
    for batch in BATCHES:
        entries, states = plausible_entries(module, sum(CHUNKS), batch), zero_states(module, batch)
        for t in range(len(entries)):
            expected, expected_states = torch_step(module)(entries[t : t + 1], states)
            outputs, states = step(entries[t : t + 1], states)
            apart["outputs"] += _output_distances(module, outputs, expected)
            apart["states"] += _state_distances(states, expected_states)
    return _few_beyond(apart)


def _few_beyond(apart: dict[str, list[Array]]) -> dict[str, float]:
    """The greatest distance of each kind, and the share of all that is beyond TOLERANCE; raises ExportError."""
    joined = {kind: np.concatenate([part.ravel() for part in parts]) for kind, parts in apart.items()}
    greatest = {kind: _greatest(values) for kind, values in joined.items()}
    everything = np.concatenate(list(joined.values()))
    beyond = float((everything > TOLERANCE).mean())
    if not (max(greatest.values()) <= INT8_TOLERANCE and beyond <= BEYOND):
        raise ExportError(
            f"parity: a step differs from PyTorch by {max(greatest.values()):.3g}, {beyond:.2%} of the values by more "
            f"than {TOLERANCE:g}; at most {INT8_TOLERANCE:g} and {BEYOND:.0%} are allowed"
        )
    return {**greatest, "beyond": beyond}


def check_chunks(module: RecurrentModel, step: Step) -> None:
    """One call over all steps, calls of one step each, and random cuts give the same bits."""
    T, rng = sum(CHUNKS), np.random.default_rng(1)
    random_cuts = [_random_lengths(rng, T) for _ in range(CUTS)]
    for batch in BATCHES[:-1]:
        entries, zero = plausible_entries(module, T, batch), zero_states(module, batch)
        whole = fold(step, entries, [T], zero)
        for lengths in ([1] * T, list(CHUNKS), *random_cuts):
            _same_bits(f"chunks of {lengths} at B={batch}", fold(step, entries, lengths, zero), whole)


def check_batches(module: RecurrentModel, step: Step) -> None:
    """Each row gives the same bits alone and beside others."""
    T, most = sum(CHUNKS), max(BATCHES)
    entries, zero = plausible_entries(module, T, most), zero_states(module, 1)
    rows = [fold(step, entries[:, [row]], [T], zero) for row in range(most)]
    for batch in BATCHES[1:]:
        alone = {name: np.concatenate([row[name] for row in rows[:batch]], axis=1) for name in rows[0]}
        together = fold(step, entries[:, :batch], [T], zero_states(module, batch))
        _same_bits(f"rows alone against B={batch}", together, alone)


def threads_agree(module: RecurrentModel, steps: list[Step]) -> bool:
    """Whether every number of threads gives the same bits; worth knowing, but not asked of a model."""
    batch = max(BATCHES)
    entries, zero = plausible_entries(module, sum(CHUNKS), batch), zero_states(module, batch)
    first, *others = [fold(step, entries, [len(entries)], zero) for step in steps]
    return all(other[name].tobytes() == first[name].tobytes() for other in others for name in first)


def carry(
    step: Step, entries: Array, lengths: tuple[int, ...] | list[int], states: Tensors
) -> Iterator[tuple[Tensors, Tensors]]:
    """Outputs and states after each chunk, the states carried; lengths add up to T."""
    for start, end in pairwise(np.cumsum([0, *lengths])):
        outputs, states = step(entries[start:end], states)
        yield outputs, states


def fold(step: Step, entries: Array, lengths: list[int], states: Tensors) -> Tensors:
    """All outputs joined over time, and the last states, in one dict."""
    chunks = list(carry(step, entries, lengths, states))
    outputs = {name: np.concatenate([chunk[name] for chunk, _ in chunks]) for name in chunks[0][0]}
    return outputs | chunks[-1][1]


def torch_step(module: RecurrentModel) -> Step:
    """The module itself, in evaluation mode."""
    module.eval()
    names = list(carried_states(module.config))

    def step(entries: Array, states: Tensors) -> tuple[Tensors, Tensors]:
        with torch.inference_mode():
            before = tuple(torch.from_numpy(states[name]) for name in names) or module.initial_state(entries.shape[1])
            outputs, after = module(torch.from_numpy(entries), before)
        named = {name: value.numpy() for name, value in zip(names, after, strict=bool(names))}
        return {name: value.numpy() for name, value in outputs.items()}, named

    return step


def ort_step(graph: bytes, threads: int = 1) -> Step:
    """The graph in ONNX Runtime on the CPU."""
    session = _open(graph, threads)
    entry, *names = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]

    def step(entries: Array, states: Tensors) -> tuple[Tensors, Tensors]:
        feeds = {entry: entries, **states}
        results: Tensors = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        return results, {name: results.pop(f"{name}_next") for name in names}

    return step


def _open(graph: bytes, threads: int) -> onnxruntime.InferenceSession:
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def zero_states(module: RecurrentModel, batch: int) -> Tensors:
    """The state at position 0, each [layers, B, hidden] or [1, B, samples] float32."""
    shapes = carried_states(module.config).items()
    return {name: np.zeros((rows, batch, width), np.float32) for name, (rows, width) in shapes}


def plausible_entries(module: RecurrentModel, T: int, batch: int, seed: int = 0) -> Array:
    """Random symbols [T, B] int64, or walks within the features' ranges, or sounds [T, B, F] float32."""
    rng = np.random.default_rng(seed)
    if module.config.vocabulary:
        return rng.integers(0, module.config.vocabulary, (T, batch), dtype=np.int64)
    if isinstance(module.encoder, SoundEncoder):
        return _sounds(rng, T, batch, module.encoder.sound.hop)
    assert isinstance(module.encoder, ValueEncoder)
    mean, scale, period = (
        value.cpu().numpy() for value in (module.encoder.mean, module.encoder.scale, module.encoder.period)
    )
    start = rng.standard_normal((1, batch, len(mean)))
    walk = start + 0.3 * rng.standard_normal((T, batch, len(mean))).cumsum(axis=0)
    values = mean + scale * np.clip(walk, -3, 3)
    clock = np.floor(rng.uniform(0, 1, (1, batch, len(mean))) * period) + np.arange(T)[:, None, None]
    cyclic = period > 0
    values[..., cyclic] = clock[..., cyclic] % period[cyclic]
    return np.asarray(values, np.float32)


def _sounds(rng: np.random.Generator, T: int, batch: int, hop: int) -> Array:
    """Noise over a tone, [T, B, hop], from silence to full scale by the step."""
    loud = 10 ** rng.uniform(-5, 0, (T, batch, 1)) * (rng.random((T, batch, 1)) > 0.1)
    turns = rng.uniform(0, 0.5, (1, batch, 1)) * np.arange(T * hop).reshape(T, 1, hop)
    sounds = loud * (np.sin(2 * np.pi * turns) / 2 + rng.uniform(-0.5, 0.5, (T, batch, hop)))
    return np.asarray(sounds, np.float32)


def target_std(module: RecurrentModel) -> Array:
    """Standard deviation of each column [K] in the data's own units."""
    if module.config.task == "regressor" or isinstance(module.head, OwnHead):
        assert isinstance(module.head, ForecastHead | OwnHead)
        own: Array = module.head.target_scale.cpu().numpy()
        return own
    assert isinstance(module.encoder, ValueEncoder)
    std: Array = module.encoder.scale[list(module.config.columns)].cpu().numpy()
    return std


def _units(module: RecurrentModel) -> str:
    outputs = "each target's standard deviation" if module.config.targets else "logits"
    return f"outputs: {outputs}; states: absolute, relative where a cell state is above 1"


def distance(module: RecurrentModel, ours: tuple[Tensors, Tensors], theirs: tuple[Tensors, Tensors]) -> float:
    """The greatest difference between two pairs of outputs and states."""
    return max(_output_distance(module, ours[0], theirs[0]), _state_distance(ours[1], theirs[1]))


def _output_distance(module: RecurrentModel, ours: Tensors, theirs: Tensors) -> float:
    return max(map(_greatest, _output_distances(module, ours, theirs)))


def _output_distances(module: RecurrentModel, ours: Tensors, theirs: Tensors) -> list[Array]:
    """A target far from zero is coarser in float32 than 1e-4 of its deviation; hence a thousandth of it at least."""
    if not module.config.targets:
        return [np.abs(ours[name] - theirs[name]) for name in theirs]
    std = target_std(module)
    return [np.abs(ours[n] - theirs[n]) / np.maximum(std, np.abs(theirs[n]) / 1000) for n in theirs]


def _state_distance(ours: Tensors, theirs: Tensors) -> float:
    return max(map(_greatest, _state_distances(ours, theirs)), default=0.0)


def _state_distances(ours: Tensors, theirs: Tensors) -> list[Array]:
    """An lstm's c reaches thousands, where float32 itself is coarser than 1e-4; hence relative above 1."""
    return [np.abs(ours[n] - theirs[n]) / np.maximum(1, np.abs(theirs[n])) for n in theirs]


def _greatest(distance: Array) -> float:
    return float(distance.max()) if np.isfinite(distance).all() else float("inf")


def _raise_greatest(greatest: dict[str, float], kind: str, distance: float, batch: int) -> None:
    if not distance <= TOLERANCE:
        raise ExportError(
            f"parity: {kind} differ from PyTorch by {distance:.3g} at B={batch}; at most {TOLERANCE:g} is allowed"
        )
    greatest[kind] = max(greatest[kind], distance)


def _random_lengths(rng: np.random.Generator, T: int) -> list[int]:
    cuts = np.flatnonzero(rng.random(T - 1) < 0.3) + 1
    return [int(length) for length in np.diff([0, *cuts, T])]


def _same_bits(case: str, ours: Tensors, theirs: Tensors) -> None:
    for name, value in theirs.items():
        if ours[name].tobytes() != value.tobytes():
            difference = np.abs(ours[name] - value).max()
            raise ExportError(f"invariance: {case}: {name!r} changes by {difference:.3g}; not a bit may change")
