"""What a tenant may use: steps and bytes a second, streams at once, sessions.

The two rates are token buckets that may be overdrawn: a request is taken while something is left, and what it asks for
is taken off, however much; the next one waits until it is paid for. So no request is too large for its limit, and over
time no tenant has more. All of it is this process's own: every replica counts for itself.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping
from math import ceil

from service import metrics
from service.api.auth import Allowed, Tenant
from service.errors import Problem
from service.store.base import Store

WINDOW_S = 10
"""a bucket holds what comes in that time"""
COUNT_EVERY_S = 1.0
PAGE = 1000


class Bucket:
    """A rate: so much a second, and at most ten seconds' worth at once."""

    __slots__ = ("_at", "_level", "rate")

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._level = rate * WINDOW_S
        self._at = time.monotonic()

    def _fill(self) -> None:
        now = time.monotonic()
        self._level = min(self.rate * WINDOW_S, self._level + (now - self._at) * self.rate)
        self._at = now

    def wait_s(self) -> float:
        """Seconds until something is left; 0: now."""
        self._fill()
        return 0.0 if self._level > 0 else -self._level / self.rate + 0.001

    def take(self, amount: float) -> None:
        """Take, or with a negative amount give back."""
        self._level -= amount

    @property
    def left(self) -> int:
        """What is left."""
        self._fill()
        return max(0, int(self._level))

    @property
    def rest_s(self) -> int:
        """Seconds until it is full again; where nothing is left, until something is."""
        return ceil(self.wait_s()) or ceil((self.rate * WINDOW_S - self._level) / self.rate)


class Usage:
    """What one tenant uses."""

    def __init__(self, allowed: Allowed) -> None:
        self.allowed = allowed
        self.steps = Bucket(allowed.steps_per_s) if allowed.steps_per_s is not None else None
        self.bytes = Bucket(allowed.bytes_per_s) if allowed.bytes_per_s is not None else None
        self.streams = 0
        self.sessions = 0
        """as counted last, and those begun since"""
        self.counted_at = 0.0
        self.counting: asyncio.Task[None] | None = None

    def change(self, allowed: Allowed) -> None:
        """Take other limits; a bucket keeps what it has where its rate stays."""
        old, self.allowed = self.allowed, allowed
        if old.steps_per_s != allowed.steps_per_s:
            self.steps = Bucket(allowed.steps_per_s) if allowed.steps_per_s is not None else None
        if old.bytes_per_s != allowed.bytes_per_s:
            self.bytes = Bucket(allowed.bytes_per_s) if allowed.bytes_per_s is not None else None

    def policies(self) -> Iterable[tuple[str, str, str]]:
        """(name, its RateLimit-Policy parameters, its RateLimit parameters). Source: draft-ietf-httpapi-ratelimit."""
        for name, bucket, unit in (("steps", self.steps, "steps"), ("bytes", self.bytes, "content-bytes")):
            if bucket is not None:
                most = ceil(bucket.rate * WINDOW_S)
                yield name, f'q={most};qu="{unit}";w={WINDOW_S}', f"r={bucket.left};t={bucket.rest_s}"
        for name, most_at_once, used, unit in (
            ("streams", self.allowed.streams, self.streams, "concurrent-requests"),
            ("sessions", self.allowed.sessions, self.sessions, "sessions"),
        ):
            if most_at_once is not None:
                yield name, f'q={most_at_once};qu="{unit}"', f"r={max(0, most_at_once - used)}"


