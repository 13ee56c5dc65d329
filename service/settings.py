"""How a process of ours is told its settings: by flags, or by its environment.

The settings that routers and runners have in common are types here.
"""

import sys
from pathlib import Path
from typing import Annotated, TypeVar

import structlog
from pydantic import AfterValidator, AliasChoices, ByteSize, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

log = structlog.get_logger(__name__)


class Size(ByteSize):
    """A number of bytes. It is read from 268435456, 256MiB or 0.25GiB, and shown as 256 MiB."""

    def __str__(self) -> str:
        size = int(self)
        for unit in ("bytes", "KiB", "MiB", "GiB"):
            if size < 1024 or size % 1024:
                return f"{size} {unit}"
            size //= 1024
        return f"{size} TiB"


def settings_of(process: str) -> SettingsConfigDict:
    """How `granatum <process>` reads its settings: --max-queue, or GRANATUM_<PROCESS>_MAX_QUEUE."""
    return SettingsConfigDict(
        env_prefix=f"GRANATUM_{process.upper()}_",
        cli_prog_name=f"granatum {process}",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        frozen=True,
    )


def _not_blank(key: SecretStr) -> SecretStr:
    if not key.get_secret_value().strip():
        raise ValueError("the cluster key is empty: set GRANATUM_CLUSTER_KEY")
    return key


ClusterKey = Annotated[
    SecretStr,
    AfterValidator(_not_blank),
    Field(
        validation_alias=AliasChoices("cluster-key", "GRANATUM_CLUSTER_KEY"),
        description="the secret that routers and runners share; rather set GRANATUM_CLUSTER_KEY",
    ),
]
StoreUrl = Annotated[
    str, Field(description="the adapters' store, such as file:///path or s3://bucket/path")
]
ListenAddress = Annotated[str, Field(description="host:port to serve on; port 0: any free one")]
Certificate = Annotated[Path | None, Field(description="PEM certificate to serve with")]
CertificateKey = Annotated[Path | None, Field(description="PEM key of --tls-cert")]
Insecure = Annotated[bool, Field(description="plaintext beyond this machine, without TLS")]

Given = TypeVar("Given", bound=BaseSettings)


def read_settings(kind: type[Given]) -> Given:
    """The settings of the command line and the environment.

    If they are not right, each wrong flag is named, on a terminal as people read it and else in
    the log, and the process ends with status 2.
    """
    try:
        return kind(_cli_parse_args=True)
    except ValidationError as error:
        flags = ((".".join(map(str, e["loc"])).replace("_", "-"), e) for e in error.errors())
        wrong = [f"--{flag}: {e['msg']}" for flag, e in flags]
        if sys.stderr.isatty():
            sys.stderr.writelines(f"{kind.model_config['cli_prog_name']}: {w}\n" for w in wrong)
        else:
            log.error("the settings are not right", wrong=wrong)
        sys.exit(2)
