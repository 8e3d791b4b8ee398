"""Which of four continuations follows: questions out of a text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from nemo_pvs.data.tokenize import load_tokenizer, write_token_file
from nemo_pvs.errors import UserError
from nemo_pvs.evaluation.continuations import CONTEXT_TOKENS, ENDING_TOKENS, write_continuations
from nemo_pvs.evaluation.requests import parse_tasks
from tests.conftest import save_tiny_tokenizer

WINDOW = CONTEXT_TOKENS + ENDING_TOKENS
DRAW = random.Random(0)
DOCUMENTS = [[DRAW.randint(2, 127) for _ in range(5 * WINDOW)] + [0] for _ in range(3)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_token_file(tmp_path / "test", DOCUMENTS, vocab=128)
    return tmp_path / "test"


@pytest.fixture
def questions(text: Path, tmp_path: Path):
    tokenizer = load_tokenizer(save_tiny_tokenizer(tmp_path))

    def write(count: int, seed: int = 0) -> list[dict]:
        write_continuations(text, tokenizer, tmp_path / "task", count, seed=seed)
        return [json.loads(line) for line in (tmp_path / "task" / "continuation.jsonl").read_text().splitlines()]

    return write


def test_the_right_ending_follows_and_the_others_do_not(questions) -> None:
    follows = " ".join(f"w{token}" for document in DOCUMENTS for token in document)
    made = questions(9)
    assert len(made) == 9
    for question in made:
        assert len(question["context"].split()) == CONTEXT_TOKENS
        assert len(set(question["choices"])) == 4
        for place, ending in enumerate(question["choices"]):
            assert len(ending.split()) == ENDING_TOKENS
            assert (question["context"] + ending in follows) == (place == question["answer"])
        assert "<eos>" not in question["context"] + "".join(question["choices"]), "a window crosses two documents"
    contexts = [question["context"] for question in made]
    assert contexts == sorted(contexts, key=follows.index), "they go through the text"
    assert follows.index(contexts[-1]) > 0.75 * len(follows), "and reach its end"
    assert len({question["answer"] for question in made}) > 1


def test_a_seed_draws_the_same_again(questions) -> None:
    assert questions(9) == questions(9) != questions(9, seed=1)


def test_lm_eval_finds_the_task(questions, tmp_path: Path) -> None:
    questions(4)
    [request] = parse_tasks(str(tmp_path / "task"))
    assert request.task == "continuation"
    assert yaml.safe_load((tmp_path / "task" / "continuation.yaml").read_text())["target_delimiter"] == ""


def test_a_text_that_is_too_short_is_refused(questions, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has text for \d+ questions of the task continuation, not for 100"):
        questions(100)
    assert not (tmp_path / "task").exists()
