"""The independent check: every log is what its clients were told, and every memory is what its log says."""

from dataclasses import dataclass, field
from typing import Any

from ledger import Entry, Ledger
from live import Server


@dataclass
class Found:
    """What a check found; `details` says where."""

    logs: int = 0
    entries: int = 0
    lost: int = 0
    doubled: int = 0
    unverified: int = 0
    details: list[str] = field(default_factory=list)


def check(server: Server, ledgers: list[Ledger], found: Found) -> None:
    """Compare all sessions with what their clients were told."""
    for ledger in ledgers:
        _compare(server, ledger, found)


def _compare(server: Server, ledger: Ledger, found: Found) -> None:
    expected, homeless = ledger.line()
    log = read_log(server, ledger.session)
    same = sum(1 for told, there in zip(expected, log, strict=False) if told == there)
    lost = len(expected) - same
    doubled = ledger.doubled + homeless + max(0, len(log) - len(expected))
    verified = not log or verify(server, ledger, log)
    found.logs += 1
    found.entries += len(log)
    found.lost += lost
    found.doubled += doubled
    found.unverified += not verified
    if lost or doubled or not verified:
        found.details.append(
            f"{ledger.session}: {lost} lost, {doubled} doubled ({homeless} without a place), verified: {verified}; "
            f"told {len(expected)} entries, the log has {len(log)}; epochs {ledger.begins}"
        )


def read_log(server: Server, session: str) -> list[Entry]:
    """A session's whole log, [] when there is no such session."""
    entries: list[Entry] = []
    after: int | None = 0
    while after is not None:
        response = server.http.get(f"/v1/sessions/{session}/log", params={"after": after, "limit": 1000})
        if response.status_code == 404:
            return []
        page = server.ok(response)
        found = [one["position"] for one in page["data"]]
        assert found == list(range(after + 1, after + 1 + len(found))), (session, after, found)
        entries += [(one["source"], one["input"]) for one in page["data"]]
        after = page["next_cursor"]
    return entries


def verify(server: Server, ledger: Ledger, log: list[Entry]) -> bool:
    """Whether the memory is the fold of the log, by the service's own word or by folding it into a fresh session."""
    said = server.ok(server.http.post(f"/v1/sessions/{ledger.session}/verify"))
    if said["verified"] is not None:
        return bool(said["verified"])
    return bool(server.state(ledger.session) == folded(server, ledger.model, [value for _, value in log]))


def folded(server: Server, model: str, inputs: list[Any]) -> Any:  # noqa: ANN401 (any JSON)
    """The state of a fresh session that was fed these inputs."""
    made = server.create(model)["id"]
    server.steps(made, inputs, predictions="none")
    state = server.state(made)
    assert server.http.delete(f"/v1/sessions/{made}").status_code == 204
    return state
