"""Taylor importance against the whole model: plain autograd in float64, finite differences, and its invariances."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.gradients import taylor_scores
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.calibration.taylor import METRICS
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import Compute, LayerwiseModel
from nemo_pvs.ledger.flops import calibration_flops
from tests import families
from tests.calibration.test_engine import token_set
from tests.multiplications import multiplications
from tests.state_source import StateSource, tiny_model

LAYERS, HIDDEN, HEAD_DIM, HEADS, GROUPS = 4, 64, 16, 8, 2
COPY = 6 * 24 * HIDDEN * 4
"""Bytes of the hidden states of ``token_set()`` in fp32."""


def whole_model_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean loss over sequences of one length; that of transformers is fp32 whatever the model is."""
    ids = ids.long()
    return torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def element_scores(model: Any, ids: torch.Tensor) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield every parameter's name, and for each metric what its single weights add, by plain autograd.

    For ``vectorize`` these are ``W g``, whose sums' absolute values are to be taken.
    """
    per_sequence: list[dict[str, torch.Tensor]] = []
    for sequence in ids:
        model.zero_grad()
        whole_model_loss(model, sequence[None]).backward()
        per_sequence.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    model.zero_grad()
    whole_model_loss(model, ids).backward()
    for name, weight in model.named_parameters():
        w, g = weight.detach(), weight.grad
        a = torch.stack([gradients[name] ** 2 for gradients in per_sequence]).mean(0)
        yield (
            name,
            {
                "param_first": (w * g).abs(),
                "param_second": w * w * a,
                "param_mix": (w * g - w * w * a / 2).abs(),
                "vectorize": w * g,
            },
        )


def whole_model_scores(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute every unit's score by loops over its rows and columns."""
    config = model.config
    groups, per_group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    h, ffn, layers = config.head_dim, config.intermediate_size, config.num_hidden_layers
    scores = {f"groups.{metric}": torch.zeros(layers, groups).double() for metric in METRICS}
    scores |= {f"ffn.{metric}": torch.zeros(layers, ffn).double() for metric in METRICS}
    scores |= {f"heads.{metric}": torch.zeros(layers, groups * per_group).double() for metric in METRICS}
    for name, elements in element_scores(model, ids):
        _, _, layer, *_, module, kind = f"{name}..".split(".")[:6] if "layers" in name else (None,) * 6
        if kind != "weight" or not module.endswith("_proj"):
            continue
        for metric, element in elements.items():
            vectors = element.T if module in {"o_proj", "down_proj"} else element
            sums = [float(vector.sum().abs()) for vector in vectors]  # all terms but those of vectorize are positive
            for channel, score in enumerate(sums):
                if module in {"gate_proj", "up_proj", "down_proj"}:
                    scores[f"ffn.{metric}"][int(layer), channel] += score
                else:
                    head = channel // h
                    group = head if module in {"k_proj", "v_proj"} else head // per_group
                    scores[f"groups.{metric}"][int(layer), group] += score
                    if module in {"q_proj", "o_proj"}:
                        scores[f"heads.{metric}"][int(layer), head] += score
    return scores


def taylor(scores: Scores) -> dict[str, torch.Tensor]:
    names = [f"{site}.{metric}" for site in ("groups", "heads", "ffn") for metric in METRICS]
    return {name: scores.tensors[name] for name in names}


def measure(source: Any, tokens: TokenSet, **settings: Any) -> dict[str, torch.Tensor]:
    batch_size = settings.pop("batch_size", 4)
    return taylor_scores(LayerwiseModel(source, Compute(**settings)), tokens, batch_size=batch_size)


def assert_same(scores: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float) -> None:
    assert scores.keys() == expected.keys()
    for name, tensor in expected.items():
        assert scores[name].dtype == torch.float64
        # Sums of terms of both signs cancel.
        atol = rtol * float(tensor.max()) if name.endswith(("vectorize", "mix")) else 0
        torch.testing.assert_close(
            scores[name], tensor, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(families.CASES)), ids=lambda case: " ".join(families.CASES[case][:2]))
