"""Layer-by-layer passes on a GPU give the results of the CPU, wherever hidden states are kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.transforms.random import RandomSource
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.layerwise import state_memory
from nemo_pvs.layerwise.model import Compute, LayerwiseModel
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.layerwise.state_memory import Room
from nemo_pvs.pruning.sparse.sequential import LayerwiseMethod, prune_layers
from nemo_pvs.pruning.sparse.sparsegpt import SparseGPT
from nemo_pvs.pruning.sparse.sparsity import Sparsity
from nemo_pvs.pruning.sparse.wanda import Wanda
from nemo_pvs.pruning.structured.depth import scan_windows
from tests.conftest import tiny_llama_config
from tests.state_source import random_ids

pytestmark = pytest.mark.gpu

SAMPLES, LENGTH = 12, 64
ROOMS = {"on the device": Room(1 << 40, 0), "page-locked": Room(0, 1 << 40), "pageable": Room(0, 0)}
MATRICES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def source(parent: Path) -> HuggingFaceSource:
    return HuggingFaceSource(parent)


@pytest.fixture(scope="module")
def tokens() -> TokenSet:
    return TokenSet(random_ids(SAMPLES, LENGTH), {})


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference relative to that of ``other``."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def test_statistics_and_gradients_are_those_of_the_cpu(device, source, tokens, measured):
    expected, found = (
        calibrate(source, tokens, gradients=True, compute=Compute(device=where)).tensors for where in ("cpu", device)
    )
    apart = {name: _apart(found[name], expected[name]) for name in expected if name != "tokens"}
    worst = max(apart, key=apart.__getitem__)
    measured(f"{len(apart)} statistics; {worst} is {apart[worst]:.1e} apart")
    assert apart[worst] < 1e-4
    assert {tensor.device.type for tensor in found.values()} == {"cpu"}


def test_losses_are_those_of_the_cpu(device, source, tokens, measured):
    found = []
    for where in ("cpu", device):
        compute = Compute(device=where)
        scan = scan_windows(source, tokens, 2, compute=compute)
        found.append([*scan.losses, scan.dense_loss, perplexity(source, tokens, compute)["loss"]])
    apart = max(abs(one - other) for one, other in zip(*found, strict=True))
    measured(f"depth scan and perplexity {apart:.1e} apart")
    assert apart < 1e-4
    assert max(found[0]) - min(found[0]) > 10 * apart, "the losses tell nothing apart"


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
@pytest.mark.parametrize("method", [Wanda, SparseGPT])
def test_masks_are_those_of_the_cpu(device, source, tokens, tmp_path, measured, method, sparsity):
    """But for ties within rounding, which SparseGPT carries on from column to column."""
    chosen = method(Sparsity.parse(sparsity))
    kept = [_masks(source, tokens, chosen, tmp_path / str(run), where) for run, where in enumerate(("cpu", device))]
    same = float((kept[0] == kept[1]).float().mean())
    measured(f"{same:.3%} of the mask the same")
    assert float(kept[1].float().mean()) == pytest.approx(0.5, abs=0.01)
    assert same > (0.999 if method is Wanda else 0.98)


def _masks(source: Any, tokens: TokenSet, method: LayerwiseMethod, folder: Path, where: str) -> torch.Tensor:
    pruned = prune_layers(source, tokens, method, folder, compute=Compute(device=where))
    names = (f"model.layers.{layer}.{name}.weight" for layer in range(4) for name in MATRICES)
    return torch.cat([pruned.masks.read(name).flatten() for name in names])


@pytest.fixture(scope="module")
def wide(device: str) -> tuple[RandomSource, TokenSet]:
    """A model of three layers and text that take a GPU long enough for a copy that comes too early to be seen."""
    if not device.startswith("cuda"):
        return RandomSource(tiny_llama_config(num_hidden_layers=3).to_dict(), seed=0), TokenSet(random_ids(8, 64), {})
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3, "max_position_embeddings": 512}
    config = tiny_llama_config(**sizes, num_attention_heads=16, head_dim=64).to_dict()
    return RandomSource(config, seed=0), TokenSet(random_ids(48, 512), {})


def test_results_do_not_depend_on_where_states_are(device, wide, tmp_path, monkeypatch, measured):
    source, tokens = wide
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, room in ROOMS.items():
        monkeypatch.setattr(Room, "here", lambda _, room=room: room)
        compute = Compute(device=device, batch_size=4, memory_limit=1 << 40)
        results = dict(calibrate(source, tokens, compute=compute).tensors)
        results["scan"] = torch.tensor(scan_windows(source, tokens, 1, compute=compute).losses)
        results["mask"] = _mask_of_last(source, tokens, tmp_path / name, compute)
        found[name] = results
    on_device = found.pop("on the device")
    for place, results in found.items():
        differing = [name for name, tensor in on_device.items() if not torch.equal(results[name], tensor)]
        assert not differing, place
    measured(f"{len(on_device)} results equal, bit for bit, in {len(ROOMS)} places")


def _mask_of_last(source: Any, tokens: TokenSet, folder: Path, compute: Compute) -> torch.Tensor:
    pruned = prune_layers(source, tokens, Wanda(Sparsity.parse("2:4")), folder, compute=compute)
    return pruned.masks.read("model.layers.2.mlp.down_proj.weight")


def test_gradients_do_not_depend_on_where_states_are(device, wide, monkeypatch, measured):
    """Attention's backward pass on a GPU adds in any order, so equality is only near."""
    source, tokens = wide
    found = []
    for room in ROOMS.values():
        monkeypatch.setattr(Room, "here", lambda _, room=room: room)
        compute = Compute(device=device, batch_size=4, memory_limit=1 << 40)
        found.append(calibrate(source, tokens, gradients=True, compute=compute).tensors)
    names = [name for name in found[0] if name.startswith(("groups.", "ffn.param", "ffn.vectorize"))]
    apart = max(_apart(other[name], found[0][name]) for other in found[1:] for name in names)
    measured(f"at most {apart:.1e} apart")
    assert apart < 1e-4


