"""Tenant and admin keys: a JSON file of their SHA-256 digests, and the command that edits it.

    granatum keys add --tenant acme --file keys.json    prints the new key, once
    granatum keys add --admin --file keys.json
    granatum keys add --tenant acme --max-priority 5 --file keys.json
    granatum keys list --file keys.json
    granatum keys revoke DIGEST --file keys.json        its first 8 digits will do

The file: `{"keys": [{"sha256": "<64 hex>", "tenant": "acme"}, {"sha256": "...", "admin": true}]}`.
A tenant's record may have `"max_priority"`, the highest that its requests may ask for, else 0.
Keys are 256 random bits, so that a plain SHA-256 keeps them, and so that the time it takes to look
a digest up tells nothing about any key.
"""

import argparse
import fcntl
import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from granatum.adapters_store.names import check_name, is_digest
from granatum.v1.errors import GranatumError, InvalidRequest, NotFound
from granatum.v1.validation import MAX_PRIORITY

_CHECK_S = 1.0
_PREFIX = "gk-"
_SHORTEST = 8

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a key names: a tenant, or (None) an operator of the cluster."""

    tenant: str | None
    max_priority: int = 0
    """The highest that the tenant's requests may ask for."""

    def __str__(self) -> str:
        if self.tenant is None:
            return "admin"
        bound = f", priority up to {self.max_priority}" if self.max_priority else ""
        return f"tenant {self.tenant}{bound}"


class Keys:
    """The keys of a file, read again when it changes; a broken file leaves them as they were."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        self._identities = read(path)
        self._check_at = time.monotonic() + _CHECK_S

    def identify(self, key: str) -> Identity | None:
        """Whom the key names, or None."""
        if time.monotonic() >= self._check_at:
            self._check_at = time.monotonic() + _CHECK_S
            self._reload()
        return self._identities.get(digest_of(key))

    def _reload(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._identities = read(self._path)
            log.info("keys reloaded", keys=len(self._identities))
        except GranatumError as error:
            log.error("keys file is broken, the old keys stay", error=error.message)


def digest_of(key: str) -> str:
    """SHA-256 of a key, 64 hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def read(path: Path) -> dict[str, Identity]:
    """Identities by their keys' digests. Raises InvalidRequest for a file that is not right."""
    return {record["sha256"]: _identity(record) for record in _records(path)}


def add(path: Path, identity: Identity) -> str:
    """Make a key, keep its digest in the file (made if need be) and return the key."""
    key = _PREFIX + secrets.token_urlsafe(32)
    record: dict[str, Any] = {"sha256": digest_of(key)}
    record |= {"admin": True} if identity.tenant is None else {"tenant": identity.tenant}
    if identity.max_priority:
        record["max_priority"] = identity.max_priority
    _identity(record)  # or raise what is wrong
    with _locked(path):
        _write(path, [*(_records(path) if path.exists() else []), record])
    return key


def revoke(path: Path, digest: str) -> None:
    """Remove the one key whose digest begins so. Raises NotFound unless there is exactly one."""
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
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="granatum keys")
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="make a key and print it, once")
    whose = adding.add_mutually_exclusive_group(required=True)
    whose.add_argument("--tenant", help="the tenant that it names")
    whose.add_argument(
        "--admin", action="store_true", help="a key for who runs the fleet: see and drain runners"
    )
    adding.add_argument(
        "--max-priority",
        type=int,
        default=0,
        help="the highest priority that requests with this key may ask for (default: 0)",
    )
    listing = commands.add_parser("list", help="print digests and whom they name")
    revoking = commands.add_parser("revoke", help="remove a key")
    revoking.add_argument("digest", help="its first digits, as `list` prints them")
    for command in (adding, listing, revoking):
        command.add_argument("--file", type=Path, required=True, help="the keys file")
    return parser


def main() -> int:
    """Run the command line; the exit status."""
    given = _parser().parse_args()
    try:
        match given.command:
            case "add":
                tenant = None if given.admin else check_name(given.tenant, "tenant name")
                print(add(given.file, Identity(tenant, given.max_priority)))
            case "list":
                for digest, identity in read(given.file).items():
                    print(digest[:16], identity)
            case _:
                revoke(given.file, given.digest)
                print(given.digest, "is revoked")
    except GranatumError as error:
        print(error.message, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{given.file} cannot be written ({error.strerror})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
