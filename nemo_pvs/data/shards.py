"""Tokenises many files with many workers: one shard per file, resumable, then one token file per split."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.data.corpus import BlankFilter, input_files, read_file, report_blank, report_left_out
from nemo_pvs.data.tokenize import batches, count_tokens, encode, end_of_text, load_tokenizer, tokenizer_hash
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import disk_errors, read_json, sha256_file, sha256_json, whole_folder, write_json
from nemo_pvs.system.megatron_import import import_megatron
from nemo_pvs.system.output_paths import check_folder
from nemo_pvs.system.processes import hidden_main_module

_SHARDS = ".shards"
_MANIFEST = "shard.json"


@dataclass(frozen=True)
class _Settings:
    """The settings that determine the tokens of every shard."""

    tokenizer: str
    shares: tuple[tuple[str, float], ...]
    seed: int
    text_key: str


def split_of(text: str, shares: Mapping[str, float], seed: int) -> str:
    """Return the split of a document: that into whose share its SHA-256 with the seed falls, as a number from 0 to 1.

    So the split depends only on the text and the seed, copies of a text stay together, and workers need not
    communicate. Shares are met on average, not exactly; ``split.split_documents`` is exact, for small corpora.
    """
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    for name, share in shares.items():
        if position < share:
            return name
        position -= share
    return name


def tokenize_files(
    inputs: list[str],
    tokenizer_folder: Path,
    out: Path,
    shares: Mapping[str, float],
    *,
    seed: int = 0,
    text_key: str = "text",
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Write ``out/<split>.bin``, ``.idx`` and a manifest ``.json`` for each split; return the manifests.

    Every input file becomes a shard, written atomically by one worker; an interrupted run continues with the files
    that have no shard. At the end the shards are joined in the order of the files, so the result does not depend on
    the number of workers; meanwhile the tokens take up twice their disk space. Splits that already exist, from the
    same files and settings, are not written again.

    Args:
        inputs: Files, folders of them, or the built-in corpus.
        tokenizer_folder: A Hugging Face folder with the tokenizer.
        out: Folder for the token files.
        shares: Split name to share of the documents; they add up to 1.
        seed: Seed of the split.
        text_key: Key or column of the text.
        workers: Number of processes; at most one per file is used.
        progress: Called with (files done, total files).

    Raises:
        UserError: an input, the tokenizer or a share is invalid, a split gets no document, or the disk is full.
    """
    _check(shares, workers)
    check_folder(out)
    end_of_text(load_tokenizer(tokenizer_folder), tokenizer_folder)
    settings = _Settings(str(tokenizer_folder.resolve()), tuple(shares.items()), seed, text_key)
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
        return finished
    shards = []
    for index, identity in enumerate(made_from["files"]):
        key = sha256_json({**made_from, "files": identity})[:16]
        shards.append(out / _SHARDS / f"{index:06d}-{key}")
    _write_shards(files, shards, settings, workers, progress)
    report_blank(sum(read_json(shard / _MANIFEST).get("without_text", 0) for shard in shards))
    with disk_errors(out):
        manifests = {name: _join(name, shards, out, sha256_json(made_from), tokenizer_folder) for name in shares}
        shutil.rmtree(out / _SHARDS)
    return manifests


def _check(shares: Mapping[str, float], workers: int) -> None:
    if not shares or min(shares.values()) <= 0 or not abs(sum(shares.values()) - 1) < 1e-6:
        given = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise UserError(f"The shares of a split must be positive and add up to 1, not: {given or 'none'}.")
    if workers < 1:
        raise UserError(f"--workers is {workers}; give at least 1.")


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


