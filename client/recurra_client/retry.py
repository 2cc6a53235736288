"""When a request is sent again, and after which pause. Nothing here sends or waits."""

import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from recurra_client.errors import RecurraError, unreachable

AGAIN = frozenset((429, 502, 503, 504))
"""nothing was done, or the key says what was: try again"""
NEVER = (httpx.LocalProtocolError, httpx.UnsupportedProtocol)
"""the request itself can not be sent"""
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


@dataclass(frozen=True, slots=True)
class Retry:
    """How patient a client is."""

    patience_s: float = 60.0
    """how long one request is sent again, from its first failure; a stream, from its last token"""
    first_s: float = 0.1
    """the first pause at most; each is twice as long as the one before"""
    most_s: float = 5.0
    """no pause is longer, unless Retry-After says so"""


class Attempts:
    """One request's failures."""

    def __init__(self, retry: Retry, repeatable: bool = True) -> None:
        """`repeatable`: whether sending it again does no harm when its answer was lost."""
        self._retry = retry
        self._repeatable = repeatable
        self.succeed()

    def succeed(self) -> None:
        """Something has come: the next failure is a first one."""
        self._failures = 0
        self._since = 0.0

    def lost(self, error: httpx.TransportError | None) -> float:
        """No answer came, or it broke off; gives the pause in s, or raises RecurraError."""
        if isinstance(error, NEVER) or not (self._repeatable or isinstance(error, NOT_SENT)):
            raise unreachable(error) from error
        pause = self._pause()
        if pause is None:
            raise unreachable(error or "the connection ends again and again") from error
        return pause

    def refused(self, response: httpx.Response) -> float:
        """The answer, read whole, is no success; gives the pause in s, or raises RecurraError."""
        return self.refused_with(RecurraError.from_answer(response), retry_after(response))

    def refused_with(self, error: RecurraError, after_s: float = 0.0) -> float:
        """The request was refused; gives the pause in s, or raises the error."""
        pause = self._pause(after_s) if error.status in AGAIN else None
        if pause is None:
            raise error
        return pause

    def _pause(self, least_s: float = 0.0) -> float | None:
        """The next pause; None: patience is at its end."""
        now = time.monotonic()
        if not self._failures:
            self._since = now
        most = min(self._retry.first_s * 2 ** min(self._failures, 30), self._retry.most_s)
        self._failures += 1
        pause = max(random.uniform(most / 2, most), least_s)
        return pause if now + pause - self._since <= self._retry.patience_s else None


def retry_after(response: httpx.Response) -> float:
    """The seconds of Retry-After, which may be a date; 0 without one."""
    given = response.headers.get("retry-after", "").strip()
    if given.isascii() and given.isdigit():
        return float(given)
    try:
        at = parsedate_to_datetime(given)
    except ValueError:
        return 0.0
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return max((at - datetime.now(UTC)).total_seconds(), 0.0)
