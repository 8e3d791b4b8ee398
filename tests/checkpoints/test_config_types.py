"""Settings of another type than Transformers gives them are refused by their key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_pvs.checkpoints.huggingface.config import read_config
from nemo_pvs.checkpoints.huggingface.config_types import check_types
from nemo_pvs.errors import UserError


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("architectures", 1, "a list of names"),
        ("architectures", "LlamaForCausalLM", "a list of names"),
        ("architectures", [["LlamaForCausalLM"]], "a list of names"),
        ("architectures", {"LlamaForCausalLM": 1}, "a list of names"),
        ("model_type", 5, "a name"),
        ("hidden_size", "64", "a whole number of 1 or more"),
        ("num_attention_heads", 0, "a whole number of 1 or more"),
        ("num_hidden_layers", True, "a whole number of 1 or more"),
        ("vocab_size", 2**60, "a whole number of 1 or more"),
        ("max_position_embeddings", 1e6, "a whole number of 1 or more"),
        ("rope_theta", -1, "a positive number"),
        ("rms_norm_eps", float("nan"), "a positive number"),
        ("tie_word_embeddings", "yes", "true or false"),
        ("eos_token_id", [1, "2"], "the id of a token"),
        ("rope_scaling", [8.0], "a dictionary"),
    ],
)
def test_a_setting_of_another_type_is_refused(tmp_path: Path, key: str, value: Any, what: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value}))
    with pytest.raises(UserError, match=f"config.json has .* for {key}, which must be {what}"):
        read_config(path)


def test_what_models_have_is_taken() -> None:
    check_types(
        {
            "architectures": ["LlamaForCausalLM"],
            "eos_token_id": [128001, 128008],
            "pad_token_id": -1,
            "rope_theta": 500000,
            "rope_scaling": None,
            "sliding_window": None,
            "attention_dropout": 0,
            "head_dim": None,
        },
        "config.json",
    )