def _write_shards(
    files: list[Path | None],
    shards: list[Path],
    settings: _Settings,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    missing = [(file, shard) for file, shard in zip(files, shards, strict=True) if not shard.is_dir()]
    done = len(files) - len(missing)

    def count_one() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, len(files))

    if progress:
        progress(done, len(files))
    if workers == 1 or len(missing) < 2:
        for file, shard in missing:
            _write_shard(file, shard, settings)
            count_one()
        return
    pool = ProcessPoolExecutor(
        min(workers, len(missing)), multiprocessing.get_context("spawn"), initializer=_single_threaded
    )
    with pool:
        with hidden_main_module():
            futures = [pool.submit(_write_shard, file, shard, settings) for file, shard in missing]
        try:
            for future in as_completed(futures):
                future.result()
                count_one()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _single_threaded() -> None:
    """Limit a worker to one core, because there is one worker per core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _write_shard(file: Path | None, shard: Path, settings: _Settings) -> None:
    """Tokenise one file into the folder ``shard``: a token file for every split with a document, and a manifest."""
    import_megatron()
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder  # takes seconds

    tokenizer = load_tokenizer(Path(settings.tokenizer))
    end = end_of_text(tokenizer, Path(settings.tokenizer))
    dtype = DType.optimal_dtype(len(tokenizer))
    shares = dict(settings.shares)
    builders: dict[str, Any] = {}
    documents = dict.fromkeys(shares, 0)
    digest = hashlib.sha256()
    blank = BlankFilter()
    with whole_folder(shard) as partial, ExitStack() as closing:
        for batch in batches(blank.apply(read_file(file, settings.text_key))):
            for document, ids in zip(batch, encode(tokenizer, batch), strict=True):
                digest.update(hashlib.sha256(document.text.encode()).digest())
                name = split_of(document.text, shares, settings.seed)
                if name not in builders:
                    builders[name] = IndexedDatasetBuilder(str(partial / f"{name}.bin"), dtype=dtype)
                    closing.callback(builders[name].data_file.close)
                builders[name].add_document(torch.tensor([*ids, end]), [len(ids) + 1])
                documents[name] += 1
        for name, builder in builders.items():
            builder.finalize(str(partial / f"{name}.idx"))
        manifest = {"documents": documents, "without_text": blank.count, "source_sha256": digest.hexdigest()}
        write_json(partial / _MANIFEST, manifest)


def _join(name: str, shards: list[Path], out: Path, made_from: str, tokenizer_folder: Path) -> dict[str, Any]:
    """Join one split of all shards in the order of the files; return its manifest."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    manifests = [read_json(shard / _MANIFEST) for shard in shards]
    present = [shard / name for shard, manifest in zip(shards, manifests, strict=True) if manifest["documents"][name]]
    if not present:
        raise UserError(f"The split {name} got no document; give more text, or a larger share for {name}.")
    dtype = DType.optimal_dtype(len(load_tokenizer(tokenizer_folder)))
    partial = out / f".{name}.partial.bin"
    builder = IndexedDatasetBuilder(str(partial), dtype=dtype)
    gc.freeze()  # Megatron collects garbage after every shard, which takes seconds if it visits all imported objects
    try:
        for prefix in present:
            builder.add_index(str(prefix))
    finally:
        gc.unfreeze()
    builder.finalize(str(partial.with_suffix(".idx")))
    (out / f"{name}.json").unlink(missing_ok=True)  # it describes other tokens
    for suffix in (".bin", ".idx"):
        with open(partial.with_suffix(suffix), "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial.with_suffix(suffix), out / f"{name}{suffix}")
    manifest = {
        "documents": sum(manifest["documents"][name] for manifest in manifests),
        "tokens": count_tokens(out / name),
        "dtype": str(dtype.__name__),
        "append_eos": True,
        "tokenizer_sha256": tokenizer_hash(tokenizer_folder),
        "source_sha256": sha256_json([manifest["source_sha256"] for manifest in manifests]),
        "bin_sha256": sha256_file(out / f"{name}.bin"),
        "made_from": made_from,
    }
    write_json(out / f"{name}.json", manifest)
    return manifest
