"""Results do not depend on where hidden states are kept, however late their copies arrive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.layerwise.state_memory import StateMemory
from nemo_pvs.layerwise.transfers import Transfers
from nemo_pvs.model.layout import Layout
from nemo_pvs.pruning.sparse.sequential import prune_layers
from nemo_pvs.pruning.sparse.sparsegpt import SparseGPT
from nemo_pvs.pruning.sparse.sparsity import Sparsity
from nemo_pvs.pruning.structured.depth import scan_windows
from tests.layerwise.imitated_gpu import Stream, imitate_gpu
from tests.state_source import StateSource, random_ids, tiny_model

COMPUTE = Compute(batch_size=2)
Results = dict[str, torch.Tensor]


def _calibration(folder: Path, *, gradients: bool = True) -> Results:
    return dict(calibrate(StateSource(tiny_model()), _tokens(), gradients=gradients, compute=COMPUTE).tensors)


def _losses(folder: Path) -> Results:
    source = StateSource(tiny_model())
    scan = scan_windows(source, _tokens(), 2, compute=COMPUTE)
    return {
        "scan": torch.tensor([*scan.losses, scan.dense_loss]),
        "perplexity": torch.tensor(perplexity(source, _tokens(), COMPUTE)["loss"]),
    }


def _sparse(folder: Path) -> Results:
    source = StateSource(tiny_model())
    pruned = prune_layers(source, _tokens(), SparseGPT(Sparsity.parse("2:4")), folder, compute=COMPUTE)
    return {name: pruned.read(name) for name in Layout.for_config(source.config).parts(shape_of(source))}


def _tokens() -> TokenSet:
    ids = random_ids(5, 24).tolist()
    return TokenSet.from_windows(ids, data_set="random", source_sha256="0" * 64, tokenizer_sha256=None, seed=0)


@pytest.mark.parametrize("work", [_calibration, _losses, _sparse])
def test_states_on_the_host_give_the_results_of_states_on_the_device(
    work: Callable[[Path], Results], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = work(tmp_path / "device")
    seen = imitate_gpu(monkeypatch)
    found = work(tmp_path / "host")
    seen.check()
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


@pytest.mark.parametrize("work", [partial(_calibration, gradients=False), _losses])
def test_no_more_states_are_held_than_the_limit(work, monkeypatch, tmp_path):
    """Also while one part of the text follows another; otherwise the next would not find room on the device."""
    sequence = 24 * 64 * 4
    alive, most, parts = 0, 0, 0
    empty = StateMemory.empty

    def change(count: int) -> None:
        nonlocal alive, most
        alive += count
        most = max(most, alive)

    def counted(memory: StateMemory, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        nonlocal parts
        parts += 1
        states = empty(memory, size, dtype)
        change(states.nbytes)
        weakref.finalize(states.untyped_storage(), change, -states.nbytes)
        return states

    monkeypatch.setattr(StateMemory, "empty", counted)
    monkeypatch.setattr(f"{__name__}.COMPUTE", replace(COMPUTE, memory_limit=4 * sequence))
    work(tmp_path)
    assert parts > 1
    assert 3 * sequence < most <= 4 * sequence


def test_few_batches_are_on_the_device_at_once(monkeypatch):
    """Kernels are only queued: nothing else keeps the CPU from fetching all batches before the first is done."""
    done, fetched = [], []

    class Queue(Stream):
        def record_event(self):
            event = super().record_event()
            event.synchronize = lambda: done.append(event)
            return event

    imitate_gpu(monkeypatch)
    computing = Queue()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: computing)
    transfers = Transfers(torch.device("cpu"))
    fetch = transfers._fetch
    monkeypatch.setattr(transfers, "_fetch", lambda part: (fetched.append(part), fetch(part))[1])
    most = 0
    for number, _ in enumerate(transfers.batches(random_ids(20, 3).float(), 2)):
        most = max(most, len(fetched) - len(done))
        assert len(fetched) == min(number + 2, 10), "the next batch is on its way while this one is used"
    assert most == 3
