"""Megatron with the weights of our NeMo checkpoint computes what Hugging Face computes with the original's."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from tests.conftest import make_tiny_llama
from tests.families import CASES, save_tiny
from tests.megatron.ranks import run_ranks

pytestmark = pytest.mark.parallel

LLAMA31 = {
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "max_position_embeddings": 4096,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
LAYOUTS = [(1, 1), (2, 1), (1, 2)]


def _megatron_logits(checkpoint: Path, ids: torch.Tensor, tensor_parallel: int, pipeline_parallel: int):
    """Return the fp32 logits [n, s, vocab] on the last pipeline stage, None on the others."""
    import fiddle
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from nemo.lightning import io

    from nemo_pvs.megatron.attention import FUSED_KERNELS, sdpa_layer_spec
    from nemo_pvs.megatron.cpu import megatron_on_cpu

    with megatron_on_cpu():
        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel)
        model_parallel_cuda_manual_seed(1)
        stored = io.load_context(checkpoint / "context", subpath="model", build=False).config
        settings = {
            **dict.fromkeys(FUSED_KERNELS, False),
            "transformer_layer_spec": sdpa_layer_spec,
            "use_cpu_initialization": True,
            "params_dtype": torch.float32,
            "pipeline_dtype": torch.float32,
            "bf16": False,
            "parallel_output": False,
            "tensor_model_parallel_size": tensor_parallel,
            "pipeline_model_parallel_size": pipeline_parallel,
        }
        for name, value in settings.items():
            setattr(stored, name, value)
        config = fiddle.build(stored)
        first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        model = config.configure_model(tokenizer=None, pre_process=first, post_process=last).float().eval()
        wanted = model.sharded_state_dict(prefix="module.")
        loaded = dist_checkpointing.load(wanted, str(checkpoint / "weights"), validate_access_integrity=False)
        weights = {name.removeprefix("module."): value for name, value in loaded.items() if name.startswith("module.")}
        missing = model.load_state_dict(weights, strict=False)
        assert not [name for name in missing.missing_keys if not name.endswith("_extra_state")]
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        with torch.no_grad():
            if not first:
                hidden = torch.empty(ids.shape[1], ids.shape[0], config.hidden_size)
                torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
                model.set_input_tensor(hidden)
            output = model(ids, positions, None)
            if not last:
                torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return output.numpy() if last else None


def _largest_difference(folder: Path, nemo: Path, ids: torch.Tensor, layout: tuple[int, int]) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(ids).logits
    results = run_ranks(layout[0] * layout[1], _megatron_logits, nemo, ids, *layout)
    return max(float((torch.from_numpy(got) - expected).abs().max()) for got in results if got is not None)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"TP={layout[0]} PP={layout[1]}")
@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, LLAMA31], ids=["tied", "Llama 3.1 rope scaling"])
def test_tiny_llama_has_the_same_logits(config, layout, tmp_path):
    folder = make_tiny_llama(tmp_path / "hf", **config)
    write_nemo(HuggingFaceSource(folder), tmp_path / "nemo")
    ids = torch.randint(0, 128, (2, 200), generator=torch.Generator().manual_seed(0))
    assert _largest_difference(folder, tmp_path / "nemo", ids, layout) < 1e-4


@pytest.mark.parametrize(
    ("family", "settings", "layout"),
    [
        *(pytest.param(family, settings, (1, 1), id=f"{family} {about}") for family, about, settings in CASES),
        # A layer in which everything that is sharded by heads or rows is there: biases, or norms of queries and keys.
        *(
            pytest.param(family, settings, (2, 1), id=f"{family} TP=2")
            for family, about, settings in CASES
            if (family, about) in {("llama", "biases"), ("qwen2", "plain"), ("qwen3", "plain")}
        ),
    ],
)
def test_every_family_has_the_same_logits(family, settings, layout, tmp_path):
    folder = save_tiny(tmp_path / "hf", family, **settings)
    write_nemo(HuggingFaceSource(folder), tmp_path / "nemo")
    ids = torch.randint(0, 128, (2, 60), generator=torch.Generator().manual_seed(0))
    assert _largest_difference(folder, tmp_path / "nemo", ids, layout) < 1e-4


def test_attention_without_a_window_refuses_sequences_beyond_it(tmp_path):
    write_nemo(HuggingFaceSource(save_tiny(tmp_path / "hf", "mistral", sliding_window=48)), tmp_path / "nemo")
    ids = torch.zeros(1, 49, dtype=torch.long)
    with pytest.raises(AssertionError, match=r"UserError: Sequences of 49 tokens do not fit .* window of 48"):
        run_ranks(1, _megatron_logits, tmp_path / "nemo", ids, 1, 1)
