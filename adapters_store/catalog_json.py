"""How a catalog is written in the store: JSON that ends with a SHA-256 of everything before."""

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from granatum.adapters_store.catalog import (
    Adapter,
    Alias,
    Catalog,
    Retired,
    Version,
    Visibility,
)
from granatum.v1.errors import Internal

_FORMAT = 2
_WITHOUT_SUM = 1
"""The format before there was a checksum."""
_AT_ONCE = 500
"""Versions to write in one go: the interpreter is held by a millisecond's work at most."""
_END = re.compile(rb',"sha256":"([0-9a-f]{64})"}')
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
    """The catalog as JSON; `revision` tells this writing from any other."""
    body = b"".join(part.encode() for part in _parts(catalog, revision))
    return body + b',"sha256":"%s"}' % hashlib.sha256(body).hexdigest().encode()


def decode(data: bytes) -> tuple[Catalog, str]:
    """The catalog and its revision. Raises CatalogDamaged if `data` is not what was written."""
    try:
        fields = json.loads(data)
        if fields["format"] == _FORMAT:
            _check_sum(data)
        elif fields["format"] != _WITHOUT_SUM:
            raise ValueError(f"format {fields['format']}")
        return _catalog(fields), fields["revision"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CatalogDamaged from error


def _check_sum(data: bytes) -> None:
    end = _END.fullmatch(data, len(data) - _END_BYTES)
    if end is None or hashlib.sha256(data[: end.start()]).hexdigest().encode() != end[1]:
        raise ValueError("the checksum is another one")


def _parts(catalog: Catalog, revision: str) -> Iterator[str]:
    """The JSON in pieces, without its checksum and last brace."""
    yield f'{{"format":{_FORMAT},"revision":{_json(revision)},"adapters":{{'
    for place, (name, adapter) in enumerate(catalog.adapters.items()):
        fields = _json(
            {
                "next_version": adapter.next_version,
                "visibility": adapter.visibility.value,
                "emptied": adapter.emptied,
            }
        )
        yield f'{"," if place else ""}{_json(name)}:{fields[:-1]},"versions":['
        yield from _versions(adapter)
        yield "]}"
    aliases = {
        alias: {"name": at.name, "version": at.version} for alias, at in catalog.aliases.items()
    }
    retired = {digest: [gone.at, gone.size_bytes] for digest, gone in catalog.retired.items()}
    yield f'}},"aliases":{_json(aliases)},"retired":{_json(retired)}'
    yield f',"floors":{_json(catalog.floors)}'


def _versions(adapter: Adapter) -> Iterator[str]:
    left = iter(adapter.versions)
    separator = ""
    while batch := [_fields(version) for version in islice(left, _AT_ONCE)]:
        yield separator + _json(batch)[1:-1]
        separator = ","


def _fields(version: Version) -> dict[str, object]:
    return {
        "version": version.version,
        "digest": version.digest,
        "size_bytes": version.size_bytes,
        "max_rank": version.max_rank,
        "target_modules": version.target_modules,
        "create_time": version.create_time,
        "base_fingerprint": version.base_fingerprint,
        "elements": version.elements,
    }


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _catalog(fields: dict[str, Any]) -> Catalog:
    return Catalog(
        adapters={name: _adapter(value) for name, value in fields["adapters"].items()},
        aliases={alias: Alias(**at) for alias, at in fields["aliases"].items()},
        retired={digest: _retired(value) for digest, value in fields["retired"].items()},
        floors=fields.get("floors", {}),
    )


def _adapter(fields: dict[str, Any]) -> Adapter:
    return Adapter(
        next_version=fields["next_version"],
        visibility=Visibility(fields["visibility"]),
        versions=tuple(
            Version(**{**version, "target_modules": tuple(version["target_modules"])})
            for version in fields["versions"]
        ),
        emptied=fields.get("emptied", 0.0),
    )


def _retired(value: Any) -> Retired:
    """From [time, bytes], or from the time alone, as catalogs without a checksum have it."""
    return Retired(*value) if isinstance(value, list) else Retired(value)
