"""What ``pvs doctor --deep`` tries: imports, a sum over all GPUs, and training, saving and resuming a tiny model."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_pvs.data.corpus import Document
from nemo_pvs.data.train_tokenizer import train_tokenizer
from nemo_pvs.doctor.finding import Finding
from nemo_pvs.errors import TrainingError, UserError
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.system.megatron_import import import_megatron
from nemo_pvs.system.rendezvous import STANDALONE
from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.trainer import PreemptedError, Trainer, is_finished

_SECONDS = 600
"""After this long an import or a sum is considered hung; on a slow file system an import takes minutes."""
_VOCAB = 320
_SEQUENCE = 64
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": _VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
"""Sizes that every kernel takes, FP8 included."""
_IMPORT = "from nemo_pvs.system.megatron_import import import_megatron as m; m(); "
_IMPORT += "import nemo_pvs.megatron.rank, nemo_pvs.evaluation.tasks, nemo_run, gguf"


def import_all() -> Finding:
    """Import NeMo and Megatron with our code on top of them, as a rank does, and lm-eval, NeMo-Run and gguf."""
    begin = time.monotonic()
    problem = _run([sys.executable, "-W", "ignore", "-c", _IMPORT])
    if problem:
        return Finding(
            "FAIL", "import", f"training and evaluation cannot be imported: {problem}", f'python -c "{_IMPORT}"'
        )
    return Finding("ok", "import", f"NeMo, Megatron, lm-eval, NeMo-Run and gguf, in {time.monotonic() - begin:.0f} s")


def try_everything(gpus: int) -> Iterator[Finding]:
    """Yield a finding for each thing tried, until one fails.

    Args:
        gpus: Number of GPUs to use, all at once; without any, two ranks share the CPU.
    """
    ranks = gpus or 2
    for attempt in (import_all, lambda: sum_over(ranks), lambda: train_and_resume(ranks)):
        finding = attempt()
        yield finding
        if finding.level == "FAIL":
            return


def sum_over(ranks: int) -> Finding:
    """Add up a tensor over ranks of this machine, by NCCL on GPUs and by gloo on a CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", *STANDALONE, f"--nproc-per-node={ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer")
        problem = _run([*command, "-m", "nemo_pvs.doctor.all_reduce", str(answer)])
        said = answer.read_text() if answer.exists() else ""
    if problem or not said:
        fix = "NCCL_DEBUG=INFO pvs doctor --deep, which shows where NCCL stops"
        return Finding("FAIL", "all-reduce", f"{ranks} ranks cannot sum a tensor: {problem or 'they end early'}", fix)
    return Finding("ok", "all-reduce", said)


def train_and_resume(ranks: int) -> Finding:
    """Train a tiny model for one step on all ranks, save it, and resume it for another step."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            job = _job(Path(folder), ranks)
            for steps in (1, 2):
                tokens = steps * job.training.tokens_per_step
                job = replace(job, training=job.training.model_copy(update={"tokens": float(tokens)}))
                with Trainer(Path(folder, "launcher.log")) as trainer:
                    trainer.train(job)
                assert is_finished(job)
        except PreemptedError:
            raise  # the user or Slurm has stopped the doctor
        except (TrainingError, UserError) as error:
            kept = Path(tempfile.mkdtemp(prefix="pvs-doctor-"), "log.txt")
            logs = [path.read_text(errors="replace") for path in sorted(Path(folder).rglob("*log*.txt"))]
            kept.write_text("\n".join([*logs, str(error)]))
            return Finding("FAIL", "training", f"a tiny model cannot be trained: {_reason(kept)}", f"less {kept}")
        losses = [point["loss"] for point in metrics.read(job.metrics).training]
    seconds = time.monotonic() - begin
    steps_of = f"trained, saved and resumed on {ranks} rank{'s' * (ranks > 1)}"
    if len(losses) != 2 or not np.isfinite(losses).all():
        return Finding("FAIL", "training", f"the losses of two steps are {losses}", "pvs doctor --deep, once more")
    return Finding(
        "ok", "training", f"a tiny model {steps_of}, in {seconds:.0f} s; losses {losses[0]:.3f}, {losses[1]:.3f}"
    )


def _job(folder: Path, ranks: int) -> TrainingJob:
    """Write a random model, a tokenizer and random text into a folder, and return their training for one step."""
    import_megatron()
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
    from nemo_pvs.checkpoints.transforms.random import RandomSource

    words = " ".join(f"{number:x}" for number in range(5000))
    train_tokenizer([Document(words, "doctor")], folder / "tokenizer", _VOCAB)
    assets = tuple(sorted((folder / "tokenizer").iterdir()))
    write_nemo(RandomSource(_CONFIG, 0, assets, torch.bfloat16), folder / "initial")
    batch = 2 * ranks
    generator = torch.Generator().manual_seed(0)
    for name, samples in (("train", 4 * batch), ("validation", batch)):
        text = torch.randint(1, _VOCAB, (samples * _SEQUENCE + 1,), generator=generator)
        builder = IndexedDatasetBuilder(f"{folder / name}.bin", dtype=DType.optimal_dtype(_VOCAB))
        builder.add_document(text, [len(text)])
        builder.finalize(f"{folder / name}.idx")
    (folder / "run").mkdir()
    return TrainingJob(
        name="doctor",
        folder=folder / "run",
        initial=folder / "initial",
        data={name: str(folder / name) for name in ("train", "validation")},
        layout=Parallelism(data_parallel=ranks),
        training=Training(
            tokens=float(batch * _SEQUENCE),
            sequence_length=_SEQUENCE,
            global_batch_size=batch,
            learning_rate=1e-3,
            validation_samples=batch,
            validations=1,
            checkpoints=1,
        ),
    )


def _run(command: list[str]) -> str:
    """Run a command; return why it failed in one line, empty if it did not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"nothing happened for {_SECONDS} s"
    if not done.returncode:
        return ""
    return _last_error(done.stderr) or f"exit code {done.returncode}"


def _reason(log: Path) -> str:
    return _last_error(log.read_text())


def _last_error(text: str) -> str:
    """Return the last line that names an error, otherwise the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or line.startswith("pvs: ")]
    return (errors or lines or [""])[-1][:300]
