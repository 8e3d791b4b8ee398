"""Megatron-Bridge itself loads, trains from and exports what we write, and we read what it writes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from megatron.bridge import AutoBridge
from megatron.bridge.models import gpt_provider
from megatron.bridge.training import checkpointing, model_load_save
from megatron.bridge.training.config import CheckpointConfig, ConfigContainer, LoggerConfig
from megatron.bridge.training.optim import _get_scheduler
from megatron.bridge.training.state import GlobalState
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.optimizer import OptimizerConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import nemo_pvs.modeling  # noqa: F401  # registers the class for uneven layers
from nemo_pvs.checkpoints.convert import convert
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.megatron.source import MegatronSource
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.model.layout import Layout, layouts
from tests.documents import ROOT, blocks
from tests.families import CASES, LAYOUTS, save_tiny
from tests.megatron.test_megatron_core import BOUNDS, LLAMA31, SAME_HEADS
from tests.uneven_model import make_uneven

pytestmark = [pytest.mark.bridge, pytest.mark.slow]

MODELS = [*CASES, ("llama", "Llama 3.1 rope scaling", LLAMA31), *((family, "uneven", {}) for family in LAYOUTS)]
STOCK = [(family, about, settings) for family, about, settings in MODELS if about not in ("uneven", "biases")]


def _save(folder: Path, model: tuple[str, str, dict[str, Any]]) -> Path:
    family, about, settings = model
    if about == "uneven":
        return make_uneven(folder, std=0.1, sizes=SAME_HEADS, bounds=BOUNDS, family=family)
    return save_tiny(folder, family, **settings)


@pytest.fixture(params=MODELS, ids=lambda model: " ".join(model[:2]))
def hf(request, tmp_path) -> Path:
    return _save(tmp_path / "hf", request.param)


@pytest.fixture
def root(hf, tmp_path) -> Path:
    convert(hf, tmp_path / "root", to="megatron")
    return tmp_path / "root"


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Start the group of ranks that Bridge's loaders expect; its exporter starts its own."""
    with model_load_save.temporary_distributed_context("gloo"):
        yield


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    rows, length = ids.shape
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    with torch.no_grad():
        return model.eval()(ids, torch.arange(length).expand(rows, -1), mask)


