"""One tenant's adapters, versions and aliases: a value, and the changes that can be made to it.

A tenant's catalog is one object in the store. Every change reads the object, makes the next value
here, and swaps that value in only if nobody else changed the object meanwhile. So these rules hold
always: names and aliases are distinct, a version's number is never given twice, and an alias points
at a version that exists.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property

from granatum.adapters_store.limits import UploadLimits
from granatum.adapters_store.proof import ProofResult
from granatum.v1.errors import AlreadyExists, NotFound, Overloaded

MAX_EMPTIED = 1_000
"""The most names without versions of which a catalog remembers the next version."""


_VERSIONS = "TENANT_VERSIONS", "--max-adapter-versions"
_ALIASES = "TENANT_ALIASES", "--max-adapter-aliases"
_BYTES = "TENANT_STORED_BYTES", "--max-adapter-bytes-per-tenant"
"""The limits: the error's reason, and the router's flag."""


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
    elements: int = 0
    """Elements that it takes in a runner's arena; 0: an old upload, without this number."""
    base_model: str = ""
    """The base model that it was trained for, as its trainer called it; empty: unknown."""
    proof: ProofResult | None = None
    """What its last proof found; None: no upload of it brought one."""
    chat_sha256: str = ""
    """Of its chat settings, 64 hexadecimal digits; empty: it has none."""

    def is_the_same_as(self, upload: "Version") -> bool:
        """Whether `upload` adds nothing: its bytes and its base model are the same."""
        return (self.digest, self.base_fingerprint) == (upload.digest, upload.base_fingerprint)


@dataclass(frozen=True, slots=True)
class AdapterHistory:
    """A name's versions, oldest first.

    A name without versions is kept for a while, because `next_version` must not be given again.
    `emptied` says when its last version was deleted, in Unix seconds.
    """

    next_version: int = 1
    visibility: Visibility = Visibility.PRIVATE
    versions: tuple[Version, ...] = ()
    emptied: float = 0.0

    def find(self, version: int | None) -> Version | None:
        """The version of this number, or with None the newest."""
        if version is None:
            return self.versions[-1] if self.versions else None
        at = bisect_left(self.versions, version, key=_number)
        return next((v for v in self.versions[at : at + 1] if v.version == version), None)


@dataclass(frozen=True, slots=True)
class Alias:
    """The version that an alias points at."""

    name: str
    version: int


@dataclass(frozen=True, slots=True)
class Retired:
    """When the bytes of a digest were last deleted, in Unix seconds, and their number."""

    at: float
    size_bytes: int = 0


