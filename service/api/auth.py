"""Who asks: API keys, each of which belongs to a tenant.

The keys file is TOML; `recurra keys new` makes the lines of the keys:

    keys.4f1c2a9e = {tenant = "acme", salt = "...", hash = "...", scope = "use", expires = 2027-01-01T00:00:00Z}
    tenants.acme = {sessions = 1000, steps_per_s = 500, streams = 20, bytes_per_s = 1000000}

A key is `rk_<id>_<secret>`, and the file holds HMAC-SHA256(salt, secret). The secret is 256 random bits: a slow hash
would make nothing safer that can not be guessed anyway, and would cost a stranger's every guess dearly: ours.
"""

import hmac
import os
import re
import secrets
import threading
import time
import tomllib
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import Problem

log = structlog.get_logger(__name__)

Scope = Literal["use", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

ID_BYTES = 8
SALT_BYTES = 16
SECRET_BYTES = 32
MAX_GIVEN = 256
TENANT = r"^[a-z0-9][a-z0-9._-]{0,62}$"

_KEY = re.compile(rb"rk_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_HEX = r"^[0-9a-f]+$"


class KeysError(Exception):
    """The keys file can not be used; the message says why, and holds nothing of it."""


class Allowed(BaseModel):
    """What a tenant may use at most; None: as much as there is."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    sessions: int | None = Field(default=None, ge=0, le=10**9)
    steps_per_s: Annotated[float, Field(gt=0, le=1e9)] | None = None
    streams: int | None = Field(default=None, ge=0, le=10**6)
    bytes_per_s: Annotated[float, Field(gt=0, le=1e12)] | None = None


EVERYTHING = Allowed()


class Tenant(msgspec.Struct, frozen=True):
    """One of those who share the service, with what the key that was shown allows."""

    name: str
    scope: Scope | None
    """None: no key was shown, where none is needed"""
    allowed: Allowed = EVERYTHING
    expires_s: float | None = None
    """seconds since 1970"""

    @property
    def is_admin(self) -> bool:
        """Whether it may change what is served."""
        return self.scope == "admin"


OWNER = Tenant("", "admin")
"""who asks while there are no keys: everybody is the same one, and may do everything"""
ANYBODY = Tenant("", None)
"""who asks without a key where none is needed"""


class _Key(BaseModel):
    """A line of the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tenant: str = Field(pattern=TENANT)
    salt: str = Field(pattern=_HEX, min_length=2 * SALT_BYTES, max_length=128)
    hash: str = Field(pattern=_HEX, min_length=64, max_length=64)
    scope: Scope = "use"
    expires: datetime | date | None = None

    def expires_s(self) -> float | None:
        """Seconds since 1970; a day ends where it begins, and a time without a zone is UTC."""
        if self.expires is None:
            return None
        at = self.expires
        if not isinstance(at, datetime):
            at = datetime(at.year, at.month, at.day, tzinfo=UTC)
        return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()


class _File(BaseModel):
    """The keys file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    keys: dict[Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")], _Key] = {}
    tenants: dict[Annotated[str, Field(pattern=TENANT)], Allowed] = {}


class _Entry(msgspec.Struct, frozen=True):
    tenant: Tenant
    salt: bytes
    hash: bytes


_NOBODY = _Entry(ANYBODY, bytes(SALT_BYTES), bytes(32))
"""compared with where an id is unknown, so that it takes as long as a known one"""


class _Ring:
    """The keys as they were read once, and those that were shown since."""

    def __init__(self, keys: dict[bytes, _Entry]) -> None:
        self.keys = keys
        self.shown: dict[bytes, Tenant] = {}
        """by a digest of the key under this process's own secret: the keys themselves are not kept"""


class Keys:
    """The keys of the service. Without a file everybody is its owner."""

    def __init__(self, path: Path | None = None) -> None:
        """Read the file; raises KeysError."""
        self._path = path
        self._own = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._ring = _Ring({})
        if path is not None:
            self._seen = _signature(path)
            self._ring = _read(path)

    @property
    def on(self) -> bool:
        """Whether a key is needed."""
        return self._path is not None

    def tenant_of(self, authorization: bytes | None, scope: Scope = "use") -> Tenant:
        """Whose an Authorization header is; raises Problem 401, or 403 when the key is not for what it is used for.

        Cheap enough for every request: a digest and a look-up.
        """
        if self._path is None:
            return OWNER
        if authorization is None:
            raise _unauthorized("a key is needed: -H 'Authorization: Bearer rk_...'")
        scheme, _, given = authorization[:MAX_GIVEN].partition(b" ")
        if scheme.lower() != b"bearer":
            raise _unauthorized("the key is sent as -H 'Authorization: Bearer rk_...'")
        given, ring = given.strip(), self._ring
        digest = hmac.digest(self._own, given, "sha256")
        found = ring.shown.get(digest)
        if found is None:
            found = _checked(ring, given)
            ring.shown[digest] = found
        if found.expires_s is not None and time.time() >= found.expires_s:
            raise _unauthorized("the key has expired", "invalid_token")
        if found.scope not in (scope, "admin"):
            raise Problem("forbidden", f"the key is for {found.scope}, and this needs one for {scope}")
        return found

    def allowances(self) -> dict[str, Allowed]:
        """What the tenants that have a key may use."""
        return {entry.tenant.name: entry.tenant.allowed for entry in self._ring.keys.values()}

    def refresh(self) -> bool:
        """Read the file again if it has changed; a file that can not be used changes nothing. True: it was read."""
        if self._path is None:
            return False
        with self._lock:
            try:
                seen = _signature(self._path)
                if seen == self._seen:
                    return False
                self._seen = seen
                self._ring = _read(self._path)
            except KeysError as error:
                log.error("keys_not_read", error=str(error))
                return False
        log.info("keys_read", keys=len(self._ring.keys))
        return True


def _unauthorized(detail: str, error: str | None = None) -> Problem:
    """401; `error` as RFC 6750 names it."""
    return Problem("unauthorized", detail, None, **({"error": error} if error is not None else {}))


def _checked(ring: _Ring, given: bytes) -> Tenant:
    found = _KEY.fullmatch(given)
    entry = ring.keys.get(found[1]) if found is not None else None
    against = entry or _NOBODY
    mine = hmac.digest(against.salt, found[2] if found is not None else given, "sha256")
    if not hmac.compare_digest(mine, against.hash) or entry is None:
        raise _unauthorized("the key is not known", "invalid_token")
    return entry.tenant


def _signature(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise KeysError(f"the keys file can not be read: {os.strerror(error.errno or 0)}") from None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> _Ring:
    try:
        said = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise KeysError(f"the keys file can not be read: {os.strerror(error.errno or 0)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KeysError(f"the keys file is not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise KeysError(f"the keys file, {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    keys = {}
    for name, key in said.keys.items():
        tenant = Tenant(key.tenant, key.scope, said.tenants.get(key.tenant, EVERYTHING), key.expires_s())
        keys[name.encode()] = _Entry(tenant, bytes.fromhex(key.salt), bytes.fromhex(key.hash))
    return _Ring(keys)


def make_key(tenant: str, scope: Scope = "use", expires: datetime | None = None) -> tuple[str, str]:
    """A new key, and the line that goes into the keys file; raises ValueError on a bad tenant name."""
    if re.fullmatch(TENANT, tenant) is None:
        raise ValueError("a tenant's name has up to 63 small letters, digits, dots, dashes and underscores")
    name, secret, salt = (
        secrets.token_hex(ID_BYTES),
        secrets.token_urlsafe(SECRET_BYTES),
        secrets.token_bytes(SALT_BYTES),
    )
    kept = hmac.digest(salt, secret.encode(), "sha256").hex()
    until = f", expires = {expires.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}" if expires is not None else ""
    line = f'keys.{name} = {{tenant = "{tenant}", salt = "{salt.hex()}", hash = "{kept}", scope = "{scope}"{until}}}'
    return f"rk_{name}_{secret}", line
