"""What every process makes of wrong settings."""

import pytest
from pydantic import Field, TypeAdapter
from pydantic_settings import BaseSettings
from structlog.testing import capture_logs

from granatum.service.cluster_key import check_cluster_key
from granatum.service.settings import ClusterKey, Size, read_settings, settings_of
from granatum.v1.errors import Unauthenticated


class Sample(BaseSettings):
    """Settings of a process "sample"."""

    model_config = settings_of("sample")
    most_pages: int = Field(1, ge=1)
    cluster_key: ClusterKey


def run_with(monkeypatch: pytest.MonkeyPatch, *flags: str) -> Sample:
    monkeypatch.setattr("sys.argv", ["sample", *flags])
    return read_settings(Sample)


def test_flags_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANATUM_SAMPLE_MOST_PAGES", "3")
    monkeypatch.setenv("GRANATUM_CLUSTER_KEY", "secret")
    assert run_with(monkeypatch).most_pages == 3
    settings = run_with(monkeypatch, "--most-pages", "4")
    assert settings.most_pages == 4
    assert settings.cluster_key.get_secret_value() == "secret"
    assert "secret" not in repr(settings)


def test_every_wrong_flag_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with capture_logs() as logs, pytest.raises(SystemExit) as ended:
        run_with(monkeypatch, "--most-pages", "0", "--cluster-key", " ")
    assert ended.value.code == 2
    (said,) = logs
    assert said["log_level"] == "error"
    pages, key = said["wrong"]
    assert pages.startswith("--most-pages: ")
    assert key.startswith("--cluster-key: ")
    assert "GRANATUM_CLUSTER_KEY" in key


def test_on_a_terminal_wrong_flags_are_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with pytest.raises(SystemExit):
        run_with(monkeypatch, "--most-pages", "0", "--cluster-key", " ")
    pages, key = capsys.readouterr().err.splitlines()
    assert pages.startswith("granatum sample: --most-pages: ")
    assert key.startswith("granatum sample: --cluster-key: ")


@pytest.mark.parametrize(
    ("text", "number", "shown"),
    [
        ("268435456", 1 << 28, "256 MiB"),
        ("256MiB", 1 << 28, "256 MiB"),
        ("1.5 GiB", 3 << 29, "1536 MiB"),
        ("1TiB", 1 << 40, "1 TiB"),
        ("1025", 1025, "1025 bytes"),
    ],
)
def test_a_size_is_read_and_shown_with_its_unit(text: str, number: int, shown: str) -> None:
    size = TypeAdapter(Size).validate_python(text)
    assert (size, str(size)) == (number, shown)


def test_another_cluster_key_is_refused() -> None:
    check_cluster_key("schlüssel", "schlüssel")
    for given in ("", "schlussel"):
        with pytest.raises(Unauthenticated, match="GRANATUM_CLUSTER_KEY"):
            check_cluster_key(given, "schlüssel")
