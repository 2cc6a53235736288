"""What Schemathesis can not make up: lines of JSON, and sessions and models that are there."""

import json
from typing import Any

import schemathesis

SESSIONS = {"kept-letters": "tiny-letters", "kept-weather": "tiny-weather", "kept-people": "tiny-people"}
"""session -> its model"""


@schemathesis.serializer("application/x-ndjson")
def lines(_: Any, value: Any) -> bytes:  # noqa: ANN401 (any JSON)
    if isinstance(value, str):
        return value.encode(errors="surrogatepass")
    return value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n"


@schemathesis.deserializer("application/x-ndjson")
def first_line(_: Any, response: Any) -> Any:  # noqa: ANN401 (any JSON)
    """The schema is that of a line."""
    found = [json.loads(line) for line in response.content.splitlines()]
    return found[0] if found else {"session": None, "error": {}}


@schemathesis.hook
def map_path_parameters(_: Any, found: dict[str, Any] | None) -> dict[str, Any] | None:  # noqa: ANN401
    """Half of the ids are made up, the others are of sessions and models that are there."""
    if not found:
        return found
    for name, there in (("session_id", list(SESSIONS)), ("model", list(SESSIONS.values()))):
        if isinstance(given := found.get(name), str) and len(given) % 2:
            found[name] = there[len(given) // 2 % len(there)]
    return found
