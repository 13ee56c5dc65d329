"""How a box's router is reached, by clients and by the box's own runners."""

from pathlib import Path

import pytest

from granatum.cli.box.layout import Layout
from granatum.v1.transport import Tls

TLS = Tls(Path("cert.pem"), Path("key.pem"))


@pytest.mark.parametrize(
    ("listen", "tls", "insecure", "needs_loopback", "security"),
    [
        ("127.0.0.1:7070", None, False, False, ()),
        ("localhost:7070", TLS, False, True, ("--tls-cert", "cert.pem", "--tls-key", "key.pem")),
        ("0.0.0.0:7070", None, True, True, ("--insecure",)),
        ("192.0.2.1:7070", TLS, False, True, ("--tls-cert", "cert.pem", "--tls-key", "key.pem")),
    ],
)
def test_runners_come_by_plaintext_on_loopback_alone(
    listen: str, tls: Tls | None, insecure: bool, needs_loopback: bool, security: tuple[str, ...]
) -> None:
    layout = Layout(Path("m"), Path("s"), listen=listen, tls=tls, insecure=insecure)
    assert layout.needs_loopback is needs_loopback
    assert layout.router_security == security


def test_a_store_elsewhere_makes_no_directory_here() -> None:
    assert Layout(Path("m"), Path("s")).own_store == (Path("s/adapters"),)
    assert Layout(Path("m"), Path("s"), store="s3://bucket").own_store == ()
