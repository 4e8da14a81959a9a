"""API keys: made once, shown once, kept as digests, and looked up by a gateway that may be running meanwhile.

A key is `mk-` and 256 random bits. The file keys/keys.json of a home holds SHA-256 digests alone: bits that nobody can
guess need no slow hash. It is replaced as a whole under a lock, and read again by whoever asks after it has changed.
"""

import hashlib
import hmac
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_serializer, model_validator

from moestro.artifacts import disk_space_errors, exclusive, sync
from moestro.errors import ConfigError, InputError
from moestro_flows.home import Home
from moestro_services.gateway.caller import Scope
from moestro_services.gateway.limits import Limits

PREFIX = "mk-"
SECRET_BYTES = 32
SECRET = re.compile(r"mk-[A-Za-z0-9_-]{43}")
"""What a key looks like."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SETTLED_NS = 50_000_000
"""A file changed so recently may be changed again without its times showing it."""


class Key(BaseModel):
    """What is kept of a key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    """Random, and no part of the secret: what logs and the audit log name the key by."""
    name: Annotated[str, Field(pattern=rf"^{NAME.pattern}$")]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    """SHA-256 of the secret."""
    scopes: Annotated[frozenset[Scope], Field(min_length=1)]
    limits: Limits = Limits()
    created_at: AwareDatetime
    revoked_at: AwareDatetime | None = None

    @field_serializer("scopes")
    def _in_order(self, scopes: frozenset[Scope]) -> list[str]:
        return [scope.value for scope in Scope if scope in scopes]

    @property
    def live(self) -> bool:
        """Whether it was not revoked."""
        return self.revoked_at is None

    def facts(self) -> dict[str, Any]:
        """What may be shown of it, as JSON values."""
        told = self.model_dump(mode="json", exclude={"digest", "limits"})
        return told | {"limits": self.limits.given()}


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _distinct(self) -> "_File":
        for what in ("id", "digest"):
            if len({getattr(key, what) for key in self.keys}) < len(self.keys):
                raise ValueError(f"two keys have one {what}")
        return self


class KeyRing:
    """The keys in the file `path`, which need not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._keys: tuple[Key, ...] = ()
        self._digests: tuple[tuple[bytes, Key], ...] = ()
        self._seen: tuple[int, ...] = ()

    @classmethod
    def of(cls, home: Home) -> "KeyRing":
        """The keys of a home."""
        return cls(home.path / "keys" / "keys.json")

    def list(self) -> tuple[Key, ...]:
        """All keys, revoked ones too, oldest first; raises `ConfigError` if their file is damaged."""
        self._refresh()
        return self._keys

    def create(self, name: str, scopes: Iterable[Scope], limits: Limits | None = None) -> tuple[Key, str]:
        """A new key, and its secret, which is nowhere kept. Its `limits` hold where they were given explicitly.

        Raises `ConfigError` if the name is none, or that of a key which is not revoked, or if there is no scope.
        """
        wanted = frozenset(scopes)
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot be a key's name.",
                hint="Names have up to 64 letters, digits, dots, dashes and underscores.",
            )
        if not wanted:
            raise ConfigError("A key without a scope opens nothing.", hint=f"Scopes are {', '.join(Scope)}.")
        secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
        with self._changing() as keys:
            if any(key.live and key.name == name for key in keys):
                raise ConfigError(f"There is a key {name!r}.", hint="Choose another name, or revoke that key first.")
            key = Key(
                id=_fresh_id(keys),
                name=name,
                digest=digest(secret),
                scopes=wanted,
                limits=limits or Limits(),
                created_at=datetime.now(UTC),
            )
            self._write((*keys, key))
        return key, secret

    def revoke(self, which: str) -> Key:
        """The key with this id, or the live key with this name, revoked from now on; again is no mistake.

        Raises `InputError` if there is none.
        """
        with self._changing() as keys:
            key = _meant(keys, which)
            if key.live:
                revoked = key.model_copy(update={"revoked_at": datetime.now(UTC)})
                self._write(tuple(revoked if key is old else old for old in keys))
                key = revoked
        return key

    def known(self, secret: str) -> Key | None:
        """The key with this secret, also if it was revoked. Its time does not tell which keys there are.

        Raises `ConfigError` if the file was damaged: then no key opens anything.
        """
        self._refresh()
        given = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
        found = None
        for stored, key in self._digests:
            if hmac.compare_digest(stored, given):
                found = key
        return found

    def _refresh(self) -> None:
        """Read the file if it is another than when it was read last."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self._keep((), ())
            return
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from None
        seen = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
        if seen == self._seen:
            return
        now = time.time_ns()
        keys = self._read()
        self._keep(keys, seen if now - status.st_mtime_ns > SETTLED_NS else ())

    def _keep(self, keys: tuple[Key, ...], seen: tuple[int, ...]) -> None:
        """Remember them; `_seen` last, which tells other threads that the rest holds."""
        self._keys = keys
        self._digests = tuple((bytes.fromhex(key.digest), key) for key in keys)
        self._seen = seen

    def _read(self) -> tuple[Key, ...]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from None
        try:
            return _File.model_validate_json(content).keys
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise self._unreadable(f"{where}: {first['msg']}" if where else first["msg"]) from None

    def _unreadable(self, why: str) -> ConfigError:
        return ConfigError(
            f"{self.path} is not a readable file of API keys ({why}).",
            hint="Restore it from a copy, or move it away and create new keys.",
        )

    @contextmanager
    def _changing(self) -> Iterator[tuple[Key, ...]]:
        """The keys as they are, while nobody else changes them."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with exclusive(self.path.with_suffix(".lock"), what="The file of API keys", wait=True):
                yield self._read()
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise ConfigError(f"{self.path} cannot be written ({error.strerror}).") from None

    def _write(self, keys: tuple[Key, ...]) -> None:
        content = _File(keys=keys).model_dump_json(indent=2, exclude_unset=True) + "\n"
        folder = self.path.parent
        with disk_space_errors(folder):
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=".keys-")  # readable by its owner alone
            try:
                with os.fdopen(handle, "w") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).replace(self.path)
            finally:
                Path(temporary).unlink(missing_ok=True)
            sync(folder)


def digest(secret: str) -> str:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _fresh_id(keys: Iterable[Key]) -> str:
    taken = {key.id for key in keys}
    while (made := secrets.token_hex(6)) in taken:
        pass
    return made


def _meant(keys: Iterable[Key], which: str) -> Key:
    """The key with the id, the live key with the name, or the one that last had it."""
    named = sorted((key for key in keys if which in (key.id, key.name)), key=lambda key: (key.id == which, key.live))
    if not named:
        known = ", ".join(f"{key.name} ({key.id})" for key in keys if key.live) or "none"
        raise InputError(f"There is no API key {which!r}.", hint=f"Keys are: {known}.")
    return named[-1]
