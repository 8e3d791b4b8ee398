"""Token sets: the exact windows of tokens for calibration, depth scans and evaluation, with their origin."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from nemo_pvs.data.token_files import token_file_manifest
from nemo_pvs.data.tokenize import count_tokens
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import sha256_bytes, sha256_file
from nemo_pvs.system.megatron_import import import_megatron

Windows = Literal["packed", "documents"]
"""How windows are cut from a text. packed: from all documents joined, so that a window may begin and end in the middle
of documents and hold several; documents: each from one document, those that are shorter than a window left out."""


@dataclass(frozen=True)
class TokenSet:
    """Token windows of one length, without padding."""

    ids: torch.Tensor
    """int32 [N, S]: N sequences (samples) of S tokens."""
    manifest: dict[str, Any]
    """Origin of the windows: data_set, source_sha256, tokenizer_sha256, samples, sequence_length, seed and ids_sha256.
    ``seed`` is None for consecutive windows."""

    @classmethod
    def from_stream(
        cls,
        stream: Sequence[int] | npt.NDArray[Any],
        *,
        sequence_length: int,
        samples: int | None = None,
        seed: int | None = None,
        data_set: str = "unnamed",
        source_sha256: str | None = None,
        tokenizer_sha256: str | None = None,
        documents: Sequence[int] | npt.NDArray[Any] | None = None,
    ) -> TokenSet:
        """Cut windows from one long stream of token ids.

        Without a seed, windows are consecutive from the start of the stream, and a remainder is dropped (the loader of
        Minitron in llm-pruning-collection). With a seed, each window starts at ``randint(0, len - S - 1)`` of Python's
        ``random.Random(seed)``, so windows may overlap (the WikiText-2 loader of FLAP and SparseGPT).

        Args:
            stream: Token ids of the concatenated documents.
            sequence_length: Tokens per window (S), at least 2.
            samples: Number of windows (N); None takes every consecutive window.
            seed: Seed of random windows; None for consecutive ones.
            data_set: Name of the text for the manifest.
            source_sha256: Hash of the text.
            tokenizer_sha256: Hash of the tokenizer's files.
            documents: The number of tokens of each document; given, each window is cut from one document. Without a
                seed, these are the first tokens of each document that is long enough; with one, each window is drawn
                from a document drawn from those.

        Raises:
            UserError: the stream is too short for the number of windows, or a number is invalid.
        """
        ids = np.asarray(stream)
        if documents is not None:
            check_window_size(samples, sequence_length)
            starts = _starts_in_documents(np.asarray(documents), sequence_length, samples, seed, data_set)
            return cls.from_windows(
                [ids[start : start + sequence_length] for start in starts],
                data_set=data_set,
                source_sha256=source_sha256,
                tokenizer_sha256=tokenizer_sha256,
                seed=seed,
                windows="documents",
            )
        check_length(len(ids), sequence_length=sequence_length, samples=samples, seed=seed, data_set=data_set)
        if seed is None:
            starts = [window * sequence_length for window in range(samples or len(ids) // sequence_length)]
        else:
            generator = random.Random(seed)
            starts = [generator.randint(0, len(ids) - sequence_length - 1) for _ in range(samples or 0)]
        return cls.from_windows(
            [ids[start : start + sequence_length] for start in starts],
            data_set=data_set,
            source_sha256=source_sha256,
            tokenizer_sha256=tokenizer_sha256,
            seed=seed,
        )

    @classmethod
    def from_windows(
        cls,
        sequences: Sequence[Sequence[int] | npt.NDArray[Any]],
        *,
        data_set: str,
        source_sha256: str | None,
        tokenizer_sha256: str | None,
        seed: int | None,
        **more: Any,
    ) -> TokenSet:
        """Build a token set from windows of equal length and record their origin.

        Args:
            sequences: N windows of S token ids.
            data_set: Name of the text.
            source_sha256: Hash of the text.
            tokenizer_sha256: Hash of the tokenizer's files.
            seed: Seed of random windows; None for others.
            **more: Additional entries of the manifest.
        """
        ids = np.stack([np.asarray(sequence) for sequence in sequences]).astype(np.int32)
        return cls(
            torch.from_numpy(ids),
            {
                "data_set": data_set,
                "source_sha256": source_sha256,
                "tokenizer_sha256": tokenizer_sha256,
                "samples": ids.shape[0],
                "sequence_length": ids.shape[1],
                "seed": seed,
                "ids_sha256": sha256_bytes(ids.tobytes()),
                **more,
            },
        )

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[str],
        tokenize: Callable[[str], Sequence[int]],
        *,
        separator: str = "\n\n",
        windows: Windows = "packed",
        characters_at_once: int | None = None,
        **settings: Any,
    ) -> TokenSet:
        """Join texts, tokenise them, and cut windows as ``from_stream`` does with ``settings``.

        Args:
            documents: The texts.
            tokenize: Turns the joined text into ids, with its default special tokens.
            separator: Inserted between the texts: two line breaks for WikiText's sets, a space for C4, as in
                llm-pruning-collection.
            windows: With ``documents``, texts are tokenised one by one, and each window is cut from one.
            characters_at_once: Tokenise the joined text in pieces of whole texts, each of at least this many
                characters; None tokenises it as a whole. A tokenizer needs about 140 bytes for each character.
            **settings: ``sequence_length``, ``samples``, ``seed``, ``data_set``, ``tokenizer_sha256``.

        Raises:
            UserError: as ``from_stream``.
        """
        at_once = 0 if windows == "documents" else characters_at_once
        digest = hashlib.sha256()
        streams: list[npt.NDArray[np.int32]] = []
        for piece in _pieces(documents, separator, at_once):
            digest.update(piece.encode())
            text = piece.removeprefix(separator) if windows == "documents" and streams else piece
            streams.append(np.asarray(tokenize(text), np.int32))
        if windows == "documents":
            settings["documents"] = [len(one) for one in streams]
        stream = np.concatenate(streams) if streams else np.zeros(0, np.int32)
        return cls.from_stream(stream, source_sha256=digest.hexdigest(), **settings)

    @classmethod
    def from_token_file(cls, prefix: Path, *, windows: Windows = "packed", **settings: Any) -> TokenSet:
        """Cut windows from Megatron's ``prefix.bin`` as ``from_stream`` does with ``settings``.

        The hashes of tokenizer and tokens are taken from the manifest ``prefix.json`` if ``nemo_pvs.data.tokenize``
        wrote one: reading terabytes for a hash takes hours.

        Raises:
            UserError: as ``from_stream`` and ``read_token_file``.
        """
        stream = read_token_file(prefix)
        known = token_file_manifest(prefix)
        settings = {"data_set": prefix.name, "tokenizer_sha256": known.get("tokenizer_sha256"), **settings}
        if windows == "documents":
            settings["documents"] = document_lengths(prefix)
        source_sha256 = known.get("bin_sha256") or sha256_file(prefix.with_name(prefix.name + ".bin"))
        return cls.from_stream(stream, source_sha256=source_sha256, **settings)


def _pieces(texts: Iterable[str], separator: str, at_once: int | None) -> Iterator[str]:
    """Yield the joined texts in pieces of whole texts with at least ``at_once`` characters; None yields one piece.

    Pieces add up to the joined text: each but the first begins with the separator.
    """
    piece: list[str] = []
    length, begin = 0, ""
    for text in texts:
        piece.append(text)
        length += len(text)
        if at_once is not None and length >= at_once:
            yield begin + separator.join(piece)
            piece, length, begin = [], 0, separator
    if piece:
        yield begin + separator.join(piece)


def _starts_in_documents(
    lengths: npt.NDArray[Any], sequence_length: int, samples: int | None, seed: int | None, data_set: str
) -> list[int]:
    """Return where windows begin of which each is within a document; see ``TokenSet.from_stream``."""
    check_documents(lengths, sequence_length=sequence_length, samples=samples, seed=seed, data_set=data_set)
    begins = np.cumsum(lengths) - lengths
    long = np.flatnonzero(lengths >= sequence_length)
    if seed is None:
        return [int(begins[index]) for index in long[:samples]]
    generator = random.Random(seed)
    starts = []
    for _ in range(samples or 0):
        drawn = long[generator.randint(0, len(long) - 1)]
        starts.append(int(begins[drawn]) + generator.randint(0, int(lengths[drawn]) - sequence_length))
    return starts


def check_documents(
    lengths: npt.NDArray[Any], *, sequence_length: int, samples: int | None, seed: int | None, data_set: str
) -> None:
    """Check that enough documents are long enough for windows of which each is within one.

    Raises:
        UserError: they are not.
    """
    if seed is not None and samples is None:
        raise UserError("Random windows need a number of samples; give it, or leave out the seed.")
    long = int((lengths >= sequence_length).sum())
    wanted = samples if seed is None and samples else 1
    if long < wanted:
        raise UserError(
            f"{long} of the {len(lengths)} documents of {data_set} have {sequence_length} tokens or more, but "
            f"{wanted} must; choose a shorter sequence_length, or packed windows."
        )


def document_lengths(prefix: Path) -> npt.NDArray[Any]:
    """Return the number of tokens of every document of Megatron's ``prefix.bin`` / ``prefix.idx``.

    Raises:
        UserError: a file is missing, or the two do not belong together.
    """
    count_tokens(prefix)
    import_megatron()
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # takes seconds and is needed only here

    dataset = IndexedDataset(str(prefix))
    ends = np.concatenate([[0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)])[dataset.document_indices]
    return np.diff(ends)


def check_length(
    tokens: int, *, sequence_length: int, samples: int | None = None, seed: int | None = None, data_set: str
) -> None:
    """Check that a stream of ``tokens`` is long enough for the windows that ``TokenSet.from_stream`` is to cut.

    Raises:
        UserError: the stream is too short, or a number is invalid.
    """
    check_window_size(samples, sequence_length)
    if seed is not None and samples is None:
        raise UserError("Random windows need a number of samples; give it, or leave out the seed.")
    available = tokens // sequence_length if seed is None else max(0, tokens - sequence_length)
    if available < (samples if seed is None and samples else 1):
        raise UserError(
            f"The data set {data_set} has {tokens} tokens, too few for {samples or 1} "
            f"{'consecutive' if seed is None else 'random'} windows of {sequence_length}; "
            "use more text, fewer samples or a shorter sequence_length."
        )


def check_window_size(samples: int | None, sequence_length: int) -> None:
    """Raise UserError unless there is at least one window and a window has at least two tokens."""
    if sequence_length < 2 or (samples is not None and samples < 1):
        raise UserError(
            f"{samples} samples of {sequence_length} tokens predict nothing; "
            "choose at least 1 sample and a sequence_length of at least 2."
        )


def read_token_file(prefix: Path) -> npt.NDArray[Any]:
    """Return all ids of Megatron's ``prefix.bin`` / ``prefix.idx`` in order, memory-mapped.

    Raises:
        UserError: a file is missing, or the two do not belong together.
    """
    if not count_tokens(prefix):
        raise UserError(f"{prefix}.bin contains no tokens; tokenise some text into it.")
    import_megatron()
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # takes seconds and is needed only here

    dtype = IndexedDataset(str(prefix)).index.dtype
    return np.memmap(prefix.with_name(prefix.name + ".bin"), dtype=dtype, mode="r")
