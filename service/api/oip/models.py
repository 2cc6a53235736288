"""Routes of the service and its models: alive, ready, what is served, its configuration and statistics."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from service.api.oip import formats
from service.api.oip.exchange import inputs_of, outputs_of
from service.api.oip.formats import ModelPath, VersionPath, described
from service.api.oip.tensors import Spec, datatype
from service.api.operations import unready
from service.api.responses import JsonResponse
from service.errors import Problem, not_ready
from service.registry import Model, Registry
from service.settings import Settings

router = APIRouter(prefix="/v2", tags=["open inference protocol"])

EXTENSIONS = (
    "sequence",
    "sequence(string_id)",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "model_configuration",
    "model_repository",
)
PLATFORM, BACKEND = "onnxruntime_onnx", "onnxruntime"

REFUSED: dict[str, Any] = {
    "status_code": 501,
    "response_class": Response,
    "responses": described("", None, "not_supported"),
}

Answer = Callable[[Request, str, int | None], Awaitable[Response]]


def of_a_model(router: APIRouter, method: str, tail: str, **said: Any) -> Callable[[Answer], Answer]:  # noqa: ANN401
    """Declares a route of a model and the same of one of its versions."""

    def declare(answer: Answer) -> Answer:
        async def newest(request: Request, model: ModelPath) -> Response:
            return await answer(request, model, None)

        async def chosen(request: Request, model: ModelPath, version: VersionPath) -> Response:
            return await answer(request, model, version)

        for path, endpoint in (("/models/{model}", newest), ("/models/{model}/versions/{version}", chosen)):
            router.add_api_route(
                path + tail, endpoint, methods=[method], name=answer.__name__, description=answer.__doc__, **said
            )
        return answer

    return declare


def model_of(request: Request, name: str, version: int | None) -> Model:
    """A version of a model, by default the greatest; raises Problem naming what there is."""
    registry: Registry = request.app.state.registry
    return registry.get(name, version)


# ---------------------------------------------------------------------- the service


@router.get("", responses=described("the service", formats.ServerMetadata))
async def server(request: Request) -> Response:
    """Look at the service."""
    return JsonResponse({"name": "recurra", "version": request.app.version, "extensions": EXTENSIONS})


@router.get("/health/live", responses=described("the process is alive", formats.Live))
async def live() -> Response:
    """The process is alive."""
    return JsonResponse({"live": True})


@router.get("/health/ready", responses=described("requests are taken", formats.Ready))
async def ready(request: Request) -> Response:
    """Models are loaded, the store can be written and the service is not stopping."""
    problems = await unready(request)
    if problems:
        raise not_ready(f"not ready: {', '.join(problems)}; see /readyz")
    return JsonResponse({"ready": True})


# ---------------------------------------------------------------------- models


@of_a_model(router, "GET", "/ready", responses=described("the model is served", formats.ModelReady, "model_not_found"))
async def model_ready(request: Request, name: str, version: int | None) -> Response:
    """The model is loaded and the service is not stopping."""
    manifest = model_of(request, name, version).bundle.manifest
    if request.app.state.sessions.draining:
        raise not_ready("the service is stopping")
    return JsonResponse({"name": manifest.name, "ready": True})


@router.get("/models/stats", responses=described("all models", formats.Statistics))
async def all_statistics(request: Request) -> Response:
    """Look at the statistics of all models."""
    registry: Registry = request.app.state.registry
    return JsonResponse({"model_stats": [_statistics(request, model) for model in registry]})


@of_a_model(router, "GET", "/stats", responses=described("the model", formats.Statistics, "model_not_found"))
async def statistics(request: Request, name: str, version: int | None) -> Response:
    """Look at what a model has done since the service was started."""
    registry: Registry = request.app.state.registry
    model = registry.get(name, version)
    chosen = [model] if version is not None else registry.versions()[name].values()
    return JsonResponse({"model_stats": [_statistics(request, one) for one in chosen]})


@of_a_model(router, "GET", "", responses=described("the model", formats.ModelMetadata, "model_not_found"))
async def metadata(request: Request, name: str, version: int | None) -> Response:
    """Look at a model: its inputs and outputs, batch first."""
    model = model_of(request, name, version)
    manifest = model.bundle.manifest
    registry: Registry = request.app.state.registry
    return JsonResponse(
        {
            "name": manifest.name,
            "versions": [str(one) for one in registry.versions()[name]],
            "platform": PLATFORM,
            "inputs": [_listed(spec) for spec in inputs_of(manifest)],
            "outputs": [_listed(spec) for spec in outputs_of(manifest)],
        }
    )


@of_a_model(router, "GET", "/config", responses=described("the model", formats.ModelConfig, "model_not_found"))
async def config(request: Request, name: str, version: int | None) -> Response:
    """Look at a model's configuration: how sequences are kept, and the states that an infer without one may give."""
    model = model_of(request, name, version)
    manifest = model.bundle.manifest
    settings: Settings = request.app.state.settings
    states = [
        {
            "input_name": spec.input,
            "output_name": spec.output,
            "data_type": f"TYPE_{datatype(spec.dtype)}",
            "dims": list(spec.row_shape),
        }
        for spec in manifest.session_states
    ]
    return JsonResponse(
        {
            "name": manifest.name,
            "platform": PLATFORM,
            "backend": BACKEND,
            "max_batch_size": model.engine.max_batch,
            "input": [_configured(spec) for spec in inputs_of(manifest)],
            "output": [_configured(spec) for spec in outputs_of(manifest)],
            "sequence_batching": {
                "oldest": {"max_candidate_sequences": settings.max_resident},
                "max_sequence_idle_microseconds": settings.oip_idle_s * 1_000_000,
                "state": states,
            },
        }
    )


