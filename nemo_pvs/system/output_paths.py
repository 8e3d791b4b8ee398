"""Checks that an output path can be written, before any work is done and without creating anything."""

from __future__ import annotations

import os
from pathlib import Path

from nemo_pvs.errors import UserError

# Temporary and companion files of a target have longer names, at most ".NAME.search.json.12345678.partial".
_ROOM_IN_NAME = 32
_LONGEST_NAME = 255
"""In bytes, on every file system in use."""


def check_folder(target: Path) -> None:
    """Refuse a folder that cannot be created or, if it exists, cannot be written to.

    Raises:
        UserError: it or one of its parents is a file or a broken link; permission is denied; the file system is
            read-only; or a name is too long.
    """
    nearest = _nearest_existing(target)
    if nearest is not None and not nearest.is_dir():
        file = "it" if nearest == target else nearest
        raise UserError(f"Cannot write {target}: {file} is a file, not a folder; choose another path.")
    _check_writable(nearest, target)


def check_file(target: Path) -> None:
    """Refuse a file that cannot be created or replaced.

    Raises:
        UserError: it is a folder, or its folder cannot be written to (``check_folder``).
    """
    nearest = _nearest_existing(target)
    if nearest == target:
        if target.is_dir():
            raise UserError(f"Cannot write {target}: it is a folder, but a file is needed; add a file name.")
        nearest = target.parent
    if nearest is not None and not nearest.is_dir():
        raise UserError(f"Cannot write {target}: {nearest} is a file, not a folder; choose another path.")
    _check_writable(nearest, target)


def _nearest_existing(target: Path) -> Path | None:
    """Return the target or its nearest existing parent; refuse bad names and broken links on the way."""
    limits = [*(_LONGEST_NAME for _ in target.parts[:-1]), _LONGEST_NAME - _ROOM_IN_NAME]
    if any(len(os.fsencode(part)) > limit for part, limit in zip(target.parts, limits, strict=False)):
        raise UserError(f"Cannot write {target}: a name in this path is too long; choose a shorter one.")
    if "\0" in str(target):
        raise UserError(f"Cannot write {str(target)!r}: a path cannot contain a zero byte; choose another path.")
    try:
        for path in (target, *target.parents):
            if path.exists():
                return path
            if path.is_symlink():
                raise UserError(
                    f"Cannot write {target}: {path} is a link to {os.readlink(path)}, which does not exist; remove "
                    "the link, or choose another path."
                )
    except OSError as error:  # no permission to list a folder, or the whole path is too long
        raise UserError(f"Cannot write {target}: {error.strerror}; choose another path.") from None
    return None


def _check_writable(folder: Path | None, target: Path) -> None:
    if folder is None or os.access(folder, os.W_OK | os.X_OK):
        return
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise UserError(f"Cannot write {target}: the file system is read-only; choose another folder.")
    raise UserError(f"Cannot write {target}: permission is denied in {folder}; choose a folder that you may write to.")
