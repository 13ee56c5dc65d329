"""The base model's weights on the device. Projections that share an input are one matrix."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from granatum.kernels.linear.dense import Dense
from granatum.models.checkpoint import required_weight_files
from granatum.models.config import ModelConfig
from granatum.models.families import Group
from granatum.v1.errors import InvalidRequest

_IGNORED = ("rotary_emb.inv_freq",)
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_QUANTISED = (
    *(".qweight", ".qzeros", ".g_idx", ".scales", ".weight_packed", ".weight_shape"),
    *("_scale", "_scale_inv", "_zero_point", ".absmax", ".quant_map", ".SCB", ".weight_format"),
)
"""How names of tensors end that only quantised checkpoints have."""
_UNQUANTISED = "give the model in bfloat16, float16 or float32"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes of checkpoints that are served; each tensor is rounded to the dtype of the weights."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. `input_norm`, `post_norm` are [hidden]; `q_norm`, `k_norm` [head_dim]."""

    input_norm: torch.Tensor
    qkv: Dense
    o: Dense
    post_norm: torch.Tensor
    gate_up: Dense
    down: Dense
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """A model. `embedding` is [vocab, hidden]; `head` multiplies by it if the two are tied."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: Dense

    @property
    def device(self) -> torch.device:
        """The device that all tensors are on."""
        return self.embedding.device


def empty_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    """Weights of the right shapes, not initialised."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def linear(group: str) -> Dense:
        out = sum(config.out_features[group])
        bias = empty(out) if group in config.biased else None
        return Dense(empty(out, config.in_features[group]), bias)

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm=empty(config.hidden),
            post_norm=empty(config.hidden),
            q_norm=empty(config.head_dim) if config.qk_norm else None,
            k_norm=empty(config.head_dim) if config.qk_norm else None,
            **{group.name: linear(group.name) for group in config.family.groups},
        )

    embedding = empty(config.vocab, config.hidden)
    layers = tuple(layer() for _ in range(config.layers))
    head = Dense(embedding if config.tied else empty(config.vocab, config.hidden))
    return Weights(embedding, layers, empty(config.hidden), head)


def random_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    """Weights drawn from a normal distribution of deviation 0.02, norms around one."""
    weights = empty_weights(config, dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    for name, target in targets(config, weights):
        target.normal_(1.0 if "norm" in name else 0.0, 0.02, generator=generator)
    return weights


def load_weights(
    config: ModelConfig, directory: Path, dtype: torch.dtype, device: torch.device
) -> Weights:
    """Read a Hugging Face directory's safetensors, tensor by tensor, to where each tensor belongs.

    Raises:
        InvalidRequest: naming a tensor that is missing, unknown, or of another shape.
    """
    weights = empty_weights(config, dtype, device)
    known = dict(targets(config, weights))
    wanted = dict(known)
    head: torch.Tensor | None = None
    for file in required_weight_files(directory):
        for name, tensor in _tensors(file):
            if (target := wanted.pop(name, None)) is not None:
                _copy(target, tensor, name)
            elif config.tied and name == _HEAD:
                head = tensor
            elif name in known:
                raise _invalid(
                    f"{file.name} holds {name}, which another file held already: "
                    "download the model again"
                )
            elif not name.endswith(_IGNORED):
                raise _misplaced(file, name)
    if head is not None and (target := wanted.pop(_EMBEDDING, None)) is not None:
        _copy(target, head, _HEAD)  # the one tensor is stored under the head's name
    if wanted:
        raise _invalid(
            f"{directory} lacks {len(wanted)} tensors, such as {min(wanted)}: "
            "download the model again"
        )
    if head is not None and not torch.equal(head.to(weights.embedding), weights.embedding):
        raise _invalid(
            f"config.json says tie_word_embeddings, but {_HEAD} differs from the embedding: "
            "set tie_word_embeddings to false to use it, or remove the tensor"
        )
    return weights


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """A file's tensors by name."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                yield name, tensors.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise _invalid(f"{file} cannot be read ({error}): download it again") from error


def targets(config: ModelConfig, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a Hugging Face checkpoint: its name, and the view that is to hold it."""
    yield _EMBEDDING, weights.embedding
    yield "model.norm.weight", weights.norm
    if not config.tied:
        yield _HEAD, weights.head.weight
    for index, layer in enumerate(weights.layers):
        for name, tensor in _layer_targets(config, layer):
            yield f"model.layers.{index}.{name}", tensor


def _layer_targets(config: ModelConfig, layer: LayerWeights) -> Iterator[tuple[str, torch.Tensor]]:
    yield "input_layernorm.weight", layer.input_norm
    yield "post_attention_layernorm.weight", layer.post_norm
    if layer.q_norm is not None and layer.k_norm is not None:
        yield "self_attn.q_norm.weight", layer.q_norm
        yield "self_attn.k_norm.weight", layer.k_norm
    for group in config.family.groups:
        linear: Dense = getattr(layer, group.name)
        sizes = _module_rows(config, group)
        parts = {"weight": linear.weight, "bias": linear.bias}
        for kind, tensor in parts.items():
            if tensor is not None:
                for module, rows in zip(group.modules, torch.split(tensor, sizes), strict=True):
                    yield f"{module.path}.{kind}", rows


def _module_rows(config: ModelConfig, group: Group) -> list[int]:
    """How many rows of a group's weight each of its modules has in the checkpoint."""
    widths = dict(zip(group.projections, config.out_features[group.name], strict=True))
    return [sum(widths[name] for name in module.projections) for module in group.modules]


def _misplaced(file: Path, name: str) -> Exception:
    said = f"{file.name} holds {name}, which this model has no place for"
    if name.endswith(_QUANTISED):
        said += f": its weights are quantised; {_UNQUANTISED}"
    return _invalid(said)


def _copy(target: torch.Tensor, tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype not in _DTYPES:
        raise _invalid(f"{name} is of {tensor.dtype}: {_UNQUANTISED}")
    if tensor.shape != target.shape:
        raise _invalid(
            f"{name} has shape {tuple(tensor.shape)}, not {tuple(target.shape)} as config.json says"
        )
    target.copy_(tensor)


def _invalid(message: str) -> Exception:
    return InvalidRequest(f"the model cannot be loaded: {message}")