@dataclass(frozen=True)  # without slots: cached properties need a __dict__
class Catalog:
    """Everything that one tenant has.

    `retired` holds when each digest was last deleted, so that its bytes stay for streams in flight.

    Names fall into at most 256 classes. `floors`: per class, the first version number of a new
    name. It is above the versions of every forgotten name of the class. So no number is ever given
    twice, and the memory of deleted names is bounded.
    """

    adapters: dict[str, AdapterHistory] = field(default_factory=dict)
    aliases: dict[str, Alias] = field(default_factory=dict)
    retired: dict[str, Retired] = field(default_factory=dict)
    floors: dict[str, int] = field(default_factory=dict)

    def find(self, name: str, version: int | None) -> tuple[str, Version] | None:
        """The adapter's name and version that `name[@version]` or an alias stands for."""
        alias = self.aliases.get(name)
        if alias is not None:
            if version is not None:
                return None
            name, version = alias.name, alias.version
        found = self.adapters.get(name, AdapterHistory()).find(version)
        return None if found is None else (name, found)

    def newest(self, name: str) -> Version | None:
        """The newest version of an adapter."""
        return self.adapters.get(name, AdapterHistory()).find(None)

    def find_digest(self, digest: str, *, published: bool = False) -> tuple[str, Version] | None:
        """The latest version with these bytes; with `published` only of published adapters."""
        matching = [
            (name, version)
            for name, version in self._by_digest.get(digest, ())
            if not published or self._is_published(name)
        ]
        return max(matching, key=lambda found: found[1].create_time, default=None)

    def versions(self) -> Iterator[tuple[str, Version]]:
        """Every name and version, sorted."""
        return self.versions_after("", 0)

    def versions_after(self, name: str, version: int) -> Iterator[tuple[str, Version]]:
        """Every name and version that comes after `name@version`, sorted."""
        for later in self._names[bisect_left(self._names, name) :]:
            versions = self.adapters[later].versions
            after = version + 1 if later == name else 0
            for found in versions[bisect_left(versions, after, key=_number) :]:
                yield later, found

    def aliases_of(self, name: str, version: int) -> tuple[str, ...]:
        """The aliases that point at a version, sorted."""
        return tuple(self._by_target.get(Alias(name, version), ()))

    @property
    def size_bytes(self) -> int:
        """Bytes stored for the tenant, those of just deleted versions included."""
        kept = {digest: found[0][1].size_bytes for digest, found in self._by_digest.items()}
        gone = (r.size_bytes for digest, r in self.retired.items() if digest not in kept)
        return sum(kept.values()) + sum(gone)

    @cached_property
    def _names(self) -> list[str]:
        return sorted(self.adapters)

    @cached_property
    def _by_digest(self) -> dict[str, list[tuple[str, Version]]]:
        found: dict[str, list[tuple[str, Version]]] = {}
        for name, version in self.versions():
            found.setdefault(version.digest, []).append((name, version))
        return found

    @cached_property
    def _by_target(self) -> dict[Alias, list[str]]:
        found: dict[Alias, list[str]] = {}
        for alias in sorted(self.aliases):
            found.setdefault(self.aliases[alias], []).append(alias)
        return found

    @cached_property
    def published(self) -> frozenset[str]:
        """The digests that other tenants may use."""
        return frozenset(
            version.digest
            for name, adapter in self.adapters.items()
            if self._is_published(name)
            for version in adapter.versions
        )

    def _is_published(self, name: str) -> bool:
        return self.adapters[name].visibility is Visibility.PUBLISHED

    def check_room(self, name: str, digest: str, size_bytes: int, limits: UploadLimits) -> None:
        """Raise if a version of `name` with these bytes cannot be added."""
        if name in self.aliases:
            raise AlreadyExists(
                f"{name!r} is an alias: upload under another name, or delete the alias first",
                field="header.name",
            )
        versions = sum(len(adapter.versions) for adapter in self.adapters.values())
        if versions >= limits.max_versions:
            raise _full(_VERSIONS, f"{limits.max_versions:,} versions", "delete old ones first")
        if versions + len(self.retired) >= 2 * limits.max_versions:
            raise _full(
                _VERSIONS,
                f"{len(self.retired):,} deleted versions beside {versions:,} others",
                "try again in an hour",
            )
        added = 0 if digest in self._by_digest or digest in self.retired else size_bytes
        if self.size_bytes + added > limits.max_tenant_bytes:
            raise _full(
                _BYTES,
                f"{limits.max_tenant_bytes:,} bytes of adapters",
                "delete old ones first; their bytes count for another hour or two",
            )

    def add_version(self, name: str, version: Version, limits: UploadLimits) -> "Catalog":
        """This catalog with one more version of `name`. The number in `version` is ignored."""
        self.check_room(name, version.digest, version.size_bytes, limits)
        floor = self.floors.get(_class(name), 1)
        adapter = self.adapters.get(name, AdapterHistory(next_version=floor))
        added = replace(
            adapter,
            next_version=adapter.next_version + 1,
            versions=(*adapter.versions, replace(version, version=adapter.next_version)),
        )
        return replace(self, adapters={**self.adapters, name: added})

    def hold(self, name: str, version: Version, limits: UploadLimits) -> "Catalog":
        """This catalog with the version's bytes, which nothing refers to yet.

        They count against the tenant, and garbage collection knows them, as if the version had been
        added and deleted.
        """
        if version.digest in self._by_digest:
            return self
        self.check_room(name, version.digest, version.size_bytes, limits)
        held = Retired(version.create_time, version.size_bytes)
        return replace(self, retired={**self.retired, version.digest: held})

    def set_proof(self, name: str, version: int, proof: ProofResult) -> "Catalog":
        """This catalog with what a proof of a version found."""
        adapter = self.adapters[name]
        versions = tuple(
            replace(v, proof=proof) if v.version == version else v for v in adapter.versions
        )
        return replace(self, adapters={**self.adapters, name: replace(adapter, versions=versions)})

    def delete(self, name: str, version: int | None, now: float) -> tuple["Catalog", int]:
        """This catalog without a version, or with None all, and their aliases; how many went."""
        adapter = self.adapters.get(name, AdapterHistory())
        gone = tuple(v for v in adapter.versions if version in (None, v.version))
        if not gone:
            raise NotFound(_no_such(name, version))
        numbers = {v.version for v in gone}
        left = tuple(v for v in adapter.versions if v.version not in numbers)
        if left:
            adapters = {**self.adapters, name: replace(adapter, versions=left)}
        else:
            # A name that is used again starts private, even if it was published before.
            adapters = {other: kept for other, kept in self.adapters.items() if other != name}
            adapters[name] = AdapterHistory(adapter.next_version, emptied=now)
        changed = replace(
            self,
            adapters=adapters,
            aliases={
                alias: at
                for alias, at in self.aliases.items()
                if at.name != name or at.version not in numbers
            },
            retired={**self.retired, **{v.digest: Retired(now, v.size_bytes) for v in gone}},
        )
        return changed.forget(changed.emptied()[:-MAX_EMPTIED]), len(gone)

    def set_alias(
        self, alias: str, name: str, version: int | None, limits: UploadLimits
    ) -> "Catalog":
        """This catalog with the alias on a version, or with None on the newest version of now."""
        if self.adapters.get(alias, AdapterHistory()).versions:
            raise AlreadyExists(
                f"{alias!r} is an adapter's name: choose another alias", field="alias"
            )
        found = self.adapters.get(name, AdapterHistory()).find(version)
        if found is None:
            raise NotFound(_no_such(name, version))
        if alias not in self.aliases and len(self.aliases) >= limits.max_aliases:
            raise _full(_ALIASES, f"{limits.max_aliases:,} aliases", "delete one first")
        return replace(self, aliases={**self.aliases, alias: Alias(name, found.version)})

    def delete_alias(self, alias: str) -> "Catalog":
        """This catalog without the alias."""
        if alias not in self.aliases:
            raise NotFound(f"there is no alias {alias!r}: list your adapters to see the aliases")
        return replace(
            self, aliases={name: at for name, at in self.aliases.items() if name != alias}
        )

    def set_visibility(self, name: str, visibility: Visibility) -> "Catalog":
        """This catalog with that visibility of `name`: of all versions, later ones included."""
        adapter = self.adapters.get(name, AdapterHistory())
        if not adapter.versions:
            raise NotFound(_no_such(name, None))
        return replace(
            self, adapters={**self.adapters, name: replace(adapter, visibility=visibility)}
        )

    def forget_deleted(self, before: float) -> "Catalog":
        """This catalog without the memory of digests and names that were deleted before then."""
        kept = {digest: gone for digest, gone in self.retired.items() if gone.at >= before}
        names = [name for name in self.emptied() if self.adapters[name].emptied < before]
        return replace(self, retired=kept).forget(names)

    def emptied(self) -> list[str]:
        """The names without versions, in the order in which they lost their last one."""
        return [name for name, adapter in self.adapters.items() if not adapter.versions]

    def forget(self, names: list[str]) -> "Catalog":
        """This catalog without these names; the floors of their classes rise above them."""
        floors = dict(self.floors)
        for name in names:
            of = _class(name)
            floors[of] = max(floors.get(of, 1), self.adapters[name].next_version)
        gone = set(names)
        kept = {name: adapter for name, adapter in self.adapters.items() if name not in gone}
        return replace(self, adapters=kept, floors=floors)


def _number(version: Version) -> int:
    return version.version


def _class(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:2]


def _full(limit: tuple[str, str], what: str, advice: str) -> Overloaded:
    reason, flag = limit
    return Overloaded(f"you keep {what}, as many as a tenant may ({flag}): {advice}", reason=reason)


def _no_such(name: str, version: int | None) -> str:
    which = name if version is None else f"{name}@{version}"
    return f"there is no adapter {which!r} of yours: list your adapters to see what there is"
