"""Stored measurements: one JSON file per measurement, identified by everything that its numbers depend on."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_pvs.system import ranks
from nemo_pvs.system.files import disk_errors, read_json, sha256_json, write_json
from nemo_pvs.system.ranks import from_main


@dataclass(frozen=True)
class Store:
    """The folder of one evaluation: measurements, and the journals of unfinished ones."""

    folder: Path

    def find(self, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Return the metrics of a measurement with the same settings, if there is one.

        Args:
            name: Name of the measurement.
            settings: Everything that its numbers depend on: model fingerprint, tokenizer, content of the task, ...
        """
        path = self._path(name, settings)
        known = read_json(path) if path.is_file() else None
        return known["metrics"] if known and known["settings"] == settings else None

    def write(self, name: str, settings: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Store a measurement, and remove its journal."""
        write_json(self._path(name, settings), {"name": name, "settings": settings, "metrics": metrics})
        self.journal(name, settings).remove()

    def journal(self, name: str, settings: dict[str, Any]) -> Journal:
        """Return the journal of a measurement."""
        return Journal(self._path(name, settings).with_suffix(".journal"))

    def _path(self, name: str, settings: dict[str, Any]) -> Path:
        readable = re.sub(r"[^\w.-]+", "_", name).strip("_")
        folder = self.folder / "measured" / str(settings["model"])[:16]
        return folder / f"{readable[-80:]}-{sha256_json(settings)[:16]}.json"


Answer = tuple[Any, ...]
"""The answer to a request, in types that JSON has."""


class Journal:
    """A folder with one file of answers per rank; lines that a killed rank left incomplete are ignored."""

    def __init__(self, folder: Path) -> None:
        """Store the folder, without reading or writing anything yet.

        Args:
            folder: Folder of the files; its name must identify the model, the task and all settings.
        """
        self._folder = folder

    @staticmethod
    def key(ids: Sequence[int], *settings: Any) -> str:
        """Return the key of a request: a hash of its tokens and of whatever else its answer depends on."""
        return sha256_json([list(ids), *settings])[:32]

    def read(self) -> Mapping[str, Answer]:
        """Return the answers of earlier runs, the same on every rank (rank 0 reads)."""
        files = sorted(self._folder.glob("*.jsonl"))
        return from_main(lambda: {key: answer for file in files for key, answer in _lines(file).items()})

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Append the answers of a batch to this rank's file."""
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / f"{ranks.rank()}.jsonl", "a+b") as file:
                if file.tell() and _torn(file.fileno()):
                    file.write(b"\n")
                file.write(b"".join(json.dumps([key, *answer]).encode() + b"\n" for key, answer in answers.items()))

    def remove(self) -> None:
        """Remove all answers, after the task's result has been written."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _torn(descriptor: int) -> bool:
    """Return whether a file's last line is incomplete."""
    return os.pread(descriptor, 1, os.fstat(descriptor).st_size - 1) != b"\n"


def _lines(file: Path) -> dict[str, Answer]:
    answers = {}
    for line in file.read_text(errors="replace").splitlines():
        try:
            key, *answer = json.loads(line)
        except ValueError:  # the line that was being written when the run was killed
            continue
        answers[key] = tuple(answer)
    return answers
