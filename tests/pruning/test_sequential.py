"""Layer by layer against whole models and float64 oracles; killed and resumed; on two ranks."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource, write_huggingface
from nemo_pvs.checkpoints.masks import masks_of
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.pruning.sparse.pruned_layers import SparseSource
from nemo_pvs.pruning.sparse.sequential import LayerwiseMethod, prune_layers
from nemo_pvs.pruning.sparse.sparsegpt import SparseGPT
from nemo_pvs.pruning.sparse.sparsity import Sparsity
from nemo_pvs.pruning.sparse.wanda import Wanda
from nemo_pvs.pruning.sparse.work_folder import work_folder
from nemo_pvs.system.files import read_json
from tests.conftest import make_tiny_llama
from tests.megatron.ranks import run_ranks
from tests.pruning.test_sparsegpt import oracle
from tests.state_source import StateSource, random_ids, tiny_model

LAYERS = 4
METHODS: list[LayerwiseMethod] = [Wanda(Sparsity(0.5)), SparseGPT(Sparsity.parse("2:4")), SparseGPT(Sparsity(0.6))]


def token_set(samples: int = 6, length: int = 48) -> TokenSet:
    return TokenSet(random_ids(samples, length, seed=5), {})


def state(source: SparseSource) -> dict[str, torch.Tensor]:
    """Return every pruned matrix and mask, to be compared bit for bit."""
    names = source.masks.names
    return {name: source.read(name) for name in names} | {f"{name} mask": source.masks.read(name) for name in names}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def inputs_of(model: torch.nn.Module, ids: torch.Tensor, layer: int) -> dict[str, np.ndarray[Any, Any]]:
    """Run a whole model and return what each matrix of one layer reads, [channels, tokens]."""
    seen: dict[str, np.ndarray[Any, Any]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].flatten(0, 1).double().numpy().T})
        )
        for name, module in model.named_modules()
        if name.startswith(f"model.layers.{layer}.") and isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(ids.long())
    for hook in hooks:
        hook.remove()
    return seen


def prune_like_the_paper(weight: torch.Tensor, x: Any, method: LayerwiseMethod, samples: int) -> tuple[Any, Any]:
    w = weight.detach().double().numpy()
    if isinstance(method, SparseGPT):
        hessian = 2 / samples * x @ x.T
        hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
        zeros, group = method.sparsity.pattern or (method.sparsity.ratio, 128)
        return oracle(w, hessian, zeros, group)
    scores = np.abs(w) * np.sqrt((x**2).sum(axis=1))
    gone = scores.argsort(axis=1, kind="stable").argsort(axis=1) < w.shape[1] // 2
    return np.where(gone, 0, w), gone


@pytest.mark.slow
@pytest.mark.parametrize("calibration", ["sequential", "dense"])
@pytest.mark.parametrize("method", METHODS, ids=["wanda", "sparsegpt 2:4", "sparsegpt 0.6"])
def test_layer_by_layer_is_what_whole_models_say(method: LayerwiseMethod, calibration: Any, tmp_path: Path) -> None:
    """The oracle runs all of the dense model, or the model pruned so far, in float64, for every layer."""
    dense, tokens = tiny_model(num_hidden_layers=3).double(), token_set()
    pruned_so_far = copy.deepcopy(dense)
    expected = {}
    for layer in range(3):
        inputs = inputs_of(pruned_so_far if calibration == "sequential" else dense, tokens.ids, layer)
        for name, x in inputs.items():
            module = pruned_so_far.get_submodule(name)
            weight, gone = prune_like_the_paper(module.weight, x, method, len(tokens.ids))
            expected[f"{name}.weight"] = torch.from_numpy(weight)
            expected[f"{name}.weight mask"] = torch.from_numpy(~gone)
            with torch.no_grad():
                module.weight.copy_(torch.from_numpy(weight))
    source = StateSource(dense)
    result = prune_layers(
        source,
        tokens,
        method,
        tmp_path / "work",
        calibration=calibration,
        compute=Compute(batch_size=4, dtype=torch.float64),
    )
    found = state(result)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if name.endswith("mask"):
            assert torch.equal(tensor, expected[name]), name
        else:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_sequential_and_dense_differ_behind_the_first_layer(tmp_path: Path) -> None:
    source, tokens = StateSource(tiny_model()), token_set()
    results = [
        state(prune_layers(source, tokens, METHODS[1], tmp_path / kind, calibration=kind))  # type: ignore[arg-type]
        for kind in ("sequential", "dense")
    ]
    for name, tensor in results[0].items():
        same = torch.equal(tensor, results[1][name])
        assert same == name.startswith("model.layers.0."), name


def test_the_result_is_a_model_with_masks(tmp_path: Path) -> None:
    parent = StateSource(tiny_model())
    before = {name: tensor.clone() for name, tensor in parent.model.state_dict().items()}
    result = prune_layers(parent, token_set(), METHODS[2], tmp_path / "work")
    assert masks_of(result) is result.masks
    write_huggingface(result, tmp_path / "sparse")
    written = HuggingFaceSource(tmp_path / "sparse")
    for name, dense in before.items():
        assert torch.equal(parent.read(name), dense)  # in memory, so a careless in-place change would show
        if name in result.masks.names:
            mask = result.masks.read(name)
            assert int((~mask).sum()) == int(0.6 * dense.numel() + 1e-9)
            assert (result.read(name)[~mask] == 0).all()
            assert not torch.equal(result.read(name), torch.where(mask, dense, 0.0))
        else:
            assert torch.equal(result.read(name), dense)
        assert torch.equal(written.read(name), result.read(name))
    assert len(result.masks.names) == 7 * LAYERS


def test_layers_see_what_will_be_stored(tmp_path: Path) -> None:
    """A bf16 model: the statistics of layer 1 come from matrices rounded to bf16."""
    model = tiny_model().bfloat16()
    result = prune_layers(StateSource(model), token_set(), METHODS[1], tmp_path / "work")
    assert result.read(result.masks.names[0]).dtype == torch.bfloat16
    rounded = tiny_model().bfloat16().float()
    for name in result.masks.names:
        if ".layers.0." in name:
            rounded.get_parameter(name).data.copy_(result.read(name))
    x = inputs_of(rounded, token_set().ids, 1)["model.layers.1.self_attn.q_proj"]
    name = "model.layers.1.self_attn.q_proj.weight"
    _, gone = prune_like_the_paper(rounded.get_parameter(name), x, METHODS[1], 6)
    assert (~result.masks.read(name).numpy() == gone).mean() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS[:2], ids=["wanda", "sparsegpt"])
def test_batches_and_memory_do_not_matter(method: LayerwiseMethod, tmp_path: Path) -> None:
    source, tokens = StateSource(tiny_model().double()), token_set(7)
    settings: list[dict[str, Any]] = [{"batch_size": 7}, {"batch_size": 2}, {"batch_size": 7, "memory_limit": 1}]
    results = [
        state(
            prune_layers(source, tokens, method, tmp_path / str(index), compute=Compute(dtype=torch.float64, **kwargs))
        )
        for index, kwargs in enumerate(settings)
    ]
    assert_same(results[0], results[2])
    for name, tensor in results[0].items():
        if name.endswith("mask"):
            assert torch.equal(tensor, results[1][name])
        else:
            torch.testing.assert_close(tensor, results[1][name], rtol=1e-6, atol=1e-9)


def test_progress_counts_sequences_through_layers(tmp_path: Path) -> None:
    for calibration, passes in (("sequential", 2 * LAYERS - 1), ("dense", LAYERS)):
        steps: list[tuple[int, int]] = []
        prune_layers(
            StateSource(tiny_model()),
            token_set(6),
            METHODS[0],
            tmp_path / calibration,
            calibration=calibration,  # type: ignore[arg-type]
            compute=Compute(batch_size=2),
            progress=lambda done, total, steps=steps: steps.append((done, total)),
        )
        assert steps == [(done, 6 * passes) for done in range(2, 6 * passes + 1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("calibration", ["sequential", "dense"])
def test_interrupted_anywhere_and_resumed_it_is_the_same_to_the_bit(calibration: Any, tmp_path: Path) -> None:
    layers = 3
    source, tokens = StateSource(tiny_model(num_hidden_layers=layers)), token_set(4)
    settings: dict[str, Any] = {"calibration": calibration, "compute": Compute(batch_size=2)}
    expected = state(prune_layers(source, tokens, METHODS[1], tmp_path / "whole", **settings))
    passes = 2 if calibration == "sequential" else 1
    total = 2 * (passes * layers - passes + 1)  # steps of two of the four sequences
    for last_step in range(1, total + 1):
        folder, steps = tmp_path / str(last_step), 0

        def interrupt(done: int, _: int, last_step: int = last_step) -> None:
            if done == 2 * last_step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prune_layers(source, tokens, METHODS[1], folder, progress=interrupt, **settings)

        def count(done: int, _: int) -> None:
            nonlocal steps
            steps += 1

        result = prune_layers(source, tokens, METHODS[1], folder, progress=count, **settings)
        layers_done = (last_step - 1) // (2 * passes)
        assert steps == total - 2 * passes * layers_done
        assert_same(state(result), expected)
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            [*(f"layer-{layer:05d}" for layer in range(layers)), "record.json"]
        )


_KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.pruning.sparse.sequential import prune_layers
from nemo_pvs.pruning.sparse.sparsegpt import SparseGPT
from nemo_pvs.pruning.sparse.sparsity import Sparsity

model, ids, folder = map(Path, sys.argv[1:])

def die(done, total):
    if done == 17:  # six sequences, two passes a layer: in the second pass of layer 1
        os.kill(os.getpid(), signal.SIGKILL)

prune_layers(HuggingFaceSource(model), TokenSet(torch.load(ids, weights_only=True), {}),
             SparseGPT(Sparsity.parse("2:4")), folder, compute=Compute(batch_size=1), progress=die)
"""


