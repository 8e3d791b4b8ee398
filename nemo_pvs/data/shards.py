"""Tokenises many files with many workers: in parts, resumable, then joined to one token file per split."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemo_pvs.data.corpus import input_files, report_blank, report_left_out
from nemo_pvs.data.encoder import tokenizer_json
from nemo_pvs.data.part_tokens import HASHES, IDS, LENGTHS, MANIFEST, PartWriter, Settings, start_worker, write_part
from nemo_pvs.data.parts import FilePart, divide
from nemo_pvs.data.token_files import token_file_manifest
from nemo_pvs.data.token_index import token_dtype, write_index
from nemo_pvs.data.tokenize import count_tokens, end_of_ids, end_of_text, load_tokenizer, tokenizer_hash
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import disk_errors, read_json, sha256_file, sha256_json, write_json
from nemo_pvs.system.output_paths import check_folder
from nemo_pvs.system.processes import hidden_main_module
from nemo_pvs.system.progress import console

PARTS = ".shards"
"""The folder of the parts, until they are joined."""


def tokenize_files(
    inputs: list[str],
    tokenizer_folder: Path,
    out: Path,
    shares: Mapping[str, float],
    *,
    seed: int = 0,
    text_key: str = "text",
    workers: int | None = None,
    shard: tuple[int, int] | None = None,
    part_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Write ``out/<split>.bin``, ``.idx`` and a manifest ``.json`` for each split; return the manifests.

    The files are divided into parts (``parts.divide``), each of which one worker writes atomically; an interrupted run
    continues with the missing parts. At the end they are joined in their order, so the result depends neither on the
    number of workers nor on the parts; meanwhile the tokens take up twice their disk space. Splits that already exist,
    from the same files and settings, are not written again.

    Args:
        inputs: Files, folders of them, or the built-in corpus.
        tokenizer_folder: A Hugging Face folder with the tokenizer.
        out: Folder for the token files.
        shares: Split name to share of the documents; they add up to 1.
        seed: Seed of the split.
        text_key: Key or column of the text.
        workers: Number of processes; None for one per core.
        shard: (i, n): write only the i-th of n shares of the parts, i from 1, and do not join. A call without it
            writes the parts that are still missing, and joins.
        part_bytes: Least size of a part; None for a size that depends on that of the files.
        progress: Called with (parts done, all parts).

    Returns:
        The manifest of each split; nothing if ``shard`` is given and the splits do not exist yet.

    Raises:
        UserError: an input, the tokenizer or a share is invalid, a split gets no document, or the disk is full.
    """
    _check(shares, workers, shard)
    check_folder(out)
    tokenizer = load_tokenizer(tokenizer_folder)
    end = end_of_text(tokenizer, tokenizer_folder)
    dtype = token_dtype(end_of_ids(tokenizer))
    description = tokenizer_json(tokenizer)
    settings = Settings(
        description, None if description else tokenizer, end, dtype, tuple(shares.items()), seed, text_key
    )
    report_left_out(inputs)
    files = input_files(inputs)
    made_from: dict[str, Any] = {
        "files": [_identity(file) for file in files],
        "tokenizer": tokenizer_hash(tokenizer_folder),
        "shares": dict(shares),
        "seed": seed,
        "text_key": text_key,
    }
    finished = _finished(out, shares, sha256_json(made_from))
    if finished is not None:
        if shard is None and (out / PARTS).exists():  # a kill interrupted their removal
            _remove_parts(out / PARTS, divide(files, part_bytes), made_from)
        return finished
    parts = divide(files, part_bytes)
    folders = list(_folders(out / PARTS, parts, made_from))
    _report_unused(out / PARTS, folders)
    mine = slice(None) if shard is None else slice(shard[0] - 1, None, shard[1])
    _write_parts(parts[mine], folders[mine], settings, workers or available_cores(), progress)
    if shard is not None:
        return {}
    report_blank(sum(read_json(folder / MANIFEST)["without_text"] for folder in folders))
    with disk_errors(out):
        source = _source_hash(parts, folders)
        _refuse_other_splits(out, shares, source)
        manifests = {}
        for name in shares:
            joined = _join(name, folders, out, dtype)
            manifests[name] = {
                **joined,
                "append_eos": True,
                "tokenizer_sha256": made_from["tokenizer"],
                "source_sha256": source,
                "bin_sha256": sha256_file(out / f"{name}.bin"),
                "made_from": sha256_json(made_from),
            }
            write_json(out / f"{name}.json", manifests[name])
        shutil.rmtree(out / PARTS)
    return manifests


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(shares: Mapping[str, float], workers: int | None, shard: tuple[int, int] | None) -> None:
    if not shares or min(shares.values()) <= 0 or not abs(sum(shares.values()) - 1) < 1e-6:
        given = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise UserError(f"The shares of a split must be positive and add up to 1, not: {given or 'none'}.")
    for name in shares:
        if not name or Path(name).name != name or name.startswith("."):
            raise UserError(f"The split {name!r} cannot be the name of a file; call it train or the like.")
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; give at least 1.")
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise UserError(f"--shard is {shard[0]}/{shard[1]}; the first of 16 shards is 1/16, and the last one 16/16.")


