from dataclasses import replace
from types import SimpleNamespace

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.planning.memory import training_memory
from nemo_pvs.pruning.presets import target_presets
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.load import parse_training
from nemo_pvs.training.machine import H100, H100_BYTES, Machine, check_gpus, h100_layout

TRAINING = parse_training(
    {
        "tokens": 50e9,
        "sequence_length": 8192,
        "global_batch_size": 512,
        "learning_rate": 3e-4,
        "validation_samples": 512,
    }
)


@pytest.mark.parametrize("gpus", [8, 64, 256])
@pytest.mark.parametrize("name", [name for name in target_presets() if name.startswith("llama31_8b")])
def test_a_layout_is_legal_fits_and_uses_every_gpu(name, gpus):
    shape = target_presets()[name].target
    layout, reasons = h100_layout(shape, TRAINING, gpus)
    assert layout.processes == gpus
    shape.check_parallel(tensor_parallel=layout.tensor_parallel, pipeline_parallel=layout.pipeline_parallel)
    assert TRAINING.global_batch_size % (TRAINING.micro_batch_size * layout.data_parallel) == 0
    assert training_memory(shape, layout, TRAINING).total < H100_BYTES
    assert len(reasons) == 6
    assert all(": " in reason or reason.startswith("about") for reason in reasons)


def test_the_least_communication_that_fits():
    shape = target_presets()["llama31_8b/4b-width"].target
    few, _ = h100_layout(shape, TRAINING, 8)
    many, reasons = h100_layout(shape, TRAINING, 256)
    assert (many.tensor_parallel, many.pipeline_parallel, many.virtual_pipeline) == (1, 1, None)
    assert few.context_parallel >= many.context_parallel, "more GPUs share the optimizer's state out, never less"
    assert reasons[0].startswith("TP 1: no layer")
    # Something smaller in every respect would not fit.
    for smaller in (1, 2, 4, 8):
        if smaller < few.context_parallel:
            tight = Parallelism(context_parallel=smaller, data_parallel=8 // smaller)
            assert training_memory(shape, tight, TRAINING).total > 0.9 * H100_BYTES


def test_a_large_model_is_cut_in_layers_and_stages():
    shape = target_presets()["llama31_8b/4b-depth"].parent.replace(layers=80, hidden=8192, ffn=28672, heads=64)
    layout, _ = h100_layout(shape, TRAINING, 512)
    assert layout.tensor_parallel * layout.pipeline_parallel > 1
    assert layout.sequence_parallel == (layout.tensor_parallel > 1)
    if layout.pipeline_parallel > 1:
        assert 80 % (layout.pipeline_parallel * layout.virtual_pipeline) == 0
    with pytest.raises(UserError, match="does not fit on 2 H100s"):
        h100_layout(shape, TRAINING, 2)


def test_a_machine_refuses_what_its_kernels_cannot():
    plain = Machine(gpu=False, transformer_engine=False, bf16=False)
    assert (plain.precision("auto"), H100.precision("auto"), H100.precision("fp8")) == ("fp32", "bf16", "fp8")
    with pytest.raises(UserError, match="fp8"):
        plain.precision("fp8")
    with pytest.raises(UserError, match="context_parallel is 2"):
        plain.check(Parallelism(context_parallel=2))
    H100.check(Parallelism(context_parallel=2))


SHARDED = {"tensor_parallel": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("machine", "layout", "precision", "overlaps"),
    [
        ({}, SHARDED, "bf16", False),
        ({"multicast": False}, SHARDED, "bf16", False),
        ({"multicast": True}, SHARDED, "bf16", True),
        ({}, {**SHARDED, "tp_overlap": True}, "bf16", True),
        ({"multicast": True}, {**SHARDED, "tp_overlap": False}, "bf16", False),
        ({"multicast": True}, SHARDED, "fp8", False),
        ({"multicast": True}, {"tensor_parallel": 2}, "bf16", False),
        ({"multicast": True}, {}, "bf16", False),
        ({"multicast": True, "transformer_engine": False}, SHARDED, "bf16", False),
        ({"multicast": True, "gpu": False}, {**SHARDED, "tp_overlap": True}, "bf16", False),
    ],
)
def test_tensor_parallel_overlap_needs_multicast_or_a_wish(machine, layout, precision, overlaps):
    chosen = replace(H100, **machine)
    assert chosen.tp_overlap(Parallelism(**layout), precision) == overlaps


def test_overlap_that_transformer_engine_would_die_of_is_refused():
    """Where multicast is known to be missing; of a cluster that a run is described for, it is not known."""
    layout = Parallelism(**SHARDED, tp_overlap=True)
    with pytest.raises(UserError, match="needs CUDA multicast"):
        replace(H100, multicast=False).check(layout)
    for machine in (H100, replace(H100, multicast=True), Machine(gpu=False, transformer_engine=False, bf16=True)):
        machine.check(layout)
    replace(H100, multicast=False).check(Parallelism(**SHARDED))


@pytest.mark.parametrize(("major", "precision"), [(7, "fp32"), (8, "bf16"), (9, "bf16")])
def test_auto_is_bf16_only_on_gpus_that_compute_in_it(monkeypatch, major, precision):
    """Older ones have the type, but emulate its arithmetic, for which PyTorch says by default that they support it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(major=major))
    monkeypatch.setattr("torch.cuda._check_bf16_tensor_supported", lambda _: True)
    monkeypatch.setattr("nemo_pvs.training.machine.has_transformer_engine", lambda: False)
    assert Machine.here().precision("auto") == precision


def test_a_run_with_more_ranks_than_gpus_can_use_the_cpu():
    with pytest.raises(UserError, match=r"arm needs 2 ranks, but this machine has 1 GPU; .*CUDA_VISIBLE_DEVICES= "):
        check_gpus("arm", Parallelism(data_parallel=2), 1)
