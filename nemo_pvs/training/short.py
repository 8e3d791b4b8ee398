"""Short retraining of the candidates of an architecture search, from the weights that each plan keeps.

Imports no NeMo.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_pvs.checkpoints.huggingface.folder import write_huggingface
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.windows import validation_windows
from nemo_pvs.layerwise.model import ON_CPU, Compute
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.training import metrics
from nemo_pvs.training.prepare import prepare_job
from nemo_pvs.training.trainer import Trainer


@contextmanager
def short_training(
    source: WeightSource,
    folder: Path,
    data: Path,
    layout: Parallelism,
    training: Training,
    compute: Compute = ON_CPU,
) -> Iterator[Callable[[Plan], float]]:
    """Yield a function that prunes by a plan, trains the result and returns its validation loss (nats per token).

    This is the last step of Minitron's search (2407.14679, section 3.3): candidates rank differently right after
    pruning and after some training. All are trained with the same options, in processes that import NeMo once; an
    interrupted training resumes from its last checkpoint.

    Args:
        source: The dense model.
        folder: Folder for the runs, with a subfolder for each candidate.
        data: Folder with ``train`` and ``validation`` token files.
        layout: Parallelism of every run.
        training: Training options of every run.
        compute: Where and how layers run if the training did not measure the loss after its last step.

    Raises:
        UserError: raised by the function if ``prepare_job`` refuses a run.
    """
    with Trainer(folder / "launcher.log") as trainer:

        def train(plan: Plan) -> float:
            run = folder / plan.plan_hash[:12]
            pruned = run.with_name(f"{run.name}-pruned")
            if not pruned.exists():
                write_huggingface(PrunedSource(source, plan), pruned)
            job = prepare_job(str(pruned), run, data, layout, training, random_init=False)
            checkpoint = trainer.train(job)
            loss = _final_loss(metrics.read(job.metrics), checkpoint, data, training, compute)
            shutil.rmtree(pruned)
            return loss

        yield train


def _final_loss(curve: metrics.Metrics, checkpoint: Path, data: Path, training: Training, compute: Compute) -> float:
    """Return the validation loss after the last step.

    Training does not measure it if it was killed between its last save and its last validation, or if the interval of
    validations does not divide its steps; the loss of an earlier step would be compared with losses of the last one.
    """
    for point in curve.validation:
        if point["step"] == training.steps:
            return float(point["loss"])
    windows = validation_windows(
        data / "validation", samples=training.validation_samples, sequence_length=training.sequence_length
    )
    return float(perplexity(open_source(checkpoint), windows, compute)["loss"])
