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


def is_name(text: str) -> bool:
    """Whether `text` can name a tenant, an adapter or an alias."""
    return _NAME.fullmatch(text) is not None


def is_digest(text: str) -> bool:
    """Whether `text` is 64 hexadecimal digits in lower case."""
    return _DIGEST.fullmatch(text) is not None


def check_name(text: str, what: str = "adapter name", field: str | None = None) -> str:
    """`text`, if it can name a tenant, an adapter or an alias; InvalidRequest if not.

    `field` is the request's field that holds it.
    """
    if not is_name(text):
        raise InvalidRequest(f"{shown(text)} is no valid {what}: give {_SYNTAX}", field=field)
    return text


def check_digest(text: str, field: str | None = None) -> str:
    """`text`, if it is a digest (64 hexadecimal digits); InvalidRequest if not."""
    if not is_digest(text):
        raise InvalidRequest(f"{shown(text)} is no digest: give 64 of 0-9, a-f", field=field)
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
    def parse(cls, text: str, field: str = "adapter") -> "AdapterRef":
        """Read `name`, `name@version`, `tenant/name[@version]` or `sha256:<digest>`.

        Raises InvalidRequest, which names the request's `field`, for anything else.
        """
        if text.startswith("sha256:"):
            return cls(digest=check_digest(text.removeprefix("sha256:"), field))
        tenant, slash, rest = text.rpartition("/")
        name, at, version = rest.partition("@")
        return cls(
            name=check_name(name, field=field),
            version=_version(version, text, field) if at else None,
            tenant=check_name(tenant, "tenant name", field) if slash else None,
        )

    def __str__(self) -> str:
        if self.digest is not None:
            return f"sha256:{self.digest}"
        prefix = "" if self.tenant is None else f"{self.tenant}/"
        return f"{prefix}{self.name}" + ("" if self.version is None else f"@{self.version}")


def _version(version: str, text: str, field: str) -> int:
    if _VERSION.fullmatch(version) is None or int(version) > MAX_VERSION:
        raise InvalidRequest(
            f"{shown(text)}: a version is a whole number from 1 on, as in 'support-bot@3'",
            field=field,
        )
    return int(version)
