"""Migrate run folders of earlier versions, whose records identify models by the earlier fingerprint.

The earlier fingerprint did not detect every change of a model. It is replaced once, when the folder is first used
again; from then on every change is detected.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import read_json, sha256_json, write_json

_EARLIER = re.compile("[0-9a-f]{64}")


def adopt_earlier_records(folder: Path, source: str | None) -> None:
    """Replace earlier fingerprints of models by current ones in all stage records of a run folder.

    A model that is no longer in the folder keeps its earlier fingerprint.

    Args:
        folder: The run folder.
        source: The parent's checkpoint folder, if the recipe names one.
    """
    records = {path: read_json(path) for path in sorted((folder / "stages").glob("*.json"))}
    results = [record["result"] for record in records.values() if isinstance(record.get("result"), dict)]
    stated = {result.get("fingerprint") for result in results}
    earlier = {name for name in stated if isinstance(name, str) and _EARLIER.fullmatch(name)}
    if not earlier:
        return
    current = {}
    for model in _models(folder, source):
        try:
            name = fingerprint(open_source(model))
        except UserError:  # unfinished or damaged; the stage that needs it reports that
            continue
        if name.earlier() in earlier:
            current[name.earlier()] = str(name)
    for path, record in records.items():
        renamed = _renamed(record, current)
        if renamed != record:
            write_json(path, {**renamed, "inputs_hash": sha256_json(renamed["inputs"])})


def _models(folder: Path, source: str | None) -> Iterator[Path]:
    """Yield the folder of every model that a run may have started from or made."""
    if source and Path(source).is_dir():
        yield Path(source)
    for pattern in ("parent", "pruned/**/huggingface", "random/*/nemo", "models/**"):
        for path in sorted(folder.glob(pattern)):
            if (path / "config.json").is_file() or (path / "weights").is_dir():
                yield path


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [_renamed(part, names) for part in value]
    return names.get(value, value) if isinstance(value, str) else value
