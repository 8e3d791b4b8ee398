"""Gates on Megatron: ones change nothing, zeros are as good as slicing, every layout has the same gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan
from tests.families import save_tiny
from tests.megatron.ranks import run_ranks
from tests.state_source import random_ids

pytestmark = pytest.mark.parallel

LAYERS, HIDDEN, GROUPS, FFN = 4, 64, 4, 96
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": LAYERS, "num_key_value_heads": GROUPS}),
    "biases": ("llama", {"num_hidden_layers": LAYERS, "num_key_value_heads": GROUPS, "attention_bias": True}),
}
LAYOUTS = [(1, 1, 1, False), (2, 2, 1, False), (2, 2, 1, True), (2, 1, 2, False), (2, 1, 1, False), (4, 2, 2, False)]
IDS = random_ids(4, 25)


def plan_of(source: Any) -> Plan:
    """Return a plan that leaves something out everywhere; the last layer goes whole."""
    generator = torch.Generator().manual_seed(1)

    def some(size: int, kept: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(size, generator=generator)[:kept].tolist()))

    parent = shape_of(source)
    return Plan(
        method="test",
        parent=parent,
        target=parent.replace(layers=3, hidden=40, ffn=50, kv_groups=3),
        keep_layers=(0, 1, 2),
        keep_hidden=some(HIDDEN, 40),
        keep_ffn=tuple(some(FFN, 50) for _ in range(3)),
        keep_kv_groups=tuple(some(GROUPS, 3) for _ in range(3)),
    )


def masks_of_plan(plan: Plan) -> tuple[torch.Tensor, ...]:
    """Return bool hidden [d], groups [L, G], ffn [L, f], layers [L]."""
    sizes = (HIDDEN,), (LAYERS, GROUPS), (LAYERS, FFN), (LAYERS,)
    hidden, groups, ffn, layers = (torch.zeros(size, dtype=torch.bool) for size in sizes)
    hidden[list(plan.keep_hidden)] = True
    for place, layer in enumerate(plan.keep_layers):
        layers[layer] = True
        groups[layer, list(plan.keep_kv_groups[place])] = True
        ffn[layer, list(plan.keep_ffn[place])] = True
    return hidden, groups, ffn, layers


def factors() -> tuple[torch.Tensor, ...]:
    """Return random gates, some of them zero, but of few hidden channels: norms of few are of low accuracy."""
    generator = torch.Generator().manual_seed(2)
    sizes = (HIDDEN,), (LAYERS, GROUPS), (LAYERS, FFN), (LAYERS,)
    drawn = [torch.rand(size, generator=generator) for size in sizes]
    return tuple(torch.where(one < 0.2, 0.0, one) for one in drawn)


def _measure(folders: list[Path], tensor_parallel: int, pipeline_parallel: int, sequence_parallel: bool) -> list[Any]:
    """Be a rank; return for each checkpoint log-probabilities by gates, and gradients of gates."""
    from nemo_pvs.megatron.gradients import _MegatronGradients
    from nemo_pvs.megatron.inference import megatron_ranks
    from nemo_pvs.megatron.pruning.gates import gate_gradients, gated_layer_spec, install_gates
    from nemo_pvs.pruning.learned.gates import Gates
    from nemo_pvs.system.ranks import joined

    class Model(_MegatronGradients):
        layer_spec = staticmethod(gated_layer_spec)

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._wanted = sequence_parallel
            super().__init__(*arguments, **options)

        def _build(self, source: Any) -> torch.nn.Module:
            self._sequence_parallel = self._wanted
            return super()._build(source)

    measured = []
    with joined(on_gpus=True), megatron_ranks(tensor_parallel, pipeline_parallel):
        for folder in folders:
            source = open_source(folder)
            model = Model(source, dtype=torch.float32, device="cpu")
            current: list[Gates | None] = [None]

            def score(gates: Gates | None, current: list = current, model: Model = model) -> Any:
                current[0] = gates
                scores = model.score(IDS)
                return scores and scores.logprobs.numpy()

            plain = _MegatronGradients(source, dtype=torch.float32, device="cpu").score(IDS)
            install_gates(model.model, lambda current=current: current[0])
            ones = [torch.ones(size) for size in ((HIDDEN,), (LAYERS, GROUPS), (LAYERS, FFN), (LAYERS,))]
            masks = masks_of_plan(plan_of(source))
            result = {
                "dense": plain and plain.logprobs.numpy(),
                "none": score(None),
                "ones": score(Gates(*ones)),
                "masks": score(Gates(*masks)),
                "masks as numbers": score(Gates(*(mask.float() for mask in masks))),
            }
            gates = Gates(*factors()).requires_grad_()
            result["factors"] = score(gates)
            for sequence in IDS.tensor_split(model.replicas)[model.replica]:
                model._forward_and_backward(sequence[None].long())
            found = gate_gradients(gates, sequence_parallel=sequence_parallel)
            shares = len(IDS) // model.replicas
            result["gradients"] = [(tensor / shares).numpy() for tensor in found.tensors]
            measured.append(result)
    return measured


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for index, (family, settings) in enumerate(MODELS.values()):
        folder = tmp_path_factory.mktemp(f"model-{index}")
        write_nemo(HuggingFaceSource(save_tiny(folder / "hf", family, **settings)), folder / "nemo")
        made.append(folder / "nemo")
    return made


@pytest.fixture(scope="module")
def by_layout(folders: list[Path]) -> dict[Any, list[Any]]:
    return {layout: run_ranks(layout[0], _measure, folders, *layout[1:]) for layout in LAYOUTS}


def _answers(by_layout: dict[Any, list[Any]], model: int, name: str) -> dict[Any, np.ndarray]:
    """Return what each layout measured, from the rank that has it."""
    return {
        layout: next(rank[model][name] for rank in ranks if rank[model][name] is not None)
        for layout, ranks in by_layout.items()
    }


@pytest.mark.parametrize("model", range(len(MODELS)), ids=MODELS)
def test_gates_of_one_and_no_gates_are_the_dense_model_to_the_bit(by_layout: Any, model: int) -> None:
    dense = _answers(by_layout, model, "dense")
    for name in ("none", "ones"):
        for layout, answer in _answers(by_layout, model, name).items():
            np.testing.assert_array_equal(answer, dense[layout], err_msg=f"{name} {layout}")


@pytest.mark.parametrize("model", range(len(MODELS)), ids=MODELS)
def test_masked_is_pruned(by_layout: Any, folders: list[Path], model: int) -> None:
    from nemo_pvs.evaluation.scoring import TransformersScorer

    source = open_source(folders[model])
    pruned = PrunedSource(source, plan_of(source))
    expected = TransformersScorer(pruned, dtype=torch.float32, device="cpu").score(IDS.long()).logprobs.numpy()
    dense = _answers(by_layout, model, "dense")[LAYOUTS[0]]
    assert np.abs(expected - dense).max() > 0.1
    for name in ("masks", "masks as numbers"):
        for layout, answer in _answers(by_layout, model, name).items():
            np.testing.assert_allclose(answer, expected, atol=1e-5, err_msg=f"{name} {layout}")


@pytest.mark.parametrize("model", range(len(MODELS)), ids=MODELS)
def test_every_layout_has_the_same_gradients_on_every_rank(by_layout: Any, model: int) -> None:
    expected = by_layout[LAYOUTS[0]][0][model]["gradients"]
    assert all(np.abs(tensor).max() > 1e-4 for tensor in expected)
    for layout, ranks in by_layout.items():
        for rank in ranks:
            for name, tensor, one in zip(
                ["hidden", "groups", "ffn", "layers"], rank[model]["gradients"], expected, strict=True
            ):
                np.testing.assert_allclose(
                    tensor, one, rtol=1e-3, atol=1e-5 * np.abs(one).max(), err_msg=f"{name} {layout}"
                )