def _identity(file: Path | None) -> list[Any]:
    if file is None:
        return ["built-in"]
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns]


def _finished(out: Path, shares: Mapping[str, float], made_from: str) -> dict[str, dict[str, Any]] | None:
    """Return the manifests of existing token files from the same files and settings; None if any is missing."""
    manifests = {}
    for name in shares:
        path = out / f"{name}.json"
        manifests[name] = read_json(path) if path.is_file() else {}
        if manifests[name].get("made_from") != made_from:
            return None
        count_tokens(out / name)
    return manifests


def _refuse_other_splits(out: Path, shares: Mapping[str, float], source: str) -> None:
    """Refuse to write splits next to one of an earlier division of the same texts, which shares documents with them.

    Raises:
        UserError: naming the split.
    """
    for data in sorted(out.glob("*.bin")):
        if data.stem not in shares and token_file_manifest(data.with_suffix("")).get("source_sha256") == source:
            raise UserError(
                f"{data} is a split of the same text that --split no longer names, and its documents would be in the "
                "other splits too; remove it, or choose another --out."
            )


def _report_unused(root: Path, folders: list[Path]) -> None:
    """Print a line if there are parts and none of them is used, as when shards were written with other options."""
    present = {path for path in root.glob("*") if path.is_dir() and not path.name.startswith(".")}
    if present and present.isdisjoint(folders):
        console.print(
            f"{root} has {len(present):,} parts of other text or with another tokenizer, --split, --seed or "
            "--text-key, which are not used.",
            soft_wrap=True,
            markup=False,
        )


def _remove_parts(root: Path, parts: list[FilePart], made_from: Mapping[str, Any]) -> None:
    """Remove parts that are joined, and the folder that they are in unless it holds others."""
    for folder in _folders(root, parts, made_from):
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        root.rmdir()


def _folders(root: Path, parts: list[FilePart], made_from: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the folder of every part, named after its number and what it is made from."""
    file = -1
    for number, part in enumerate(parts):
        file += part.start == 0
        identity = {**made_from, "files": made_from["files"][file], "part": [part.start, part.end]}
        yield root / f"{number:06d}-{sha256_json(identity)[:16]}"


def _write_parts(
    parts: list[FilePart],
    folders: list[Path],
    settings: Settings,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    missing = [(part, folder) for part, folder in zip(parts, folders, strict=True) if not folder.is_dir()]
    done = len(parts) - len(missing)

    def count_one() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, len(parts))

    if progress:
        progress(done, len(parts))
    if workers == 1 or len(missing) < 2:
        writer = PartWriter(settings)
        for part, folder in missing:
            writer.write(part, folder)
            count_one()
        return
    # Spawned, because the tokenizers' threads do not survive a fork.
    pool = ProcessPoolExecutor(
        min(workers, len(missing)),
        multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(settings,),
    )
    with pool:
        with hidden_main_module():
            futures = [pool.submit(write_part, part, folder) for part, folder in missing]
        try:
            for future in as_completed(futures):
                future.result()
                count_one()
        except BrokenProcessPool:
            raise UserError(
                "A worker was killed, possibly for lack of memory; to continue, run the command again with fewer "
                "--workers."
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _source_hash(parts: list[FilePart], folders: list[Path]) -> str:
    """Return a hash of the texts in their order, which does not depend on how files are divided."""
    digests = []
    for part, folder in zip(parts, folders, strict=True):
        if part.start == 0:
            digests.append(hashlib.sha256())
        with open(folder / HASHES, "rb") as file:
            while block := file.read(1 << 20):
                digests[-1].update(block)
    return sha256_json([digest.hexdigest() for digest in digests])


def _join(name: str, folders: list[Path], out: Path, dtype: str) -> dict[str, Any]:
    """Join one split of all parts in their order; return the numbers of documents and tokens, and their type."""
    counts = [read_json(folder / MANIFEST)["documents"][name] for folder in folders]
    present = [folder for folder, count in zip(folders, counts, strict=True) if count]
    if not present:
        raise UserError(f"The split {name} got no document; give more text, or a larger share for {name}.")
    partial = out / f".{name}.partial.bin"
    try:
        with open(partial, "wb") as joined:
            for folder in present:
                with open(folder / f"{name}{IDS}", "rb") as ids:
                    shutil.copyfileobj(ids, joined)
        write_index(partial.with_suffix(".idx"), [folder / f"{name}{LENGTHS}" for folder in present], dtype)
        (out / f"{name}.json").unlink(missing_ok=True)  # it describes other tokens
        for suffix in (".bin", ".idx"):
            with open(partial.with_suffix(suffix), "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial.with_suffix(suffix), out / f"{name}{suffix}")
    finally:
        for suffix in (".bin", ".idx"):
            partial.with_suffix(suffix).unlink(missing_ok=True)
    return {"documents": sum(counts), "tokens": count_tokens(out / name), "dtype": dtype}
