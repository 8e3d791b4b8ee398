from __future__ import annotations

from pathlib import Path

import pytest

from nemo_pvs.data.corpus import Document
from nemo_pvs.data.token_files import check_end, describe_token_file
from nemo_pvs.data.tokenize import tokenize, tokenizer_hash, write_token_file
from nemo_pvs.errors import UserError

from .conftest import SENTENCES, save_tokenizer


def test_a_file_of_ours_is_known_by_its_manifest(tokenizer_folder: Path, tmp_path: Path) -> None:
    made = tokenize([Document(text, text) for text in SENTENCES], tokenizer_folder, tmp_path / "a")
    found = describe_token_file(tmp_path / "a", tokenizer_hash(tokenizer_folder), 10_000)
    assert found == {"tokens": made["tokens"], "bin_sha256": made["bin_sha256"]}
    other = save_tokenizer(tmp_path / "other", vocab_size=300)
    with pytest.raises(UserError, match="made with another tokenizer than the model's"):
        describe_token_file(tmp_path / "a", tokenizer_hash(other), 10_000)


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path) -> None:
    write_token_file(tmp_path / "a", [[1, 2, 127], [5]], vocab=128)
    assert describe_token_file(tmp_path / "a", "any", 128)["tokens"] == 4
    with pytest.raises(UserError, match="holds the token 127, but the model's vocabulary ends at 126"):
        describe_token_file(tmp_path / "a", "any", 127)


def test_another_index_is_another_file(tmp_path: Path) -> None:
    write_token_file(tmp_path / "a", [[1, 2, 3], [5]], vocab=128)
    write_token_file(tmp_path / "b", [[1, 2], [3, 5]], vocab=128)
    first, second = (describe_token_file(tmp_path / name, "any", 128) for name in "ab")
    assert first["tokens"] == second["tokens"]
    assert first["bin_sha256"] != second["bin_sha256"]


def test_the_last_token_must_have_one_to_predict() -> None:
    check_end(99, [60, 40], None, ["a", "b"])
    with pytest.raises(UserError, match=r"reads 100 tokens .* has 100 tokens"):
        check_end(100, [60, 40], None, ["a", "b"])
    check_end(100, [80, 30], [3.0, 1.0], ["a", "b"])
    with pytest.raises(UserError, match=r"reads 75 tokens of a\.bin \(weight 3\), but it has 70"):
        check_end(100, [70, 30], [3.0, 1.0], ["a", "b"])
