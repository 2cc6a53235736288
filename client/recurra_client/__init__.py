"""Recurra from Python: sessions that remember, streams that resume by themselves; sync and async."""

from recurra_client.aio import AsyncClient, AsyncSession, AsyncStream
from recurra_client.bulk import Line
from recurra_client.errors import RecurraError
from recurra_client.results import (
    Alternative,
    Done,
    Forecast,
    ForecastStep,
    Generated,
    LogEntry,
    Parent,
    Prediction,
    SessionInfo,
    Steps,
    Token,
    TokenLogprobs,
    Usage,
    Verified,
)
from recurra_client.retry import Retry
from recurra_client.sync import Client, Session, Stream

__all__ = [
    "Alternative",
    "AsyncClient",
    "AsyncSession",
    "AsyncStream",
    "Client",
    "Done",
    "Forecast",
    "ForecastStep",
    "Generated",
    "Line",
    "LogEntry",
    "Parent",
    "Prediction",
    "RecurraError",
    "Retry",
    "Session",
    "SessionInfo",
    "Steps",
    "Stream",
    "Token",
    "TokenLogprobs",
    "Usage",
    "Verified",
]
