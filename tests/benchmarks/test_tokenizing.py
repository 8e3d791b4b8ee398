import pytest

from tests.benchmarks.tokenizing import compare, write_text
from tests.conftest import save_tiny_tokenizer

pytestmark = pytest.mark.slow

NAMES = ["Megatron-LM, 1 worker", "pvs tokenize, 2 workers"]


def test_all_write_the_same_tokens(tmp_path):
    text = tmp_path / "lines.jsonl"
    text.write_text("".join(f'{{"text": "w{index} w5"}}\n' for index in range(50)))
    write_text(tmp_path / "text.jsonl", [text], 2000)
    (tmp_path / "tokenizer").mkdir()
    measured = compare(tmp_path / "text.jsonl", save_tiny_tokenizer(tmp_path / "tokenizer"), tmp_path, 1, NAMES)
    assert list(measured) == NAMES
    assert all(seconds > 0 and cpu > 0 for seconds, cpu in measured.values())
