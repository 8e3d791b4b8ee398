"""How well GPUs are used, with the answers of one imitated: what a record of a step says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_pvs.planning.gpu_time import peak_flops
from nemo_pvs.training.gpu_use import flops_per_token, gpu_use
from tests.conftest import make_tiny_llama


def test_without_a_gpu_nothing_is_said() -> None:
    assert gpu_use(1e6, 10**9, 8, "bf16") == {}


def test_a_gpus_use_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 61_500_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    use = gpu_use(1e5, 10**10, 8, "bf16")
    assert use == {"peak_gigabytes": 61.5, "mfu": pytest.approx(1e15 / (8 * 989.4e12))}
    assert gpu_use(1e5, 10**10, 8, "fp8")["mfu"] == pytest.approx(use["mfu"] / 2)
    assert gpu_use(1e5, None, 8, "bf16") == gpu_use(1e5, 10**10, 8, "fp32") == {"peak_gigabytes": 61.5}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some other accelerator")
    assert gpu_use(1e5, 10**10, 8, "bf16") == {"peak_gigabytes": 61.5}


@pytest.mark.parametrize(
    ("device", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 2 * 989.4e12),
        ("NVIDIA H100 PCIe", 756e12, 2 * 756e12),
        ("NVIDIA GH200 480GB", 989.4e12, 2 * 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, None),
    ],
)
def test_peaks_by_the_devices_name(device: str, bf16: float, fp8: float | None) -> None:
    assert (peak_flops(device, "bf16"), peak_flops(device, "fp8")) == (bf16, fp8)


def test_a_teachers_forward_pass_counts(tmp_path: Path) -> None:
    student = make_tiny_llama(tmp_path / "student", num_hidden_layers=1)
    teacher = make_tiny_llama(tmp_path / "teacher", num_hidden_layers=2)
    alone, itself = (flops_per_token(folder, None, 32) for folder in (student, teacher))
    assert flops_per_token(student, teacher, 32) == alone + itself // 3
