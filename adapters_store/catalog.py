"""One tenant's adapters, versions and aliases: a value, and the changes that can be made to it.

A tenant's catalog is one object in the store. Every change reads it, makes the next value here, and
swaps it in only if nobody else did meanwhile, so whatever holds for a value holds always: names and
aliases are distinct, versions are never given twice, an alias points at a version that exists.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum

from granatum.v1.errors import AlreadyExists, NotFound, Overloaded


class Visibility(Enum):
    """Who may use an adapter."""

    PRIVATE = "private"
    PUBLISHED = "published"


@dataclass(frozen=True, slots=True)
class Version:
    """One version of an adapter. `digest` is 64 hexadecimal digits, `create_time` Unix seconds."""

    version: int
    digest: str
    size_bytes: int
    max_rank: int
    target_modules: tuple[str, ...]
    create_time: float
    base_fingerprint: str

    def is_the_same_as(self, upload: "Version") -> bool:
        """Whether uploading that adds nothing: the bytes and the base model are the same."""
        return (self.digest, self.base_fingerprint) == (upload.digest, upload.base_fingerprint)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A name's versions, oldest first. It stays when all are deleted, for `next_version`."""

    next_version: int = 1
    visibility: Visibility = Visibility.PRIVATE
    versions: tuple[Version, ...] = ()

    def find(self, version: int | None) -> Version | None:
        """That version, or the newest."""
        if version is None:
            return self.versions[-1] if self.versions else None
        return next((known for known in self.versions if known.version == version), None)


@dataclass(frozen=True, slots=True)
class Alias:
    """The version that an alias points at."""

    name: str
    version: int


@dataclass(frozen=True, slots=True)
class Catalog:
    """Everything that one tenant has.

    `retired` holds when each digest was last deleted, so that its bytes stay for streams in flight.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    aliases: dict[str, Alias] = field(default_factory=dict)
    retired: dict[str, float] = field(default_factory=dict)

    def find(self, name: str, version: int | None) -> tuple[str, Version] | None:
        """The adapter's name and version that `name[@version]` or an alias stands for."""
        alias = self.aliases.get(name)
        if alias is not None:
            if version is not None:
                return None
            name, version = alias.name, alias.version
        found = self.adapters.get(name, Adapter()).find(version)
        return None if found is None else (name, found)

    def newest(self, name: str) -> Version | None:
        """The newest version of an adapter."""
        return self.adapters.get(name, Adapter()).find(None)

    def find_digest(self, digest: str, *, published: bool = False) -> tuple[str, Version] | None:
        """The latest upload with these bytes, of published adapters only if asked."""
        matching = [
            (name, version)
            for name, version in self.versions()
            if version.digest == digest and (not published or self._is_published(name))
        ]
        return max(matching, key=lambda found: found[1].create_time, default=None)

    def versions(self) -> Iterator[tuple[str, Version]]:
        """Every name and version, sorted."""
        for name in sorted(self.adapters):
            for version in self.adapters[name].versions:
                yield name, version

    def aliases_of(self, name: str, version: int) -> tuple[str, ...]:
        """The aliases that point at a version, sorted."""
        target = Alias(name, version)
        return tuple(sorted(alias for alias, at in self.aliases.items() if at == target))

    def published(self) -> frozenset[str]:
        """The digests that other tenants may use."""
        return frozenset(v.digest for name, v in self.versions() if self._is_published(name))

    def _is_published(self, name: str) -> bool:
        return self.adapters[name].visibility is Visibility.PUBLISHED

    def check_name_is_free(self, name: str, max_versions: int) -> None:
        """Raise if a version of `name` cannot be added."""
        if name in self.aliases:
            raise AlreadyExists(
                f"{name!r} is an alias: upload under another name, or delete the alias first"
            )
        if sum(1 for _ in self.versions()) >= max_versions:
            raise Overloaded(
                f"there are {max_versions} versions already, the most that a tenant may keep: "
                "delete old ones first"
            )

    def add_version(self, name: str, version: Version, max_versions: int) -> "Catalog":
        """With the next version of `name`; the number in `version` is replaced by it."""
        self.check_name_is_free(name, max_versions)
        adapter = self.adapters.get(name, Adapter())
        added = replace(
            adapter,
            next_version=adapter.next_version + 1,
            versions=(*adapter.versions, replace(version, version=adapter.next_version)),
        )
        return replace(self, adapters={**self.adapters, name: added})

    def delete(self, name: str, version: int | None, now: float) -> tuple["Catalog", int]:
        """Without that version, or all of them, and their aliases; and how many that were."""
        adapter = self.adapters.get(name, Adapter())
        gone = tuple(v for v in adapter.versions if version in (None, v.version))
        if not gone:
            raise NotFound(_no_such(name, version))
        left = tuple(v for v in adapter.versions if v not in gone)
        # A name that is used anew must not be public because it once was.
        visibility = adapter.visibility if left else Visibility.PRIVATE
        numbers = {v.version for v in gone}
        changed = Catalog(
            adapters={
                **self.adapters,
                name: replace(adapter, versions=left, visibility=visibility),
            },
            aliases={
                alias: at
                for alias, at in self.aliases.items()
                if at.name != name or at.version not in numbers
            },
            retired={**self.retired, **{v.digest: now for v in gone}},
        )
        return changed, len(gone)

    def set_alias(self, alias: str, name: str, version: int | None) -> "Catalog":
        """With the alias pointing at that version, or at what is the newest now."""
        if self.adapters.get(alias, Adapter()).versions:
            raise AlreadyExists(f"{alias!r} is an adapter's name: choose another alias")
        found = self.adapters.get(name, Adapter()).find(version)
        if found is None:
            raise NotFound(_no_such(name, version))
        return replace(self, aliases={**self.aliases, alias: Alias(name, found.version)})

    def delete_alias(self, alias: str) -> "Catalog":
        """Without the alias."""
        if alias not in self.aliases:
            raise NotFound(f"there is no alias {alias!r}: list your adapters to see the aliases")
        return replace(
            self, aliases={name: at for name, at in self.aliases.items() if name != alias}
        )

    def set_visibility(self, name: str, visibility: Visibility) -> "Catalog":
        """With all versions of `name`, later ones too, of that visibility."""
        adapter = self.adapters.get(name, Adapter())
        if not adapter.versions:
            raise NotFound(_no_such(name, None))
        return replace(
            self, adapters={**self.adapters, name: replace(adapter, visibility=visibility)}
        )

    def forget_retired(self, before: float) -> "Catalog":
        """Without the memory of digests deleted before that time."""
        return replace(self, retired={d: at for d, at in self.retired.items() if at >= before})


def _no_such(name: str, version: int | None) -> str:
    which = name if version is None else f"{name}@{version}"
    return f"there is no adapter {which!r} of yours: list your adapters to see what there is"
