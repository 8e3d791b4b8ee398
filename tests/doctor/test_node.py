"""What the doctor says about machines that are not this one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_pvs.doctor import node as module
from nemo_pvs.doctor.finding import Finding, verdict
from nemo_pvs.doctor.node import Node, check_node
from nemo_pvs.system.cuda_driver import DriverError, Gpu
from nemo_pvs.system.files import cache_folder, user_cache

H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * 2**30, (9, 0), True)
CLUSTER = Node(
    host="n1",
    driver="570.86.10",
    gpus=(H100,) * 8,
    torch_gpus=8,
    torch_cuda="12.8",
    nccl="2.27.3",
    apex=True,
    shared_memory=512 * 2**30,
    disk=900 * 2**30,
    folder=Path("/lustre/me"),
    infiniband=True,
)
LAPTOP = Node(host="me", cpus=8, disk=100 * 2**30)


def _wrong(node: Node) -> list[tuple[str, str, str]]:
    found = check_node(node)
    assert all("\n" not in finding.line() for finding in found)
    assert all(finding.fix for finding in found if finding.level in ("warn", "FAIL")), "a finding without a fix"
    return [(finding.level, finding.subject, finding.fix) for finding in found if finding.level != "ok"]


def test_nothing_is_wrong_with_a_cluster_node_or_a_laptop():
    assert _wrong(CLUSTER) == []
    texts = [finding.text for finding in check_node(CLUSTER)]
    assert "8 x NVIDIA H100 80GB HBM3, 80 GiB, multicast, CUDA 12.8, NCCL 2.27.3, Apex" in texts
    assert _wrong(LAPTOP) == []
    assert "none; 8 CPU cores" in [finding.text for finding in check_node(LAPTOP)]


@pytest.mark.parametrize(
    ("change", "level", "subject", "fix"),
    [
        ({"driver_problem": "CUDA_ERROR_SYSTEM_NOT_READY"}, "FAIL", "driver", "systemctl start nvidia-fabricmanager"),
        ({"driver_problem": "CUDA_ERROR_UNKNOWN"}, "FAIL", "driver", "nvidia-smi"),
        ({"gpus": (), "torch_gpus": 0}, "FAIL", "GPUs", "docker run --gpus all"),
        ({"gpus": (), "torch_gpus": 0, "visible": ""}, "note", "GPUs", "unset CUDA_VISIBLE_DEVICES"),
        ({"torch_gpus": 0, "torch_cuda": None}, "FAIL", "PyTorch", "pip install -c constraints-gpu.txt torch"),
        ({"torch_gpus": 0, "torch_problem": "driver too old"}, "FAIL", "PyTorch", "driver 570.86.10 supports"),
        ({"gpus": (replace(H100, capability=(7, 0)),)}, "warn", "GPUs", "precision: fp32"),
        ({"busy": ((3, 20 * 2**30),)}, "warn", "GPUs", "nvidia-smi"),
        ({"shared_memory": 64 * 2**20}, "FAIL", "shared memory", "docker run --ipc=host"),
        ({"locked_memory": 64 * 2**10}, "warn", "locked memory", "--ulimit memlock=-1"),
        ({"disk": 20 * 2**30}, "warn", "disk", "--out"),
        ({"locks": (Path("/home/me/lock"),)}, "warn", "lock", "rm /home/me/lock"),
    ],
)
def test_each_trouble_has_one_line_with_its_fix(change, level, subject, fix):
    ((found_level, found_subject, found_fix),) = _wrong(replace(CLUSTER, **change))
    assert (found_level, found_subject) == (level, subject)
    assert fix in found_fix


def test_what_only_gpus_need_is_no_trouble_elsewhere():
    bare = replace(LAPTOP, shared_memory=64 * 2**20, locked_memory=64 * 2**10, infiniband=True, disk=20 * 2**30)
    assert _wrong(bare) == []


def test_mixed_gpus_are_all_named():
    texts = [one.text for one in check_node(replace(CLUSTER, gpus=(H100, Gpu("L4", 24 * 2**30, (8, 9), False))))]
    assert "1 x NVIDIA H100 80GB HBM3, 80 GiB, 1 x L4, 24 GiB, no multicast, CUDA 12.8, NCCL 2.27.3, Apex" in texts


def test_an_image_is_built_without_gpus():
    assert [finding.level for finding in check_node(replace(LAPTOP, disk=0), build=True)] == ["note"]


def test_a_driver_that_does_not_start_is_found(monkeypatch):
    def fail():
        raise DriverError("CUDA_ERROR_SYSTEM_NOT_READY")

    monkeypatch.setattr(module, "gpus", fail)
    monkeypatch.setattr(module, "driver_version", lambda: "570.86.10")
    here = Node.here()
    assert here.driver_problem == "CUDA_ERROR_SYSTEM_NOT_READY"
    assert check_node(here)[0].level == "FAIL"


def test_only_locks_that_nobody_holds_any_more_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("py312_cu128/managed_alloc_runtime", "held"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "lock").touch()
    left = tmp_path / "py312_cu128" / "managed_alloc_runtime" / "lock"
    os.utime(left, (0, 0))
    assert Node.here().locks == (left,)


def test_locks_are_looked_for_where_pytorch_compiles(tmp_path, monkeypatch):
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    left = Path(_get_build_directory("managed_alloc_runtime", verbose=False)) / "lock"
    left.touch()
    os.utime(left, (0, 0))
    assert Node.here().locks == (left,)


def test_a_lock_that_goes_meanwhile_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("going", "left"):
        (tmp_path / name).mkdir()
    left = tmp_path / "left" / "lock"
    left.touch()
    os.utime(left, (0, 0))
    (tmp_path / "going" / "lock").symlink_to(tmp_path / "gone")  # found by name, but not there
    assert Node.here().locks == (left,)


def test_a_user_without_a_home_is_examined_too(monkeypatch):
    """As in a container that does not know the number of its user."""
    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000 - 1)
    assert user_cache() is None
    assert cache_folder().is_absolute()
    assert Node.here().locks == ()


def test_memory_that_others_use_is_counted_by_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '0, 4\\n1, 20480\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert module._busy() == ((1, 20 * 2**30),)
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML' >&2; exit 18\n")
    assert module._busy() == ()


def test_the_last_line_says_what_it_comes_to():
    fine, wrong = Finding("warn", "a", "b", "c"), Finding("FAIL", "a", "b", "c")
    assert "that is fine" in verdict([fine], gpus=0)
    assert verdict([fine], gpus=8).startswith("Found nothing that would keep 8 GPUs from training;")
    assert verdict([fine, wrong], gpus=8).startswith("Training cannot work here; see the line marked FAIL")
    assert verdict([wrong, wrong], gpus=0).startswith("Training cannot work here; see the 2 lines marked FAIL")
    assert "without a GPU" in verdict([fine], gpus=0, build=True)
