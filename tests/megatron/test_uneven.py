"""Uneven layers on real Megatron: the same logits as our Hugging Face class, the same training on every layout."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_pvs.checkpoints.files.torch_dist import TorchDistReader
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.windows import validation_windows
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.trainer import last_checkpoint
from tests.conftest import save_tiny_tokenizer
from tests.megatron.jobs import SEQUENCE, VALIDATION_SAMPLES, tiny_job
from tests.megatron.ranks import run_ranks
from tests.megatron.test_logits import _largest_difference as largest_logit_difference
from tests.megatron.test_training import _largest_difference, _losses, _run, _train
from tests.uneven_model import BIASES, LLAMA3_ROPE, SIZES, make_uneven

pytestmark = pytest.mark.parallel

STEPS = 8


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ({}, (1, 1)),
        ({}, (2, 1)),
        ({"tie_word_embeddings": True}, (1, 2)),
        ({"rope_scaling": LLAMA3_ROPE, "max_position_embeddings": 4096, **BIASES}, (2, 1)),
        ({"attention_bias": True}, (1, 1)),
        ({"family": "mistral", "sliding_window": None}, (2, 1)),
        ({"family": "qwen2"}, (2, 1)),
        ({"family": "qwen3", "tie_word_embeddings": True}, (1, 2)),
    ],
    ids=[
        "TP=1",
        "TP=2",
        "tied, PP=2",
        "llama3 rope and biases, TP=2",
        "attention biases",
        "mistral, TP=2",
        "qwen2, TP=2",
        "qwen3, tied, PP=2",
    ],
)
def test_logits_are_those_of_our_huggingface_class(settings, layout, tmp_path):
    folder = make_uneven(tmp_path / "hf", std=0.1, **settings)
    write_nemo(HuggingFaceSource(folder), tmp_path / "nemo")
    ids = torch.randint(0, 128, (2, 200), generator=torch.Generator().manual_seed(0))
    assert largest_logit_difference(folder, tmp_path / "nemo", ids, layout) < 1e-4


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> TrainingJob:
    """A short run in fp32; tests choose the layout and the folder."""
    folder = tmp_path_factory.mktemp("job")
    model = save_tiny_tokenizer(make_uneven(folder / "model", std=0.02, **BIASES))
    return tiny_job(folder, model, steps=STEPS)


@pytest.fixture(scope="module")
def reference(job, tmp_path_factory) -> tuple[TrainingJob, metrics.Metrics]:
    """The run of one process, and its curve."""
    folder = tmp_path_factory.mktemp("reference")
    curve = _run(job, folder, distributed_optimizer=False)
    assert len(curve.training) == STEPS
    assert curve.training[-1]["loss"] < curve.training[0]["loss"] - 0.2, "it does not learn"
    return replace(job, folder=folder), curve


def test_a_killed_run_goes_on_at_another_layout(job, reference, tmp_path):
    """TP=2 with sequence parallelism until the middle, then PP=2 by turns: the curve of one process."""
    folder = tmp_path / "run"
    folder.mkdir()
    doomed = replace(job, folder=folder, layout=Parallelism(tensor_parallel=2, sequence_parallel=True))
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(2, _train, doomed, 6)
    first_half = metrics.read(doomed.metrics)
    curve = _run(job, folder, pipeline_parallel=2, virtual_pipeline=2)
    assert len(curve.training) == STEPS
    assert first_half.training[-1]["step"] >= 5
    assert doomed.log.read_text().count(f"step 5/{STEPS}") == 2, (
        "it started over instead of at the checkpoint of step 4"
    )
    assert _largest_difference(_losses(curve), _losses(reference[1])) < 1e-4


def test_the_trained_checkpoint_reads_back(job, reference):
    """Read without NeMo it has the validation loss that NeMo measured."""
    trained_job, curve = reference
    trained = open_source(last_checkpoint(trained_job))
    assert shape_of(trained).uneven == SIZES
    windows = validation_windows(Path(job.data["validation"]), samples=VALIDATION_SAMPLES, sequence_length=SEQUENCE)
    assert perplexity(trained, windows)["loss"] == pytest.approx(curve.validation[-1]["loss"], abs=1e-4)


def test_names_are_those_that_megatron_writes(reference):
    """Tensors and extra states of a checkpoint that Megatron saved, beside those that we wrote."""
    trained_job, _ = reference
    saved, ours = (NemoSource(folder) for folder in (last_checkpoint(trained_job), trained_job.initial))
    assert {name for name in _weights(saved).names if name.startswith("module.")} == {*_weights(ours).names}
    written = _object_names(ours.folder)
    asked = {name for name in _object_names(saved.folder) if name.startswith("module.") and "_extra_state" in name}
    assert asked <= written
    # Megatron's local layers have no extra state in core attention and norms; those of Transformer Engine have.
    assert {
        name for name in written - asked if "core_attention" not in name and "final_layernorm" not in name
    } == set()


def _weights(source: NemoSource) -> TorchDistReader:
    return TorchDistReader(source.folder / "weights")


def _object_names(folder: Path) -> set[str]:
    description = pickle.loads((folder / "weights" / ".metadata").read_bytes())
    return {name for name, stored in description.state_dict_metadata.items() if not hasattr(stored, "size")}


def test_stock_nemo_loads_the_context(job):
    """`io.load_context` of NeMo needs nothing but this package installed."""
    run_ranks(1, _check_context, job.initial)


def _check_context(checkpoint: Path) -> None:
    import fiddle
    from nemo.lightning import io

    stored = io.load_context(checkpoint / "context", subpath="model", build=False).config
    stored.apply_rope_fusion = False  # which needs Transformer Engine
    stored.bias_activation_fusion = stored.bias_dropout_fusion = False
    config = fiddle.build(stored)
    assert type(config).__name__ == "PrunedLlamaConfig"
    assert config.heterogeneous_block_specs
    assert config.add_bias_linear
    for index, (ffn, heads, groups) in enumerate(SIZES, start=1):
        layer = config.get_config_for_layer(index)
        assert (layer.ffn_hidden_size, layer.num_attention_heads, layer.num_query_groups) == (ffn, heads, groups)
        assert layer.hidden_size == config.hidden_size
    assert (config.ffn_hidden_size, config.num_attention_heads, config.num_query_groups) == (128, 24, 6)
    stored.num_layers = 5
    with pytest.raises(ValueError, match="has 4 entries for 5 layers"):
        fiddle.build(stored)
