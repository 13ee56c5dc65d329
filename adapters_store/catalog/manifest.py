"""What everyone else sees of an adapter."""

import re
from dataclasses import dataclass, fields, replace

from granatum.adapters_store.catalog.catalog import Catalog, Version, Visibility


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(Version):
    """One version of an adapter as everyone else sees it: with its names. `aliases` are sorted."""

    tenant: str
    name: str
    visibility: Visibility
    aliases: tuple[str, ...]

    @classmethod
    def of(cls, catalog: Catalog, tenant: str, name: str, version: Version) -> "Manifest":
        """The manifest of a version in its tenant's catalog."""
        return cls(
            **{field.name: getattr(version, field.name) for field in fields(Version)},
            tenant=tenant,
            name=name,
            visibility=catalog.adapters[name].visibility,
            aliases=catalog.aliases_of(name, version.version),
        )

    def for_strangers(self) -> "Manifest":
        """What another tenant sees: aliases and the owner's folders are the owner's alone."""
        return replace(self, aliases=(), base_model=re.split(r"[/\\]", self.base_model)[-1])

    @property
    def full_name(self) -> str:
        """`tenant/name@version`."""
        return f"{self.tenant}/{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a listing; `next_page_token` is empty on the last."""

    adapters: tuple[Manifest, ...]
    next_page_token: str
