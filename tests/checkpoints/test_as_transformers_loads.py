"""What ``--verify logits`` compares with is the model that Transformers makes of a folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nemo_pvs.checkpoints.huggingface.as_transformers_loads import AsTransformersLoads
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.agreement import compare_logits
from tests.conftest import make_tiny_llama
from tests.families import CASES, save_tiny
from tests.state_source import StateSource

IDS = torch.randint(0, 128, (2, 33), generator=torch.Generator().manual_seed(1))


def edit(path, drop=(), **values):
    old = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps({**old, **values}))


def assert_same(folder, model):
    """The folder, as Transformers loads it, is ``model``; and so is our own reading of it."""
    for source in (AsTransformersLoads(folder), HuggingFaceSource(folder)):
        assert compare_logits(source, StateSource(model), IDS).max_difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("family", "settings"), [(family, settings) for family, _, settings in CASES])
def test_a_family_is_what_from_pretrained_makes_of_it(family, settings, tmp_path):
    folder = save_tiny(tmp_path, family, torch.float32, **settings)
    edit(folder / "config.json", drop=("architectures",))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.architectures = [type(model).__name__]
    assert_same(folder, model)


@pytest.mark.slow
def test_rope_parameters_are_read_although_version_4_ignores_them(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    folder = make_tiny_llama(tmp_path, rope_theta=500000.0, rope_scaling=scaling)
    model = AutoModelForCausalLM.from_pretrained(folder)
    edit(folder / "config.json", ("rope_theta", "rope_scaling"), rope_parameters={**scaling, "rope_theta": 500000.0})
    assert_same(folder, model)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)  # version 4 adds its defaults
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 10000.0
    assert_same(folder, model)


def test_a_head_of_its_own_is_kept_although_version_4_drops_it(tmp_path):
    folder = make_tiny_llama(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    edit(folder / "config.json", tie_word_embeddings=True)
    assert_same(folder, model)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(folder, AutoModelForCausalLM.from_pretrained(folder))


def test_a_folder_that_transformers_does_not_load_is_refused(tmp_path):
    folder = make_tiny_llama(tmp_path)
    edit(folder / "config.json", drop=("model_type",))
    assert HuggingFaceSource(folder).config["model_type"] == "llama"
    with pytest.raises(UserError, match=r"Transformers cannot load .* use --verify checksum"):
        AsTransformersLoads(folder)
