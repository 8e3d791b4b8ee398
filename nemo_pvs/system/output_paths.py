"""Paths that are to be written: whether they can be, before any work is done for them, and without making anything."""

from __future__ import annotations

import os
from pathlib import Path

from nemo_pvs.errors import UserError

# Names are made longer by temporary files and files beside a target, at most ".NAME.search.json.12345678.partial".
_ROOM_IN_NAME = 32
_LONGEST_NAME = 255
"""In bytes, on every file system in use."""


def check_folder(target: Path) -> None:
    """Refuse a folder that cannot be made, or cannot be written to if it is there.

    Raises:
        UserError: it is a file, or lies below one; it, or a part of its path, is a link to nothing; permission is
            denied, the file system is read-only, or a name is too long.
    """
    nearest = _nearest_existing(target)
    if nearest is not None and not nearest.is_dir():
        below = "it" if nearest == target else nearest
        raise UserError(f"Cannot write {target}: {below} is a file, not a folder; choose another path.")
    _check_writable(nearest, target)


def check_file(target: Path) -> None:
    """Refuse a file that cannot be made or replaced.

    Raises:
        UserError: it is a folder, or its folder cannot be written to (``check_folder``).
    """
    nearest = _nearest_existing(target)
    if nearest == target:
        if target.is_dir():
            raise UserError(f"Cannot write {target}: it is a folder, and a file is to be written; add a file's name.")
        nearest = target.parent
    if nearest is not None and not nearest.is_dir():
        raise UserError(f"Cannot write {target}: {nearest} is a file, not a folder; choose another path.")
    _check_writable(nearest, target)


def _nearest_existing(target: Path) -> Path | None:
    """Return the target or the first of its parents that exists, after a look at the names and links on the way."""
    limits = [*(_LONGEST_NAME for _ in target.parts[:-1]), _LONGEST_NAME - _ROOM_IN_NAME]
    if any(len(os.fsencode(part)) > limit for part, limit in zip(target.parts, limits, strict=False)):
        raise UserError(f"Cannot write {target}: a name in this path is too long; choose a shorter one.")
    if "\0" in str(target):
        raise UserError(f"Cannot write {str(target)!r}: a path holds no zero byte; choose another one.")
    try:
        for path in (target, *target.parents):
            if path.exists():
                return path
            if path.is_symlink():
                raise UserError(
                    f"Cannot write {target}: {path} is a link to {os.readlink(path)}, which does not exist; remove "
                    "the link, or choose another path."
                )
    except OSError as error:  # no permission to look, or the whole path is too long
        raise UserError(f"Cannot write {target}: {error.strerror}; choose another path.") from None
    return None


def _check_writable(folder: Path | None, target: Path) -> None:
    if folder is None or os.access(folder, os.W_OK | os.X_OK):
        return
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise UserError(f"Cannot write {target}: the file system is read-only; choose another folder.")
    raise UserError(f"Cannot write {target}: permission is denied in {folder}; choose a folder that you may write to.")
