"""Routes of the models folder: what lies there, and what of it is served."""

import asyncio

from fastapi import APIRouter, Request, Response

from service.api.oip import formats
from service.api.oip.formats import IndexBody, ModelPath, RepositoryBody, body_of, described
from service.api.requests import read_bytes, require_admin
from service.api.responses import JsonResponse
from service.errors import Problem
from service.registry import Registry

router = APIRouter(prefix="/v2/repository", tags=["open inference protocol"])


@router.post(
    "/index",
    openapi_extra=body_of(IndexBody, required=False, served={"ready": True}),
    responses=described("every version of every model", list[formats.IndexEntry], "payload_too_large"),
)
async def index(request: Request) -> Response:
    """List the models folder: what is served, and why the rest is not."""
    body = IndexBody.model_validate_json(await read_bytes(request) or b"{}")
    registry: Registry = request.app.state.registry
    found = [_entry(name, version, "READY") for name, of in registry.versions().items() for version in of]
    if not body.ready:
        found += [_entry(name, version, "UNAVAILABLE", "unloaded") for name, version in registry.unloaded]
        ready = {(one["name"], one["version"]) for one in found}
        skipped = [(*path.split("/"), reason) for path, reason in registry.problems.items()]
        found += [_entry(n, v, "UNAVAILABLE", reason) for n, v, reason in skipped if (n, v) not in ready]
    return JsonResponse(found)


def _entry(name: str, version: object, state: str, reason: str = "") -> dict[str, str]:
    return {"name": name, "version": str(version), "state": state, "reason": reason}


@router.post(
    "/models/{model}/load",
    response_class=Response,
    openapi_extra=body_of(RepositoryBody, required=False),
    responses=described("it is served", None, "model_not_found", "payload_too_large"),
)
async def load(request: Request, model: ModelPath) -> Response:
    """Load every version of a model that lies in the models folder, also of one that was unloaded."""
    require_admin(request)
    await _read(request)
    registry: Registry = request.app.state.registry
    report = await asyncio.to_thread(registry.load, model)
    if report.skipped:
        reasons = "; ".join(f"{version}: {reason}" for version, reason in report.skipped.items())
        raise Problem("bad_request", f"not all of {model!r} could be loaded: {reasons}")
    return Response()


@router.post(
    "/models/{model}/unload",
    response_class=Response,
    openapi_extra=body_of(RepositoryBody, required=False),
    responses=described("it is not served any more", None, "model_not_found", "payload_too_large"),
)
async def unload(request: Request, model: ModelPath) -> Response:
    """Let go of a model until it is loaded again or the service starts anew; refused while sessions live on it."""
    require_admin(request)
    await _read(request)
    registry: Registry = request.app.state.registry
    report = await asyncio.to_thread(registry.unload, model)
    if report.kept:
        kept = ", ".join(report.kept)
        raise Problem("bad_request", f"sessions live on {kept}, which is still served: delete or migrate them first")
    return Response()


async def _read(request: Request) -> None:
    """Read the body, which says nothing; raises ValidationError when it wants what is not supported."""
    RepositoryBody.model_validate_json(await read_bytes(request) or b"{}")
