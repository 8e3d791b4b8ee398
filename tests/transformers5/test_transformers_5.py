"""What we write loads in Transformers 5 with the logits that version 4 computes, and the other way round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import nemo_pvs as pvs
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.layerwise.model import LayerwiseModel
from tests.conftest import make_tiny_llama
from tests.families import CASES, LAYOUTS, save_tiny
from tests.pruning.test_vocabulary import COMMON, ROWS, byte_level, characters, save
from tests.transformers5.in_version_5 import IDS, TEXT, logits
from tests.uneven_model import LLAMA3_ROPE, make_uneven

pytestmark = pytest.mark.transformers5
ROPES: dict[str, dict[str, Any]] = {
    "llama 3.1": LLAMA3_ROPE,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


def in_version_5(*arguments: Any) -> None:
    environment = {**os.environ, "PYTHONPATH": os.environ["PVS_TRANSFORMERS_5"]}
    command = [sys.executable, "-W", "ignore", "-m", "tests.transformers5.in_version_5", *map(str, arguments)]
    subprocess.run(command, env=environment, check=True, cwd=Path(__file__).parents[2])


def pruned(folder: Path, method: str, **settings: Any) -> None:
    parent = save_tiny(folder.with_name(f"{folder.name} parent"), "llama")
    text = folder.with_name("text.txt")
    text.write_text("a few words to read " * 400)
    pvs.prune(parent, folder, method, data=str(text), samples=4, sequence_length=32, **settings)


def fewer_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    parent = save(make_tiny_llama(folder.with_name(f"{folder.name} parent"), vocab_size=ROWS), tokenizer)
    (parent / "text.txt").write_text(COMMON)
    pvs.prune(parent, folder, "vocabulary", target="vocab=400", data=parent / "text.txt")


WRITTEN: dict[str, Callable[[Path], Any]] = {
    **{
        f"{family}, {case}": lambda folder, family=family, settings=settings: save_tiny(folder, family, **settings)
        for family, case, settings in CASES
    },
    **{
        f"llama, {name}": lambda folder, scaling=scaling: save_tiny(folder, "llama", rope_scaling=scaling)
        for name, scaling in ROPES.items()
    },
    "width": lambda folder: pruned(folder, "minitron-width", target="hidden=48,ffn=64"),
    "fewer groups": lambda folder: pruned(folder, "minitron-width", target="ffn=64,kv_groups=1"),
    "depth": lambda folder: pruned(folder, "minitron-depth", target="layers=2"),
    "fewer heads": lambda folder: pruned(folder, "minitron-width", target="heads=4"),
    "flap": lambda folder: pruned(folder, "flap", ratio=0.3),
    "flap, heads": lambda folder: pruned(folder, "flap", ratio=0.2, attention_unit="heads"),
    "vocabulary of bytes": lambda folder: fewer_tokens(folder, byte_level()),
    "vocabulary of characters": lambda folder: fewer_tokens(folder, characters()),
    "sparse": lambda folder: pruned(folder, "magnitude", sparsity="2:4"),
    **{f"uneven {family}": lambda folder, family=family: make_uneven(folder, family=family) for family in LAYOUTS},
    "uneven with biases": lambda folder: make_uneven(folder, attention_bias=True, mlp_bias=True),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of models, written as Hugging Face folders by us, with what version 5 computes."""
    folder = tmp_path_factory.mktemp("written")
    for index, (case, make) in enumerate(WRITTEN.items()):
        make(folder / f"source {index}")
        pvs.convert(folder / f"source {index}", folder / case, to="hf")
    in_version_5("load", *(folder / case for case in WRITTEN))
    return folder


@pytest.mark.parametrize("case", WRITTEN)
def test_what_we_write_loads_in_version_5(case: str, written: Path) -> None:
    recorded = torch.load(written / f"{case}.logits.pt")
    model = AutoModelForCausalLM.from_pretrained(written / case)
    assert (recorded["logits"] - logits(model)).abs().max() < 1e-5
    # Version 5 takes every tokenizer of a Qwen 2 for Qwen's BPE, but the tiny models have one of words.
    if "ids" in recorded and not case.startswith("qwen2"):
        assert recorded["ids"] == AutoTokenizer.from_pretrained(written / case)(TEXT)["input_ids"]


def test_a_hidden_size_that_version_5_refuses_is_pointed_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pruned(tmp_path / "narrow", "minitron-width", target="hidden=52")
    assert "Transformers 5 refuses a Llama whose 8 heads do not divide its hidden size of 52" in capfd.readouterr().out
    with pytest.raises(subprocess.CalledProcessError):
        in_version_5("load", tmp_path / "narrow")
    assert "not a multiple of the number of attention heads" in capfd.readouterr().err


SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
SAVED = [
    ("llama", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    ("tied llama", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    ("mistral", "MistralForCausalLM", {"head_dim": 16, "sliding_window": 96}),
    ("qwen2", "Qwen2ForCausalLM", {}),
    ("qwen3", "Qwen3ForCausalLM", {"head_dim": 16, "tie_word_embeddings": True}),
    *(
        (f"llama, {name}", "LlamaForCausalLM", {"rope_parameters": {**scaling, "rope_theta": 50000.0}})
        for name, scaling in ROPES.items()
    ),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of models that version 5 saved, with what it computes."""
    folder = tmp_path_factory.mktemp("saved")
    in_version_5("save", folder, json.dumps([(name, class_, {**SIZES, **more}) for name, class_, more in SAVED]))
    return folder


@pytest.mark.parametrize("case", [name for name, *_ in SAVED])
def test_what_version_5_saves_is_read(case: str, saved: Path, tmp_path: Path) -> None:
    expected = torch.load(saved / f"{case}.logits.pt")["logits"]
    model = LayerwiseModel(HuggingFaceSource(saved / case))
    hidden = model.embed(IDS)
    for index in range(model.shape.layers):
        model.run_layer(model.layer(index), hidden)
    assert (torch.cat(list(model.logits(hidden))) - expected[0]).abs().max() < 1e-5
    pvs.convert(saved / case, tmp_path / "hf", to="hf")
    assert transformers.__version__.startswith("4.")
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")) - expected).abs().max() < 1e-5
