"""Which channels and groups width pruning keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.structured.width import most_important, plan_width
from tests.state_source import StateSource, random_ids, tiny_model

PARENT = Shape(layers=2, hidden=4, ffn=3, heads=4, kv_groups=2, head_dim=2, vocab=8, tied=False)


def make_scores(**tensors: Any) -> Scores:
    values = {
        "hidden.energy": [1.0, 3.0, 2.0, 3.0],
        "hidden.meanabs_l2": [4.0, 3.0, 2.0, 1.0],
        "ffn.energy": [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]],
        "ffn.meanabs_l2": [[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]],
        # Layer 0: head 2 is the strongest, but group 0 is stronger as a whole.
        "heads.energy": [[4.0, 4.0, 5.0, 1.0], [1.0, 1.0, 0.0, 3.0]],
        "heads.meanabs_l2": [[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]],
        **tensors,
    }
    manifest = {"model_fingerprint": "f", "shape": PARENT.to_dict(), "tokens": {}}
    return Scores({name: torch.tensor(value).double() for name, value in values.items()}, manifest)


def calibrated(model: LlamaForCausalLM) -> Scores:
    tokens = TokenSet.from_stream(random_ids(1, 8 * 32, seed=5)[0].numpy(), sequence_length=32)
    return calibrate(StateSource(model), tokens)


def test_by_hand() -> None:
    target = PARENT.replace(hidden=2, ffn=2, kv_groups=1)
    plan = plan_width(make_scores(), target)
    assert plan.keep_hidden == (1, 3)
    assert plan.keep_ffn == ((1, 2), (0, 1))
    assert plan.keep_kv_groups == ((0,), (1,))
    plan = plan_width(make_scores(), target, aggregation="meanabs_l2")
    assert plan.keep_hidden == (0, 1)
    assert plan.keep_ffn == ((0, 2), (1, 2))
    assert plan.keep_kv_groups == ((1,), (0,))


def test_query_heads_by_hand() -> None:
    plan = plan_width(make_scores(), PARENT.replace(heads=2))
    assert plan.keep_kv_groups == ((0, 1),) * 2
    assert plan.keep_heads == ((0, 2), (0, 3))  # a tie goes to the lower index
    # With one head a group, group 1 of layer 0 is the stronger one: 5 against 4.
    plan = plan_width(make_scores(), PARENT.replace(kv_groups=1, heads=1))
    assert plan.keep_kv_groups == ((1,), (1,))
    assert plan.keep_heads == ((2,), (3,))
    plan = plan_width(make_scores(), PARENT.replace(kv_groups=1, heads=1), aggregation="meanabs_l2")
    assert plan.keep_heads == ((2,), (0,))
    assert plan_width(make_scores(), PARENT.replace(kv_groups=1)).keep_heads == ()


def test_ties_go_to_the_lower_index_and_counts_are_exact() -> None:
    assert most_important(torch.tensor([3.0, 1.0, 3.0, 3.0]), 2) == (0, 2)
    assert most_important(torch.ones(1000), 300) == tuple(range(300))


def test_the_parents_own_shape_keeps_everything() -> None:
    plan = plan_width(make_scores(), PARENT)
    assert plan.keep_hidden == (0, 1, 2, 3)
    assert plan.keep_ffn == ((0, 1, 2),) * 2
    assert plan.keep_kv_groups == ((0, 1),) * 2


def test_a_smaller_target_is_nested_in_a_larger_one() -> None:
    scores = calibrated(tiny_model())
    small, large = (plan_width(scores, scores.shape.replace(hidden=h, ffn=h)) for h in (16, 40))
    assert set(small.keep_hidden) < set(large.keep_hidden)
    assert all(set(inner) < set(outer) for inner, outer in zip(small.keep_ffn, large.keep_ffn, strict=True))


def test_planted_units_are_kept() -> None:
    """Make some units loud and their readers deaf in proportion: the function stays, the scores must notice."""
    generator = torch.Generator().manual_seed(4)
    model = tiny_model(num_key_value_heads=4)
    hidden = torch.randperm(64, generator=generator)[:24].sort().values
    ffn = [torch.randperm(96, generator=generator)[:32].sort().values for _ in range(4)]
    groups = [torch.randperm(4, generator=generator)[:2].sort().values for _ in range(4)]
    ids = random_ids(2, 32).long()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.fill_(1.0)
            layer.post_attention_layernorm.weight.fill_(1.0)
        before = model(ids).logits
        for layer, some_ffn, some_groups in zip(model.model.layers, ffn, groups, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[hidden] *= 10
                for reader in readers:
                    reader.weight[:, hidden] /= 10
            mlp.up_proj.weight[some_ffn] *= 100
            mlp.down_proj.weight[:, some_ffn] /= 100
            attention.v_proj.weight.view(4, 16, 64)[some_groups] *= 100
            attention.o_proj.weight.view(64, 4, 2 * 16)[:, some_groups] /= 100
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)
    scores = calibrated(model)
    for aggregation in ("energy", "meanabs_l2"):
        plan = plan_width(scores, scores.shape.replace(hidden=24, ffn=32, kv_groups=2), aggregation)
        assert plan.keep_hidden == tuple(hidden.tolist())
        assert plan.keep_ffn == tuple(tuple(row.tolist()) for row in ffn)
        assert plan.keep_kv_groups == tuple(tuple(row.tolist()) for row in groups)


@pytest.mark.parametrize(
    ("heads", "pairs"),
    [
        # Heads 0 to 3 by falling importance: 2, 0, 3, 1. Heads 4 to 7: 7, 6, 5, 4.
        (6, ((3, 1), (5, 4))),
        (4, ((0, 3), (2, 1), (6, 5), (7, 4))),
        (2, ((2, 0), (7, 6))),
        (8, None),
    ],
)
def test_residuals_of_removed_heads_by_hand(heads: int, pairs: tuple[tuple[int, int], ...] | None) -> None:
    """K of L heads: ``head_i`` takes in ``head_{2K-i+1}``; of L = 4 K = 1 leaves two heads that none takes in."""
    parent = PARENT.replace(heads=8)
    scores = make_scores(**{"heads.energy": [[3.0, 1.0, 4.0, 2.0, 0.0, 1.0, 2.0, 3.0]] * 2})
    scores = Scores(scores.tensors, {**scores.manifest, "shape": parent.to_dict()})
    plan = plan_width(scores, parent.replace(heads=heads), merge_heads=True)
    assert plan.merged_heads == (() if pairs is None else (pairs,) * 2)
    assert plan_width(scores, parent.replace(heads=heads)).merged_heads == ()
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("aggregation", ["energy", "meanabs_l2"])
def test_the_importance_of_a_head_is_the_norm_of_its_output(aggregation: str) -> None:
    """By a float64 loop over what enters ``o_proj``, and the two best of each group of four are kept."""
    model, ids = tiny_model(), random_ids(1, 4 * 32, seed=5).view(4, 32)
    entering: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0].double()))
    with torch.no_grad():
        model(ids.long())
    scores = calibrate(StateSource(tiny_model()), TokenSet.from_stream(ids.flatten().numpy(), sequence_length=32))
    plan = plan_width(scores, scores.shape.replace(heads=4), aggregation)
    for layer, outputs in enumerate(entering):
        norms = []
        for head in range(8):
            output = outputs[:, :, 16 * head : 16 * head + 16]
            if aggregation == "energy":
                norms.append(sum(float(token.norm()) ** 2 for token in output.flatten(0, 1)))
            else:
                norms.append(float(output.abs().mean(dim=1).norm()))
        best = [sorted(group, key=lambda head: -norms[head])[:2] for group in (range(4), range(4, 8))]
        assert plan.keep_heads[layer] == (*sorted(best[0]), *sorted(best[1]))


def test_planted_heads_are_kept() -> None:
    model = tiny_model()
    generator = torch.Generator().manual_seed(4)
    planted = []
    with torch.no_grad():
        for layer in model.model.layers:
            loud = [4 * group + int(torch.randint(4, (), generator=generator)) for group in range(2)]
            planted.append(tuple(loud))
            # A head that attends to one token instead of averaging over many has the larger output.
            layer.self_attn.q_proj.weight.mul_(1e-3).view(8, 16, 64)[loud] *= 1e5
    scores = calibrated(model)
    for aggregation in ("energy", "meanabs_l2"):
        assert plan_width(scores, scores.shape.replace(heads=2), aggregation).keep_heads == tuple(planted)


def test_the_plan_is_deterministic_and_names_its_scores() -> None:
    scores = make_scores()
    target = PARENT.replace(hidden=2)
    plan = plan_width(scores, target)
    assert plan.plan_hash == plan_width(scores, target).plan_hash
    assert plan.provenance["scores"] == scores.content_hash
    assert plan.provenance["model_fingerprint"] == "f"
    assert plan.plan_hash != plan_width(scores, target, "meanabs_l2").plan_hash


@pytest.mark.parametrize(
    ("target", "aggregation", "message"),
    [
        (PARENT.replace(layers=1), "energy", "remove layers with depth pruning"),
        (PARENT, "l1", "Unknown aggregation 'l1'; choose energy or meanabs_l2"),
        (PARENT.replace(hidden=5), "energy", "keeps .*hidden 4,.* target is .*hidden 5,"),
        (PARENT.replace(vocab=4), "energy", "leaves head_dim alone"),
    ],
)
def test_impossible_targets_are_refused(target: Shape, aggregation: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_width(make_scores(), target, aggregation)
