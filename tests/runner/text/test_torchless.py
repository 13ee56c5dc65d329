"""transformers without torch, in fresh processes: lighter, and otherwise the same."""

import subprocess
import sys

from granatum.examples.tasks import BASE_MODEL
from granatum.models.config import read_config
from granatum.runner.text.tokenizer import Tokenizer
from granatum.v1.inference_pb2 import Chat, ChatMessage

READ = f"""
from pathlib import Path
import sys
from granatum.runner.text.torchless import import_transformers
import_transformers()
import granatum.runner.app
from granatum.models.config import read_config
from granatum.runner.text.tokenizer import Tokenizer
from granatum.v1.inference_pb2 import Chat, ChatMessage
directory = Path({str(BASE_MODEL)!r})
tokenizer = Tokenizer(directory)
print(tokenizer.encode("größe>"))
print(tokenizer.encode_chat(Chat(messages=[ChatMessage(role="user", content="hi")])))
print(tokenizer.decode(tokenizer.encode("größe>")), tokenizer.size, sorted(tokenizer.end_ids))
print(read_config(directory))
print("torch" in sys.modules, "triton" in sys.modules)
"""


def output(program: str) -> list[str]:
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not child.stderr
    return child.stdout.splitlines()


def test_the_front_needs_no_torch_and_reads_the_same() -> None:
    tokenizer = Tokenizer(BASE_MODEL)
    ids = tokenizer.encode("größe>")
    assert output(READ) == [
        str(ids),
        str(tokenizer.encode_chat(Chat(messages=[ChatMessage(role="user", content="hi")]))),
        f"{tokenizer.decode(ids)} {tokenizer.size} {sorted(tokenizer.end_ids)}",
        str(read_config(BASE_MODEL)),
        "False False",
    ]


def test_torch_can_be_had_afterwards_and_transformers_stays_without() -> None:
    program = """
from granatum.runner.text.torchless import import_transformers
import_transformers()
import torch
from transformers.utils import is_torch_available
print(torch.zeros(1).item(), is_torch_available())
"""
    assert output(program) == ["0.0 False"]


def test_where_torch_is_already_transformers_stays_whole() -> None:
    program = """
import torch
from granatum.runner.text.torchless import import_transformers
import_transformers()
from transformers.utils import is_torch_available
print(is_torch_available())
"""
    assert output(program) == ["True"]
