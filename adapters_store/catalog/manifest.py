"""What everyone else sees of an adapter."""

from dataclasses import dataclass, replace

from granatum.adapters_store.catalog.catalog import Catalog, Version, Visibility


@dataclass(frozen=True, slots=True)
class Manifest:
    """One version of an adapter, as everyone else sees it.

    `digest` is 64 hexadecimal digits, `create_time` Unix seconds, `aliases` are sorted.
    """

    tenant: str
    name: str
    version: int
    digest: str
    size_bytes: int
    max_rank: int
    target_modules: tuple[str, ...]
    create_time: float
    visibility: Visibility
    aliases: tuple[str, ...]
    base_fingerprint: str
    elements: int = 0
    """Room that it takes in a runner's arena; 0: unknown."""

    @classmethod
    def of(cls, catalog: Catalog, tenant: str, name: str, version: Version) -> "Manifest":
        """The manifest of a version in its tenant's catalog."""
        return cls(
            tenant=tenant,
            name=name,
            version=version.version,
            digest=version.digest,
            size_bytes=version.size_bytes,
            max_rank=version.max_rank,
            target_modules=version.target_modules,
            create_time=version.create_time,
            visibility=catalog.adapters[name].visibility,
            aliases=catalog.aliases_of(name, version.version),
            base_fingerprint=version.base_fingerprint,
            elements=version.elements,
        )

    def for_strangers(self) -> "Manifest":
        """What another tenant sees: aliases are the owner's alone."""
        return replace(self, aliases=())

    @property
    def full_name(self) -> str:
        """`tenant/name@version`."""
        return f"{self.tenant}/{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a listing; `next_page_token` is empty on the last."""

    adapters: tuple[Manifest, ...]
    next_page_token: str
