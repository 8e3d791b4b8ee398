"""A model run layer by layer from its checkpoint is the model that transformers runs as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import Compute, LayerwiseModel
from tests.state_source import StateSource, random_ids, tiny_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: list[dict[str, Any]] = [{}, {"tie_word_embeddings": True}, {"rope_scaling": LLAMA3_ROPE}]


def run(model: LayerwiseModel, ids: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
    hidden = model.embed(ids)
    for index in range(model.shape.layers):
        model.run_layer(model.layer(index), hidden, batch_size)
    return hidden


@pytest.mark.parametrize("overrides", VARIANTS, ids=["untied", "tied", "llama3 rope"])
def test_states_and_loss_are_those_of_transformers(
    overrides: dict[str, Any], make_tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_tiny_llama(tmp_path / "model", seed=3, **overrides)
    ids = random_ids(5, 200)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = reference(ids.long(), labels=ids.long(), output_hidden_states=True)
    model = LayerwiseModel(HuggingFaceSource(folder))
    hidden = model.embed(ids)
    for index in range(model.shape.layers):
        torch.testing.assert_close(hidden, expected.hidden_states[index], rtol=1e-5, atol=1e-6)
        model.run_layer(model.layer(index), hidden, batch_size=2)
    total, count = model.losses(hidden[:, :-1], ids[:, 1:])
    assert count == 5 * 199
    assert total / count == pytest.approx(float(expected.loss), rel=1e-5)
    # Logits in the width of a float: the head of transformers on our states.
    with torch.no_grad():
        logits = reference.lm_head(reference.model.norm(hidden))
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_rotary_scaling_changes_the_states() -> None:
    """Without this the llama3 case above could pass with the scaling ignored on both sides."""
    ids = random_ids(2, 200)
    plain, scaled = (tiny_model(seed=1, rope_scaling=rope) for rope in (None, LLAMA3_ROPE))
    states = [run(LayerwiseModel(StateSource(model)), ids) for model in (plain, scaled)]
    assert (states[0] - states[1]).abs().max() > 1e-2


def test_batch_size_does_not_matter() -> None:
    model = LayerwiseModel(StateSource(tiny_model()))
    ids = random_ids(7, 33)
    torch.testing.assert_close(run(model, ids, 1), run(model, ids, 5), rtol=1e-5, atol=1e-5)


def test_attention_is_causal() -> None:
    model = LayerwiseModel(StateSource(tiny_model()))
    ids = random_ids(1, 20)
    changed = ids.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 128
    before, after = run(model, ids), run(model, changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


def test_loss_in_chunks_of_tokens_is_the_loss_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LayerwiseModel(StateSource(tiny_model()))
    ids = random_ids(3, 50)
    hidden = run(model, ids)
    at_once = model.losses(hidden, ids)
    monkeypatch.setattr("nemo_pvs.layerwise.token_scores._LOGITS_AT_ONCE", 7 * model.shape.vocab)
    in_chunks = model.losses(hidden, ids)
    assert in_chunks[0] == pytest.approx(at_once[0], rel=1e-6)
    assert in_chunks[1] == at_once[1] == 3 * 50


def test_bfloat16_is_near_fp32() -> None:
    source = StateSource(tiny_model(std=0.02))
    ids = random_ids(2, 40)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = LayerwiseModel(source, compute=Compute(dtype=dtype))
        hidden = run(model, ids)
        assert hidden.dtype == dtype
        losses.append(model.losses(hidden, ids)[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[1] != losses[0]


def test_chunks_fit_the_memory_limit() -> None:
    per_sequence = 16 * 64 * 4
    model = LayerwiseModel(StateSource(tiny_model()), compute=Compute(memory_limit=6 * per_sequence))
    ids = random_ids(10, 16)
    assert [len(chunk) for chunk in model.chunks(ids)] == [6, 4]
    assert [len(chunk) for chunk in model.chunks(ids, states=3)] == [2] * 5
    assert [len(chunk) for chunk in model.chunks(ids, states=100)] == [1] * 10
    assert torch.equal(torch.cat(list(model.chunks(ids, states=3))), ids)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 257, dtype=torch.int32), "do not fit the model's context of 256"),
        (torch.full((1, 8), 128, dtype=torch.int32), "vocabulary has 128 entries"),
        (torch.full((1, 8), -1, dtype=torch.int32), "vocabulary has 128 entries"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LayerwiseModel(StateSource(tiny_model())).embed(ids)
