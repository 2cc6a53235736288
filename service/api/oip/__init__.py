"""The Open Inference Protocol, version 2, with Triton's extensions for sequences, raw tensors and the models folder."""

from fastapi import APIRouter

from service.api.oip import infer, models, repository

router = APIRouter()
for _module in (infer, models, repository):
    router.include_router(_module.router)
