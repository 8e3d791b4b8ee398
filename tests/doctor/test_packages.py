"""What the doctor says about packages, for sets of versions that are not installed here."""

from __future__ import annotations

import shlex

import pytest
from packaging.requirements import Requirement

from nemo_pvs.doctor.packages import (
    check_dependencies,
    check_packages,
    check_python,
    check_transformer_engine,
    installed_version,
    our_requirements,
)

NEEDS = [
    "torch>=2.6,<2.14",
    "nemo-toolkit[core,run]>=2.6,<2.8",
    "megatron-core>=0.15.0.dev0,<0.16",
    "gguf>=0.16",
    "zarr<3",
    'pytest>=8; extra == "dev"',
]
TESTED = {"torch": "2.13.0", "nemo-toolkit": "2.7.3", "megatron-core": "0.15.3", "gguf": "0.19.0", "zarr": "2.18.7"}
IN_A_CONTAINER = {**TESTED, "torch": "2.9.0a0+50eac811a6.nv25.09", "megatron-core": "0.15.0rc7"}


def _found(versions, requirements=NEEDS):
    return [(found.level, found.subject, found.fix) for found in check_packages(requirements, versions.get)]


@pytest.mark.parametrize("versions", [TESTED, IN_A_CONTAINER], ids=["tested", "container"])
def test_all_well(versions):
    (finding,) = check_packages(NEEDS, versions.get)
    assert finding.level == "ok"
    assert f"torch {versions['torch']}, nemo-toolkit 2.7.3" in finding.text


def test_a_missing_package_is_named_with_the_command_that_adds_only_it():
    without = {name: version for name, version in TESTED.items() if name != "gguf"}
    assert _found(without)[1:] == [("FAIL", "gguf", "pip install -c constraints.txt 'gguf>=0.16'")]
    in_container = {**without, "torch": IN_A_CONTAINER["torch"]}
    assert _found(in_container)[1:] == [("FAIL", "gguf", "pip install --no-deps 'gguf>=0.16'")]


def test_a_container_whose_megatron_cannot_train_is_to_be_replaced_not_changed():
    later = {**IN_A_CONTAINER, "megatron-core": "0.16.0", "zarr": "3.0.1"}
    assert _found(later)[1:] == [
        ("FAIL", "megatron-core", "use the image nvcr.io/nvidia/nemo:25.11"),
        ("warn", "zarr", "pip install --no-deps 'zarr<3'"),
    ]
    assert _found({**TESTED, "nemo-toolkit": "2.5.0"})[1][0] == "FAIL"


def test_a_version_that_is_none_is_a_finding_and_no_crash():
    assert _found({**TESTED, "zarr": "main-3f2a"})[1][:2] == ("warn", "zarr")
    assert [level for level, _, _ in _engine("unknown")] == ["ok", "warn"]


def test_a_folder_of_sources_is_not_an_installation():
    assert _found(TESTED, None) == [("FAIL", "nemo_pvs", "pip install --no-deps --editable .")]


def test_what_is_installed_here_is_what_is_declared():
    assert our_requirements()
    assert not [found for found in check_packages(our_requirements()) if found.level == "FAIL"]
    assert installed_version("no-such-package") is None


_TREE = {
    "lm-eval": [
        "rouge-score>=0.0.4",
        "sacrebleu[ja]; extra == 'ja'",
        "old; python_version < '3'",
        "fsspec[http]",
        "torch",
    ],
    "rouge-score": ["nltk", "absl-py"],
    "nltk": ["lm_eval"],
    "fsspec": ["aiohttp; extra == 'http'", "smbprotocol; extra == 'smb'"],
    "torch": ["nvidia-nccl-cu12"],
    "nemo-toolkit": ["wget"],
}


