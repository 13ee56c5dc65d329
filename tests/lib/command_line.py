"""The command `granatum` as a real process."""

import asyncio
import os
import sys


async def granatum(*arguments: str | bytes, **env: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "granatum.cli", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200", **env},
    )
    output, errors = await child.communicate()
    assert child.returncode is not None
    return child.returncode, output.decode(), errors.decode()