@pytest.mark.slow
def test_kill_9(tmp_path: Path) -> None:
    source, tokens = HuggingFaceSource(make_tiny_llama(tmp_path / "model")), token_set(5)
    expected = state(prune_layers(source, tokens, METHODS[1], tmp_path / "whole", compute=Compute(batch_size=1)))
    torch.save(tokens.ids, tmp_path / "ids")
    folder = work_folder(tmp_path / "target")
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "model"), str(tmp_path / "ids"), str(folder)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert read_json(folder / "record.json")["layers_done"] == 1
    first = (folder / "layer-00000" / "weights.safetensors").stat()
    result = prune_layers(source, tokens, METHODS[1], folder, compute=Compute(batch_size=1))
    assert_same(state(result), expected)
    assert (folder / "layer-00000" / "weights.safetensors").stat().st_mtime_ns == first.st_mtime_ns


def interrupted(folder: Path, source: StateSource, tokens: TokenSet, method: LayerwiseMethod, sequences: int) -> None:
    def interrupt(done: int, _: int) -> None:
        if done >= sequences:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_layers(source, tokens, method, folder, progress=interrupt)


@pytest.mark.slow
def test_another_pruning_in_the_folder(tmp_path: Path) -> None:
    source, tokens, folder = StateSource(tiny_model()), token_set(), tmp_path / "work"
    interrupted(folder, source, tokens, METHODS[0], 20)
    others: list[tuple[str, tuple[StateSource, TokenSet, LayerwiseMethod]]] = [
        ("model", (StateSource(tiny_model(seed=1)), tokens, METHODS[0])),
        ("samples, tokens", (source, token_set(5), METHODS[0])),
        ("sparsity", (source, tokens, Wanda(Sparsity.parse("2:4")))),
        ("block, compat, damping, method", (source, tokens, SparseGPT(Sparsity(0.5)))),
    ]
    for differing, arguments in others:
        with pytest.raises(UserError, match=f"an interrupted pruning with another {differing};"):
            prune_layers(*arguments, folder)
    replaced = state(prune_layers(*others[2][1], folder, overwrite=True))
    assert_same(replaced, state(prune_layers(*others[2][1], tmp_path / "fresh")))


