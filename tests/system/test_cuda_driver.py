"""The driver's answers, from a stand-in for its library that is compiled here."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from nemo_pvs.system import cuda_driver
from nemo_pvs.system.cuda_driver import DriverError, Gpu, driver_version, gpus

_SOURCE = """
#include <string.h>
#include <stddef.h>
int cuInit(unsigned flags) { return INIT; }
int cuGetErrorName(int code, const char **name) { *name = code == 802 ? "CUDA_ERROR_SYSTEM_NOT_READY" : 0; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int number) { *device = 10 + number; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
  strncpy(name, device == 10 ? "H100" : "A100", size);
  return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 85899345920; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
  if (which == 75) *value = device == 10 ? 9 : 8;
  else if (which == 76) *value = 0;
  else if (which == 132 && device == 10) *value = 1;
  else return 1;
  return 0;
}
"""


@pytest.fixture
def library(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")

    def build(init: int = 0) -> str:
        (tmp_path / "cuda.c").write_text(_SOURCE.replace("INIT", str(init)))
        target = str(tmp_path / f"libcuda-{init}.so")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", target, str(tmp_path / "cuda.c")], check=True)
        return target

    return build


def test_each_gpu_with_its_memory_and_abilities(library):
    assert gpus(library()) == [Gpu("H100", 80 * 2**30, (9, 0), True), Gpu("A100", 80 * 2**30, (8, 0), False)]


def test_a_driver_that_hides_all_gpus_has_none_and_one_that_does_not_start_says_why(library):
    assert gpus(library(100)) == []
    with pytest.raises(DriverError, match=r"^CUDA_ERROR_SYSTEM_NOT_READY$"):
        gpus(library(802))
    with pytest.raises(DriverError, match=r"^error 999$"):
        gpus(library(999))


def test_without_a_driver_there_are_no_gpus(tmp_path, monkeypatch):
    assert gpus("libcuda-of-nobody.so") == []
    monkeypatch.setattr(cuda_driver, "_VERSION_FILE", tmp_path / "version")
    assert driver_version() is None


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build", "570.86.10"),
        ("NVRM version: something else", "unknown"),
    ],
)
def test_the_version_of_the_driver(tmp_path, monkeypatch, line, version):
    monkeypatch.setattr(cuda_driver, "_VERSION_FILE", tmp_path / "version")
    (tmp_path / "version").write_text(line + "\nGCC version:  gcc version 12.3.0\n")
    assert driver_version() == version
