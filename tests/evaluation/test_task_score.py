"""A model's score in tasks is what ``pvs evaluate`` reports of it."""

from pathlib import Path

import pytest
import torch

from nemo_pvs.checkpoints.detect import open_source
from nemo_pvs.data.tokenize import load_tokenizer
from nemo_pvs.evaluation.language_model import CheckpointLM
from nemo_pvs.evaluation.scoring import TransformersScorer
from nemo_pvs.evaluation.task_score import task_score
from nemo_pvs.evaluation.tasks import load_tasks, measure_task
from nemo_pvs.evaluation.wishes import parse_wishes
from tests.conftest import make_tiny_llama, save_tiny_tokenizer

TASKS = Path(__file__).parent / "tasks"


def test_first_metrics_with_their_sign(tmp_path: Path) -> None:
    folder = save_tiny_tokenizer(make_tiny_llama(tmp_path / "model"))
    source = open_source(folder)
    scorer = TransformersScorer(source, dtype=torch.float32, device="cpu")
    model = CheckpointLM(scorer, load_tokenizer(folder), source.config["max_position_embeddings"])
    firsts = {}
    for task in load_tasks(parse_wishes(str(TASKS)), tmp_path):
        name, metric = next(iter(measure_task(task, model, 3).items()))
        firsts[task.task.config.task] = (name, metric["value"])
    less_is_better = {"perplexity", "word_perplexity"}
    assert {name for name, _ in firsts.values()} & less_is_better
    expected = [-value if name in less_is_better else value for name, value in firsts.values()]
    measured = task_score(str(TASKS), folder, tmp_path, limit=3)(source)
    assert measured == pytest.approx(sum(expected) / len(expected))