class Limits:
    """The usage of all tenants."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._usages: dict[str, Usage] = {}

    def of(self, tenant: Tenant) -> Usage:
        """A tenant's usage."""
        usage = self._usages.get(tenant.name)
        if usage is None:
            usage = self._usages[tenant.name] = Usage(tenant.allowed)
        elif usage.allowed is not tenant.allowed:
            usage.change(tenant.allowed)
        return usage

    # ------------------------------------------------------------------ rates

    def take(self, tenant: Tenant, steps: int) -> None:
        """Take steps; raises Problem 429 when none are left."""
        bucket = self.of(tenant).steps
        if bucket is not None:
            self._must_have(tenant, "steps", bucket, "steps a second")
            bucket.take(steps)
        if tenant.name:
            metrics.TENANT_STEPS.labels(tenant.name).inc(steps)

    def give_back(self, tenant: Tenant, steps: int) -> None:
        """Correct what was taken by what was used; negative: more was used."""
        bucket = self.of(tenant).steps
        if bucket is not None:
            bucket.take(-steps)

    def must_have_bytes(self, tenant: Tenant) -> None:
        """Raise Problem 429 when the tenant has sent more than it may."""
        bucket = self.of(tenant).bytes
        if bucket is not None:
            self._must_have(tenant, "bytes", bucket, "bytes a second")

    def take_bytes(self, tenant: Tenant, count: int) -> None:
        """Note the bytes of a body."""
        bucket = self.of(tenant).bytes
        if bucket is not None:
            bucket.take(count)

    @staticmethod
    def _must_have(tenant: Tenant, name: str, bucket: Bucket, what: str) -> None:
        if (wait_s := bucket.wait_s()) > 0:
            metrics.TENANT_REFUSALS.labels(tenant.name, name).inc()
            detail = f"more than {bucket.rate:g} {what}: try again in {ceil(wait_s)} s"
            raise Problem("rate_limited", detail, None, retry_after_s=ceil(wait_s), **_violated(name))

    # ------------------------------------------------------------------ streams

    def open_stream(self, tenant: Tenant) -> None:
        """One stream more; raises Problem 429 when there are enough."""
        usage = self.of(tenant)
        most = usage.allowed.streams
        if most is not None and usage.streams >= most:
            metrics.TENANT_REFUSALS.labels(tenant.name, "streams").inc()
            raise Problem("quota_exceeded", f"at most {most} streams at once", None, **_violated("streams"))
        usage.streams += 1

    def close_stream(self, tenant: Tenant) -> None:
        """One stream less."""
        self.of(tenant).streams -= 1

    # ------------------------------------------------------------------ sessions

    def begin_session(self, name: str) -> None:
        """One session more of the tenant of that name; raises Problem 429 when there are enough.

        Sessions that ended are noticed when they are counted again, which a refusal brings about.
        """
        usage = self._usages.get(name)
        if usage is None or usage.allowed.sessions is None:
            return
        if usage.sessions >= usage.allowed.sessions:
            self._count_soon(name, usage)
            metrics.TENANT_REFUSALS.labels(name, "sessions").inc()
            detail = f"at most {usage.allowed.sessions} sessions: delete some"
            raise Problem("quota_exceeded", detail, None, retry_after_s=2, **_violated("sessions"))
        usage.sessions += 1

    def _count_soon(self, name: str, usage: Usage) -> None:
        due = time.monotonic() - usage.counted_at >= COUNT_EVERY_S
        if due and (usage.counting is None or usage.counting.done()):
            usage.counting = asyncio.get_running_loop().create_task(self._count(name, usage))

    async def count(self, allowances: Mapping[str, Allowed]) -> None:
        """Count the sessions of the tenants whose number is limited."""
        for name, allowed in allowances.items():
            usage = self._usages.setdefault(name, Usage(allowed))
            usage.change(allowed)
            if allowed.sessions is not None:
                await self._count(name, usage)

    async def _count(self, name: str, usage: Usage) -> None:
        found, after, begun = 0, "", usage.sessions
        while page := await asyncio.to_thread(self._store.heads, name, None, after, PAGE):
            found, after = found + len(page), page[-1].id
            if len(page) < PAGE:
                break
        usage.sessions = found + max(0, usage.sessions - begun)
        usage.counted_at = time.monotonic()

    # ------------------------------------------------------------------ headers

    def headers(self, tenant: Tenant) -> list[tuple[bytes, bytes]]:
        """What an answer says of the tenant's limits; nothing where there are none."""
        policies = list(self.of(tenant).policies())
        if not policies:
            return []
        policy = ", ".join(f'"{name}";{said}' for name, said, _ in policies)
        left = ", ".join(f'"{name}";{said}' for name, _, said in policies)
        return [(b"ratelimit-policy", policy.encode()), (b"ratelimit", left.encode())]


def _violated(name: str) -> dict[str, object]:
    return {"violated-policies": [name]}


def steps_in(inputs: object) -> int:
    """How many steps inputs ask for, at most: a symbol of several characters counts as so many until it is fed."""
    if isinstance(inputs, str | list):
        return max(1, len(inputs))
    if isinstance(inputs, dict):
        return max((len(one) for one in inputs.values() if isinstance(one, list)), default=1)
    return 1


class Visit:
    """One request on its way through the limits of its tenant."""

    __slots__ = ("_limits", "_streams", "_taken", "tenant")

    def __init__(self, limits: Limits, tenant: Tenant) -> None:
        self.tenant = tenant
        self._limits = limits
        self._taken = 0
        self._streams = False

    def take(self, steps: int) -> None:
        """Take the steps that are asked for; raises Problem 429."""
        self._limits.take(self.tenant, steps)
        self._taken += steps

    @property
    def unlimited(self) -> bool:
        """Whether any number of steps may be taken."""
        return self._limits.of(self.tenant).steps is None

    def used(self, steps: int) -> None:
        """Say how many steps it was in the end."""
        self._limits.give_back(self.tenant, self._taken - steps)
        self._taken = 0

    def take_bytes(self, count: int) -> None:
        """Note the body's size."""
        self._limits.take_bytes(self.tenant, count)

    def stream(self) -> None:
        """The answer will be a stream; raises Problem 429."""
        if not self._streams:
            self._limits.open_stream(self.tenant)
            self._streams = True

    def leave(self) -> None:
        """The answer is sent."""
        if self._streams:
            self._streams = False
            self._limits.close_stream(self.tenant)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the answer says of the limits."""
        return self._limits.headers(self.tenant)
