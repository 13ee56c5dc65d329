"""How a catalog is written in the store: JSON that ends with a SHA-256 of everything before.

A version is a short row. What many versions share stands once in "kinds". So thousands of versions
are read and written in some milliseconds, while everything else in the process waits.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

from granatum.adapters_store.catalog.catalog import (
    AdapterHistory,
    Alias,
    Catalog,
    Retired,
    Version,
    Visibility,
)
from granatum.adapters_store.proof import ProofResult
from granatum.v1.errors import Internal

_FORMAT = 2
_OLD_FORMAT = 1
_BATCH = 500
"""Versions to write in one go: the interpreter is held by a millisecond's work at most."""
_END = re.compile(rb',"sha256":"([0-9a-f]{64})"}')
_Kind = tuple[tuple[str, ...], str, str]
"""The projections that a version adapts, its base model's fingerprint, and its trainer's name for
the base model."""
_END_BYTES = len(b',"sha256":""}') + 64


class CatalogDamaged(Internal):
    """A tenant's catalog cannot be read."""

    def __init__(self) -> None:
        super().__init__(
            "the catalog of this tenant's adapters is damaged: the operator must restore it from "
            "a backup",
            reason="CATALOG_DAMAGED",
        )


def encode(catalog: Catalog, revision: str) -> bytes:
    """The catalog as JSON. No two writings have the same `revision`."""
    body = b"".join(part.encode() for part in _parts(catalog, revision))
    return body + b',"sha256":"%s"}' % hashlib.sha256(body).hexdigest().encode()


def decode(data: bytes) -> tuple[Catalog, str]:
    """The catalog and its revision. Raises CatalogDamaged if `data` is not what was written."""
    try:
        fields = json.loads(data)
        if fields["format"] == _OLD_FORMAT:
            return _old_catalog(fields), fields["revision"]
        if fields["format"] != _FORMAT:
            raise ValueError(f"format {fields['format']}")
        _check_sum(data)
        return _catalog(fields), fields["revision"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CatalogDamaged from error


def _check_sum(data: bytes) -> None:
    end = _END.fullmatch(data, len(data) - _END_BYTES)
    if end is None or hashlib.sha256(data[: end.start()]).hexdigest().encode() != end[1]:
        raise ValueError("the checksum is another one")


def _parts(catalog: Catalog, revision: str) -> Iterator[str]:
    """The JSON in pieces, without its checksum and last brace."""
    kinds: dict[_Kind, int] = {}
    yield f'{{"format":{_FORMAT},"revision":{_json(revision)},"adapters":{{'
    for place, (name, adapter) in enumerate(catalog.adapters.items()):
        head = [adapter.next_version, adapter.visibility.value, adapter.emptied]
        yield f"{',' if place else ''}{_json(name)}:{_json(head)[:-1]},["
        yield from _rows(adapter, kinds)
        yield "]]"
    aliases = {alias: [at.name, at.version] for alias, at in catalog.aliases.items()}
    retired = {digest: [gone.at, gone.size_bytes] for digest, gone in catalog.retired.items()}
    # Older routers read kinds of two parts and rows of seven: what came later stands apart.
    yield f'}},"kinds":{_json([kind[:2] for kind in kinds])},'
    yield f'"base_models":{_json([kind[2] for kind in kinds])},'
    yield f'"further":{_json(_further(catalog))},"aliases":{_json(aliases)},'
    yield f'"retired":{_json(retired)},"floors":{_json(catalog.floors)}'


def _rows(adapter: AdapterHistory, kinds: dict[_Kind, int]) -> Iterator[str]:
    left = iter(adapter.versions)
    separator = ""
    while batch := [_row(version, kinds) for version in islice(left, _BATCH)]:
        yield separator + _json(batch)[1:-1]
        separator = ","


def _row(version: Version, kinds: dict[_Kind, int]) -> list[object]:
    kind = version.target_modules, version.base_fingerprint, version.base_model
    return [
        version.version,
        version.digest,
        version.size_bytes,
        version.max_rank,
        version.create_time,
        version.elements,
        kinds.setdefault(kind, len(kinds)),
    ]


def _further(catalog: Catalog) -> dict[str, dict[str, Any]]:
    """By `name@version`, what only some versions have."""
    return {
        f"{name}@{version.version}": {
            "chat": version.chat_sha256,
            "proof": version.proof and asdict(version.proof),
        }
        for name, adapter in catalog.adapters.items()
        for version in adapter.versions
        if version.chat_sha256 or version.proof
    }


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _catalog(fields: dict[str, Any]) -> Catalog:
    names = fields.get("base_models") or [""] * len(fields["kinds"])
    kinds = [
        (tuple(targets), base, name)
        for (targets, base), name in zip(fields["kinds"], names, strict=True)
    ]
    further = fields.get("further", {})
    return Catalog(
        adapters={
            name: _adapter(name, row, kinds, further) for name, row in fields["adapters"].items()
        },
        aliases={alias: Alias(*at) for alias, at in fields["aliases"].items()},
        retired={digest: Retired(*gone) for digest, gone in fields["retired"].items()},
        floors=fields["floors"],
    )


def _adapter(
    name: str, row: list[Any], kinds: list[_Kind], further: dict[str, Any]
) -> AdapterHistory:
    next_version, visibility, emptied, rows = row
    versions = tuple(_version(row, kinds) for row in rows)
    if further:
        versions = tuple(_with_further(v, further.get(f"{name}@{v.version}")) for v in versions)
    return AdapterHistory(next_version, Visibility(visibility), versions, emptied)


def _version(row: list[Any], kinds: list[_Kind]) -> Version:
    number, digest, size_bytes, max_rank, create_time, elements, kind = row
    targets, base, name = kinds[kind]
    return Version(number, digest, size_bytes, max_rank, targets, create_time, base, elements, name)


def _with_further(version: Version, further: dict[str, Any] | None) -> Version:
    if further is None:
        return version
    proof = further["proof"]
    return replace(
        version, chat_sha256=further["chat"], proof=None if proof is None else ProofResult(**proof)
    )


def _old_catalog(fields: dict[str, Any]) -> Catalog:
    """A catalog of the format without a checksum."""
    return Catalog(
        adapters={
            name: AdapterHistory(
                next_version=adapter["next_version"],
                visibility=Visibility(adapter["visibility"]),
                versions=tuple(
                    Version(**{**version, "target_modules": tuple(version["target_modules"])})
                    for version in adapter["versions"]
                ),
            )
            for name, adapter in fields["adapters"].items()
        },
        aliases={alias: Alias(**at) for alias, at in fields["aliases"].items()},
        retired={digest: Retired(at) for digest, at in fields["retired"].items()},
    )
