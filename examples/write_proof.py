"""Writes a proof of an adapter: ``python -m granatum.examples.write_proof --help``.

A proof holds the log probabilities that transformers and PEFT compute on some texts, under the
adapter and under the base model alone.  An upload that carries the file is refused unless the
fleet computes the same.

The texts are JSON Lines, ``{"prompt": "...", "answer": "..."}``; 16 at most are used.  Prompt and
answer are scored together: tokens of which the adapter is sure tell little.  Give the base model
as it is served, not quantised, with its tokenizer.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

FORMAT = "granatum-proof/1"
MAX_PROMPTS, MAX_TOKENS = 16, 2048


@torch.inference_mode()
def logprobs(model: Any, ids: list[int]) -> list[float]:
    """The log probability of each token after the first, given those before it; in float32."""
    logits = model(torch.tensor([ids], device=model.device)).logits[0].float()
    chosen = torch.tensor(ids[1:], device=logits.device)[:, None]
    values: list[float] = logits[:-1].log_softmax(-1).gather(1, chosen)[:, 0].tolist()
    return values


def proof(model: PeftModel, prompts: list[tuple[str, list[int]]]) -> dict[str, Any]:
    """The proof of the model's active adapter on texts with their token ids."""
    entries = []
    for text, ids in prompts:
        with model.disable_adapter():
            base = logprobs(model, ids)
        entries.append(
            {
                "text": text,
                "token_ids": ids,
                "first": 1,
                "logprobs": logprobs(model, ids),
                "base_logprobs": base,
            }
        )
    dtype = str(next(model.get_base_model().parameters()).dtype).removeprefix("torch.")
    return {"format": FORMAT, "dtype": dtype, "prompts": entries}


def tokenized(tokenizer: Any, texts: Path) -> Iterator[tuple[str, list[int]]]:
    """Each line's text and token ids, cut to what a proof may hold."""
    # JSON's texts may hold what splitlines() takes for the end of a line.
    for number, line in enumerate(texts.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            prompt, answer = fields["prompt"], fields["answer"]
            if not (isinstance(prompt, str) and isinstance(answer, str)):
                raise TypeError("both are texts")
        except (ValueError, LookupError, TypeError) as error:
            example = '{"prompt": "...", "answer": "..."}'
            raise SystemExit(f"{texts}, line {number}: it is not {example} ({error!r})") from None
        ids = tokenizer(prompt).input_ids + tokenizer(answer, add_special_tokens=False).input_ids
        yield prompt + answer, ids[:MAX_TOKENS]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the base model's folder or name")
    parser.add_argument("--adapter", required=True, help="the adapter's folder")
    parser.add_argument("--texts", required=True, type=Path, help="JSON Lines of prompt and answer")
    parser.add_argument("--out", required=True, type=Path, help="the proof to write")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = list(islice(tokenized(tokenizer, options.texts), MAX_PROMPTS))
    dtype = getattr(torch, options.dtype)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(options.device)
    model = PeftModel.from_pretrained(base, options.adapter).eval()
    options.out.write_text(json.dumps(proof(model, prompts)))
    print(f"{options.out}: {sum(len(ids) - 1 for _, ids in prompts)} tokens")


if __name__ == "__main__":
    main()
