"""A NeMo checkpoint of uneven layers that earlier code wrote: it names a class of ours by the module of then."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from tests.megatron.ranks import run_ranks
from tests.megatron.test_logits import _megatron_logits
from tests.state_source import as_transformers
from tests.unchanged.finished_run import unpack

MODULE, CLASSES = "nemo_pvs.training.uneven", ("PrunedLlamaConfig", "PrunedLlama31Config")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return unpack(tmp_path_factory.mktemp("made")) / "run"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pruned", "random"])
def test_it_is_read(kind, run):
    checkpoint = run / kind / "uneven" / "nemo"
    context = (checkpoint / "context" / "io.json").read_text()
    assert set(re.findall(r'"module": "(nemo_pvs[^"]*)",\s*"name": "(\w+)"', context)) == {(MODULE, CLASSES[0])}
    record = "prune" if kind == "pruned" else "random"
    result = json.loads((run / "stages" / f"{record}-uneven.json").read_text())["result"]
    assert fingerprint(open_source(checkpoint)) == result["fingerprint"]
    assert shape_of(open_source(checkpoint)).uneven


def test_its_context_is_enough(run):
    """Without the copy of the Hugging Face config that lies in it, as in a checkpoint that Megatron saved."""
    checkpoint = run / "pruned" / "uneven" / "nemo"
    shape = shape_of(open_source(checkpoint))
    (checkpoint / "context" / "huggingface_config.json").rename(run / "huggingface_config.json")
    try:
        assert shape_of(open_source(checkpoint)) == shape
    finally:
        (run / "huggingface_config.json").rename(checkpoint / "context" / "huggingface_config.json")


@pytest.mark.parallel
def test_nemo_loads_it(run):
    """By the class that it names, with the logits of the model that it is a copy of."""
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = as_transformers(open_source(run / "pruned" / "uneven" / "huggingface")).float()(ids).logits
    (logits,) = run_ranks(1, _megatron_logits, run / "pruned" / "uneven" / "nemo", ids, 1, 1)
    assert float((torch.from_numpy(logits) - expected).abs().max()) < 1e-4


@pytest.mark.parallel
def test_the_module_has_the_classes_that_checkpoints_name():
    run_ranks(1, _check_classes)


def _check_classes() -> None:
    for name in CLASSES:
        assert "ffn_hidden_size_by_layer" in getattr(import_module(MODULE), name).__dataclass_fields__
