"""Writes files and folders atomically (temporary sibling, fsync, rename), reads JSON and YAML, computes checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from nemo_pvs.errors import UserError
from nemo_pvs.system.folder_lock import locked_target
from nemo_pvs.system.output_paths import check_file, check_folder

_BLOCK_BYTES = 1 << 20
_PARTIAL = ".partial"
"""Suffix of files that are being written."""

# A tilde where a path may begin: ~/x, --out=~/x, ARM=~/x, ~/x,~/y.
_HOME = re.compile(r"(?:^|(?<=[=,]))~[^/,]*(?=/|,|$)")


def expand_home(value: Any) -> Any:
    """Expand ``~`` as a shell would, in every string within ``value`` where a path may begin.

    Applied to all command-line arguments and recipe values, so nothing else needs to handle ``~``.
    """
    if isinstance(value, str):
        return _HOME.sub(lambda match: os.path.expanduser(match[0]), value)
    if isinstance(value, Mapping):
        return {key: expand_home(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [expand_home(entry) for entry in value]
    return value


def user_cache() -> Path | None:
    """Return the user's cache folder; None without a home directory, as for a user that a container does not know."""
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return None if cache.startswith("~") else Path(cache)


def cache_folder() -> Path:
    """Return the user's folder for what can be computed again: ``$XDG_CACHE_HOME/nemo_pvs``. It may not exist yet.

    Without a home directory it is a temporary one.
    """
    return (user_cache() or Path(tempfile.gettempdir(), f"user-{os.getuid()}")) / "nemo_pvs"


def sha256_bytes(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of ``value`` as canonical JSON (sorted keys, no spaces): equal values have equal hashes."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_folder(folder: Path) -> str:
    """Return one SHA-256 over the relative names and bytes of every file below ``folder``."""
    return sha256_json({str(file.relative_to(folder)): sha256_file(file) for file in _files_below(folder)})


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder with hard links instead of copies of the files where the file system supports them."""

    def link(file: str, other: str) -> None:
        try:
            os.link(file, other)
        except OSError:
            shutil.copy2(file, other)

    shutil.copytree(source, target, copy_function=link)


def read_json(path: Path) -> Any:
    """Read a JSON file, with or without a byte order mark.

    Raises:
        UserError: the file is missing, cannot be read or is not JSON.
    """
    content = _read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it from its source.") from None


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Read a YAML file, with or without a byte order mark.

    Raises:
        UserError: the file is missing, cannot be read or is not YAML.
    """
    content = _read_bytes(path)
    try:
        return yaml.load(content, Loader=loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # e.g. the date 2026-99-99
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None


class StrictLoader(yaml.SafeLoader):
    """Also refuses a key that is given twice, of which YAML takes the last, and an anchor that refers to itself."""

    def __init__(self, stream: Any) -> None:
        """Begin to read a file."""
        super().__init__(stream)
        self._open: list[Any] = []

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node, which must not be one of those that it is in."""
        event: Any = self.peek_event()
        if self.check_event(yaml.AliasEvent) and event.anchor in self._open:
            raise yaml.composer.ComposerError(None, None, f"{event.anchor} contains itself", event.start_mark)
        return super().compose_node(parent, index)

    def compose_sequence_node(self, anchor: Any) -> Any:
        """Compose a list."""
        self._open.append(anchor)
        node = super().compose_sequence_node(anchor)
        self._open.pop()
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose a mapping; keys that it merges from others may be given again."""
        self._open.append(anchor)
        node: Any = super().compose_mapping_node(anchor)
        self._open.pop()
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.composer.ComposerError(None, None, f"{key.value} is given twice", key.start_mark)
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist; check the path.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path.") from None


def json_text(value: Any) -> str:
    """Return ``value`` as indented JSON, as ``write_json`` writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; readers see either the old file or the complete new one."""
    write_text(path, json_text(value))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8; as ``write_bytes``.

    Raises:
        UserError: the file cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content``; readers see either the old file or the complete new one; the last of several writers wins.

    Raises:
        UserError: the file cannot be written.
    """
    check_file(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            _fsync(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def remove_partial_files(folder: Path) -> None:
    """Remove what killed writers have left in a folder in which nobody is writing."""
    for path in folder.glob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of ``target`` that becomes ``target`` when the block ends without an error.

    Every file is flushed to disk before the rename, so a crash leaves either nothing or a finished folder. Leftovers
    of an earlier, killed run with the same target are removed; after an error, so are parents created for the target.
    If ``target`` is a link to a folder, that folder is replaced and the link stays.

    Raises:
        UserError: ``target`` exists and ``overwrite`` is false, another process is making it, or it cannot be written.
    """
    check_new_folder(target, overwrite=True)
    if target.is_symlink():
        target = target.resolve()
    with locked_target(target):
        if target.exists() and not overwrite:  # not all commands that get here have --overwrite
            raise UserError(f"{target} already exists; remove it or choose another name.")
        with _whole_folder(target) as partial:
            yield partial


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    partial = _partial_name(target)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    try:
        with disk_errors(target):
            yield partial
            for file in _files_below(partial):
                _fsync(file)
            _move_away(target)
            os.replace(partial, target)
            _fsync(target.parent)
            shutil.rmtree(_old_name(target), ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _move_away(target: Path) -> None:
    """Rename the folder to be replaced, because removing it is not atomic."""
    shutil.rmtree(_old_name(target), ignore_errors=True)
    if target.exists():
        os.replace(target, _old_name(target))


def remove_whole(target: Path) -> None:
    """Remove a folder or a file, if it exists; a crash leaves all of it or nothing, because it is renamed first."""
    if target.is_dir():
        _move_away(target)
    else:
        target.unlink(missing_ok=True)
    remove_leftover(target)


def remove_leftover(target: Path) -> None:
    """Remove what a killed process has left of an earlier folder ``target`` that it was removing or replacing."""
    shutil.rmtree(_old_name(target), ignore_errors=True)


def check_new_folder(target: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that cannot be created (``output_paths.check_folder``), or that exists and may not be replaced.

    Raises:
        UserError: the message says why.
    """
    check_folder(target)
    _refuse_existing(target, overwrite)
    if target.exists():  # the replacement is created in its parent
        check_folder(target.resolve().parent)


def check_new_file(target: Path, *, overwrite: bool = False) -> None:
    """Refuse a file that cannot be created (``output_paths.check_file``), or that exists and may not be replaced.

    Raises:
        UserError: the message says why.
    """
    check_file(target)
    _refuse_existing(target, overwrite)


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise UserError(f"{target} already exists; remove it, choose another name, or pass --overwrite.")


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn errors of a full, read-only or forbidden disk into a UserError that names ``target``."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # After a failed write, PyTorch's zip writer fails again, with a RuntimeError, when it closes the file.
        refusal = _os_error(error)
        reasons = {
            errno.ENOSPC: "the disk is full; free some space and run the command again",
            errno.EDQUOT: "the disk quota is used up; free some space and run the command again",
            errno.EACCES: "permission is denied; choose a folder that you may write to",
            errno.EPERM: "permission is denied; choose a folder that you may write to",
            errno.EROFS: "the file system is read-only; choose another folder",
        }
        if refusal is None or refusal.errno not in reasons:
            raise
        raise UserError(f"Cannot write {target}: {reasons[refusal.errno]}.") from error


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the OSError that ``error`` is or was raised while handling, or None."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _partial_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _old_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
