"""What the examples of the API are about: a tiny model with a tokenizer, and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.reporting.conftest import results  # noqa: F401


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_tokenizer(make_tiny_llama(tmp_path_factory.mktemp("api") / "model"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of words that the tokenizer knows."""
    file = tmp_path_factory.mktemp("api") / "text.jsonl"
    documents = [" ".join(f"w{2 + (index + place) * 7 % 125}" for place in range(80)) for index in range(40)]
    file.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return file


@pytest.fixture
def namespace(model: Path, text: Path, results: Any, tmp_path: Path) -> dict[str, Any]:  # noqa: F811
    """Return the names that the examples in docstrings use, all of them files or folders."""
    finished = tmp_path / "finished"
    results.save(finished / "results.json")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "name": "tiny",
                "title": "tiny",
                "parent": {"source": str(model)},
                "data": {"source": str(text)},
                "targets": {"width": {"method": "minitron-width", "ffn": 48}},
                "calibrate": {"samples": 2, "sequence_length": 16},
                "evaluate": {"samples": 2, "sequence_length": 16},
                "train": {
                    "tokens": 64,
                    "sequence_length": 16,
                    "global_batch_size": 2,
                    "validation_samples": 2,
                    "learning_rate": 1e-3,
                },
            }
        )
    )
    return {"model": model, "text": text, "folder": tmp_path, "finished": finished, "recipe": recipe}
