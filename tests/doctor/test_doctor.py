"""``pvs doctor`` on this machine, which has no GPU, and the first lines of a job's log."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nemo_pvs.doctor import deep, examine
from nemo_pvs.doctor.finding import Finding
from nemo_pvs.megatron import launch
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.training.job import TrainingJob


def test_a_machine_without_gpus_is_fine(pvs):
    outcome = pvs("doctor")
    assert (outcome.code, outcome.errors) == (0, "")
    lines = outcome.output.splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["Python", "packages"]
    assert lines[-1] == "There is no GPU, and that is fine: everything works on this CPU, at the sizes of make demo."


def test_what_keeps_training_from_working_ends_with_2(pvs, monkeypatch):
    needs = ["torch", "no-such-package>=3"]
    monkeypatch.setattr(examine, "our_requirements", lambda: needs)
    outcome = pvs("doctor", "--deep")
    assert outcome.code == 2
    (line,) = [line for line in outcome.output.splitlines() if line.startswith("FAIL")]
    assert line.endswith("fix: pip install -c constraints.txt 'no-such-package>=3'")
    assert outcome.errors.startswith("pvs: Training cannot work here; see the line marked FAIL")
    assert "import" not in outcome.output, "tried although it cannot work"


def test_an_image_for_gpus_without_transformer_engine_is_not_built(pvs):
    outcome = pvs("doctor", "--build")
    assert outcome.code == 2
    assert "FAIL  Transformer Engine" in outcome.output


def test_deep_and_build_exclude_each_other(pvs):
    assert pvs("doctor", "--deep", "--build").code == 2


def test_it_is_fast_because_it_imports_neither_nemo_nor_megatron():
    script = "import sys; from nemo_pvs.doctor.examine import log_lines; print(*log_lines(), sep='\\n'); "
    script += "print([name for name in ('nemo', 'megatron', 'transformers', 'lightning') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *lines, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert lines[0].startswith("pvs doctor on ")
    assert "GPUs none" in lines[0]


def test_a_log_begins_with_one_line_and_then_what_is_wrong(monkeypatch):
    wrong = Finding("warn", "lock", "left", "rm lock")
    monkeypatch.setattr(examine, "check_node", lambda node, build: [Finding("ok", "disk", "much"), wrong])
    first, *more = examine.log_lines()
    assert first.endswith("; disk much")
    assert more == ["pvs doctor: warn  lock                left; fix: rm lock"]


def test_an_examination_that_fails_is_a_line_in_the_log_and_training_goes_on(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(examine.Node, "here", fail)
    monkeypatch.setattr(launch, "_fork_ranks", lambda job: 0)
    training = Training(tokens=512, sequence_length=32, global_batch_size=4, learning_rate=1e-3, validation_samples=4)
    job = TrainingJob("arm", tmp_path, tmp_path / "initial", {}, Parallelism(), training)
    assert launch._start(job) == 0
    assert job.log.read_text() == (
        "pvs doctor: the examination of this node failed: RuntimeError('Could not determine home directory.')\n"
    )


def test_ranks_that_cannot_add_up_are_a_failure(monkeypatch):
    monkeypatch.setattr(deep, "_run", lambda command: "RuntimeError: NCCL error")
    finding = deep.sum_over(8)
    assert finding.level == "FAIL"
    assert "8 ranks cannot sum a tensor: RuntimeError: NCCL error" in finding.text
    assert "NCCL_DEBUG=INFO" in finding.fix
    monkeypatch.setattr(deep, "_run", lambda command: "")
    assert deep.sum_over(8).level == "FAIL", "no rank has answered"


def test_nothing_is_tried_after_a_failure(monkeypatch):
    monkeypatch.setattr(deep, "import_all", lambda: Finding("ok", "import", ""))
    monkeypatch.setattr(deep, "sum_over", lambda ranks: Finding("FAIL", "all-reduce", str(ranks), "x"))
    assert [(one.subject, one.text) for one in deep.try_everything(8)] == [("import", ""), ("all-reduce", "8")]


def test_the_last_error_of_a_program_is_quoted():
    assert deep._last_error("Traceback:\n  x\nImportError: no\nexiting\n") == "ImportError: no"
    assert deep._last_error("one\ntwo\n") == "two"
    assert deep._last_error("") == ""


@pytest.mark.parallel
def test_a_tiny_model_is_trained_saved_and_resumed(forked_launcher):
    finding = deep.train_and_resume(2)
    assert finding.level == "ok", finding.text
    assert "resumed on 2 ranks" in finding.text


@pytest.mark.parallel
def test_ranks_of_this_cpu_add_up(tmp_path, monkeypatch):
    """Also where nobody knows the machine's full name, at which torchrun has ranks meet by default."""
    (tmp_path / "sitecustomize.py").write_text("import socket\nsocket.getfqdn = lambda name='': 'nowhere.invalid'\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))))
    monkeypatch.setattr(deep, "_SECONDS", 90)
    finding = deep.sum_over(2)
    assert finding.level == "ok", finding.text
    assert finding.text.startswith("2 ranks by gloo, 1 MiB in ")
