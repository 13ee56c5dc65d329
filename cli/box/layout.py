"""The parts of a service on one machine, as the user asked for them."""

from dataclasses import dataclass
from pathlib import Path

from granatum.v1.transport import Tls, is_loopback


@dataclass(frozen=True, slots=True)
class Layout:
    """What a box consists of, and where it keeps its state."""

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
    """The tenants that get a key if `state` holds no keys yet."""
    runner_arguments: tuple[str, ...] = ()

    @property
    def keys_file(self) -> Path:
        """The file with the digests of tenants' and admins' keys."""
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
        """Whether the router needs a second address, on loopback, for the box's runners.

        With TLS it does: a certificate has the name that clients use, and hardly 127.0.0.1. If the
        router listens on another address of the machine, it does not listen on loopback.
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
