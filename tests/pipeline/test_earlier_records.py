"""A run folder that an earlier version made, with its fingerprints in the records, goes on without being redone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.pipeline.pipeline import Pipeline
from nemo_pvs.recipe.load import parse_recipe
from tests.pipeline.test_pipeline import tiny_values


def prepare(values: dict, folder: Path) -> dict[str, dict]:
    """Do every stage before training, and return the records."""
    Pipeline(parse_recipe(values, "test"), folder).prepare_only()
    return {path.name: json.loads(path.read_text()) for path in (folder / "stages").glob("*.json")}


def as_an_earlier_version_wrote_it(folder: Path, parent: Path) -> None:
    """Give all models in the records of a run, its scores and its plans, the fingerprints of an earlier version."""
    models = [parent, *folder.glob("pruned/*/huggingface"), *folder.glob("random/*/nemo")]
    names = {str(name): name.earlier() for name in (fingerprint(open_source(model)) for model in models)}
    assert len(names) == 5
    for path in (
        *folder.glob("stages/*.json"),
        *folder.glob("scores/manifest.json"),
        *folder.glob("pruned/*/plan.json"),
    ):
        text = path.read_text()
        for today, earlier in names.items():
            text = text.replace(today, earlier)
        path.write_text(text)


@pytest.mark.slow
def test_a_run_folder_of_an_earlier_version_goes_on(tmp_path):
    values, run = tiny_values(tmp_path), tmp_path / "run"
    parent = Path(values["parent"]["source"])
    before = prepare(values, run)
    as_an_earlier_version_wrote_it(run, parent)
    records = {path.name: json.loads(path.read_text()) for path in (run / "stages").glob("*.json")}
    assert records != before
    assert prepare(values, run) == before, "a stage was done again, or a name is not that of today"
    # From now on a change is noticed that the earlier fingerprint did not see.
    earlier = fingerprint(open_source(parent)).earlier()
    weights = load_file(parent / "model.safetensors")
    weights["model.embed_tokens.weight"][5] *= -2
    save_file(weights, parent / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(open_source(parent)).earlier() == earlier
    changed = prepare(values, run)
    for name in ("parent.json", "calibrate.json", "prune-width.json", "prune-depth.json"):
        assert changed[name]["seconds"] != before[name]["seconds"], f"{name} was not done again"
