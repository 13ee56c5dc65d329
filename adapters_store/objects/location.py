"""From the URL of an adapter store to its objects."""

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from obstore.exceptions import BaseError
from obstore.store import MemoryStore, from_url

from granatum.adapters_store.objects.local import LocalObjects
from granatum.adapters_store.objects.objects import Objects, first_line
from granatum.v1.errors import InvalidRequest

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

# A store that is away fails within seconds, so that a caller can say so before its deadline.
_RETRIES: "RetryConfig" = {
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=10),
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=1),
        "base": 2,
    },
}


def open_objects(url: str) -> Objects:
    """Open a local directory (a path or file://), memory:// (for tests), or what obstore knows.

    obstore reads credentials and endpoints from the environment (AWS_*, GOOGLE_*, AZURE_*). It uses
    plaintext HTTP only with AWS_ALLOW_HTTP=true. Raises InvalidRequest for a URL that cannot be
    opened.
    """
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        return _open_directory(Path(unquote(parts.path) if parts.scheme else url))
    if parts.scheme == "memory":
        return Objects(MemoryStore())
    client: ClientConfig = {
        "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() == "true",
        "connect_timeout": timedelta(seconds=3),
        "timeout": timedelta(seconds=30),
    }
    try:
        return Objects(from_url(url, client_options=client, retry_config=_RETRIES))
    except (BaseError, ValueError) as error:
        raise InvalidRequest(
            f"the adapter store {parts.scheme}://{parts.hostname or ''} cannot be opened: "
            f"{first_line(error)}"
        ) from error


def _open_directory(root: Path) -> Objects:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return LocalObjects(root.resolve())
    except OSError as error:
        raise InvalidRequest(
            f"the adapter store's directory {root} cannot be used: {error.strerror}"
        ) from error
