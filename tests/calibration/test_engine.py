"""The calibration pass against an independent pass of the whole model in float64, and its invariances."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import Compute
from tests.state_source import StateSource, random_ids, tiny_model
from tests.uneven_model import uneven_model

LAYERS, HIDDEN, FFN, HEADS, HEAD_DIM = 4, 64, 96, 8, 16


def token_set(samples: int = 6, length: int = 24, seed: int = 0) -> TokenSet:
    return TokenSet.from_stream(random_ids(1, samples * length, seed=seed)[0].numpy(), sequence_length=length)


def energy(activations: torch.Tensor) -> torch.Tensor:
    return sum(token**2 for sequence in activations for token in sequence)


def norm_of_means(activations: torch.Tensor) -> torch.Tensor:
    return sum(sequence.abs().mean(0) ** 2 for sequence in activations).sqrt()


def published_fluctuation(activations: torch.Tensor) -> torch.Tensor:
    """Return FLAP's recurrence, a sequence at a time."""
    fluctuation = torch.zeros(activations.shape[-1]).double()
    for n in range(2, len(activations) + 1):
        distance = ((activations[n - 1] - activations[:n].mean((0, 1))) ** 2).sum(0)
        fluctuation = fluctuation * (n - 2) / (n - 1) + distance / n
    return fluctuation


