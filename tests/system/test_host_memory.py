"""How much memory a process may still take, of the machine and of its control group."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_pvs.system.host_memory import available

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 64 GiB available, and this process two groups deep."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {64 << 20} kB\nBuffers: 2 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    (tmp_path / "sys/fs/cgroup/job/step").mkdir(parents=True)
    return tmp_path


def _group(folder: Path, limit: str, used: int, cached: int) -> None:
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached // 2}\nactive_file {cached - cached // 2}\n")


def test_without_limits_it_is_the_machine_s(root):
    assert available(root) == 64 * GIB
    _group(root / "sys/fs/cgroup/job/step", "max", 7 * GIB, GIB)
    assert available(root) == 64 * GIB
    (root / "proc/self/cgroup").write_text("4:memory:/old\n")  # version 1
    assert available(root) == 64 * GIB


def test_the_tightest_group_counts_and_cached_files_are_free(root):
    _group(root / "sys/fs/cgroup/job", str(32 * GIB), 20 * GIB, 4 * GIB)
    assert available(root) == 16 * GIB
    _group(root / "sys/fs/cgroup/job/step", str(8 * GIB), 7 * GIB, 3 * GIB)
    assert available(root) == 4 * GIB
    _group(root / "sys/fs/cgroup/job/step", str(8 * GIB), 9 * GIB, 0)
    assert available(root) == 0


def test_a_container_sees_its_own_group_at_the_top(root):
    (root / "proc/self/cgroup").write_text("0::/\n")
    _group(root / "sys/fs/cgroup", str(8 * GIB), 2 * GIB, GIB)
    assert available(root) == 7 * GIB


def test_this_machine_has_some():
    assert 0 < available() < 1 << 50
