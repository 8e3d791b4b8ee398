"""Writes token files for Megatron (.bin and .idx) with a manifest of their contents; loads tokenizers."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_pvs.data.assets import asset_files, copy_asset
from nemo_pvs.data.corpus import Document
from nemo_pvs.data.token_index import count_indexed_tokens
from nemo_pvs.data.tokenizer_config import TOKENIZER_CONFIG, for_both_versions
from nemo_pvs.errors import UserError
from nemo_pvs.model.not_a_model import refuse_other_folders
from nemo_pvs.system.files import disk_errors, json_text, sha256_bytes, sha256_file, sha256_json, write_json
from nemo_pvs.system.megatron_import import import_megatron

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The files that determine the ids of a text; chat templates, for example, do not.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
_BATCH = 64  # documents per call of the Rust tokenizer


def tokenize(
    documents: Iterable[Document],
    tokenizer_folder: Path,
    prefix: Path,
    *,
    append_eos: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write ``prefix.bin``, ``prefix.idx`` and, last, the manifest ``prefix.json``; return the manifest.

    No special tokens are added except the end-of-text token after each document. Ids are stored as uint16 if the
    vocabulary allows and as int32 otherwise, as by Megatron's own preprocessing. Files of an earlier run are replaced;
    if there is a manifest, it belongs to the files next to it. Its ``source_sha256`` covers the texts in their order,
    ``bin_sha256`` the ids.

    Args:
        documents: Read once, a batch at a time, so a corpus may be larger than memory.
        tokenizer_folder: A Hugging Face folder with the tokenizer's files; nothing is downloaded.
        prefix: Path of the token files without suffix.
        append_eos: End every document with the tokenizer's end-of-text token.
        progress: Called with (documents done, total documents); the total is 0 if ``documents`` has no length.

    Raises:
        UserError: there is no tokenizer, no end-of-text token or no document, or the disk cannot be written.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    end = [end_of_text(tokenizer, tokenizer_folder)] if append_eos else []
    digest = hashlib.sha256()
    total = len(documents) if isinstance(documents, Sized) else 0
    count = 0

    def tokenized() -> Iterator[list[int]]:
        nonlocal count
        for batch in batches(documents):
            for document, ids in zip(batch, encode(tokenizer, batch), strict=True):
                digest.update(hashlib.sha256(document.text.encode()).digest())
                yield [*ids, *end]
            count += len(batch)
            if progress:
                progress(count, total)

    dtype = write_token_file(prefix, tokenized(), end_of_ids(tokenizer))
    manifest = {
        "documents": count,
        "tokens": count_tokens(prefix),
        "dtype": dtype,
        "append_eos": append_eos,
        "tokenizer_sha256": tokenizer_hash(tokenizer_folder),
        "source_sha256": digest.hexdigest(),
        "bin_sha256": sha256_file(_with_suffix(prefix, ".bin")),
    }
    write_json(_with_suffix(prefix, ".json"), manifest)
    return manifest


def write_token_file(prefix: Path, documents: Iterable[Sequence[int]], vocab: int) -> str:
    """Write ``prefix.bin`` and ``prefix.idx`` from the ids of each document; neither if anything fails.

    An earlier pair is replaced, and its manifest removed because it describes other tokens.

    Args:
        prefix: Path of the token files without suffix.
        documents: The ids of each document, read once.
        vocab: Size of the vocabulary, above all ids, which determines whether ids are stored as uint16 or int32.

    Returns:
        The name of the stored type.

    Raises:
        UserError: there are no tokens, or the disk cannot be written.
    """
    import_megatron()
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder  # takes seconds

    dtype = DType.optimal_dtype(vocab)
    partial = {suffix: prefix.with_name(f".{prefix.name}.partial{suffix}") for suffix in (".bin", ".idx")}
    try:
        with disk_errors(prefix):
            prefix.parent.mkdir(parents=True, exist_ok=True)
            builder = IndexedDatasetBuilder(str(partial[".bin"]), dtype=dtype)
            tokens = 0
            for ids in documents:
                builder.add_document(torch.tensor(ids), [len(ids)])
                tokens += len(ids)
            if not tokens:
                raise UserError(f"There are no documents to write to {prefix}.bin; check the corpus and its split.")
            builder.finalize(str(partial[".idx"]))
            _with_suffix(prefix, ".json").unlink(missing_ok=True)
            for suffix, path in partial.items():
                _flush(path)
                os.replace(path, _with_suffix(prefix, suffix))
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return str(dtype.__name__)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, never from the network and never with custom code.

    Raises:
        UserError: there is no tokenizer that transformers can read.
    """
    refuse_other_folders(folder)
    tokenizer_hash(folder)
    try:
        if for_both_versions(folder) is None:
            return _load(folder)
        with tempfile.TemporaryDirectory() as readable:
            for asset in asset_files(folder):
                copy_asset(asset, Path(readable))
            tokenizer = _load(Path(readable))
            tokenizer.name_or_path = str(folder)  # for messages
            return tokenizer
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(
            f"The tokenizer in {folder} cannot be loaded ({reason[0]}); download it again, or save it with the "
            "version of Transformers that is installed here."
        ) from error


def _load(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer  # takes seconds, and planning needs only counts

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def tokenizer_hash(folder: Path) -> str:
    """Return one SHA-256 over the files in a folder that determine the ids of a text.

    It is the same for a tokenizer saved by Transformers 5 and for our converted copy of it.

    Raises:
        UserError: the folder does not exist or has none of these files.
    """
    if not folder.exists():
        raise UserError(f"There is no tokenizer: {folder} does not exist; copy the model's tokenizer there.")
    hashes = {name: sha256_file(folder / name) for name in _TOKENIZER_FILES if (folder / name).is_file()}
    readable = for_both_versions(folder)
    if readable is not None:
        hashes[TOKENIZER_CONFIG] = sha256_bytes(json_text(readable).encode())
    if not hashes.keys() - {"special_tokens_map.json", "tokenizer_config.json", "added_tokens.json"}:
        raise UserError(f"{folder} has no tokenizer (such as tokenizer.json); copy the model's tokenizer there.")
    return sha256_json(hashes)


def count_tokens(prefix: Path) -> int:
    """Return the number of tokens in ``prefix.bin`` according to its index; works for any Megatron token file.

    Raises:
        UserError: a file is missing, the index is not Megatron's or damaged, or the two do not match.
    """
    data, index = _with_suffix(prefix, ".bin"), _with_suffix(prefix, ".idx")
    for path in (data, index):
        if not path.is_file():
            raise UserError(f"{path} does not exist; give the path of a .bin and .idx pair without the suffix.")
    return count_indexed_tokens(index, data)


def end_of_text(tokenizer: PreTrainedTokenizerBase, folder: Path) -> int:
    """Return the id that ends a document.

    Raises:
        UserError: the tokenizer does not name one.
    """
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise UserError(f"The tokenizer in {folder} names no end-of-text token; set eos_token in its config.")
    return end


def end_of_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number above all ids of a tokenizer; it has fewer tokens than that if some ids are not used."""
    return max(tokenizer.get_vocab().values()) + 1


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield documents in batches for the tokenizer."""
    remaining = iter(documents)
    while batch := list(islice(remaining, _BATCH)):
        yield batch


def encode(tokenizer: PreTrainedTokenizerBase, batch: list[Document]) -> list[list[int]]:
    """Return the ids of each document, without special tokens."""
    # verbose=False: texts may be longer than the model's context, because training divides them into sequences.
    texts = [document.text for document in batch]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    return ids


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
