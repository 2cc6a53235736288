"""Moving a session to another version of its model: the same log, folded by the other step function."""

import msgspec

from service.store.base import Branch, Commit, Head, Line, Reply, abandoned, graft
from service.work.base import Host, Resident, SessionWork, new_branch
from service.work.events import Done, Listener
from service.work.feed import Keyed


class Migrate(SessionWork):
    """Fold a session's whole log with this engine's model; with `switch` commit the session's head onto it.

    Without `switch` nothing is committed: the session goes on with its old memory meanwhile, and what has been
    folded is taken over by a second piece of work (`after`) that folds the rest and switches.
    """

    answered = 1

    def __init__(
        self,
        listener: Listener,
        at: Head,
        after: "Migrate | None" = None,
        switch: bool = False,
        keyed: Keyed | None = None,
    ) -> None:
        super().__init__(listener, 1, at)
        self._head = at
        self._after = after
        self._switch = switch
        self._keyed = keyed

    def begin(self, host: Host) -> None:
        """Start from the initial state, or from where the work before stopped."""
        self._old = self._head
        base = Resident(self._moved(host), host.initial_row, 0, host.codec.none(), None, None, 0)
        self.start(host, base)
        if (after := self._after) is not None:
            self.row, self.output, self.at = after.row, after.output, after.at
            self._noted, self._snapshot_at, self._behind = after._noted, after._snapshot_at, after._behind
            self.base = msgspec.structs.replace(base, last=after.entries[-1] if len(after.entries) else None)
        self.entries = host.log_entries(self._old, self.at, self._old.position)

    def _moved(self, host: Host) -> Head:
        """The head on the other version: a branch of its own, whose past is the whole log so far."""
        manifest, old = host.manifest, self._old
        return msgspec.structs.replace(
            old,
            version=manifest.version,
            graph=manifest.graph_sha256,
            epoch=old.epoch + 1,
            branch=new_branch(),
            generation=abandoned(old),
            state_bytes=manifest.state_bytes,
        )

    def commit(self) -> Commit | None:
        """The switch, once all is folded."""
        if self.remaining or not self._switch:
            return None
        head, old = self.base.head, self._old
        reply = session_reply(self._keyed) if self._keyed is not None else None
        branch = Branch(head.branch, self.line())
        commit = self.committed(head)
        return msgspec.structs.replace(commit, expected=old.fence, branch=branch if branch.line else None, reply=reply)

    def line(self) -> Line:
        """The whole log so far."""
        return graft(self._host.line(self._old.branch), self._old.branch, self._old.position)

    def applied(self, head: Head) -> Resident:
        """Answer."""
        self.end(Done(head))
        return self.settle(head)

    def advance(self) -> None:
        """Without the switch: all is folded."""
        if not self.remaining and not self._switch:
            self.end(Done(self._old))


def session_reply(keyed: Keyed) -> Reply:
    """The kept answer of a request that is answered with the session."""
    return Reply(keyed.scope, keyed.key, keyed.digest, "session")
