"""The command line on the ranks of torchrun: they share the text, the first one writes and talks."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_pvs.cli.main import main
from nemo_pvs.pruning.plan import Plan
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.megatron.ranks import pvs_on_ranks
from tests.system.lock_holder import holder

pytestmark = pytest.mark.parallel

SIZES = ("--samples", "5", "--sequence-length", "32")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_tokenizer(make_tiny_llama(tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    generator = random.Random(0)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{generator.randint(2, 127)}" for _ in range(2000)))
    return file


def torchrun(*arguments: object) -> str:
    """Run ``pvs`` on two ranks and return what it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "nemo_pvs.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def forked(*arguments: object) -> None:
    """Run ``pvs`` on two ranks in the environment of torchrun, forked from a server that has done its imports."""
    done = pvs_on_ranks(2, *arguments)
    assert done.code == 0, done.errors


def alone(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run ``pvs`` in this process."""
    monkeypatch.setattr(sys, "argv", ["pvs", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code


def test_calibration(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = torchrun("calibrate", model, "--data", text, "--out", tmp_path / "two", *SIZES)
    assert said.count("scores of") == 1  # one rank talks
    alone(monkeypatch, "calibrate", model, "--data", text, "--out", tmp_path / "one", *SIZES)
    two, one = (load_file(tmp_path / name / "scores.safetensors") for name in ("two", "one"))
    assert one.keys() - two.keys() == {"attention.fluctuation", "ffn.fluctuation"}  # they depend on the order
    for name, tensor in two.items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-5, atol=1e-6, msg=name)


def test_layers_by_loss(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ("--method", "minitron-depth", "--target", "layers=3", "--data", text, *SIZES)
    forked("prune", model, tmp_path / "two", *wanted)
    alone(monkeypatch, "prune", model, tmp_path / "one", *wanted)
    two, one = (Plan.load(tmp_path / name / "pvs_plan.json") for name in ("two", "one"))
    assert two.keep_layers == one.keep_layers
    assert two.provenance["losses"] == pytest.approx(one.provenance["losses"], rel=1e-6)


def test_weights_layer_by_layer(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ("--method", "sparsegpt", "--sparsity", "2:4", "--data", text, *SIZES)
    forked("prune", model, tmp_path / "two", *wanted)
    alone(monkeypatch, "prune", model, tmp_path / "one", *wanted)
    two, one = (load_file(tmp_path / name / "masks.safetensors") for name in ("two", "one"))
    assert two.keys() == one.keys()
    agreeing = [float((two[name] == mask).float().mean()) for name, mask in one.items()]
    assert min(agreeing) > 0.99  # bytes of eight bits; sums differ by rounding
    assert not list(tmp_path.glob(".*")), "a work folder was left behind"


def test_ranks_do_not_lock_each_other_out_but_another_command_does(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation"
    evaluate = ("evaluate", model, "--perplexity", text, "--samples", "2", "--sequence-length", "32", "--out", out)
    with holder(out) as first:
        done = pvs_on_ranks(2, *evaluate)
    assert done.code == 2
    assert f"process {first.pid} on" in done.errors
    assert [path.name for path in out.iterdir()] == [".lock"], "of the first, which was killed"
    forked(*evaluate)
    assert sorted(path.name for path in out.iterdir()) == ["measured", "results.json"]