def _listed(spec: Spec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _configured(spec: Spec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": f"TYPE_{spec.datatype}", "dims": list(spec.shape[1:])}


def _statistics(request: Request, model: Model) -> dict[str, Any]:
    manifest = model.bundle.manifest
    asked = request.app.state.tallies.of(model)
    calls = sorted(dict(model.engine.calls).items())
    rows = sum(width * count for width, (count, _) in calls)
    nothing = _duration(0, 0)
    return {
        "name": manifest.name,
        "version": str(manifest.version),
        "last_inference": asked.last_ms,
        "inference_count": rows,
        "execution_count": sum(count for _, (count, _) in calls),
        "inference_stats": {
            "success": _duration(asked.succeeded, asked.succeeded_s),
            "fail": _duration(asked.failed, asked.failed_s),
            "queue": nothing,
            "compute_input": nothing,
            "compute_infer": _duration(rows, sum(width * seconds for width, (_, seconds) in calls)),
            "compute_output": nothing,
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [
            {
                "batch_size": width,
                "compute_input": nothing,
                "compute_infer": _duration(count, seconds),
                "compute_output": nothing,
            }
            for width, (count, seconds) in calls
        ],
    }


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": round(seconds * 1e9)}


@router.get("/logging", **REFUSED)
@router.post("/logging", **REFUSED)
@router.get("/trace/setting", **REFUSED)
@router.post("/trace/setting", **REFUSED)
async def settings_of_triton() -> Response:
    """Triton's own switches: not supported."""
    raise Problem("not_supported", "trace and logging settings are not supported: see RECURRA_LOG_LEVEL and /metrics")


@router.get("/models/{model}/trace/setting", **REFUSED)
@router.post("/models/{model}/trace/setting", **REFUSED)
async def trace_of_a_model(model: ModelPath) -> Response:
    """Triton's trace of a model: not supported."""
    return await settings_of_triton()


@router.get("/{kind}sharedmemory/{rest:path}", **REFUSED)
@router.post("/{kind}sharedmemory/{rest:path}", **REFUSED)
async def shared_memory(kind: str, rest: str) -> Response:
    """Tensors in shared memory: not supported."""
    raise Problem("not_supported", "shared memory is not supported: send the tensors in the body")
