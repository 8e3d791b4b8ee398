"""What goes to a machine with a GPU and without a network."""

from __future__ import annotations

import zipfile
from importlib.metadata import version

from tests.gpu import needed
from tests.gpu.pack_wheels import names, slim


def test_packages_are_named_as_pip_names_them():
    freeze = "Jinja2==3.1\nruamel.yaml==0.18\n# comment\n-e git+https://x#egg=y\nnemo_run @ file:///x\n\n"
    assert names(freeze) == {"jinja2", "ruamel-yaml", "nemo-run"}


def test_what_nothing_imports_is_left_out_of_a_wheel(tmp_path):
    entries = ("nemo/__init__.py", "nemo/collections/asr/models/a.py", "nemo/collections/llm/b.py")
    for wheel in ("nemo_toolkit-2.7.3-py3-none-any.whl", "other-1.0-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / wheel, "w") as file:
            for entry in entries:
                file.writestr(entry, entry)
        slim(tmp_path / wheel)
    kept = {path.name: zipfile.ZipFile(path).namelist() for path in tmp_path.iterdir()}
    assert kept == {
        "nemo_toolkit-2.7.3-py3-none-any.whl": [entries[0], entries[2]],
        "other-1.0-py3-none-any.whl": list(entries),
    }
    assert zipfile.ZipFile(tmp_path / "nemo_toolkit-2.7.3-py3-none-any.whl").read(entries[2]) == entries[2].encode()


def test_what_belongs_to_the_gpu_is_not_packed():
    lines = needed.needed()  # of this process
    assert f"pytest=={version('pytest')}" in lines
    assert not [line for line in lines if line.startswith(("torch==", "triton", "nemo-pvs", "nemo_pvs", "nvidia-cu"))]
    belong = ("torch", "triton", "nvidia-cudnn-cu12", "cuda-bindings", "pynvml")
    assert all(needed._WITH_THE_GPU.match(name) for name in belong)
    assert not any(needed._WITH_THE_GPU.match(name) for name in ("torchx", "nvidia-modelopt", "nvidia-resiliency-ext"))
