"""Mutual TLS between client, router and runner, by the settings alone."""

import datetime
import ipaddress
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from router_box import Box
from scripted_runner import expected_ids

from granatum.v1.inference_pb2 import GenerateRequest, StopConditions
from granatum.v1.inference_pb2_grpc import InferenceServiceStub
from granatum.v1.transport import Tls, bearer, open_channel


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    """A certificate of 127.0.0.1 that vouches for itself, so that it is its own root."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "granatum tests")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (tmp_path / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return Tls(tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "cert.pem")


async def generate(box: Box, channel: grpc.aio.Channel) -> list[int]:
    request = GenerateRequest(prompt="hello", stop=StopConditions(max_tokens=5))
    async with channel:
        stub = InferenceServiceStub(channel)
        call = stub.Generate(request, metadata=bearer(box.acme), timeout=5)
        return [token.id async for response in call for token in response.tokens]


async def test_every_hop_speaks_mutual_tls(box: Box, tls: Tls) -> None:
    files = {"cert": tls.cert, "key": tls.key, "ca": tls.ca}
    router = await box.router(
        **{f"tls_{what}": file for what, file in files.items()},
        **{f"runner_{what}": file for what, file in files.items()},
    )
    await box.runner("a", tls=tls)
    address = f"127.0.0.1:{router.port}"
    assert await generate(box, open_channel(address, tls)) == expected_ids("hello", 5)
    for stranger in (None, Tls(ca=tls.ca)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(box, open_channel(address, stranger))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