def test_every_score_is_that_of_autograd_on_the_whole_model(case: int) -> None:
    family, _, settings = families.CASES[case]
    model = families.tiny_model(family, **settings).double()
    tokens = token_set(samples=3)
    # Norms and rotary positions are fp32 in transformers, whatever the model is.
    scores = measure(StateSource(model), tokens, dtype=torch.float64, batch_size=2)
    assert_same(scores, whole_model_scores(model, tokens.ids), rtol=1e-6)


def test_single_precision_is_enough() -> None:
    model, tokens = tiny_model(), token_set()
    scores = taylor(calibrate(StateSource(model), tokens, gradients=True))
    assert_same(scores, whole_model_scores(model.double(), tokens.ids), rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_vectors_scores_are_slopes_of_the_loss() -> None:
    """Each row or column scaled by 1 - epsilon and 1 + epsilon, without autograd (methods.md, T-L1)."""
    model, tokens, epsilon = tiny_model().double(), token_set(samples=2), 1e-2
    scores = measure(StateSource(model), tokens, dtype=torch.float64)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp

    def slope(vector: torch.Tensor) -> float:
        original, losses = vector.clone(), []
        for factor in (1 + epsilon, 1 - epsilon):
            vector.copy_(original * factor)
            losses.append(float(whole_model_loss(model, tokens.ids)))
        vector.copy_(original)
        return abs(losses[0] - losses[1]) / (2 * epsilon)

    for channel in (0, 17, 95):
        vectors = (mlp.gate_proj.weight[channel], mlp.up_proj.weight[channel], mlp.down_proj.weight[:, channel])
        assert sum(map(slope, vectors)) == pytest.approx(float(scores["ffn.vectorize"][1, channel]), rel=1e-3)
    queries, keys = range(64, 128), range(16, 32)  # of the second group, 4 heads of 16 channels
    expected = sum(slope(attention.q_proj.weight[channel]) for channel in queries)
    expected += sum(slope(attention.o_proj.weight[:, channel]) for channel in queries)
    expected += sum(
        slope(linear.weight[channel]) for linear in (attention.k_proj, attention.v_proj) for channel in keys
    )
    assert expected == pytest.approx(float(scores["groups.vectorize"][1, 1]), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("head", range(HEADS))
def test_a_query_head_belongs_to_the_group_whose_keys_it_reads(head: int) -> None:
    """Everything else of attention is nearly nothing, so gradients are as good as this head's (T-L3)."""
    model = tiny_model()
    with torch.no_grad():
        attention = model.model.layers[2].self_attn
        keep = torch.zeros(HEADS * HEAD_DIM)
        keep[head * HEAD_DIM : (head + 1) * HEAD_DIM] = 1
        attention.o_proj.weight *= keep
        attention.q_proj.weight *= keep[:, None]
    scores = measure(StateSource(model), token_set(samples=2))
    for metric in METRICS:
        groups = scores[f"groups.{metric}"][2]
        assert int(groups.argmax()) == head // (HEADS // GROUPS)
        assert groups.min() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 1}, {"batch_size": 6}, {"memory_limit": 4 * COPY}, {"memory_limit": 5 * COPY}],
    ids=["one by one", "at once", "two copies", "three copies"],
)
def test_neither_batches_nor_memory_change_the_scores(settings: dict[str, int]) -> None:
    source, tokens = StateSource(tiny_model()), token_set()
    assert_same(measure(source, tokens, **settings), measure(source, tokens), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2, 5, 13])
def test_states_held_at_once_stay_within_the_limit(layers: int, request: pytest.FixtureRequest) -> None:
    source, tokens = StateSource(tiny_model(num_hidden_layers=layers)), token_set(samples=5, length=20 + layers)
    expected = measure(source, tokens)
    gc.collect()
    gc.freeze()  # so that only newer objects are gone through
    request.addfinalizer(gc.unfreeze)
    runs = {}
    levels = (layers - 1).bit_length()
    for copies in range(levels + 2, layers + 3):
        alive: list[int] = []
        model = _Counting(source, alive, memory_limit=copies * tokens.ids.numel() * HIDDEN * 4)
        assert_same(taylor_scores(model, tokens, batch_size=4), expected, rtol=1e-4)
        assert max(alive) <= copies
        runs[copies] = model.runs
    # Where all states are kept each layer is run once; with less it is never cheaper.
    assert runs[layers + 2 if layers > 1 else 2] == layers
    assert list(runs.values()) == sorted(runs.values(), reverse=True)


