"""Tokenizers as Transformers 5.24 saved them, with the ids that it gave: ``transformers_5/*/expected.json``.

``backend`` is of the class that version 4 lacks, with a list of extra_special_tokens and a tokenizer.json that puts a
space before a text, which version 4 would take out. ``llama`` is of a class of version 4 that would prepend ``<s>``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_pvs.data.assets import asset_files, copy_asset
from nemo_pvs.data.corpus import Document
from nemo_pvs.data.tokenize import load_tokenizer, tokenize, tokenizer_hash
from nemo_pvs.system.files import sha256_folder
from tests.conftest import make_tiny_llama

FOLDERS = sorted(path for path in (Path(__file__).parent / "transformers_5").iterdir())


@pytest.fixture(params=FOLDERS, ids=lambda path: path.name)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.param, tmp_path / "saved", ignore=shutil.ignore_patterns("expected.json")))


def assert_ids_of_transformers_5(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    expected = json.loads((Path(__file__).parent / "transformers_5" / name / "expected.json").read_text())
    for one in expected["texts"]:
        assert tokenizer(one["text"], add_special_tokens=False)["input_ids"] == one["ids"]
        assert tokenizer(one["text"])["input_ids"] == one["with_special"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (expected["bos"], expected["eos"])
    assert set(tokenizer.all_special_tokens) == set(expected["special"])


def test_it_is_read_as_transformers_5_reads_it(saved: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    before = sha256_folder(saved)
    tokenizer = load_tokenizer(saved)
    assert_ids_of_transformers_5(tokenizer, request.node.callspec.params["saved"].name)
    assert tokenizer.name_or_path == str(saved)
    assert tokenize([Document("the parent", "1")], saved, tmp_path / "a")["tokens"] > 1
    assert sha256_folder(saved) == before


def test_a_copy_loads_in_transformers_4_and_is_the_same_tokenizer(
    saved: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    for asset in asset_files(saved):
        copy_asset(asset, tmp_path / "copy")
    assert_ids_of_transformers_5(
        AutoTokenizer.from_pretrained(tmp_path / "copy"), request.node.callspec.params["saved"].name
    )
    assert tokenizer_hash(tmp_path / "copy") == tokenizer_hash(saved)
    for asset in asset_files(tmp_path / "copy"):
        copy_asset(asset, tmp_path / "again")
    assert sha256_folder(tmp_path / "again") == sha256_folder(tmp_path / "copy")


@pytest.mark.slow
def test_the_verbs_take_a_model_of_transformers_5(pvs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Its config has rope_parameters and dtype, its tokenizer no class that version 4 knows."""
    model = make_tiny_llama(tmp_path / "model", vocab_size=320)
    config = json.loads((model / "config.json").read_text())
    del config["rope_theta"], config["rope_scaling"]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    (model / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    for file in (Path(__file__).parent / "transformers_5" / "backend").glob("tokenizer*"):
        shutil.copy(file, model)
    text = tmp_path / "text.txt"
    text.write_text("the parent is pruned and the pruned parent is trained again " * 40)
    sizes = ["--data", text, "--samples", "2", "--sequence-length", "16"]
    assert pvs("tokenize", text, "--tokenizer", model, "--out", tmp_path / "data", "--split", "train=1").code == 0
    prune = ["--method", "minitron-width", "--target", "hidden=32", *sizes]
    assert pvs("prune", model, tmp_path / "small", *prune).code == 0
    assert pvs("convert", model, tmp_path / "nemo", "--verify", "logits", "--text", text).code == 0
    for folder in (tmp_path / "small", tmp_path / "nemo" / "context" / "tokenizer"):
        assert_ids_of_transformers_5(AutoTokenizer.from_pretrained(folder), "backend")
