"""What a single-machine service consists of."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Layout:
    """What a box consists of, and where it keeps what it has to keep."""

    model: Path
    state: Path
    """A directory for adapters, keys, logs and the runners' caches."""
    listen: str = "127.0.0.1:0"
    """Port 0: any free one."""
    runners: int | None = None
    """None: one per GPU, or one on a machine without."""
    redis: str | None = None
    """The URL of a Redis-protocol server; None: our own."""
    store: str | None = None
    """The URL of the adapters' object store; None: a directory in `state`."""
    logs: Path | None = None
    """None: a directory in `state`."""
    tenants: tuple[str, ...] = ("default",)
    """Who gets a key, if `state` holds no keys yet."""
    runner_arguments: tuple[str, ...] = ()

    @property
    def keys_file(self) -> Path:
        """Digests of the tenants' and admins' keys."""
        return self.state / "keys.json"

    @property
    def log_directory(self) -> Path:
        """One file per process."""
        return self.logs or self.state / "logs"

    @property
    def store_url(self) -> str:
        """Where the adapters lie."""
        return self.store or (self.state / "adapters").resolve().as_uri()
