"""The keys file: SHA-256 digests of tenants' and admins' keys, as JSON.

    {"keys": [{"sha256": "<64 hex>", "tenant": "acme"}, {"sha256": "<64 hex>", "admin": true}]}

A tenant's record may have `"max_priority"`: the highest priority that a request with the key may
ask for. Without it the highest is 0.

A key is 256 random bits, so a plain SHA-256 protects it, and the time of a look-up by digest tells
nothing about any key.
"""

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granatum.adapters_store.names import check_name, is_digest
from granatum.v1.errors import InvalidRequest, NotFound, PreconditionFailed
from granatum.v1.validation import MAX_PRIORITY

_PREFIX = "gk-"
_SHORTEST = 8


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a key names: a tenant, or (None) an operator of the cluster."""

    tenant: str | None
    max_priority: int = 0
    """The highest priority that the tenant's requests may ask for."""

    def __str__(self) -> str:
        if self.tenant is None:
            return "admin"
        bound = f", priority up to {self.max_priority}" if self.max_priority else ""
        return f"tenant {self.tenant}{bound}"


def digest_of(key: str) -> str:
    """SHA-256 of a key, 64 hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def read(path: Path) -> dict[str, Identity]:
    """The file's identities by their keys' digests. Raises InvalidRequest for a wrong file."""
    return {record["sha256"]: _identity(record) for record in _records(path)}


def add(path: Path, identity: Identity) -> str:
    """Make a key, keep its digest in the file and return the key.

    The file is made if it is missing; its folder is not. Raises PreconditionFailed if the file
    cannot be written.
    """
    key = _PREFIX + secrets.token_urlsafe(32)
    record: dict[str, Any] = {"sha256": digest_of(key)}
    record |= {"admin": True} if identity.tenant is None else {"tenant": identity.tenant}
    if identity.max_priority:
        record["max_priority"] = identity.max_priority
    _identity(record)  # raises for an identity that no file may hold
    with _locked(path):
        _write(path, [*(_records(path) if path.exists() else []), record])
    return key


def revoke(path: Path, digest: str) -> None:
    """Remove the one key whose digest begins with `digest`, of 8 digits or more.

    Raises NotFound unless exactly one digest begins so, PreconditionFailed if the file cannot be
    written.
    """
    with _locked(path):
        records = _records(path)
        kept = [r for r in records if not r["sha256"].startswith(digest)]
        if len(digest) < _SHORTEST or len(kept) != len(records) - 1:
            raise NotFound(f"{path}: give the first {_SHORTEST} or more digits of one key's digest")
        _write(path, kept)


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["keys"]
        for record in records:
            if not is_digest(record["sha256"]):
                raise ValueError("sha256 is not 64 hexadecimal digits")
            _identity(record)
    except OSError as error:
        raise InvalidRequest(
            f"the keys file {path} cannot be read ({error.strerror}): make one with "
            f"`granatum keys add --tenant NAME --file {path}`"
        ) from error
    except (ValueError, KeyError, TypeError, InvalidRequest) as error:
        raise InvalidRequest(
            f"{path} is not a keys file ({type(error).__name__}: {error}): repair it, or move it "
            f"away and make new keys with `granatum keys add --tenant NAME --file {path}`"
        ) from error
    return list(records)


def _identity(record: dict[str, Any]) -> Identity:
    admin, tenant = record.get("admin", False), record.get("tenant")
    if admin is True and tenant is None and "max_priority" not in record:
        return Identity(None)
    if admin is False and isinstance(tenant, str):
        bound = _check_priority(record.get("max_priority", 0))
        return Identity(check_name(tenant, "tenant name"), bound)
    raise InvalidRequest(
        "a key has either a tenant or admin: true, and only a tenant a max_priority"
    )


def _check_priority(bound: object) -> int:
    if type(bound) is not int or abs(bound) > MAX_PRIORITY:
        raise InvalidRequest(f"max_priority: give {-MAX_PRIORITY} to {MAX_PRIORITY}")
    return bound


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    text = json.dumps({"keys": records}, indent=2) + "\n"
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        os.fsync(file.fileno())
    new.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other writers of files in this folder out."""
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)
    except OSError as error:
        raise PreconditionFailed(
            f"{path} cannot be written ({error.strerror}): name a file in a folder that is there "
            "and that you may write to"
        ) from error
