"""Short retraining of candidates of an architecture search, each from the weights that its plan keeps. No NeMo."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_pvs.checkpoints.huggingface.folder import write_huggingface
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.errors import UserError
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.training import metrics
from nemo_pvs.training.prepare import prepare_job
from nemo_pvs.training.trainer import Trainer


@contextmanager
def short_training(
    source: WeightSource, folder: Path, data: Path, layout: Parallelism, training: Training
) -> Iterator[Callable[[Plan], float]]:
    """Yield a function that trains what a plan keeps and returns its validation loss (nats per token).

    The step that Minitron's search ends with (2407.14679, 3.3): the order of the candidates right after pruning is not
    the order after some training. All are trained alike, in processes that import NeMo once; an interrupted training
    goes on at its last checkpoint.

    Args:
        source: The dense model.
        folder: Where runs go, one a candidate.
        data: Folder with ``train`` and ``validation`` token files.
        layout: Of every run.
        training: Of every run.
    """
    with Trainer(folder / "launcher.log") as trainer:

        def train(plan: Plan) -> float:
            run = folder / plan.plan_hash[:12]
            pruned = run.with_name(f"{run.name}-pruned")
            if not pruned.exists():
                write_huggingface(PrunedSource(source, plan), pruned)
            job = prepare_job(str(pruned), run, data, layout, training, random_init=False)
            trainer.train(job)
            curve = metrics.read(job.metrics)
            if not curve.validation:
                raise UserError(f"{run} has no validation loss; remove the folder and search again.")
            shutil.rmtree(pruned)
            return float(curve.validation[-1]["loss"])

        yield train
