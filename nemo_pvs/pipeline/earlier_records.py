"""Run folders of earlier versions, whose records name models by the earlier fingerprint, go on with today's names.

The earlier fingerprint did not see every change of a model. So the names are exchanged once, when the folder is first
used again, and from then on a changed model is noticed.
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
    """Give the models of a run folder, in all records of its stages, the names that they have today.

    A model that is no longer there keeps its earlier name.

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
    today = {}
    for place in _models(folder, source):
        try:
            name = fingerprint(open_source(place))
        except UserError:  # not finished, or damaged: whoever needs it says so
            continue
        if name.earlier() in earlier:
            today[name.earlier()] = str(name)
    for path, record in records.items():
        renamed = _renamed(record, today)
        if renamed != record:
            write_json(path, {**renamed, "inputs_hash": sha256_json(renamed["inputs"])})


def _models(folder: Path, source: str | None) -> Iterator[Path]:
    """Yield every model that a run may have made or begun with."""
    if source and Path(source).is_dir():
        yield Path(source)
    for pattern in ("parent", "pruned/**/huggingface", "random/*/nemo", "models/**"):
        for place in sorted(folder.glob(pattern)):
            if (place / "config.json").is_file() or (place / "weights").is_dir():
                yield place


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [_renamed(part, names) for part in value]
    return names.get(value, value) if isinstance(value, str) else value
