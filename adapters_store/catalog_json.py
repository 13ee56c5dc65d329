"""How a catalog is written in the store."""

import json
from dataclasses import asdict
from typing import Any

from granatum.adapters_store.catalog import Adapter, Alias, Catalog, Version, Visibility
from granatum.v1.errors import Internal

_FORMAT = 1


def encode(catalog: Catalog, revision: str) -> bytes:
    """The catalog as JSON; `revision` tells this writing from any other."""
    return json.dumps(
        {
            "format": _FORMAT,
            "revision": revision,
            "adapters": {
                name: {
                    "next_version": adapter.next_version,
                    "visibility": adapter.visibility.value,
                    "versions": [asdict(version) for version in adapter.versions],
                }
                for name, adapter in catalog.adapters.items()
            },
            "aliases": {alias: asdict(at) for alias, at in catalog.aliases.items()},
            "retired": catalog.retired,
        },
        separators=(",", ":"),
    ).encode()


def decode(data: bytes, key: str) -> tuple[Catalog, str]:
    """The catalog and its revision. Raises Internal if `key` does not hold one of ours."""
    try:
        fields = json.loads(data)
        if fields["format"] != _FORMAT:
            raise ValueError(f"format {fields['format']}")
        catalog = Catalog(
            adapters={name: _adapter(value) for name, value in fields["adapters"].items()},
            aliases={alias: Alias(**at) for alias, at in fields["aliases"].items()},
            retired=fields["retired"],
        )
        return catalog, fields["revision"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Internal(
            f"the adapter store's object {key} is damaged ({error}): restore it from a backup"
        ) from error


def _adapter(fields: dict[str, Any]) -> Adapter:
    return Adapter(
        next_version=fields["next_version"],
        visibility=Visibility(fields["visibility"]),
        versions=tuple(
            Version(**{**version, "target_modules": tuple(version["target_modules"])})
            for version in fields["versions"]
        ),
    )