@pytest.mark.slow
def test_a_pruning_that_finished_no_layer_makes_room(tmp_path: Path) -> None:
    source, tokens, folder = StateSource(tiny_model()), token_set(), tmp_path / "work"
    interrupted(folder, source, tokens, METHODS[0], 1)
    assert_same(
        state(prune_layers(source, tokens, METHODS[1], folder)),
        state(prune_layers(source, tokens, METHODS[1], tmp_path / "fresh")),
    )


def test_a_finished_pruning_is_not_done_again(tmp_path: Path) -> None:
    source, tokens = StateSource(tiny_model()), token_set()
    expected = state(prune_layers(source, tokens, METHODS[0], tmp_path / "work"))

    def never(done: int, total: int) -> None:
        raise AssertionError

    assert_same(state(prune_layers(source, tokens, METHODS[0], tmp_path / "work", progress=never)), expected)


@pytest.mark.slow
def test_lost_states_mean_starting_again(tmp_path: Path) -> None:
    source, tokens, folder = StateSource(tiny_model()), token_set(), tmp_path / "work"
    interrupted(folder, source, tokens, METHODS[0], 20)
    for file in folder.glob("states-*"):
        file.unlink()
    result = prune_layers(source, tokens, METHODS[0], folder)
    assert_same(state(result), state(prune_layers(source, tokens, METHODS[0], tmp_path / "fresh")))


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds something other than a pruning"):
        prune_layers(StateSource(tiny_model()), token_set(), METHODS[0], tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_bad_tokens_leave_nothing_behind(tmp_path: Path) -> None:
    for ids, complaint in (
        (random_ids(2, 300), "do not fit the model's context"),
        (random_ids(2, 9, 500), "vocabulary"),
    ):
        with pytest.raises(UserError, match=complaint):
            prune_layers(StateSource(tiny_model()), TokenSet(ids, {}), METHODS[0], tmp_path / "work")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS[:2], ids=["wanda", "sparsegpt"])
