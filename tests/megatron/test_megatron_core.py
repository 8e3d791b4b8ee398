"""Megatron-Core loads what we write for Megatron-Bridge, at any TP x PP, and computes what Hugging Face does.

The model is built of the fields in ``run_config.yaml``, as Bridge's providers build theirs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import nemo_pvs.modeling  # noqa: F401  # registers the class for uneven layers
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.megatron.write import write_megatron
from nemo_pvs.model.shape import LayerSizes
from tests.families import CASES, save_tiny
from tests.megatron.ranks import run_ranks
from tests.uneven_model import make_uneven

pytestmark = pytest.mark.parallel

LAYOUTS = [(1, 1), (2, 1), (1, 2)]
LLAMA31 = {
    "rope_theta": 500000.0,
    "max_position_embeddings": 16384,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SAME_HEADS = tuple(LayerSizes(ffn, 8, groups) for ffn, groups in ((96, 2), (40, 4), (64, 8), (128, 2)))
BOUNDS = LayerSizes(ffn=128, heads=32, kv_groups=8)


def _model(fields: dict[str, Any], tensor_parallel: int, pipeline_parallel: int) -> torch.nn.Module:
    """Build this rank's part of the model that a provider's fields describe, of Megatron's own layers."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig

    uneven = fields["_target_"].endswith("HeterogeneousProvider")
    config_class = HeterogeneousTransformerConfig if uneven else TransformerConfig
    known = {field.name for field in dataclasses.fields(config_class) if field.init}
    assert fields["activation_func"] == {"_target_": "torch.nn.functional.silu", "_call_": False}
    stated = {name: value for name, value in fields.items() if name in known}
    fusions = [name for name in stated if name.endswith("_fusion")]
    config = config_class(
        **{
            **stated,
            **dict.fromkeys((*fusions, "persist_layer_norm", "gradient_accumulation_fusion"), False),
            "activation_func": torch.nn.functional.silu,
            "window_size": tuple(stated["window_size"]) if stated["window_size"] else None,
            "params_dtype": torch.float32,
            "pipeline_dtype": torch.float32,
            "autocast_dtype": None,
            "cp_comm_type": None,
            "use_cpu_initialization": True,
            "tensor_model_parallel_size": tensor_parallel,
            "pipeline_model_parallel_size": pipeline_parallel,
        }
    )
    spec = (
        get_gpt_heterogeneous_layer_spec(config, use_te=False)
        if uneven
        else get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    )
    model = GPTModel(
        config,
        spec,
        vocab_size=fields["vocab_size"],
        max_sequence_length=fields["seq_length"],
        parallel_output=False,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=fields["share_embeddings_and_output_weights"],
        position_embedding_type=fields["position_embedding_type"],
        rotary_percent=fields["rotary_percent"],
        rotary_base=fields["rotary_base"],
        rope_scaling=fields["rope_scaling"],
        rope_scaling_factor=fields["rope_scaling_factor"],
        seq_len_interpolation_factor=fields["seq_len_interpolation_factor"],
    )
    return model.float().eval()


def _logits(root: Path, ids: torch.Tensor, tensor_parallel: int, pipeline_parallel: int) -> Any:
    """Return the logits [n, s, vocab] on the last pipeline stage, None on the others."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemo_pvs.megatron.cpu import megatron_on_cpu

    def ones(*size: int, device: Any = None, make: Any = torch.ones, **settings: Any) -> torch.Tensor:
        return make(*size, **settings)

    iteration = root / f"iter_{int((root / 'latest_checkpointed_iteration.txt').read_text()):07d}"
    with megatron_on_cpu(), mock.patch("torch.ones", ones):  # the mask of a window is made on a GPU by name
        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel)
        model_parallel_cuda_manual_seed(1)
        fields = yaml.safe_load((iteration / "run_config.yaml").read_text())["model"]
        model = _model(fields, tensor_parallel, pipeline_parallel)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(iteration))
        model.load_state_dict(loaded["model"])
        rows, length = ids.shape
        positions = torch.arange(length).expand_as(ids)
        mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
        with torch.no_grad():
            if not model.pre_process:
                hidden = torch.empty(length, rows, fields["hidden_size"])
                torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
                model.set_input_tensor(hidden)
            output = model(ids, positions, mask)
            if not model.post_process:
                torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return output.numpy() if model.post_process else None


def _assert_same_logits(folder: Path, root: Path, layout: tuple[int, int], length: int = 60) -> None:
    write_megatron(HuggingFaceSource(folder), root)
    ids = torch.randint(0, 128, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    results = run_ranks(layout[0] * layout[1], _logits, root, ids, *layout)
    [logits] = [torch.from_numpy(result) for result in results if result is not None][-1:]
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("family", "settings", "layout"),
    [
        pytest.param(family, settings, layout, id=f"{family} {about} TP={layout[0]} PP={layout[1]}")
        for family, about, settings in CASES
        for layout in LAYOUTS
        if layout == (1, 1) or about in ("plain", "window")
    ],
)
def test_every_family_has_the_same_logits(family, settings, layout, tmp_path):
    folder = save_tiny(tmp_path / "hf", family, num_hidden_layers=4, **settings)
    _assert_same_logits(folder, tmp_path / "root", layout, length=100)  # longer than the window


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"TP={layout[0]} PP={layout[1]}")
def test_scaled_rotary_embeddings_have_the_same_logits(layout, tmp_path):
    folder = save_tiny(tmp_path / "hf", "llama", num_hidden_layers=4, **LLAMA31)
    _assert_same_logits(folder, tmp_path / "root", layout, length=200)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"TP={layout[0]} PP={layout[1]}")
def test_layers_of_different_sizes_have_the_same_logits(layout, tmp_path):
    folder = make_uneven(tmp_path / "hf", std=0.1, sizes=SAME_HEADS, bounds=BOUNDS)
    _assert_same_logits(folder, tmp_path / "root", layout)
