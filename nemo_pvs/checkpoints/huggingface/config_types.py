"""Type checks for the settings in a Hugging Face config, so that a message names the key that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_pvs.errors import UserError

_LARGEST = 2**48
"""Upper limit for any size or count in a config."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _is_size(value: Any) -> bool:
    return _is_count(value) and bool(value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e300


def _is_token(value: Any) -> bool:
    """Return whether this is a token id or a list of token ids; -1 means none in old configs."""
    ids = value if isinstance(value, list) else [value]
    return all(isinstance(id_, int) and not isinstance(id_, bool) and -1 <= id_ < _LARGEST for id_ in ids)


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _are_settings(value: Any) -> bool:
    return isinstance(value, Mapping)


_KINDS: tuple[tuple[Callable[[Any], bool], str, tuple[str, ...]], ...] = (
    (_are_texts, 'a list of names, such as ["LlamaForCausalLM"]', ("architectures", "layer_types")),
    (_is_text, "a name", ("model_type", "hidden_act", "torch_dtype", "dtype", "sparsity_masks")),
    (
        _is_size,
        "a whole number of 1 or more",
        (
            *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "vocab_size", "max_position_embeddings"),
        ),
    ),
    (_is_count, "a whole number of 0 or more", ("sliding_window", "max_window_layers")),
    (_is_positive, "a positive number", ("rms_norm_eps", "rope_theta", "initializer_range")),
    (_is_share, "a number from 0 to 1", ("attention_dropout",)),
    (
        _is_flag,
        "true or false",
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_cache"),
    ),
    (_is_token, "the id of a token", ("bos_token_id", "eos_token_id", "pad_token_id")),
    (_are_settings, "a dictionary", ("rope_scaling", "rope_parameters")),
)


def check_types(config: Mapping[str, Any], where: str | Path) -> None:
    """Refuse a config in which a setting does not have the type that Transformers expects; null counts as absent.

    Args:
        config: The parsed file.
        where: Name of the file in messages.

    Raises:
        UserError: a setting has the wrong type; the message names the first one.
    """
    for fits, expected, keys in _KINDS:
        for key in keys:
            if config.get(key) is not None and not fits(config[key]):
                raise UserError(
                    f"{where} has {_short(config[key])} for {key}, which must be {expected}; restore the file."
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]} ..."