def test_a_broken_layer_is_named(method: LayerwiseMethod, tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 0] = float("nan")
    with pytest.raises(UserError, match=r"not finite \(layer 2, input of mlp\.down_proj\)"):
        prune_layers(StateSource(model), token_set(), method, tmp_path / "work")


def test_dead_channels_and_few_tokens(tmp_path: Path) -> None:
    """Three tokens for 64 inputs, and FFN channels that never fire."""
    model, said = tiny_model(), []
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:5] = 0
    method = SparseGPT(Sparsity(0.5), damping=0.0)
    result = prune_layers(
        StateSource(model), TokenSet(random_ids(1, 3), {}), method, tmp_path / "work", warn=said.append
    )
    assert (result.read("model.layers.1.mlp.down_proj.weight")[:, :5] == 0).all()
    assert all(result.read(name).isfinite().all() for name in result.masks.names)
    assert any(text.startswith("layer 1, input of self_attn.q_proj, self_attn.k_proj") for text in said)
    assert all("trying again with damping" in text for text in said)


@pytest.mark.slow
def test_a_nemo_checkpoint_gives_the_same_result(tmp_path: Path, make_tiny_llama: Callable[..., Path]) -> None:
    source = HuggingFaceSource(make_tiny_llama(tmp_path / "hf", dtype=torch.bfloat16))
    write_nemo(source, tmp_path / "nemo")
    results = [
        state(prune_layers(one, token_set(), METHODS[1], tmp_path / f"work {index}"))
        for index, one in enumerate((source, NemoSource(tmp_path / "nemo")))
    ]
    assert_same(*results)


def prune_on_a_rank(model: str, folder: str, interrupt_at: float) -> dict[str, np.ndarray[Any, Any]]:
    """Prune with gloo, resumed after all ranks are interrupted at that share of the way, in the middle of a pass."""
    torch.distributed.init_process_group("gloo")

    def interrupt(done: int, total: int) -> None:
        if done / total > interrupt_at:
            raise KeyboardInterrupt

    for progress in (interrupt, None):
        try:
            result = prune_layers(
                HuggingFaceSource(Path(model)),
                token_set(7),
                SparseGPT(Sparsity.parse("2:4")),
                Path(folder),
                compute=Compute(batch_size=2, dtype=torch.float64),
                progress=progress,
            )
        except KeyboardInterrupt:
            torch.distributed.barrier()
            continue
        return {name: tensor.numpy() for name, tensor in state(result).items()}
    raise AssertionError


@pytest.mark.parallel
def test_two_ranks(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model", dtype=torch.float32)
    one = state(
        prune_layers(
            HuggingFaceSource(model),
            token_set(7),
            METHODS[1],
            tmp_path / "one",
            compute=Compute(batch_size=2, dtype=torch.float64),
        )
    )
    whole = run_ranks(2, prune_on_a_rank, str(model), str(tmp_path / "two"), 1.0)
    resumed = run_ranks(2, prune_on_a_rank, str(model), str(tmp_path / "resumed"), 0.33)
    for name, tensor in one.items():
        first, second = (ranks[name] for ranks in whole)
        assert np.array_equal(first, second), name
        assert all(np.array_equal(first, ranks[name]) for ranks in resumed), name
        if name.endswith("mask"):
            assert np.array_equal(tensor.numpy(), first), name
        else:
            np.testing.assert_allclose(tensor.numpy(), first, rtol=1e-5, atol=1e-7)
