"""Every model that a command makes carries what it cost, ancestors included."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from nemo_pvs.checkpoints.convert import convert
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.cli.verbs import prune
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.flops import calibration_flops, sparse_calibration_flops
from nemo_pvs.ledger.ledger import LEDGER, Ledger
from nemo_pvs.planning.charges import ancestry, charge_run, charge_scores
from nemo_pvs.recipe.distillation import Distillation
from nemo_pvs.recipe.training import Training
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.pruning.test_flap import TINY

TEXT = {"samples": 4, "sequence_length": 32}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(" ".join(f"w{2 + index * 7 % 125}" for index in range(2000)))
    return str(save_tiny_tokenizer(make_tiny_llama(tmp_path / "model")))


def _charges(folder: str | Path) -> list[tuple[str, int | None]]:
    return [(charge.activity, charge.tokens) for charge in Ledger.load(Path(folder) / LEDGER).charges]


def test_a_chain_of_commands_adds_up(model: str, tmp_path: Path) -> None:
    text, short, narrow = {**TEXT, "data": str(tmp_path / "text.txt")}, str(tmp_path / "short"), str(tmp_path / "thin")
    prune(model, short, "minitron-depth", target="layers=3", parent_tokens=1e6, **text)
    candidates = 4  # of which each lacks one layer; and the dense model
    assert _charges(short) == [("parent pretraining", 10**6), ("search", (candidates + 1) * 128)]

    convert(short, tmp_path / "nemo", to="nemo")
    prune(str(tmp_path / "nemo"), narrow, "minitron-width", target="ffn=48", **text)
    assert _charges(narrow) == [*_charges(short), ("calibration", 128)]
    found = Ledger.load(Path(narrow) / LEDGER).charges[-1]
    assert found.flops == calibration_flops(shape_of(open_source(short)), 128, 32)

    # The dense model's 6 N a token, counted on the module that transformers makes of it.
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict().items()
    matrices = sum(weight.numel() for name, weight in weights if weight.ndim == 2 and "embed" not in name)
    assert Ledger.load(Path(narrow) / LEDGER).charges[0].flops == 6 * matrices * 10**6


def test_a_sparse_method_charges_its_own_pass(model: str, tmp_path: Path) -> None:
    sparse = str(tmp_path / "sparse")
    prune(model, sparse, "wanda", sparsity="2:4", data=str(tmp_path / "text.txt"), **TEXT)
    before, own = Ledger.load(Path(sparse) / LEDGER).charges
    assert before.tokens is None  # nobody said what the parent had seen, and no total pretends to know
    assert Ledger.load(Path(sparse) / LEDGER).total.tokens is None
    assert own.flops == sparse_calibration_flops(shape_of(open_source(model)), 128, 32, sequential=True)

    # What is trained under its masks is charged as dense, and the zeros are counted beside it.
    training = Training(tokens=1280, sequence_length=32, global_batch_size=4, validation_samples=4, learning_rate=1e-3)
    ledger = ancestry(Path(sparse), None)
    training = training.model_copy(update={"distill": Distillation(teacher=str(model))})
    charge_run(ledger, training, open_source(sparse), Path(model))
    run, lessons = ledger.charges[2:]
    zeros = sum(int((weight == 0).sum()) for weight in AutoModelForCausalLM.from_pretrained(sparse).parameters())
    assert run.flops is not None
    assert run.flops_zeros_skipped == run.flops - 6 * zeros * 1280
    assert (lessons.activity, lessons.tokens, lessons.steps) == ("teacher", 1280, 10)


def test_a_contradiction_is_refused_before_any_work(model: str, tmp_path: Path) -> None:
    text, out = {**TEXT, "data": str(tmp_path / "text.txt")}, tmp_path / "again"
    prune(model, str(tmp_path / "first"), "magnitude", sparsity="0.5", parent_tokens=1e6, **text)
    with pytest.raises(UserError, match=r"1,000,000 in all.*2,000,000 pretraining tokens are declared"):
        prune(str(tmp_path / "first"), str(out), "magnitude", sparsity="0.6", parent_tokens=2e6, **text)
    with pytest.raises(UserError, match="give a positive number"):
        prune(model, str(out), "magnitude", sparsity="0.6", parent_tokens=-1, **text)
    assert not out.exists()
    with pytest.raises(UserError, match="or leave it out"):
        ancestry(None, 1e6)
    assert ancestry(None, None).charges == []


@pytest.mark.parametrize("gradients", [False, True])
def test_gradients_are_charged_to_those_who_need_them(gradients: bool) -> None:
    charge = charge_scores(TINY, 640, 64, gradients=gradients)
    assert charge.flops == calibration_flops(TINY, 640, 64, gradients=gradients)
    assert ("one back" in charge.note) == gradients
