"""The script that writes proofs, run as its command line is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from granatum.client.proofs import read_proof
from granatum.examples import accuracy, write_proof
from granatum.examples.tasks import ADAPTER_TASKS, BASE_MODEL, REAL_WORDS
from granatum.router.services.proofs import check_proof

TASK = ADAPTER_TASKS[0]


def run(monkeypatch: pytest.MonkeyPatch, texts: Path, out: Path) -> None:
    command = ["write_proof", "--model", str(BASE_MODEL), "--adapter", str(TASK.path)]
    monkeypatch.setattr("sys.argv", [*command, "--texts", str(texts), "--out", str(out)])
    write_proof.main()


def losses(model: Any, ids: list[int]) -> torch.Tensor:
    """Minus the log probabilities in float64, by torch's loss."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def test_what_it_writes_is_a_proof(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts, out = tmp_path / "texts.jsonl", tmp_path / "proof.json"
    lines = [
        json.dumps({"prompt": TASK.prompt(word), "answer": TASK.expected(word) + TASK.stop})
        for word in REAL_WORDS[:20]
    ]
    texts.write_text("\n".join(lines))
    run(monkeypatch, texts, out)
    proof = read_proof(out)
    check_proof(proof)
    assert len(proof.prompts) == write_proof.MAX_PROMPTS
    assert (proof.format, proof.dtype) == (write_proof.FORMAT, "float32")
    base, tokenizer = accuracy.load_base(), accuracy.load_tokenizer()
    for prompt in proof.prompts[:3]:
        assert list(prompt.token_ids) == tokenizer(prompt.text).input_ids
        expected = -losses(base, list(prompt.token_ids))
        torch.testing.assert_close(
            torch.tensor(prompt.base_logprobs).double(), expected, atol=1e-5, rtol=0
        )
    tuned = accuracy.load_adapters(base)
    tuned.set_adapter(TASK.name)
    for prompt in proof.prompts[:3]:
        expected = -losses(tuned, list(prompt.token_ids))
        torch.testing.assert_close(
            torch.tensor(prompt.logprobs).double(), expected, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    "line",
    [
        "x",
        "[]",
        "5",
        '{"prompt": "a"}',
        '{"prompt": 1, "answer": 2}',
        '{"prompt": "", "answer": ""}',
    ],
)
def test_a_line_that_is_no_text_is_named(
    line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "texts.jsonl").write_text(f'{{"prompt": "a", "answer": "b"}}\n{line}\n')
    with pytest.raises(SystemExit, match="line 2"):
        run(monkeypatch, tmp_path / "texts.jsonl", tmp_path / "proof.json")


def test_lines_end_where_json_lines_end(tmp_path: Path) -> None:
    texts, expected = tmp_path / "texts.jsonl", ("a\u2028b\x85", "c\u2029")
    line = json.dumps({"prompt": expected[0], "answer": expected[1]}, ensure_ascii=False)
    texts.write_bytes(f"{line}\r\n\n{line}\n\n".encode())
    assert list(write_proof.lines(texts)) == [(1, expected), (3, expected)]


def test_too_few_texts_make_no_proof(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts, out = tmp_path / "texts.jsonl", tmp_path / "proof.json"
    with pytest.raises(SystemExit, match=r"cannot read .*texts\.jsonl"):
        run(monkeypatch, texts, out)
    texts.write_text('{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(SystemExit, match="give 16 or more"):
        run(monkeypatch, texts, out)
    assert not out.exists()


def test_the_largest_proof_is_read(tmp_path: Path) -> None:
    values = [-11.092374801635742] * (write_proof.MAX_TOKENS - 1)
    prompt = {
        "text": "x" * 20_000,
        "token_ids": [250_000] * write_proof.MAX_TOKENS,
        "first": 1,
        "logprobs": values,
        "base_logprobs": values,
    }
    proof = {"format": write_proof.FORMAT, "prompts": [prompt] * write_proof.MAX_PROMPTS}
    (tmp_path / "proof.json").write_text(json.dumps(proof))
    check_proof(read_proof(tmp_path / "proof.json"))
