"""Writes a proof of an adapter: ``python -m granatum.examples.write_proof --help``.

A proof holds the log probabilities that transformers and PEFT compute on some texts, under the
adapter and under the base model alone.  An upload that carries the file is refused unless the
fleet computes the same.

The texts are JSON Lines, ``{"prompt": "...", "answer": "..."}``; 16 at most are used.  Prompt and
answer are scored together: tokens that the adapter is sure about tell little.  Give the base model
as it is served, not quantised, with its tokenizer.  Needs torch, transformers and peft.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

try:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError as error:
    raise SystemExit(f"{error.name} is missing: pip install torch transformers peft") from None

FORMAT = "granatum-proof/1"
MAX_PROMPTS, MAX_TOKENS, LEAST_SCORED = 16, 2048, 16


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
    """Each line's text and token ids, cut to what a proof may hold. Empty lines are passed over."""
    for number, (prompt, answer) in lines(texts):
        ids = tokenizer(prompt).input_ids + tokenizer(answer, add_special_tokens=False).input_ids
        if len(ids) < 2:
            raise SystemExit(f"{texts}, line {number}: give a text of two tokens or more")
        yield prompt + answer, ids[:MAX_TOKENS]


def lines(texts: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    """The number, the prompt and the answer of each line."""
    try:
        written = texts.read_bytes().split(b"\n")  # splitlines would cut within texts
    except OSError as error:
        raise SystemExit(f"cannot read {texts} ({error.strerror})") from None
    for number, line in enumerate(written, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            prompt, answer = fields["prompt"], fields["answer"]
            (prompt + answer).encode()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            example = '{"prompt": "...", "answer": "..."}'
            raise SystemExit(f"{texts}, line {number}: it is not {example} ({error!r})") from None
        yield number, (prompt, answer)


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
    scored = sum(len(ids) - 1 for _, ids in prompts)
    if scored < LEAST_SCORED:
        raise SystemExit(
            f"{options.texts} has {scored} tokens to score: give {LEAST_SCORED} or more"
        )
    dtype = getattr(torch, options.dtype)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(options.device)
    model = PeftModel.from_pretrained(base, options.adapter).eval()
    options.out.write_text(json.dumps(proof(model, prompts)))
    print(f"{options.out}: {scored} tokens")


if __name__ == "__main__":
    main()
