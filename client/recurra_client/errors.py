"""The one exception: what the service refused, or that it could not be reached."""

import json
from collections.abc import Mapping
from typing import Any

import httpx


class RecurraError(Exception):
    """A problem document of the service; `code` is what to decide by, `detail` what to read."""

    def __init__(self, code: str, detail: str, status: int = 0, problem: Mapping[str, Any] | None = None) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.status = status
        """of HTTP; 0: there was no answer"""
        self.problem = dict(problem or {})
        """the whole document, with the members that its code has beside (`position`, `epoch`, `errors`)"""

    @classmethod
    def of(cls, problem: Mapping[str, Any]) -> "RecurraError":
        """From a problem document."""
        code, detail = str(problem.get("code", "unknown")), str(problem.get("detail", ""))
        return cls(code, detail, int(problem.get("status", 0)), problem)

    @classmethod
    def from_answer(cls, response: httpx.Response) -> "RecurraError":
        """From an answer that is no success, read whole; a proxy's own may be no problem document."""
        try:
            found = json.loads(response.content)
        except ValueError:
            found = None
        if isinstance(found, dict) and "code" in found:
            return cls.of({"status": response.status_code, **found})
        return cls("unknown", response.text[:200] or response.reason_phrase, response.status_code)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.code, self.detail, self.status, self.problem)


def unreachable(why: object) -> RecurraError:
    """No answer came."""
    return RecurraError(
        "unreachable", f"no answer from the service: {why}" if str(why) else "no answer from the service"
    )