def whole_model_scores(model: LlamaForCausalLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute every score with loops over recorded activations of the whole model, in float64."""
    recorded: dict[str, torch.Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: recorded.update({name: (inputs[0] if "proj" in name else output).detach()})

    model = model.double()
    for index, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(record(f"{index} norm 1"))
        layer.post_attention_layernorm.register_forward_hook(record(f"{index} norm 2"))
        layer.self_attn.o_proj.register_forward_hook(record(f"{index} o_proj"))
        layer.mlp.down_proj.register_forward_hook(record(f"{index} down_proj"))
    scores: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        # The state behind the last layer is not among hidden_states: those end with the final norm's output.
        last: list[torch.Tensor] = []
        model.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
        states = model(ids.long(), output_hidden_states=True).hidden_states
        states = [*states[:LAYERS], *last]
    for site, linear in (("attention", "o_proj"), ("ffn", "down_proj")):
        inputs = [recorded[f"{i} {linear}"] for i in range(LAYERS)]
        parent = "self_attn" if linear == "o_proj" else "mlp"
        weights = [getattr(getattr(layer, parent), linear).weight.detach() for layer in model.model.layers]
        for name, statistic in (
            ("energy", energy),
            ("mean", lambda x: x.flatten(0, 1).mean(0)),
            ("variance", lambda x: x.flatten(0, 1).var(0)),
            ("fluctuation", published_fluctuation),
        ):
            scores[f"{site}.{name}"] = torch.stack([statistic(x) for x in inputs])
        scores[f"{site}.weight_energy"] = torch.stack([sum(row**2 for row in weight) for weight in weights])
        scores[f"{site}.weight_mean_abs"] = torch.stack(
            [sum(row.abs() for row in weight) / len(weight) for weight in weights]
        )
    for name, aggregate in (("energy", energy), ("meanabs_l2", norm_of_means)):
        scores[f"hidden.{name}"] = sum(aggregate(recorded[f"{i} norm {j}"]) for i in range(LAYERS) for j in (1, 2))
        scores[f"ffn.{name}"] = torch.stack([aggregate(recorded[f"{i} down_proj"]) for i in range(LAYERS)])
        channels = torch.stack([aggregate(recorded[f"{i} o_proj"]) for i in range(LAYERS)])
        heads = channels.view(LAYERS, HEADS, HEAD_DIM)
        scores[f"heads.{name}"] = heads.sum(-1) if name == "energy" else (heads**2).sum(-1).sqrt()
    scores["block_influence"] = torch.stack(
        [
            (1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)).mean()
            for before, after in pairwise(states)
        ]
    )
    return scores


def assert_same_scores(scores: Scores, expected: dict[str, torch.Tensor], rtol: float) -> None:
    assert set(scores.tensors) == {*expected, "tokens"}
    for name, tensor in expected.items():
        assert scores.tensors[name].dtype == torch.float64
        # Means of either sign cross zero.
        atol = 1e-6 * float(tensor.abs().max()) if name.endswith(".mean") else 0
        torch.testing.assert_close(
            scores.tensors[name], tensor, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_every_score_is_that_of_the_whole_model_in_float64(
    make_tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_tiny_llama(tmp_path / "model", seed=2, initializer_range=0.2)
    tokens = token_set()
    expected = whole_model_scores(AutoModelForCausalLM.from_pretrained(folder), tokens.ids)
    assert_same_scores(
        calibrate(HuggingFaceSource(folder), tokens, compute=Compute(batch_size=4)), expected, rtol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 6}, {"memory_limit": 4 * 24 * 64 * 4}])
def test_neither_batches_nor_sweeps_change_the_scores(settings: dict[str, int]) -> None:
    source, tokens = StateSource(tiny_model()), token_set()
    expected = calibrate(source, tokens, compute=Compute(batch_size=4))
    scores = {name: tensor for name, tensor in expected.tensors.items() if name != "tokens"}
    assert_same_scores(calibrate(source, tokens, compute=Compute(**settings)), scores, rtol=1e-5)


def test_layers_are_read_once_a_sweep_and_progress_counts_them() -> None:
    source, tokens = StateSource(tiny_model()), token_set()
    steps: list[tuple[int, int]] = []
    calibrate(
        source,
        tokens,
        compute=Compute(memory_limit=3 * 24 * 64 * 4),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(step, 2 * LAYERS) for step in range(1, 2 * LAYERS + 1)]
    # Layer 1 of 4 is not among those that the fingerprint reads.
    assert source.reads.count("model.layers.1.mlp.up_proj.weight") == 2


def test_a_layer_that_adds_nothing_has_no_influence() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    influence = calibrate(StateSource(model), token_set()).tensors["block_influence"]
    assert influence[2].abs() < 1e-6
    assert (influence[[0, 1, 3]] > 1e-3).all()


def test_the_manifest_names_model_tokens_and_versions() -> None:
    source, tokens = StateSource(tiny_model()), token_set()
    scores = calibrate(source, tokens)
    assert scores.model_fingerprint == fingerprint(source)
    assert scores.manifest["tokens"] == tokens.manifest
    assert torch.equal(scores.tokens.ids, tokens.ids)
    assert scores.manifest["versions"]["torch"] == torch.__version__


def test_a_nemo_copy_of_a_model_has_the_same_scores(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    huggingface = HuggingFaceSource(make_tiny_llama(tmp_path / "model", dtype=torch.bfloat16))
    write_nemo(huggingface, tmp_path / "nemo")
    scores = [calibrate(source, token_set()) for source in (huggingface, NemoSource(tmp_path / "nemo"))]
    assert scores[0].content_hash == scores[1].content_hash


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("weight", ["mlp.up_proj", "self_attn.v_proj", "mlp.down_proj", "input_layernorm"])
def test_the_first_layer_with_activations_that_are_not_finite_is_named(weight: str, value: float) -> None:
    model = tiny_model()
    layers: list[int] = []
    with torch.no_grad():
        model.model.layers[1].get_submodule(weight).weight[3] = value
    with pytest.raises(UserError, match="activations of layer 1 are not finite"):
        calibrate(StateSource(model), token_set(), progress=lambda done, _: layers.append(done))
    assert layers == [1]  # and none is run in vain


def test_a_model_with_uneven_layers_is_refused() -> None:
    with pytest.raises(UserError, match="calibrate the model that it was pruned from"):
        calibrate(StateSource(uneven_model()), token_set())


def test_tokens_of_another_vocabulary_are_refused() -> None:
    tokens = TokenSet.from_stream([5, 500, 7, 8], sequence_length=4)
    with pytest.raises(UserError, match="tokenise the text with this model's tokenizer"):
        calibrate(StateSource(tiny_model()), tokens)
