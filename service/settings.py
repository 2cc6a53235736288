"""Settings from the environment, prefix RECURRA_."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, FilePath, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "RECURRA_"


class SettingsError(Exception):
    """A setting that the service can not start with; the message names it."""


class Settings(BaseSettings):
    """How the service runs; every field is the variable RECURRA_<FIELD>."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(default=8000, ge=1, le=65535, description="port to listen on")
    models_dir: Path = Field(default=Path("models"), description="folder of the models, <name>/<version>/")
    data_dir: Path = Field(default=Path("var"), description="folder that holds the sessions")
    store: str = Field(
        default="sqlite",
        pattern=r"^(sqlite|memory|(redis|rediss|unix)://.+)$",
        description="where sessions are kept: sqlite, memory, or redis://host:port/0 for many replicas",
    )
    durability: Literal["commit", "fsync"] = Field(
        default="commit", description="commit survives kill -9, fsync survives power loss"
    )
    threads: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = Field(
        default="auto", description="threads of a call of a graph; auto: 1, and 2 where that pays"
    )
    max_batch: int = Field(default=128, ge=1, le=4096, description="sessions in a batch")
    max_queue_steps: int = Field(default=1_000_000, ge=1, description="steps that may wait for one model")
    max_resident: int = Field(default=100_000, ge=1, description="sessions of one model held in memory")
    snapshot_every: int = Field(
        default=256, ge=8, le=10**6, description="steps, at least, from one snapshot of a session's state to the next"
    )
    log_retention: Annotated[int, Field(ge=8)] | Literal["all"] = Field(
        default="all", description="steps that a session can be gone back (at least 8), or all"
    )
    idempotency_ttl_s: int = Field(default=86_400, ge=1, le=10**9, description="seconds that an answer's key is kept")
    session_ttl_s: int = Field(default=0, ge=0, le=10**9, description="idle seconds until a session expires, 0: never")
    ws_idle_s: float = Field(default=3600, gt=0, le=10**9, description="idle seconds until a WebSocket is closed")
    session_wait_ms: int = Field(default=30_000, ge=1, description="how long an operation waits for its session")
    oip_start: Literal["refuse", "restart"] = Field(
        default="refuse", description="what a sequence_start on a live sequence does: refuse, or end that one first"
    )
    oip_idle_s: int = Field(
        default=86_400, ge=1, le=10**9, description="idle seconds until a sequence begun on /v2 expires"
    )
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024, description="greatest request body")
    max_header_bytes: int = Field(default=32 * 1024, ge=1024, le=2**20, description="greatest head of a request")
    max_connections: int = Field(default=10_000, ge=1, le=10**6, description="connections at once")
    head_wait_s: float = Field(default=10.0, ge=0.5, le=3600, description="seconds that a request's head may take")
    body_wait_s: float = Field(default=60.0, ge=0.5, le=86_400, description="seconds that a request's body may take")
    send_wait_s: float = Field(
        default=30.0, ge=0.5, le=86_400, description="seconds that a client may not read, until it is cut off"
    )
    api_keys_file: FilePath | None = Field(default=None, description="file of the API keys; none: no key is needed")
    cors_origins: str = Field(
        default="",
        pattern=r"^(|\*|https?://[^\s,/*]+(,https?://[^\s,/*]+)*)$",
        description="origins whose pages may ask, with commas between; *: all",
    )
    max_tokens: int = Field(default=100_000, ge=1, description="greatest max_tokens of a generate")
    grace_s: float = Field(default=10.0, ge=0, le=3600, description="seconds to finish what runs at SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="what is logged")
    log_format: Literal["logfmt", "json"] = Field(default="logfmt", description="how a line of the log is written")
    otel_endpoint: str = Field(
        default="off", pattern=r"^(off|https?://.+)$", description="where traces go, http://host:4318, or off"
    )


def load() -> Settings:
    """The settings of this process; raises SettingsError naming the variable that is wrong."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        print(f"recurra: {unknown[0]} is not a setting and has no effect", file=sys.stderr)
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = PREFIX + "_".join(str(part) for part in first["loc"]).upper()
        raise SettingsError(f"{name}={first['input']!r}: {first['msg']}") from error
