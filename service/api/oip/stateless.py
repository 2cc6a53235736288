"""Infer without a sequence: whole sequences, from an empty memory or from states that are given; nothing is kept."""

import numpy as np
from fastapi import Response

from service.api.limits import Visit
from service.api.oip.exchange import answer, arrays_in, bound, inputs_of, outputs_of, states_of, steps_in
from service.api.oip.tensors import Asked, check_outputs, raw_of
from service.bundle import DTYPES
from service.errors import invalid
from service.registry import Model
from service.session import Sessions
from service.state import Row
from service.tasks import Output


async def infer(sessions: Sessions, visit: Visit, model: Model, asked: Asked) -> Response:
    """Whole sequences, each from the initial state or from the one that is given."""
    manifest = model.bundle.manifest
    outputs = outputs_of(manifest)
    before, after = states_of(manifest)
    arrays = await arrays_in(asked, manifest)
    given = [spec for spec in before if spec.name in arrays]
    if given and len(given) < len(before):
        raise invalid(f"give all states or none: {', '.join(spec.name for spec in before)}", "/inputs")
    check_outputs(asked.outputs, [spec.name for spec in (*outputs, *after)])
    raw = raw_of(asked, (*outputs, *after) if given else outputs)
    array = steps_in(arrays, inputs_of(manifest)[0])
    batch = len(array)
    if batch > model.engine.max_batch:
        raise invalid(f"at most {model.engine.max_batch} sequences a request (RECURRA_MAX_BATCH)", "/inputs/0/shape/0")
    bound(model, array.shape[0] * array.shape[1])
    visit.take(array.shape[0] * array.shape[1])
    for spec in given:
        state = arrays[spec.name]
        if len(state) != batch:
            raise invalid(f"state {spec.name!r} is of {len(state)} sequences, the input of {batch}", "/inputs")
        if not np.isfinite(state).all():
            raise invalid(f"state {spec.name!r} must be finite", "/inputs")
    rows: list[Row] | None = None
    if given:
        kinds = [DTYPES[spec.dtype] for spec in given]
        rows = [tuple(arrays[s.name][i].astype(k) for s, k in zip(given, kinds, strict=True)) for i in range(batch)]
    entries = [model.engine.codec.encode(sequence, "/inputs/0/data") for sequence in array]
    done = await sessions.predict(model, entries, False, rows)
    found: Output = {spec.name: np.stack([one.outputs[spec.name] for one in done]) for spec in outputs}
    found |= {spec.name: np.stack([one.row[i] for one in done]) for i, spec in enumerate(after)}
    return await answer(model, asked, {}, found, [*outputs, *after], raw)
