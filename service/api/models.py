"""Routes of models: what is served, and whole sequences without a session."""

import asyncio
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from service.api.limits import steps_in
from service.api.requests import (
    KEY_PARAMETER,
    Strict,
    Version,
    body_of,
    keyed_of,
    read,
    replay_body,
    require_admin,
    sessions_of,
    visit_of,
    while_connected,
)
from service.api.responses import BODY_ERRORS, JsonResponse, described
from service.bundle import Manifest, TensorSpec
from service.errors import invalid
from service.registry import Model, Registry
from service.state import Array
from service.work.events import Done

router = APIRouter(prefix="/v1/models", tags=["models"])

MAX_SEQUENCES = 1024


class PredictBody(Strict):
    """Whole sequences."""

    sequences: Annotated[list[Any], Field(min_length=1, max_length=MAX_SEQUENCES)]
    predictions: Literal["last", "all"] = "last"
    alternatives: int = Field(default=5, ge=0, le=1000)
    version: Version | None = None


@router.get("", responses=described(200, "all models", "ModelList"))
async def list_models(request: Request) -> Response:
    """List the models that are served."""
    registry: Registry = request.app.state.registry
    data = [card(versions) for versions in registry.versions().values()]
    return JsonResponse({"object": "list", "data": data})


@router.get("/{model}", responses=described(200, "the model", "ModelCard", "model_not_found"))
async def get_model(request: Request, model: str) -> Response:
    """Look at a model."""
    registry: Registry = request.app.state.registry
    registry.get(model)
    return JsonResponse(card(registry.versions()[model]))


@router.post(
    "/reload",
    openapi_extra=KEY_PARAMETER,
    responses=described(200, "what has changed, as name/version", "Reloaded"),
)
async def reload(request: Request) -> Response:
    """Look at the models folder again: new versions are loaded, sessions stay on theirs until they are migrated."""
    registry: Registry = request.app.state.registry
    require_admin(request)
    replies, keyed = sessions_of(request).replies, keyed_of(request, "")

    async def fresh() -> Response:
        answer = JsonResponse(asdict(await asyncio.to_thread(registry.reload)))
        await replies.keep(keyed, bytes(answer.body))
        return answer

    return await replies.once(keyed, fresh, replay_body)


@router.post(
    "/{model}/predict",
    openapi_extra=body_of(PredictBody, temperatures={"sequences": [[35, 32, 45, 48, 41, 39, 36]]}),
    responses=described(
        200, "one list of predictions a sequence", "Predictions", "model_not_found", "unknown_symbol", *BODY_ERRORS
    ),
)
async def predict(request: Request, model: str) -> Response:
    """Run whole sequences from an empty memory; nothing is kept."""
    body = await read(request, PredictBody)
    replies, keyed = sessions_of(request).replies, keyed_of(request, "", body)
    visit_of(request).take(sum(map(steps_in, body.sequences)))

    async def fresh() -> Response:
        answer = JsonResponse(await _predict(request, request.app.state.registry.get(model, body.version), body))
        await replies.keep(keyed, bytes(answer.body))
        return answer

    return await while_connected(request, replies.once(keyed, fresh, replay_body))


async def _predict(request: Request, loaded: Model, body: PredictBody) -> dict[str, Any]:
    codec = loaded.engine.codec
    entries = [codec.encode(sequence, f"/sequences/{i}") for i, sequence in enumerate(body.sequences)]
    _bound(loaded, len(entries) if body.predictions == "last" else sum(map(len, entries)), body)
    outcomes = await sessions_of(request).predict(loaded, entries, body.predictions == "last")
    return {"predictions": [_shown(loaded, e, done, body) for e, done in zip(entries, outcomes, strict=True)]}


def _bound(model: Model, shown: int, body: PredictBody) -> None:
    most = model.most_steps(body.alternatives)
    if shown > most:
        raise invalid(f"at most {most} predictions a request with these alternatives", "/sequences")


def _shown(model: Model, entries: Array, done: Done, body: PredictBody) -> list[dict[str, Any]]:
    shown = len(next(iter(done.outputs.values())))
    first = len(entries) - shown + 1
    codec = model.engine.codec
    filled = codec.fill(entries, None)[len(entries) - shown :]
    return codec.predictions(done.outputs, first, done.before, filled, body.alternatives)


def card(versions: dict[int, Model]) -> dict[str, Any]:
    """What is said of a model: its greatest version, and which there are."""
    default = max(versions)
    manifest = versions[default].bundle.manifest
    return {
        "id": manifest.name,
        "object": "model",
        "created": int(datetime.fromisoformat(manifest.created.replace("Z", "+00:00")).timestamp()),
        "owned_by": "recurra",
        "task": manifest.task,
        "input_kind": manifest.input_kind,
        "versions": list(versions),
        "default_version": default,
        "cell": manifest.cell,
        "layers": manifest.layers,
        "hidden": manifest.hidden,
        "memory": manifest.memory if isinstance(manifest.memory, str) else manifest.memory.model_dump(),
        "inputs": _inputs(manifest),
        "outputs": _outputs(manifest),
        "state_bytes": manifest.state_bytes,
        "metrics": manifest.metrics,
        "checks": manifest.checks,
    }


def _inputs(manifest: Manifest) -> list[dict[str, Any]]:
    if manifest.input_kind == "tensors":
        return [_tensor(spec) for spec in manifest.inputs]
    if (sound := manifest.sound) is not None:
        return [{"name": "samples", "unit": "full scale", "rate": sound.rate, "hop": sound.hop}]
    if manifest.features:
        return [{"name": f.name, "unit": f.unit, "fill": f.fill} for f in manifest.features]
    splitter = manifest.splitter.kind if manifest.splitter is not None else None
    return [{"name": "symbols", "vocabulary": len(manifest.symbols), "splitter": splitter}]


def _outputs(manifest: Manifest) -> list[dict[str, Any]]:
    if manifest.task == "raw":
        return [_tensor(spec) for spec in manifest.outputs]
    if manifest.targets:
        ahead = {"horizons": list(manifest.horizons)} if manifest.horizons != (1,) else {}
        said = {"quantiles": list(manifest.quantiles), **ahead}
        return [{"name": t.name, "unit": t.unit, **said} for t in manifest.targets]
    if manifest.labels:
        return [{"name": "label", "labels": list(manifest.labels)}]
    return [{"name": "alternatives", "vocabulary": len(manifest.symbols)}]


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    """What a raw model takes or gives at each step."""
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.row_shape)}
