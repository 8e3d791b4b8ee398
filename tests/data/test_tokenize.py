from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from nemo_pvs.data.corpus import Document
from nemo_pvs.data.tokenize import count_tokens, load_tokenizer, tokenize, tokenizer_hash, write_token_file
from nemo_pvs.errors import UserError

from .conftest import SENTENCES, save_tokenizer

# More than one batch, texts longer than the tokenizer's model_max_length, and characters it never saw.
TEXTS = [f"{i}. {SENTENCES[i % 3]}\n\n {'long ' * i}😀 <unseen>" for i in range(150)]
DOCUMENTS = [Document(text, str(i)) for i, text in enumerate(TEXTS)]


def test_texts_longer_than_the_model_reads_are_no_cause_for_warnings(
    tokenizer_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("transformers")  # does not propagate to the root logger, where caplog listens
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenize(DOCUMENTS, tokenizer_folder, tmp_path / "a")
            assert caplog.records == []
            load_tokenizer(tokenizer_folder)(TEXTS[-1])  # what it would have said
    finally:
        logger.removeHandler(caplog.handler)
    assert "longer than the specified maximum" in caplog.text


def test_the_token_file_decodes_to_the_documents(tokenizer_folder: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "out" / "train.v1"
    manifest = tokenize(DOCUMENTS, tokenizer_folder, prefix)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    stored = IndexedDataset(str(prefix))
    rows = [stored[i] for i in range(len(stored))]
    assert [tokenizer.decode(row[:-1], clean_up_tokenization_spaces=False) for row in rows] == TEXTS
    assert {int(row[-1]) for row in rows} == {tokenizer.eos_token_id}
    assert stored.document_indices.tolist() == list(range(len(TEXTS) + 1))
    assert all(row.dtype == np.uint16 for row in rows)
    assert manifest["tokens"] == sum(map(len, rows)) == count_tokens(prefix)
    assert manifest["documents"] == len(TEXTS)
    assert manifest["dtype"] == "uint16"
    assert manifest["tokenizer_sha256"] == tokenizer_hash(tokenizer_folder)
    assert json.loads((tmp_path / "out" / "train.v1.json").read_text()) == manifest
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["train.v1.bin", "train.v1.idx", "train.v1.json"]


def test_without_an_end_of_text_token_only_the_text_is_stored(tokenizer_folder: Path, tmp_path: Path) -> None:
    with_end = tokenize(DOCUMENTS, tokenizer_folder, tmp_path / "a")
    without = tokenize(DOCUMENTS, tokenizer_folder, tmp_path / "b", append_eos=False)
    assert with_end["tokens"] - without["tokens"] == len(DOCUMENTS)
    assert with_end["source_sha256"] == without["source_sha256"]
    assert with_end["bin_sha256"] != without["bin_sha256"]


@pytest.mark.slow
def test_a_large_vocabulary_is_stored_as_int32(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens([f"<extra-{i}>" for i in range(65_500 - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path / "large")
    assert tokenize(DOCUMENTS[:2], tmp_path / "large", tmp_path / "a")["dtype"] == "int32"
    assert count_tokens(tmp_path / "a") * 4 == (tmp_path / "a.bin").stat().st_size


def test_the_same_texts_give_the_same_bytes_and_any_change_another_source_hash(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    first = tokenize(iter(DOCUMENTS), tokenizer_folder, tmp_path / "a")
    assert tokenize(DOCUMENTS, tokenizer_folder, tmp_path / "b") == first
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()
    joined = [Document(TEXTS[0] + TEXTS[1], "joined"), *DOCUMENTS[2:]]
    assert tokenize(joined, tokenizer_folder, tmp_path / "a")["source_sha256"] != first["source_sha256"]
    assert json.loads((tmp_path / "a.json").read_text())["documents"] == len(TEXTS) - 1


def test_ids_are_written_as_they_are_and_an_old_manifest_does_not_outlive_its_tokens(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    tokenize(DOCUMENTS, tokenizer_folder, tmp_path / "a")
    assert write_token_file(tmp_path / "a", iter([[7, 65_499], [0]]), vocab=65_499 + 1) == "int32"
    stored = IndexedDataset(str(tmp_path / "a"))  # kept, because its rows point into the file that it maps
    assert [stored[0].tolist(), stored[1].tolist()] == [[7, 65_499], [0]]
    assert not (tmp_path / "a.json").exists()
    assert write_token_file(tmp_path / "b", [[1, 2], [3]], vocab=65_499) == "uint16"
    assert (count_tokens(tmp_path / "a"), count_tokens(tmp_path / "b")) == (3, 3)


def test_progress_counts_documents(tokenizer_folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    tokenize(DOCUMENTS, tokenizer_folder, tmp_path / "a", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(64, 150), (128, 150), (150, 150)]


def test_a_failure_leaves_the_earlier_files_alone(tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tokenize(DOCUMENTS[:3], tokenizer_folder, out / "a")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def broken() -> Iterator[Document]:
        yield from DOCUMENTS
        raise UserError("line 7 is broken")

    with pytest.raises(UserError, match="line 7"):
        tokenize(broken(), tokenizer_folder, out / "a")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_nothing_to_write_and_no_tokenizer_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no documents to write"):
        tokenize([], tokenizer_folder, tmp_path / "out" / "a")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(UserError, match="has no tokenizer"):
        tokenize(DOCUMENTS, tmp_path / "out", tmp_path / "a")
    with pytest.raises(UserError, match="names no end-of-text token"):
        tokenize(DOCUMENTS, save_tokenizer(tmp_path / "endless", eos=None), tmp_path / "a")
    (tokenizer_folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tokenizer_folder)


def test_a_tokenizer_with_code_of_its_own_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tokenizer_folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = tokenizer_folder / "tokenizer_config.json"
    changed = {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tokenizer_folder)
    assert not (tmp_path / "ran").exists()


def test_the_hash_names_the_tokenizer_and_nothing_else(tokenizer_folder: Path, tmp_path: Path) -> None:
    before = tokenizer_hash(tokenizer_folder)
    (tokenizer_folder / "chat_template.jinja").write_text("{{ messages }}")
    (tokenizer_folder / "model.safetensors").write_bytes(b"weights")
    assert tokenizer_hash(tokenizer_folder) == before
    assert tokenizer_hash(save_tokenizer(tmp_path / "same")) == before
    assert tokenizer_hash(save_tokenizer(tmp_path / "other", vocab_size=300)) != before
    with pytest.raises(UserError, match="has no tokenizer"):
        tokenizer_hash(tmp_path)
    with pytest.raises(UserError, match=r"There is no tokenizer: .*missing does not exist"):
        tokenizer_hash(tmp_path / "missing")


def test_token_files_that_do_not_fit_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "a"
    with pytest.raises(UserError, match=r"a\.bin does not exist"):
        count_tokens(prefix)
    tokenize(DOCUMENTS, tokenizer_folder, prefix)
    data, index = (tmp_path / "a.bin").read_bytes(), (tmp_path / "a.idx").read_bytes()
    (tmp_path / "a.bin").write_bytes(data[:-2])
    with pytest.raises(UserError, match="do not match"):
        count_tokens(prefix)
    (tmp_path / "a.bin").write_bytes(data)
    (tmp_path / "a.idx").write_bytes(index[:100])
    with pytest.raises(UserError, match=r"a\.idx is truncated"):
        count_tokens(prefix)
    (tmp_path / "a.idx").write_bytes(b"no index, but longer than the header of one")
    with pytest.raises(UserError, match="not an index"):
        count_tokens(prefix)
