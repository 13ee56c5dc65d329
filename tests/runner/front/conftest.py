"""A tokenizer of bytes, and a runner's front that serves."""

from collections.abc import AsyncIterator

import pytest
from front_rig import READY, Runner, started

from granatum.examples.tokenizer import byte_tokenizer
from granatum.runner.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(directory)
    return Tokenizer(directory)


@pytest.fixture
async def runner(tokenizer: Tokenizer) -> AsyncIterator[Runner]:
    async with started(tokenizer) as runner:
        runner.engine.send(READY)
        await runner.front.loaded.wait()
        yield runner
