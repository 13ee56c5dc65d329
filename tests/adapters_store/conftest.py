"""A real S3 server, and the three kinds of store."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from uploading import BASE

from granatum.adapters_store.location import open_objects
from granatum.adapters_store.objects import Objects
from granatum.adapters_store.store import AdapterStore


class S3Server:
    """A process that speaks S3 on a port of its own."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def make_bucket(self) -> str:
        name = f"bucket-{uuid4().hex}"
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        urllib.request.urlopen(request).close()
        return name

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/moto-api/").close()
            except OSError:
                assert time.monotonic() < deadline, "the S3 server did not start"
                assert self._process.poll() is None, "the S3 server ended"
                time.sleep(0.05)
            else:
                return


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3_environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[S3Server], None]:
    def point_at(server: S3Server) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_REGION", "us-east-1")

    return point_at


@pytest.fixture(params=["memory", "directory", "s3"])
def objects(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    s3_environment: Callable[[S3Server], None],
) -> Objects:
    """An empty object store; its scratch directory is below `tmp_path` too."""
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    if request.param == "memory":
        return open_objects("memory://")
    if request.param == "directory":
        return open_objects(str(tmp_path / "store"))
    server = request.getfixturevalue("s3")
    s3_environment(server)
    return open_objects(f"s3://{server.make_bucket()}/some/prefix")


class Clock:
    """A time that moves when told to."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def pass_hours(self, hours: float) -> None:
        self.now += hours * 3600


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(objects: Objects, clock: Clock) -> AdapterStore:
    return AdapterStore(objects, BASE, now=clock)