class _Counting(LayerwiseModel):
    """Notes how many copies of the hidden states there are whenever a layer runs."""

    def __init__(self, source: Any, alive: list[int], **settings: Any) -> None:
        super().__init__(source, Compute(**settings))
        self.runs = 0
        self._alive = alive

    def run_layer(self, layer: Any, hidden: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
        self.runs += 1
        self._count(hidden)
        return super().run_layer(layer, hidden, batch_size)

    def back_through_layer(self, layer: Any, hidden: Any, gradient: Any, batch_size: int = 8) -> torch.Tensor:
        self._count(hidden)
        return super().back_through_layer(layer, hidden, gradient, batch_size)

    def _count(self, hidden: torch.Tensor) -> None:
        same = [one for one in gc.get_objects() if type(one) is torch.Tensor and one.shape == hidden.shape]
        self._alive.append(len({one.data_ptr() for one in same}))


def test_too_little_room_is_refused_with_what_it_takes() -> None:
    model = LayerwiseModel(StateSource(tiny_model()), compute=Compute(memory_limit=4 * COPY - 1))
    with pytest.raises(UserError, match=r"6 sequences of 24 tokens need 0\.00015 GB .* --activation-memory") as caught:
        taylor_scores(model, token_set())
    assert "\n" not in str(caught.value)


def test_gradients_that_are_not_finite_are_found() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(UserError, match="gradients of layer 3 are not finite"):
        calibrate(StateSource(model), token_set(), gradients=True)


def test_one_calibration_has_both_and_progress_counts_both_ways() -> None:
    source, tokens = StateSource(tiny_model()), token_set()
    steps: list[tuple[int, int]] = []
    both = calibrate(source, tokens, gradients=True, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(step, 2 * LAYERS) for step in range(1, 2 * LAYERS + 1)]
    plain = calibrate(source, tokens)
    assert both.tensors.keys() - plain.tensors.keys() == taylor(both).keys()
    assert all(torch.equal(both.tensors[name], tensor) for name, tensor in plain.tensors.items())


def test_a_nemo_copy_of_a_model_has_the_same_scores(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    huggingface = HuggingFaceSource(make_tiny_llama(tmp_path / "model", dtype=torch.bfloat16))
    write_nemo(huggingface, tmp_path / "nemo")
    sources = (huggingface, NemoSource(tmp_path / "nemo"))
    scores = [calibrate(source, token_set(), gradients=True) for source in sources]
    assert scores[0].content_hash == scores[1].content_hash


def test_saved_scores_come_back(tmp_path: Path) -> None:
    scores = calibrate(StateSource(tiny_model()), token_set(), gradients=True)
    scores.save(tmp_path / "scores")
    assert Scores.load(tmp_path / "scores").content_hash == scores.content_hash


def test_half_precision_layers_have_gradients_in_single_precision() -> None:
    model, tokens = tiny_model().bfloat16(), token_set()
    scores = measure(StateSource(model), tokens, dtype=torch.bfloat16)
    exact = measure(StateSource(model), tokens)
    for site in ("groups", "ffn"):
        torch.testing.assert_close(scores[f"{site}.param_first"], exact[f"{site}.param_first"], rtol=0.2, atol=0)


@pytest.mark.parametrize("gradients", [False, True])
def test_the_cost_is_what_is_computed(gradients: bool) -> None:
    source, tokens = StateSource(tiny_model()), token_set()
    measured: list[Scores] = []
    products = multiplications(lambda: measured.append(calibrate(source, tokens, gradients=gradients)))
    (scores,) = measured
    attention = calibration_flops(scores.shape, 1, 1, gradients=gradients) - calibration_flops(
        scores.shape, 1, 0, gradients=gradients
    )
    assert attention == (5 if gradients else 1) * 2 * LAYERS * HEADS * HEAD_DIM
    assert 2 * products == calibration_flops(scores.shape, tokens.ids.numel(), 0, gradients=gradients)
