from __future__ import annotations

from pathlib import Path

import pytest

from nemo_pvs.data.corpus import input_files
from nemo_pvs.errors import UserError
from nemo_pvs.pipeline.tokens import RunData
from nemo_pvs.recipe.load import load_recipe, parse_recipe


def _data(folder: Path, source: Path) -> RunData:
    values = load_recipe("smollm2_135m/demo").model_dump()
    values["data"]["source"] = str(source)
    return RunData(parse_recipe(values, "recipe.yaml"), folder)


def test_the_identity_of_a_text_is_that_of_the_files_that_are_read(tmp_path: Path) -> None:
    """A file that is no text may change; one that is may not, nor may one come or go."""
    corpus = tmp_path / "corpus"
    for name in ("a.txt", "deep/b.jsonl", "README.txt", ".git/c.txt", "notes.md"):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text('{"text": "a"}')
    data = _data(tmp_path / "data", corpus)
    identity = data.identity(tmp_path, 100)
    assert list(identity) == [str(file) for file in input_files([corpus])]
    for name in ("README.txt", ".git/c.txt", "notes.md", ".new.txt"):
        (corpus / name).write_text("another content")
    assert data.identity(tmp_path, 100) == identity
    (corpus / "deep" / "new.txt").write_text("more text")
    assert data.identity(tmp_path, 100) != identity
    (corpus / "deep" / "new.txt").unlink()
    (corpus / "a.txt").write_text("other text")
    assert data.identity(tmp_path, 100) != identity


def test_a_text_that_is_missing_has_no_identity(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        _data(tmp_path / "data", tmp_path / "corpus").identity(tmp_path, 100)
