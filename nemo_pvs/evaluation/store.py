"""What has been measured, one JSON file a measurement, found again by everything that decides its numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_pvs.evaluation.journal import Journal
from nemo_pvs.system.files import read_json, sha256_json, write_json


@dataclass(frozen=True)
class Store:
    """The folder of one evaluation: measurements, and the journals of unfinished ones."""

    folder: Path

    def find(self, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Return the metrics of an equal measurement, if there is one.

        Args:
            name: What is measured.
            settings: All that its numbers depend on: fingerprint of the model, tokenizer, content of the task, ...
        """
        path = self._path(name, settings)
        known = read_json(path) if path.is_file() else None
        return known["metrics"] if known and known["settings"] == settings else None

    def write(self, name: str, settings: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Keep a measurement; its journal is no longer needed."""
        write_json(self._path(name, settings), {"name": name, "settings": settings, "metrics": metrics})
        self.journal(name, settings).remove()

    def journal(self, name: str, settings: dict[str, Any]) -> Journal:
        """Return the journal of a measurement."""
        return Journal(self._path(name, settings).with_suffix(".journal"))

    def _path(self, name: str, settings: dict[str, Any]) -> Path:
        readable = re.sub(r"[^\w.-]+", "_", name).strip("_")
        folder = self.folder / "measured" / str(settings["model"])[:16]
        return folder / f"{readable[-80:]}-{sha256_json(settings)[:16]}.json"