def test_a_chunk_that_is_done_makes_room_for_the_next(gpu, wide, monkeypatch):
    """States go where there is room, and that of an earlier chunk is free again."""
    source, _ = wide
    assert LayerwiseModel(source, Compute(device="cuda")).embed(random_ids(2, 512)).device == torch.device(gpu)
    two_chunks = 2 * 2 * 512 * 1024 * 4
    monkeypatch.setattr(Room, "here", lambda _: Room(two_chunks, 1 << 30))
    model = LayerwiseModel(source, Compute(device=gpu))
    for ids in random_ids(8, 512).split(2):
        hidden = model.embed(ids)  # for a moment there are two chunks
        assert hidden.device == torch.device(gpu)
    assert model.embed(random_ids(4, 512)).is_pinned()


def test_speed_of_an_8b_layer(gpu, monkeypatch, measured):
    """64 windows of 4,096 tokens, 2 GiB of states, with the statistics of a calibration left out."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = tiny_llama_config(**sizes, head_dim=128, num_hidden_layers=1, max_position_embeddings=4096).to_dict()
    source = RandomSource(config, seed=0, dtype=torch.bfloat16)
    seconds = {}
    for name, room in ROOMS.items():
        monkeypatch.setattr(state_memory.Room, "here", lambda _, room=room: room)
        model = LayerwiseModel(source, Compute(device=gpu, dtype=torch.bfloat16, memory_limit=1 << 40))
        layer = model.layer(0)
        hidden = model.embed(random_ids(64, 4096))
        model.run_layer(layer, hidden[:16])
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.run_layer(layer, hidden)
        torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - began
    measured("262k tokens: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
    assert seconds["page-locked"] < seconds["pageable"]
    assert seconds["on the device"] < 1.1 * seconds["page-locked"]
