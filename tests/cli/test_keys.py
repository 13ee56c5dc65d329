"""`granatum keys`, as a user runs it."""

from pathlib import Path

import pytest
from command_line import granatum

from granatum.router.services.keys_file import Identity, digest_of, read


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


async def succeed(*arguments: str) -> str:
    """What the command prints."""
    status, output, errors = await granatum("keys", *arguments)
    assert status == 0, errors
    return output


async def test_the_command_adds_lists_and_revokes(file: Path) -> None:
    where = ("--file", str(file))
    key = (await succeed("add", "--tenant", "acme", *where)).strip()
    digest = digest_of(key)
    assert read(file) == {digest: Identity("acme")}
    assert key not in file.read_text(), "keys stand as digests"
    assert file.stat().st_mode & 0o777 == 0o600
    assert await succeed("list", *where) == f"{digest[:16]} tenant acme\n"
    assert (await succeed("revoke", digest[:16], *where)).endswith(" is revoked\n")
    assert await succeed("list", *where) == ""


async def test_the_command_takes_and_shows_the_bound(file: Path) -> None:
    where = ("--file", str(file))
    await succeed("add", "--tenant", "acme", "--max-priority", "5", *where)
    assert (await succeed("list", *where)).endswith(" tenant acme, priority up to 5\n")


@pytest.mark.parametrize("command", [("add", "--admin"), ("list",), ("revoke", "0" * 64)])
async def test_a_file_that_cannot_be_is_one_clear_line(
    file: Path, command: tuple[str, ...]
) -> None:
    file.touch()
    status, _, errors = await granatum("keys", *command, "--file", str(file / "keys.json"))
    assert status == 1
    (line,) = errors.splitlines()
    assert str(file / "keys.json") in line


@pytest.mark.parametrize(
    ("owner", "status", "said"),
    [
        (("--tenant", "../etc"), 1, "tenant name"),
        (("--tenant", "acme", "--admin"), 2, "either --tenant NAME or --admin"),
        ((), 2, "either --tenant NAME or --admin"),
    ],
)
async def test_a_key_has_one_right_owner(
    file: Path, owner: tuple[str, ...], status: int, said: str
) -> None:
    given, _, errors = await granatum("keys", "add", *owner, "--file", str(file))
    assert (given, file.exists()) == (status, False)
    assert said in errors
