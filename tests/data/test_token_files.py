from __future__ import annotations

import math
from pathlib import Path

import pytest

from nemo_pvs.data import token_files
from nemo_pvs.data.corpus import Document
from nemo_pvs.data.token_counts import counts_of_token_file
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
    with pytest.raises(UserError, match="contains the token 127, but the model's vocabulary ends at 126"):
        describe_token_file(tmp_path / "a", "any", 127)


def test_an_id_that_no_sample_shows_is_refused_where_all_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_token_file(tmp_path / "a", [[1, 2, 127, 3, 4, 5, 6, 7]], vocab=128)
    monkeypatch.setattr(token_files, "_SAMPLE", 1)
    assert describe_token_file(tmp_path / "a", "any", 127)["tokens"] == 8
    with pytest.raises(UserError, match="contains the token 127, but the model's vocabulary ends at 126"):
        counts_of_token_file(tmp_path / "a", 127)
    assert counts_of_token_file(tmp_path / "a", 128).nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 127]


def test_a_manifest_of_an_earlier_file_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    """As when Megatron's own script wrote the new one: its hash would say that the tokens are the old ones."""
    tokenize([Document(text, text) for text in SENTENCES], tokenizer_folder, tmp_path / "a")
    manifest = (tmp_path / "a.json").read_bytes()
    write_token_file(tmp_path / "a", [[1, 2, 3]], vocab=128)
    (tmp_path / "a.json").write_bytes(manifest)
    with pytest.raises(UserError, match=r"a\.json describes another file than .*a\.bin, which has 3 tokens"):
        describe_token_file(tmp_path / "a", tokenizer_hash(tokenizer_folder), 10_000)


def test_another_index_is_another_file(tmp_path: Path) -> None:
    write_token_file(tmp_path / "a", [[1, 2, 3], [5]], vocab=128)
    write_token_file(tmp_path / "b", [[1, 2], [3, 5]], vocab=128)
    first, second = (describe_token_file(tmp_path / name, "any", 128) for name in "ab")
    assert first["tokens"] == second["tokens"]
    assert first["bin_sha256"] != second["bin_sha256"]


def test_the_last_token_must_have_one_to_predict() -> None:
    check_end(98, 1, [60, 40], None, ["a", "b"])
    with pytest.raises(UserError, match=r"reads 99 tokens .* has 100 tokens"):
        check_end(99, 1, [60, 40], None, ["a", "b"])
    check_end(90, 10, [61, 40], None, ["a", "b"])
    with pytest.raises(UserError, match=r"reads 90 tokens .* has 100 tokens"):  # a sequence lies in one file
        check_end(90, 10, [60, 40], None, ["a", "b"])


def test_megatron_builds_a_little_more_of_each_file_of_a_blend() -> None:
    """So that much must be there, or training stops when it has built its datasets."""
    weights, names = [3.0, 1.0], ["a", "b"]
    wanted = math.ceil(750 * 1.005) * 10
    check_end(10_000, 10, [wanted + 1, 3_000], weights, names)
    with pytest.raises(UserError, match=rf"reads {wanted:,} tokens of a\.bin \(weight 3\), but it has {wanted:,} "):
        check_end(10_000, 10, [wanted, 3_000], weights, names)


@pytest.mark.slow
def test_a_damaged_index_or_a_cut_file_is_refused_wherever_it_is(tmp_path: Path) -> None:
    """Every cut and every flipped bit, but for borders of documents, which nothing else in the files confirms."""
    documents = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    write_token_file(tmp_path / "a", documents, vocab=128)
    index, data = tmp_path / "a.idx", tmp_path / "a.bin"
    whole = index.read_bytes()
    borders = len(whole) - 8 * (len(documents) + 1)
    for length in range(len(whole)):
        index.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.idx is (truncated|not an index)"):
            describe_token_file(tmp_path / "a", "any", 128)
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        index.write_bytes(damaged)
        try:
            found = describe_token_file(tmp_path / "a", "any", 128)
        except UserError:
            continue
        assert bit // 8 >= borders
        assert found["tokens"] == 10
    index.write_bytes(whole)
    data.write_bytes(data.read_bytes()[:-2])
    with pytest.raises(UserError, match="do not match; one may be truncated"):
        describe_token_file(tmp_path / "a", "any", 128)


def test_an_index_that_promises_more_than_there_is_makes_nobody_allocate_it(tmp_path: Path) -> None:
    write_token_file(tmp_path / "a", [[1, 2, 3]], vocab=128)
    index = bytearray((tmp_path / "a.idx").read_bytes())
    index[18:26] = (1 << 60).to_bytes(8, "little")  # sequences
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(UserError, match=r"a\.idx is truncated"):
        describe_token_file(tmp_path / "a", "any", 128)


def test_tokens_below_zero_and_other_manifests_are_refused(tmp_path: Path) -> None:
    write_token_file(tmp_path / "a", [[1, 2, 3]], vocab=100_000)  # int32
    (tmp_path / "a.bin").write_bytes(b"\xff" * 12)
    with pytest.raises(UserError, match="contains the token -1"):
        describe_token_file(tmp_path / "a", "any", 128)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match=r"a\.json is not the manifest"):
        describe_token_file(tmp_path / "a", "any", 128)
