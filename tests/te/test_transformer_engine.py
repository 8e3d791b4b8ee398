"""Our checkpoints and models on Transformer Engine's own modules, of which only the compiled extension is replaced."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_pvs.checkpoints.files.torch_dist import TorchDistReader
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.source import WeightSource
from tests.families import CASES, save_tiny
from tests.te import stub
from tests.uneven_model import make_uneven

pytestmark = [pytest.mark.te, pytest.mark.slow]

UNEVEN = ("llama", "uneven", {})


@pytest.fixture(params=[*CASES, UNEVEN], ids=lambda case: " ".join(case[:2]))
def source(request, tmp_path) -> WeightSource:
    family, about, settings = request.param
    if about == "uneven":
        return HuggingFaceSource(make_uneven(tmp_path / "hf"))
    return HuggingFaceSource(save_tiny(tmp_path / "hf", family, **settings))


@pytest.fixture(autouse=True)
def ranks() -> Iterator[None]:
    from nemo_pvs.megatron.inference import megatron_ranks

    with megatron_ranks(), stub.as_on_an_h100():
        yield


def _stock_model(checkpoint: Path, **settings: Any) -> torch.nn.Module:
    """Return the model that NeMo builds from a checkpoint's context, with the defaults of NeMo's classes."""
    import fiddle
    from nemo.lightning import io

    config = io.load_context(checkpoint / "context", subpath="model", build=False).config
    settings |= {"params_dtype": torch.float32, "pipeline_dtype": torch.float32, "use_cpu_initialization": True}
    for name, value in settings.items():
        setattr(config, name, value)
    return fiddle.build(config).configure_model(None, pre_process=True, post_process=True)


def _requested(state: Any) -> set[str]:
    """Return the names under which Megatron looks for a model's tensors and objects in a checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

    names = set()
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            names |= _requested(value.build())
        else:
            names.add(value.unique_key if isinstance(value, ShardedObject) else value.key)
    return names


def _load_as_nemo_does(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load with NeMo's default strictness."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    state = {"state_dict": model.sharded_state_dict(prefix="module.")}
    loaded = dist_checkpointing.load(state, str(checkpoint / "weights"), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    loaded = loaded["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in loaded.items()}, strict=True)


@pytest.mark.parametrize("gated", [False, True], ids=["stock", "gated"])
def test_stock_nemo_loads_what_we_write(source, gated, tmp_path):
    from nemo_pvs.megatron.pruning.gates import gated_layer_spec

    write_nemo(source, tmp_path / "nemo")
    model = _stock_model(tmp_path / "nemo", **({"transformer_layer_spec": gated_layer_spec} if gated else {}))
    linear = type(model.decoder.layers[0].self_attention.linear_qkv)
    assert linear.__name__ == ("TEColumnParallelLinear" if gated else "TELayerNormColumnParallelLinear")
    described = pickle.loads((tmp_path / "nemo" / "weights" / ".metadata").read_bytes())
    unwanted = set(described.state_dict_metadata) - _requested(model.sharded_state_dict(prefix="module."))
    assert all("_extra_state" in name for name in unwanted)
    if not gated:  # whose norms are ours
        assert all("core_attention" in name for name in unwanted), "only other versions ask for these"
    _load_as_nemo_does(model, tmp_path / "nemo")
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    stored = TorchDistReader(tmp_path / "nemo" / "weights").read("module.decoder.final_layernorm.weight", (0,), (64,))
    assert torch.equal(model.decoder.final_layernorm.weight, stored)


@pytest.mark.parametrize("name", ["final_layernorm._extra_state/shard_0_1", "q_layernorm._extra_state/shard_1_3"])
def test_a_state_that_is_not_written_makes_loading_fail(name, tmp_path):
    """What the test above is for: NeMo's default strictness refuses a checkpoint without it."""
    from torch.distributed.checkpoint.api import CheckpointException

    write_nemo(HuggingFaceSource(save_tiny(tmp_path / "hf", "qwen3")), tmp_path / "nemo")
    path = tmp_path / "nemo" / "weights" / ".metadata"
    described = pickle.loads(path.read_bytes())
    [left_out] = [key for key in described.state_dict_metadata if key.endswith(name)]
    del described.state_dict_metadata[left_out]
    path.write_bytes(pickle.dumps(described))
    with pytest.raises(CheckpointException, match=f"Missing key.*{name}"):
        _load_as_nemo_does(_stock_model(tmp_path / "nemo"), tmp_path / "nemo")


def test_our_own_inference_fills_every_weight_and_needs_no_main_gradient(source):
    """With Apex, NeMo's models add up gradients in ``main_grad``, which weights have only in NeMo's training."""
    from nemo_pvs.megatron.inference import LoadedModel

    write_nemo(source, source.folder / "nemo")
    assert _stock_model(source.folder / "nemo").config.gradient_accumulation_fusion, "Apex is not imitated"
    loaded = LoadedModel(source, dtype=torch.float32, device="cpu")
    linears = [module for module in loaded.model.modules() if hasattr(module, "fuse_wgrad_accumulation")]
    assert len(linears) == 4 * len(loaded.model.decoder.layers)
    assert not any(linear.fuse_wgrad_accumulation for linear in linears)
    assert not loaded.model.config.gradient_accumulation_fusion