@pytest.mark.usefixtures("one_rank")
def test_bridge_loads_our_checkpoints_with_the_same_logits(hf, root):
    loaded = model_load_save.load_megatron_model(
        str(root / "iter_0000001"), use_cpu_init=True, skip_temp_dist_context=True
    )
    ids = torch.randint(0, 128, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()(ids).logits
    difference = (_logits(loaded[0] if isinstance(loaded, list) else loaded, ids) - expected).abs().max().item()
    print(f"largest difference of logits: {difference:.1e}")
    assert difference < 1e-4


class _Optimizer:
    is_stub_optimizer = False

    def load_state_dict(self, _: Any) -> None:
        raise AssertionError("there is none to load")

    def reload_model_params(self, *_: Any, **__: Any) -> None:
        pass

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("how", ["pretrained_checkpoint", "load"])
@pytest.mark.usefixtures("one_rank")
def test_bridges_training_begins_with_our_weights(hf, root, tmp_path, how):
    unset_num_microbatches_calculator()
    init_num_microbatches_calculator(0, None, 1, 1, 1, False)
    settings = (
        {"pretrained_checkpoint": str(root), "load": str(tmp_path / "empty")}
        if how == "pretrained_checkpoint"
        else {"load": str(root), "finetune": True}
    )
    provider, _ = model_load_save.load_model_config(str(root / "iter_0000001"))
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.fill_(torch.nan)
    state = GlobalState()
    state.cfg = ConfigContainer(
        model=provider,
        train=None,
        optimizer=OptimizerConfig(use_distributed_optimizer=False),
        ddp=None,
        scheduler=None,
        dataset=None,
        logger=LoggerConfig(),
        tokenizer=None,
        checkpoint=CheckpointConfig(ckpt_format="torch_dist", **settings),
        dist=None,
    )
    checkpointing.load_checkpoint(state, model, _Optimizer(), None)
    assert not any(parameter.isnan().any() for parameter in model[0].parameters())
    embedding = model[0].state_dict()["embedding.word_embeddings.weight"]
    assert torch.equal(embedding, HuggingFaceSource(hf).read("model.embed_tokens.weight"))
    assert state.train_state.step == 0


@pytest.mark.parametrize("model", STOCK, ids=lambda model: " ".join(model[:2]))
def test_bridge_exports_our_checkpoints_bit_for_bit(model, tmp_path):
    folder = _save(tmp_path / "hf", model)
    convert(folder, tmp_path / "root", to="megatron")
    AutoBridge.from_hf_pretrained(str(folder)).export_ckpt(
        str(tmp_path / "root"), str(tmp_path / "out"), show_progress=False
    )
    expected, exported = (load_file(tmp_path / side / "model.safetensors") for side in ("hf", "out"))
    assert expected.keys() == exported.keys()
    assert all(torch.equal(expected[name], exported[name]) for name in expected)


@pytest.mark.parametrize("model", STOCK, ids=lambda model: " ".join(model[:2]))
@pytest.mark.usefixtures("one_rank")
def test_we_read_what_bridge_imports(model, tmp_path):
    folder = _save(tmp_path / "hf", model)
    bridge = AutoBridge.from_hf_pretrained(str(folder), torch_dtype=torch.float32)
    provider = bridge.to_megatron_provider(load_weights=True)
    provider.transformer_layer_spec = gpt_provider.local_layer_spec
    provider.finalize()
    provider.perform_initialization = False
    built = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    bridge.save_megatron_model(built, str(tmp_path / "theirs"))
    source, original = open_source(tmp_path / "theirs"), HuggingFaceSource(folder)
    assert type(source) is MegatronSource
    assert source.config["architectures"] == original.config["architectures"]
    shape = shape_of(original)
    assert shape_of(source) == shape
    for name in Layout.for_config(original.config).parts(shape):
        assert torch.equal(source.read(name), original.read(name)), name
    window = original.config.get("sliding_window")
    assert source.config.get("sliding_window") == (None if window is None else window + 1)  # Bridge 0.3 writes [w, 0]
    for key in ("rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings", "initializer_range"):
        assert source.config.get(key) == original.config.get(key), key
    assert (
        convert(tmp_path / "theirs", tmp_path / "back", to="hf").tensors
        == convert(folder, tmp_path / "copy", to="hf").tensors
    )
    print(yaml.safe_load((source.folder / "run_config.yaml").read_text())["model"]["_target_"])


def test_bridges_classes_are_those_in_our_tables():
    import importlib

    for layout in layouts():
        for module, names in layout.table["bridge"]["reads"].items():
            for name in names:
                assert issubclass(getattr(importlib.import_module(module), name), gpt_provider.GPTModelProvider)


def test_the_tokenizer_is_found_where_we_say(tmp_path):
    folder = save_tiny(tmp_path / "hf", "llama")
    convert(folder, tmp_path / "root", to="megatron")
    shutil.rmtree(folder)
    assert model_load_save.load_tokenizer(str(tmp_path / "root" / "iter_0000001")).vocab_size == 128


def test_bridge_cannot_export_biases(tmp_path):
    """Which is what we tell users."""
    folder = save_tiny(tmp_path / "hf", "llama", attention_bias=True, mlp_bias=True)
    convert(folder, tmp_path / "root", to="megatron")
    bridge = AutoBridge.from_hf_pretrained(str(folder))
    with pytest.raises(AttributeError, match="mapping"):
        bridge.export_ckpt(str(tmp_path / "root"), str(tmp_path / "out"), show_progress=False)


def test_the_script_of_the_documentation_configures_a_training(tmp_path, monkeypatch):
    convert(save_tiny(tmp_path / "hf", "llama"), tmp_path / "SMALLER-root", to="megatron")
    monkeypatch.chdir(tmp_path)
    (script,) = blocks(ROOT / "docs" / "megatron_bridge.md", "python")
    begin, train = script.strip().rsplit("\n", 1)
    assert train == "pretrain(config, forward_step)"
    names: dict[str, Any] = {}
    exec(begin, names)
    config = names["config"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    config.validate()
    _get_scheduler(config.optimizer, config.scheduler, SimpleNamespace(param_groups=[]))  # checks further settings
    assert type(config) is ConfigContainer
    assert (config.model.num_layers, config.model.seq_length) == (3, config.dataset.seq_length)
    assert checkpointing.checkpoint_exists(config.checkpoint.pretrained_checkpoint)
    assert callable(names["forward_step"])
