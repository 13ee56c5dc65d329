"""Names of tenants and adapters, and the references that requests make to them."""

import re
from dataclasses import dataclass

from granatum.v1.errors import InvalidRequest

MAX_VERSION = 2**31 - 1
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[1-9][0-9]{0,9}")
_SYNTAX = "1 to 64 of a-z, 0-9, '-', '_' and '.', beginning with a letter or digit"
_SHOWN = 80


def check_name(text: str, what: str = "adapter name") -> str:
    """`text`, if it can name a tenant, an adapter or an alias; InvalidRequest if not."""
    if _NAME.fullmatch(text) is None:
        raise InvalidRequest(f"{shown(text)} is no valid {what}: give {_SYNTAX}")
    return text


def check_digest(text: str) -> str:
    """`text`, if it is a digest (64 hexadecimal digits); InvalidRequest if not."""
    if _DIGEST.fullmatch(text) is None:
        raise InvalidRequest(f"{shown(text)} is no digest: give 64 of 0-9, a-f")
    return text


def shown(text: str) -> str:
    """`text` quoted for a message, shortened and with nothing unprintable in it."""
    return ascii(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """What a request calls an adapter: a digest (64 hexadecimal digits), or a name.

    A name may be an alias; `tenant` is set if the reference names it, `version` likewise.
    """

    name: str | None = None
    version: int | None = None
    tenant: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> "AdapterRef":
        """Read `name`, `name@version`, `tenant/name[@version]` or `sha256:<digest>`.

        Raises InvalidRequest for anything else.
        """
        if text.startswith("sha256:"):
            return cls(digest=check_digest(text.removeprefix("sha256:")))
        tenant, slash, rest = text.rpartition("/")
        name, at, version = rest.partition("@")
        return cls(
            name=check_name(name),
            version=_version(version, text) if at else None,
            tenant=check_name(tenant, "tenant name") if slash else None,
        )

    def __str__(self) -> str:
        if self.digest is not None:
            return f"sha256:{self.digest}"
        prefix = "" if self.tenant is None else f"{self.tenant}/"
        return f"{prefix}{self.name}" + ("" if self.version is None else f"@{self.version}")


def _version(version: str, text: str) -> int:
    if _VERSION.fullmatch(version) is None or int(version) > MAX_VERSION:
        raise InvalidRequest(
            f"{shown(text)}: a version is a whole number from 1 on, as in 'support-bot@3'"
        )
    return int(version)
