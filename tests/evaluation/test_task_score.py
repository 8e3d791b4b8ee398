"""A model's score in tasks is what ``pvs evaluate`` reports of it."""

import json
import shutil
from math import prod
from pathlib import Path

import pytest
import torch

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.tokenize import load_tokenizer
from nemo_pvs.evaluation.language_model import CheckpointLM
from nemo_pvs.evaluation.requests import parse_tasks
from nemo_pvs.evaluation.scoring import TransformersScorer
from nemo_pvs.evaluation.task_score import task_score
from nemo_pvs.evaluation.tasks import load_tasks, measure_task
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.evaluation.generation_data import write_writing
from tests.multiplications import multiplications

TASKS = Path(__file__).parent / "tasks"


@pytest.mark.slow
def test_first_metrics_with_their_sign(tmp_path: Path) -> None:
    folder = save_tiny_tokenizer(make_tiny_llama(tmp_path / "model"))
    source = open_source(folder)
    scorer = TransformersScorer(source, dtype=torch.float32, device="cpu")
    model = CheckpointLM(scorer, load_tokenizer(folder), source.config["max_position_embeddings"])
    firsts = {}
    for task in load_tasks(parse_tasks(str(TASKS)), tmp_path):
        name, metric = next(iter(measure_task(task, model, 3).items()))
        firsts[task.task.config.task] = (name, metric["value"])
    less_is_better = {"perplexity", "word_perplexity"}
    assert {name for name, _ in firsts.values()} & less_is_better
    expected = [-value if name in less_is_better else value for name, value in firsts.values()]
    measured = task_score(str(TASKS), folder, tmp_path, limit=3)(source)
    assert measured.score == pytest.approx(sum(expected) / len(expected))
    assert measured.read == model.read


def test_what_was_read_is_what_was_multiplied(tmp_path: Path) -> None:
    """Questions of equal length need no padding, so each token read costs one product with every weight."""
    folder = save_tiny_tokenizer(make_tiny_llama(tmp_path / "model"))
    task = tmp_path / "task"
    task.mkdir()
    shutil.copy(TASKS / "endings.yaml", task)
    lines = [json.dumps({"start": f"w{5 + number} w3", "end": " w4"}) for number in range(4)]
    (task / "endings.jsonl").write_text("\n".join(lines))
    source = open_source(folder)
    score = task_score(str(task), folder, tmp_path)
    read = {}
    products = multiplications(lambda: read.update(score(source).read))
    shape = shape_of(source)
    assert sum(read.values()) == 4
    assert products == sum(map(prod, read.items())) * (shape.matrix_parameters + shape.vocab * shape.hidden)


def test_a_metric_that_does_not_say_so_is_better_when_higher(tmp_path: Path) -> None:
    """As in the report; else depth pruning would look for the layers without which the model is worst."""
    folder = save_tiny_tokenizer(make_tiny_llama(tmp_path / "model"))
    task = write_writing(tmp_path / "task", "w5", 1, "{metric: !function utils.own, aggregation: mean}")
    (task / "utils.py").write_text("def own(references, predictions):\n    return 0.75\n")
    assert task_score(str(task), folder, tmp_path)(open_source(folder)).score == 0.75


def test_texts_end_as_when_the_model_is_evaluated(tmp_path: Path) -> None:
    """With any of the tokens that the generation config names, not with the tokenizer's alone."""
    folder = save_tiny_tokenizer(make_tiny_llama(tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(128)]}))
    metric = "{metric: exact_match, aggregation: mean, higher_is_better: true}"
    task = write_writing(tmp_path / "task", "w5 w6 w3", 8, metric)
    assert task_score(str(task), folder, tmp_path)(open_source(folder)).read == {3: 1}, "one new token, never read"
