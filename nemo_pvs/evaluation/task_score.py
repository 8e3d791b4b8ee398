"""A model's result on lm-eval tasks as one number, for searches that compare many models."""

from __future__ import annotations

from pathlib import Path

from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.assets import tokenizer_folder
from nemo_pvs.data.tokenize import load_tokenizer
from nemo_pvs.evaluation.checkpoint import ends_of
from nemo_pvs.evaluation.language_model import CheckpointLM
from nemo_pvs.evaluation.requests import parse_tasks
from nemo_pvs.evaluation.scoring import TransformersScorer
from nemo_pvs.evaluation.tasks import load_tasks, measure_task
from nemo_pvs.layerwise.model import ON_CPU, Compute
from nemo_pvs.pruning.request import Scored, TaskScorer


def task_score(
    tasks: str,
    checkpoint: Path,
    data: Path,
    *,
    limit: int | None = None,
    compute: Compute = ON_CPU,
) -> TaskScorer:
    """Return a function that scores a model by the mean over tasks of each task's first metric; higher is better.

    A metric that is better when lower, such as perplexity, is negated.

    Args:
        tasks: Tasks, in the syntax of ``pvs evaluate --tasks``.
        checkpoint: Folder whose tokenizer all models share.
        data: Folder of downloaded data sets.
        limit: Maximum number of documents per task.
        compute: Device and dtype of the whole model.

    Raises:
        UserError: a task is unknown, or its data are not available locally.
    """
    loaded = load_tasks(parse_tasks(tasks), data)
    tokenizer = load_tokenizer(tokenizer_folder(checkpoint))

    def score(source: WeightSource) -> Scored:
        context = int(source.config["max_position_embeddings"])
        scorer = TransformersScorer(source, dtype=compute.dtype, device=compute.device)
        model = CheckpointLM(scorer, tokenizer, context, ends=ends_of(source, tokenizer))
        firsts = [next(iter(measure_task(task, model, limit).values())) for task in loaded]
        signed = [-first["value"] if first["higher_is_better"] is False else first["value"] for first in firsts]
        return Scored(sum(signed) / len(signed), model.read)

    return score
