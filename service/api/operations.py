"""Routes for those who run the service: alive, ready, metrics."""

import asyncio
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse

from service import metrics
from service.api.errors import RETRY_AFTER_S
from service.api.requests import visit_of
from service.api.responses import JsonResponse, described
from service.store.base import StoreError

router = APIRouter(tags=["operations"])


@router.get("/", include_in_schema=False)
async def root() -> Response:
    """Leads to the docs."""
    return RedirectResponse("/docs")


@router.get("/healthz")
async def healthz() -> Response:
    """The process is alive."""
    return JsonResponse({"status": "ok"})


@router.get("/readyz", responses={503: {"description": "not ready; `problems` says why", "model": dict[str, Any]}})
async def readyz(request: Request) -> Response:
    """Models are loaded, the store can be written and the service is not stopping; names what is wrong.

    Needs no key; where there are keys, the models are named to one of scope admin only.
    """
    state, problems = request.app.state, await unready(request)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if problems else None
    said = {"status": "ready" if not problems else "not ready", "problems": problems}
    if not visit_of(request).tenant.is_admin:
        return JsonResponse(said, 503 if problems else 200, headers)
    body = {
        **said,
        "models": {name: list(versions) for name, versions in state.registry.versions().items()},
        "skipped": state.registry.problems,
        "row_by_row": [
            f"{m.bundle.manifest.name}/{m.bundle.manifest.version}"
            for m in state.registry
            if not m.runner.batches_exactly
        ],
        "store": {"kind": state.settings.store.partition(":")[0], "durability": state.store.durability},
    }
    return JsonResponse(body, 503 if problems else 200, headers)


async def unready(request: Request) -> dict[str, object]:
    """What keeps the service from being ready, by what is wrong."""
    state = request.app.state
    problems: dict[str, object] = {}
    if (failure := await asyncio.to_thread(state.store.check)) is not None:
        problems["store"] = failure
    if state.sessions.draining:
        problems["stopping"] = True
    if not state.registry.versions():
        problems["models"] = f"no model could be loaded from {state.settings.models_dir.name!r}"
    return problems


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={status: refusal for status, refusal in described(200, "", None).items() if status in (401, 403)},
)
async def prometheus(request: Request) -> Response:
    """Metrics in Prometheus' text format; where there are keys, for one of scope metrics or admin."""
    with suppress(StoreError):  # /readyz tells
        await request.app.state.sessions.count()
    return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
