"""The shipped recipes that are called published have the numbers of the published scripts and papers."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.rounds import adapt_parameters
from nemo_pvs.recipe.load import load_recipe
from nemo_pvs.recipe.recipe import Recipe


def _load(name: str) -> tuple[Recipe, Shape]:
    recipe = load_recipe(name)
    assert recipe.parent.config is not None
    return recipe, Layout.for_config(recipe.parent.config).shape(recipe.parent.config)


@pytest.mark.parametrize(
    ("name", "target", "stages", "before", "after", "last_rate"),
    [
        ("adapt_pruner/qwen25_0p5b", "376m", 5, 494_032_768, 376_100_000, 2e-6),
        # The script counts 376.1 M and 143.1 M in round numbers.
        ("adapt_pruner/mobilellm_125m", "125m", 20, 376_075_200, 143_100_000, 0.0),
    ],
)
def test_adapt_pruner(name: str, target: str, stages: int, before: int, after: int, last_rate: float) -> None:
    """experiments/iterative_Prune_Train_{Qwen0.5B,MobileLLM350M}.sh of research4pan/AdaptPruner."""
    recipe, parent = _load(name)
    pruned, train = recipe.targets[target], recipe.train
    assert parent.parameters == before
    assert (pruned.stages, pruned.iterations or 50, pruned.amplitude or 0.02) == (stages, 50, 0.02)
    assert adapt_parameters(pruned, parent, stages) == pytest.approx(after, abs=1 if stages == 5 else 5e4)
    assert (train.learning_rate, train.learning_rate * train.min_learning_rate_ratio) == (
        2e-5,
        pytest.approx(last_rate),
    )
    assert (train.global_batch_size, train.micro_batch_size, train.sequence_length) == (32 * 4, 32, 1024)
    assert (train.warmup, train.warmup_fraction, train.decay_fraction) == ("linear", 0.05, 0.1)
    assert (train.weight_decay, train.adam_betas, train.clip_grad_norm) == (0.0, (0.9, 0.999), 1.0)
    assert (recipe.calibrate.samples, recipe.calibrate.sequence_length) == (512, 64)


def test_the_rounds_of_adapt_pruner_are_the_scripts() -> None:
    recipe, parent = _load("adapt_pruner/qwen25_0p5b")
    sizes = [adapt_parameters(recipe.targets["376m"], parent, number) for number in range(1, 6)]
    # original - (original - target) * round / steps, in the shell's whole numbers
    assert sizes == [470_446_215, 446_859_661, 423_273_108, 399_686_554, 376_100_000]


def test_llm_pruner() -> None:
    """scripts/llama_prune.sh of horseee/LLM-Pruner: a quarter of layers 4 to 29, by 10 sequences of 64 tokens."""
    recipe, parent = _load("llm_pruner/llama31_8b")
    target = recipe.targets["6.6b-taylor"]
    assert (target.ratio, target.protect_first, parent.layers - (target.protect_last or 0)) == (0.25, 4, 30)
    assert (recipe.calibrate.samples, recipe.calibrate.sequence_length) == (10, 64)


def test_sheared_llama() -> None:
    """Section 4.1 and appendix A of arXiv 2310.06694, and the configuration of princeton-nlp/LLM-Shearing."""
    recipe, _ = _load("sheared_llama/llama2_7b")
    target, train = recipe.targets["2.7b"], recipe.train
    learn = target.learn
    assert learn is not None
    assert (target.hidden, target.ffn, target.kv_groups) == (2560, 6912, 20)
    assert int(learn.tokens) == 3200 * 32 * 4096
    assert (learn.learning_rate, learn.mask_learning_rate, learn.multiplier_learning_rate) == (1e-4, 1.0, 1.0)
    assert (learn.warmup_fraction * 3200, learn.target_warmup_fraction * 3200) == (320, 640)
    assert (train.steps, train.tokens_per_step, train.learning_rate) == (48_000, 256 * 4096, 1e-4)
    assert (train.warmup_fraction, train.min_learning_rate_ratio, train.weight_decay) == (0.03, 0.1, 0.0)
    assert (train.adam_betas, train.adam_eps, train.clip_grad_norm) == ((0.9, 0.95), 1e-8, 1.0)


def test_minitron() -> None:
    """Table 4 of arXiv 2408.11796."""
    recipe, _ = _load("minitron/llama31_4b")
    train = recipe.train
    assert (int(train.tokens), train.global_batch_size, train.sequence_length) == (94 * 10**9, 1152, 8192)
    rates: Any = (train.learning_rate, train.learning_rate * train.min_learning_rate_ratio)
    assert rates == pytest.approx((1e-4, 1e-5))
    assert train.warmup_steps == 40
    assert recipe.calibrate.samples == 1024


def test_efficient_llm() -> None:
    """Figure 2 and the models of arXiv 2502.06663: N = 1, from 0.5 B tokens on, 8.6 B in all."""
    recipe, _ = _load("efficient_llm/smollm_1p7b")
    for target in recipe.targets.values():
        aware = target.pruning_aware
        assert aware is not None
        assert (int(aware.tokens), int(aware.start_tokens), aware.every) == (8_600_000_000, 500_000_000, 1)


@pytest.mark.parametrize(
    "method", ["minitron_depth", "minitron_width", "flap", "sheared", "wanda", "sparsegpt", "p200"]
)
def test_the_papers_grid(method: str) -> None:
    """scripts/run/env.sh of zlab-princeton/pruning-vs-scratch, and the schedule of its MaxText."""
    train = _load(f"llama31_8b/{method}")[0].train
    assert (train.global_batch_size, train.sequence_length, train.learning_rate) == (512, 8192, 3e-4)
    assert (train.warmup, train.warmup_fraction, train.warmup_max_steps) == ("quadratic", 0.05, 2000)
    assert (train.min_learning_rate_ratio, train.weight_decay, train.weight_decay_on) == (0.1, 0.1, "all")
    assert (train.adam_betas, train.adam_eps, train.clip_grad_norm) == ((0.9, 0.95), 1e-8, 1.0)
