"""The base model that adapters are made for: its shape, from config.json, and its identity."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granatum.models.config import ModelConfig, parse_config
from granatum.models.config_fields import Fields
from granatum.models.families import LLAMA, Family, Module
from granatum.models.folder import config_file
from granatum.models.identity import fingerprint


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model's name and shape.

    `features` maps each projection to (in_features, out_features). `fingerprint` has 64 hexadecimal
    digits. Two models with equal fingerprints can continue each other's streams: shape, weights,
    tokenizer and end tokens are the same (`identity.py`). `family` names the modules.
    """

    name: str
    num_layers: int
    features: dict[str, tuple[int, int]]
    fingerprint: str
    family: Family = LLAMA
    origin: str = ""
    """What config.json says that the model was loaded from, at times on another machine."""
    folder: Path = Path()
    """Where its files lie."""

    @classmethod
    def from_config(cls, path: Path | str, name: str | None = None) -> "BaseModel":
        """Read a model directory, or that of a config.json. The name is the directory's if absent.

        The identity is that of all the model's files in the directory: routers and runners need
        the same files, not config.json alone. Raises InvalidRequest if there is no config.json, if
        a field of it cannot be served, or if another file of the model is damaged.
        """
        file = config_file(Path(path))
        fields = Fields.read(file)
        config = parse_config(fields)
        return cls(
            name=name or _folder_name(file.parent.resolve()),
            num_layers=config.layers,
            features=config.features,
            fingerprint=fingerprint(_shape(config), fields.values, file.parent),
            family=config.family,
            origin=origin if isinstance(origin := fields.values.get("_name_or_path"), str) else "",
            folder=file.parent,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """What the model is called, the best name first."""
        return self.name, self.origin

    @property
    def modules(self) -> dict[str, Module]:
        """The linears of a layer that can be adapted, by name."""
        return {module.name: module for module in self.family.modules}

    def module_of(self, projection: str) -> Module:
        """The module that holds a projection's rows."""
        return next(m for m in self.family.modules if projection in m.projections)

    def module_name(self, layer: int, module: str) -> str:
        """The module's name in transformers, such as `model.layers.0.self_attn.q_proj`."""
        return f"model.layers.{layer}.{self.modules[module].path}"

    def module_features(self, module: str) -> tuple[int, int]:
        """(in_features, out_features) of a module; its rows are those of all its projections."""
        parts = [self.features[projection] for projection in self.modules[module].projections]
        return parts[0][0], sum(outputs for _, outputs in parts)


def _folder_name(folder: Path) -> str:
    """The model's name by its folder. Hugging Face's cache has it two folders further up."""
    cached = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.rpartition("--")[2]
    return folder.name


def _shape(config: ModelConfig) -> dict[str, Any]:
    """Every setting that decides what the model computes, by its name in config.json.

    Stored adapters and images carry this digest. Add a setting only if it changes what the model
    computes, and only where it does.
    """
    shape = {
        "model_type": config.family.model_type,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "rms_norm_eps": config.rms_eps,
        "hidden_act": config.activation,
        "tie_word_embeddings": config.tied,
        "attention_bias": bool(config.biased - {"gate_up", "down"}),
        "mlp_bias": bool(config.biased & {"gate_up", "down"}),
        "sliding_window": config.window,
        "rope": {
            # Stored adapters have the original positions as a float.
            name: float(value) if type(value) is int else value
            for name, value in config.rope.settings.items()
        },
    }
    return shape | {name: getattr(config, name) for name in config.family.multipliers}
