"""The checksums of a checkpoint's tensors, known from its manifest or from a cache before any tensor is read.

Every tensor is compared with the manifest when it is read. To identify a model, no tensor needs to be read as long as
its files are those that the checksums were computed from.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from nemo_pvs.checkpoints.fingerprint import compute_checksums
from nemo_pvs.checkpoints.manifest import MANIFEST, Manifest
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.checkpoints.tensor_record import HASH, TensorRecord
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import cache_folder, read_json, sha256_bytes, sha256_file

IGNORE = "PVS_IGNORE_MANIFEST"
"""The environment variable that ``--ignore-manifest`` sets, so that the processes a command starts obey it too."""

_SETTLED_SECONDS = 2.0
"""A file modified more recently than this could change again without a new time stamp."""

_RECORDS = TypeAdapter(dict[str, TensorRecord])


@contextmanager
def ignoring_manifests(ignore: bool = True) -> Iterator[None]:
    """Do not compare checkpoints that are opened within the block with their manifests."""
    before = os.environ.get(IGNORE)
    if ignore:
        os.environ[IGNORE] = "1"
    try:
        yield
    finally:
        if ignore:
            os.environ.pop(IGNORE)
            if before is not None:
                os.environ[IGNORE] = before


class StoredTensors:
    """The checksums of the tensors in a checkpoint's files."""

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        """Read the manifest, if there is one.

        Args:
            folder: The checkpoint.
            files: Its weight files.

        Raises:
            UserError: there is a manifest, but it is not usable.
        """
        self._folder = folder
        self._files = sorted(files)
        self._computed: tuple[dict[str, list[int]], Mapping[str, TensorRecord]] | None = None
        self.manifest = None if os.environ.get(IGNORE) else Manifest.read(folder)

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Compare a tensor that was read with the manifest, if there is one.

        Raises:
            UserError: it is not what was written.
        """
        if self.manifest is not None and not self.manifest.describes(name, tensor):
            raise changed_since(self._folder, name)

    def check_file(self, path: Path) -> None:
        """Compare a file other than a weight file with the manifest, as ``check`` does for a tensor.

        Raises:
            UserError: it is not what was written.
        """
        if self.manifest is not None:
            record = self.manifest.files.get(str(path.relative_to(self._folder)))
            if record is None or sha256_file(path) != record.sha256:
                raise changed_since(self._folder, str(path.relative_to(self._folder)))

    def checksums(self, source: WeightSource) -> Mapping[str, TensorRecord]:
        """Return the checksum of every tensor; where none are known for these files, read them from ``source``.

        Computed checksums are cached per user (``$XDG_CACHE_HOME/nemo_pvs``), with the size and modification time of
        every file.
        """
        if self._manifest_is_current():
            assert self.manifest is not None
            return self.manifest.tensors
        files = {str(path): _size_and_time(path) for path in self._files}
        if self._computed is None or self._computed[0] != files:
            self._computed = files, self._read_cache(files) or self._compute(source, files)
        return self._computed[1]

    def _compute(self, source: WeightSource, files: Mapping[str, list[int]]) -> Mapping[str, TensorRecord]:
        settled = time.time_ns() - int(_SETTLED_SECONDS * 1e9)
        records = compute_checksums(source)
        if all(changed < settled for _, changed in files.values()):
            self._write_cache(files, records)
        return records

    def _manifest_is_current(self) -> bool:
        """Return whether every file has the length in the manifest and none was modified after the manifest.

        The manifest is the last file of a checkpoint to be written.
        """
        if self.manifest is None or self.manifest.hash != HASH:
            return False
        written = _size_and_time(self._folder / MANIFEST)[1]
        for path in self._files:
            record = self.manifest.files.get(str(path.relative_to(self._folder)))
            size, changed = _size_and_time(path)
            if record is None or record.bytes != size or changed > written:
                return False
        return True

    @property
    def _cache(self) -> Path:
        return cache_folder() / "checksums" / sha256_bytes(bytes(self._folder.resolve()))[:32]

    def _read_cache(self, files: Mapping[str, list[int]]) -> dict[str, TensorRecord] | None:
        with suppress(UserError, ValidationError, AttributeError, KeyError, TypeError):
            cached: Any = read_json(self._cache)
            if cached["hash"] == HASH and cached["files"] == files:
                return _RECORDS.validate_python(cached["tensors"])
        return None

    def _write_cache(self, files: Mapping[str, list[int]], records: Mapping[str, TensorRecord]) -> None:
        """Cache checksums; if that is not possible, they are computed again the next time."""
        tensors = {name: asdict(record) for name, record in records.items()}
        with suppress(OSError):
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            # Several ranks may write at once, so each writes its own file and renames it when it is complete.
            with tempfile.NamedTemporaryFile("w", dir=self._cache.parent, delete=False) as partial:
                json.dump({"folder": str(self._folder), "hash": HASH, "files": files, "tensors": tensors}, partial)
            os.replace(partial.name, self._cache)


def changed_since(folder: Path, what: str) -> UserError:
    """Return the error for a tensor or file of a checkpoint that differs from its manifest."""
    return UserError(
        f"{what} in {folder} does not match {MANIFEST} there: a file is damaged, or another program has changed "
        "it; copy the checkpoint again, or, if the change was made on purpose, pass --ignore-manifest."
    )


def _size_and_time(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
