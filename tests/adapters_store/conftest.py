"""A real S3 server, and the three kinds of store."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3_server import S3Server
from uploading import BASE, Clock

from granatum.adapters_store.objects.location import open_objects
from granatum.adapters_store.objects.objects import Objects
from granatum.adapters_store.store import AdapterStore


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


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(objects: Objects, clock: Clock) -> AdapterStore:
    return AdapterStore(objects, BASE, now=clock)
