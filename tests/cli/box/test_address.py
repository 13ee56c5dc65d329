"""Addresses are proven free, or it is said what is wrong with them."""

import socket

import pytest

from granatum.cli.box.address import claim
from granatum.v1.errors import GranatumError, InvalidRequest, PreconditionFailed


def test_port_0_becomes_a_free_one() -> None:
    address = claim("127.0.0.1:0")
    assert address != "127.0.0.1:0"
    assert claim(address) == address, "nothing is held"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_port_that_another_listens_on_is_taken_by_any_name(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PreconditionFailed, match=rf"{host}:{port} is taken.*--listen"):
            claim(f"{host}:{port}")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("7070", "no host:port"),
        ("127.0.0.1:", "no host:port"),
        ("127.0.0.1:http", "no host:port"),
        ("127.0.0.1:65536", "no host:port"),
        ("192.0.2.1:7070", "no address of this machine"),
        ("nowhere.invalid:7070", "no name of this machine"),
    ],
)
def test_what_nobody_could_listen_on_is_said(address: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        claim(address)


def test_brackets_hold_an_ipv6_address() -> None:
    try:
        assert claim("[::1]:0").startswith("[::1]:")
    except GranatumError as error:
        assert "no address of this machine" in error.message  # noqa: PT017 - none without IPv6
