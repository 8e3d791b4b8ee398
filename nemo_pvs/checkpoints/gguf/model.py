"""A GGUF file as a weight source: its keys as config.json, its tensors under their Hugging Face names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_pvs.checkpoints.gguf.file import GgufFile
from nemo_pvs.checkpoints.gguf.names import ROPE_FACTORS, ROTATES_PAIRS, gguf_name, is_rotated, pairs_to_halves
from nemo_pvs.checkpoints.gguf.rope import llama3_scaling
from nemo_pvs.checkpoints.huggingface.shards import few
from nemo_pvs.checkpoints.masks import NoMasks
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout

_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "deci": ("PrunedLlamaForCausalLM", "pruned_llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
"""The class and the model type in config.json; ``deci`` has sizes per layer."""
_WITH_BIASES_OF_QWEN2 = {
    "llama": ("Qwen2ForCausalLM", "qwen2"),
    "deci": ("PrunedQwen2ForCausalLM", "pruned_qwen2"),
}
"""The same for a Qwen 2 that does not fit the graph of that name; ``write_gguf`` makes such files of it."""
_PER_LAYER = {
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
}

# Keys under the architecture's name that are read here, and those that add nothing to the tensors.
_READ = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
}
_SAYS_NOTHING = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
_MUST_BE_ZERO = {"expert_count", "expert_used_count", "attention.sliding_window"}


class GgufSource:
    """The model in a GGUF file."""

    format = "gguf"
    manifest = None
    masks = NoMasks()
    extra_tensors: tuple[str, ...] = ()

    def __init__(self, file: GgufFile, assets: tuple[Path, ...] = ()) -> None:
        """Read the config and check that the file has exactly the tensors that it implies.

        Args:
            file: The file.
            assets: Files to copy along with the model, such as the tokenizer's.

        Raises:
            UserError: the model is of an unsupported family, has a setting that config.json cannot express, or has
                missing, extra or wrongly sized tensors.
        """
        self.assets = assets
        self.folder = file.path.parent
        self._file = file
        self.config: Mapping[str, Any] = _config(file)
        self._shape = Layout.for_config(self.config).shape(self.config)
        self._names = {name: gguf_name(name) for name in Layout.for_config(self.config).parts(self._shape)}
        self._check_tensors()

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which ``read`` returns a tensor."""
        return self._file.dtype(self._names[name])

    @property
    def dtype_of_matrices(self) -> torch.dtype:
        """The dtype of most matrices; vectors are usually float32 whatever the matrices are."""
        names = [name for name in self._names.values() if len(self._file.size(name)) > 1]
        return Counter(self._file.dtype(name) for name in names).most_common(1)[0][0]

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in the stored dtype, or in bfloat16 if it is quantised."""
        tensor = self._file.read(self._names[name])
        if self._architecture in ROTATES_PAIRS and is_rotated(name):
            return pairs_to_halves(tensor, self._shape.head_dim)
        return tensor

    def _check_tensors(self) -> None:
        stored = {*self._file.tensors}
        unknown = sorted(stored - {*self._names.values(), *self._read_as_config()})
        if unknown:
            raise UserError(
                f"{self._file.path} has {len(unknown)} tensors that a {self._architecture} model does not have: "
                f"{few(unknown)}; use the model's Hugging Face folder."
            )
        missing = [name for name in self._names.values() if name not in stored]
        if missing:
            raise UserError(
                f"{self._file.path} lacks {len(missing)} tensors that its keys imply: {few(missing)}; "
                "download it again, or use the model's Hugging Face folder."
            )
        parts = Layout.for_config(self.config).parts(self._shape)
        for name, (part, _) in parts.items():
            expected, stored_size = part.size(self._shape), self._file.size(self._names[name])
            if stored_size != expected:
                raise UserError(
                    f"{self._names[name]} in {self._file.path} is {list(stored_size)}, but the keys imply "
                    f"{list(expected)}; convert the model to GGUF again."
                )

    @property
    def _architecture(self) -> str:
        return str(self._file.get("general.architecture"))

    def _read_as_config(self) -> set[str]:
        return {ROPE_FACTORS} if self._architecture in ROTATES_PAIRS else set()


def _config(file: GgufFile) -> dict[str, Any]:
    """Return the config.json that the keys (and the tensors, where a key is missing) imply."""
    architecture = file.get("general.architecture", "")
    if architecture not in _ARCHITECTURES:
        raise UserError(
            f"{file.path} is a model of the architecture {architecture or '(none)'}; the GGUF architectures that are "
            f"read are {', '.join(_ARCHITECTURES)} (Mistral is llama there), so use the model's Hugging Face folder."
        )
    _check_keys(file, architecture)
    layers = _size(file, "block_count")
    if f"blk.{layers - 1}.attn_norm.weight" not in file.tensors:  # before anything is allocated per layer
        raise UserError(f"{file.path} does not have the {layers} layers that its keys state; download it again.")
    sizes = _layer_sizes(file, layers)
    heads, hidden = sizes[0]["num_attention_heads"], _size(file, "embedding_length")
    head_dim = _size(file, "attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _size(file, key, head_dim) != head_dim:
            raise UserError(
                f"{architecture}.{key} in {file.path} is {_size(file, key)}, but heads have {head_dim} channels; "
                f"{_ARCHITECTURES[architecture][0]} does not support that, so use the model's Hugging Face folder."
            )
    groups = max(size["num_key_value_heads"] for size in sizes)  # what every layer fits into
    heads_per_group = max(size["num_attention_heads"] // size["num_key_value_heads"] for size in sizes)
    of_qwen2 = architecture == "qwen2"
    name, model_type = _ARCHITECTURES[architecture]
    if architecture in _WITH_BIASES_OF_QWEN2 and _has_biases_of_qwen2(file):
        of_qwen2 = True
        name, model_type = _WITH_BIASES_OF_QWEN2[architecture]
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": model_type,
        "hidden_act": "silu",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": max(size["intermediate_size"] for size in sizes),
        "num_attention_heads": groups * heads_per_group,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "vocab_size": _rows(file, "token_embd.weight"),
        "max_position_embeddings": _size(file, "context_length"),
        "rms_norm_eps": _float(file, "attention.layer_norm_rms_epsilon"),
        "rope_theta": _float(file, "rope.freq_base", 10000.0),
        "rope_scaling": None,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "bfloat16",
    }
    if not of_qwen2:  # which always has biases for q, k and v
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if architecture in ROTATES_PAIRS and not of_qwen2:
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if architecture == "deci":
        config["layer_shapes"] = sizes
    tokens = len(file.get("tokenizer.ggml.tokens", []))
    if tokens > config["vocab_size"]:
        raise UserError(
            f"{file.path} has {tokens:,} tokens, but only {config['vocab_size']:,} rows in its embedding; convert the "
            "model to GGUF again."
        )
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = file.get(f"tokenizer.ggml.{name}_token_id", None)
    config["rope_scaling"] = _rope_scaling(file, config)
    return config


def _has_biases_of_qwen2(file: GgufFile) -> bool:
    """Return whether q and k have biases, but not the output."""
    q, k, output = (f"blk.0.attn_{name}.bias" in file.tensors for name in ("q", "k", "output"))
    return q and k and not output


def _check_keys(file: GgufFile, architecture: str) -> None:
    """Refuse settings that are not read here, because without them the model might compute something else."""
    for key in file.keys:
        name = key.removeprefix(f"{architecture}.")
        zero = name in _MUST_BE_ZERO and not file.get(key)
        if name != key and name not in _READ | _SAYS_NOTHING and not zero:
            raise UserError(
                f"{file.path} has {key} = {str(file.get(key))[:40]}, which is not supported; use the model's Hugging "
                "Face folder."
            )


def _layer_sizes(file: GgufFile, layers: int) -> list[dict[str, int]]:
    """Return the sizes of every layer, which are lists in the keys of ``deci``.

    Raises:
        UserError: they differ in an architecture whose layers are equal, or a layer has none.
    """
    architecture = file.get("general.architecture")
    columns = {}
    for name, key in _PER_LAYER.items():
        values = file.get(f"{architecture}.{key}", None)
        if architecture == "deci" and isinstance(values, list):
            if len(values) != layers or not all(isinstance(value, int) and value > 0 for value in values):
                raise UserError(
                    f"{architecture}.{key} in {file.path} is not one size for each of {layers} layers; use the "
                    "model's Hugging Face folder."
                )
            columns[name] = values
        else:
            default = columns["num_attention_heads"][0] if name == "num_key_value_heads" else None
            columns[name] = [_size(file, key, default)] * layers
    return [{name: values[layer] for name, values in columns.items()} for layer in range(layers)]


def _rope_scaling(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return ``rope_scaling`` of config.json, from the keys or from Llama 3.1's tensor of factors."""
    architecture = file.get("general.architecture")
    prefix = f"{architecture}.rope.scaling."
    kind = file.get(prefix + "type", "none")
    if architecture in ROTATES_PAIRS and ROPE_FACTORS in file.tensors:
        if kind != "none":
            raise UserError(f"{file.path} has both {prefix}type and {ROPE_FACTORS}; convert the model to GGUF again.")
        factors = file.read(ROPE_FACTORS).double().numpy()
        scaling = llama3_scaling(factors, config["rope_theta"], config["head_dim"])
        if scaling is None:
            raise UserError(
                f"The factors in {ROPE_FACTORS} of {file.path} are not those of Llama 3's rope scaling; use the "
                "model's Hugging Face folder."
            )
        return scaling
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(f"{prefix}type in {file.path} is {kind}, which is not supported; use the Hugging Face folder.")
    scaling = {"rope_type": kind, "factor": _float(file, "rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = _size(file, "rope.scaling.original_context_length")
    return scaling


def _size(file: GgufFile, name: str, default: int | None = None) -> int:
    """Return a size: a positive number, the same for all layers."""
    key = f"{file.get('general.architecture')}.{name}"
    value = file.get(key) if default is None else file.get(key, None)
    value = default if value is None else value
    if isinstance(value, list) and len({*value}) == 1:
        value = value[0]
    if isinstance(value, list):
        raise UserError(
            f"{key} in {file.path} differs between layers, which is not supported; use the Hugging Face folder."
        )
    if not isinstance(value, int) or value <= 0:
        raise UserError(f"{key} in {file.path} is {value!r}, which is not a size; convert the model to GGUF again.")
    return value


def _float(file: GgufFile, name: str, default: float | None = None) -> float:
    """Return a float32 value as the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06."""
    key = f"{file.get('general.architecture')}.{name}"
    value = file.get(key) if default is None else file.get(key, default)
    if not isinstance(value, float):
        raise UserError(f"{key} in {file.path} is {value!r}, which is not a number; convert the model to GGUF again.")
    return float(str(np.float32(value)))


def _rows(file: GgufFile, name: str) -> int:
    if name not in file.tensors:
        raise UserError(f"{file.path} has no tensor {name}; download it again.")
    return file.size(name)[0]
