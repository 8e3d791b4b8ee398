import pytest
from transformers import AutoTokenizer

from tests.benchmarks.generation import compare, models, prompts, requests
from tests.evaluation.models import save_byte_model


@pytest.mark.slow
def test_both_models_are_measured_and_answer_alike(tmp_path, few_articles):
    folder = save_byte_model(tmp_path / "model", max_position_embeddings=1024)
    texts = prompts(AutoTokenizer.from_pretrained(folder), 3, 40, 60)
    rows = compare(models(folder, batch=1), requests(texts, [], 8), rounds=1)
    assert rows[0][4] == "1.00"
    assert [row[-1] for row in rows] == ["3 of 3", "3 of 3"]
