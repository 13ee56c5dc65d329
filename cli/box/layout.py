"""What a single-machine service consists of."""

from dataclasses import dataclass
from pathlib import Path

from granatum.v1.transport import Tls, is_loopback


@dataclass(frozen=True, slots=True)
class Layout:
    """What a box consists of, and where it keeps what it has to keep."""

    model: Path
    state: Path
    """A directory for adapters, keys, logs and the runners' caches."""
    listen: str = "127.0.0.1:0"
    """Port 0: any free one."""
    tls: Tls | None = None
    """What clients are served with; None: plaintext."""
    insecure: bool = False
    """Plaintext beyond this machine."""
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

    def log_of(self, process: str) -> Path:
        """Where a process of that name logs."""
        return self.log_directory / f"{process}.log"

    @property
    def needs_loopback(self) -> bool:
        """Whether the box's runners need an address of their own to reach the router.

        A certificate names the router as clients call it, and hardly as 127.0.0.1. A router that
        listens on another address of the machine does not listen on loopback.
        """
        return self.tls is not None or not is_loopback(self.listen)

    @property
    def router_security(self) -> tuple[str, ...]:
        """The router's arguments for its address beyond this machine."""
        tls = self.tls or Tls()
        files = (("--tls-cert", tls.cert), ("--tls-key", tls.key), ("--tls-ca", tls.ca))
        given = (part for name, file in files if file for part in (name, str(file)))
        return (*given, *(("--insecure",) if self.insecure else ()))

    @property
    def own_store(self) -> tuple[Path, ...]:
        """The directory of the adapters' object store, if it is the box's own."""
        return () if self.store else (self.state / "adapters",)

    @property
    def store_url(self) -> str:
        """Where the adapters lie."""
        return self.store or (self.state / "adapters").resolve().as_uri()