def _dependencies(
    *installed,
    torch="2.13.0",
    needs=("lm-eval>=0.4", "nemo_toolkit[core]>=2.6", "gguf", "fsspec[smb]; extra == 'dev'"),
):
    versions = dict.fromkeys(installed, "1.0") | {"torch": torch}
    found = check_dependencies(needs, versions.get, lambda name: _TREE.get(name, []))
    return [(one.level, one.text, one.fix) for one in found]


def test_what_packages_without_their_dependencies_lack_is_named():
    """Through packages that need each other, with markers and extras, and not beyond NVIDIA's."""
    everything = ["lm-eval", "rouge-score", "nltk", "absl-py", "fsspec", "aiohttp", "nemo-toolkit", "gguf"]
    assert _dependencies(*everything) == []
    without = [name for name in everything if name not in ("absl-py", "aiohttp")]
    assert _dependencies(*without, torch="2.9.0a0+50eac811a6.nv25.09") == [
        (
            "warn",
            "not installed: absl-py (for rouge-score), aiohttp (for fsspec)",
            "pip install --no-deps absl-py aiohttp",
        )
    ]
    assert (
        _dependencies("lm-eval", "fsspec", "aiohttp", "nemo-toolkit")[0][1]
        == "not installed: rouge-score (for lm-eval)"
    )
    assert _dependencies("nemo-toolkit") == [], "what nemo_pvs itself needs is checked elsewhere"


def test_nothing_is_lacking_here():
    assert check_dependencies(our_requirements()) == []


@pytest.mark.parametrize(
    ("version", "level"), [("3.9.18", "FAIL"), ("3.10.1", "ok"), ("3.12.9", "ok"), ("3.13.0", "FAIL")]
)
def test_python(version, level):
    assert check_python(version).level == level


def _engine(version=None, problem=None, *, gpu=True, build=False, torch="2.8.0"):
    versions = {"transformer-engine": version, "torch": torch}
    found = check_transformer_engine(gpu=gpu, build=build, versions=versions.get, problem=lambda: problem)
    return [(one.level, one.text, one.fix) for one in found]


def test_transformer_engine_matters_where_a_gpu_is():
    assert _engine("2.9.0", gpu=False) == []
    assert _engine("2.9.0") == [("ok", "2.9.0, imported", "")]
    ((level, text, fix),) = _engine(None)
    assert (level, "not installed" in text, "--no-build-isolation" in fix) == ("warn", True, True)


def test_a_broken_transformer_engine_is_a_failure_with_its_reason():
    ((level, text, fix),) = _engine("2.20.2", "ImportError: undefined symbol: _ZN3c10")
    assert level == "FAIL"
    assert "undefined symbol: _ZN3c10" in text
    assert fix == "pip install --no-build-isolation -c constraints-gpu.txt 'transformer-engine[pytorch]==2.9.0'"
    ((_, _, fix),) = _engine("2.9.0+nv", "OSError: x", torch="2.9.0a0+50eac811a6.nv25.09")
    assert fix == "docker pull nvcr.io/nvidia/nemo:25.11"


def test_another_version_of_transformer_engine_is_a_warning():
    assert [level for level, _, _ in _engine("2.20.2")] == ["ok", "warn"]


def test_an_image_must_have_it_but_need_not_have_a_driver():
    assert [level for level, _, _ in _engine(None, gpu=False, build=True)] == ["FAIL"]
    missing = "ImportError: libcuda.so.1: cannot open shared object file"
    assert [level for level, _, _ in _engine("2.9.0", missing, gpu=False, build=True)] == ["note"]
    assert [level for level, _, _ in _engine("2.9.0", "ImportError: undefined symbol", gpu=False, build=True)] == [
        "FAIL"
    ]


def test_fixes_that_are_commands_parse():
    for found in check_packages(["a-package>=1", "zarr[b]<3"], {"zarr": "4"}.get)[1:]:
        pip, install, *_, wanted = shlex.split(found.fix)
        assert (pip, install) == ("pip", "install")
        assert Requirement(wanted).name == found.subject
