"""A teacher's answers on disk: for every token of a range of samples, its k largest log-probabilities.

A cache is a folder of shards, each a safetensors file with the answers to consecutive samples, and ``cache.json``,
which says what was answered, by whom and with what. Shards depend neither on the number of ranks that write them nor
on how these split the model, and each appears whole or not at all; so an interrupted cache is completed by writing the
shards that are missing, in any layout. Every sample has a checksum, which is verified whenever the sample is read.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nemo_pvs.errors import UserError
from nemo_pvs.system.files import read_json, remove_partial_files, write_bytes, write_json

CACHE_FILE = "cache.json"
CachePrecision = Literal["fp16", "fp32"]
_DTYPES = {"fp16": np.float16, "fp32": np.float32}
_IDS, _LOGPROBS, _REST, _CRC = "ids", "logprobs", "rest", "crc32"

_SHARD_BYTES = 1 << 28
"""Maximum size of a shard that holds more than one sample."""
_SAMPLES_MEASURED = 256
_FEWEST_SHARDS = 16
"""Number of shards of a short cache, so that several ranks have something to do and a kill loses little."""


class Answers(NamedTuple):
    """A teacher's answers for s positions: what it expects as the next token."""

    ids: npt.NDArray[Any]
    """Its k most likely tokens [..., s, k], the most likely first."""
    logprobs: npt.NDArray[Any]
    """Their log-probabilities at temperature 1, in nats [..., s, k]."""
    rest: npt.NDArray[Any]
    """Logarithm of the total probability of all other tokens [..., s]; -inf if k is the whole vocabulary."""


@dataclass(frozen=True)
class CacheContent:
    """What a cache holds: answers of a teacher to samples of a text in training order."""

    teacher: str
    """Fingerprint of the teacher's weights."""
    tokenizer: str
    """Hash of its tokenizer (``tokenize.tokenizer_hash``)."""
    data: str
    """Hash of the token file (``token_files.token_file_hash``)."""
    seed: int
    """Seed of the order of samples."""
    sequence_length: int
    first: int
    """First sample, in training order."""
    end: int
    """One past the last sample."""
    vocab: int
    """Size of the vocabulary."""
    top_k: int
    """Number of tokens kept for each position; at most ``vocab``."""
    precision: CachePrecision = "fp16"
    """Type of the log-probabilities."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes for one position: ids of 2 or 4 bytes, log-probabilities, the rest, and its part of the checksum."""
        return bytes_per_token(self.vocab, self.top_k, self.precision) + 4 / self.sequence_length

    @property
    def tokens(self) -> int:
        """Number of positions."""
        return (self.end - self.first) * self.sequence_length

    @property
    def samples_per_shard(self) -> int:
        """Number of samples in every shard but the last."""
        fit = int(_SHARD_BYTES / (self.bytes_per_token * self.sequence_length))
        return max(1, min(fit, (self.end - self.first) // _FEWEST_SHARDS))

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-(self.end - self.first) // self.samples_per_shard)

    def shard_samples(self, shard: int) -> range:
        """Return the samples of a shard."""
        begin = self.first + shard * self.samples_per_shard
        return range(begin, min(begin + self.samples_per_shard, self.end))


def bytes_per_token(vocab: int, top_k: int, precision: CachePrecision) -> int:
    """Return the bytes that a cache takes for one position, without checksums and headers."""
    value = np.dtype(_DTYPES[precision]).itemsize
    return top_k * (_id_type(vocab).itemsize + value) + value


class TeacherCache:
    """A cache on disk, complete or not."""

    def __init__(self, folder: Path, content: CacheContent) -> None:
        """Describe a cache without touching the disk; ``begin`` and ``open`` return those on disk."""
        self.folder = folder
        self.content = content
        self._shard = -1
        self._file: Any = None

    @classmethod
    def begin(cls, folder: Path, content: CacheContent) -> TeacherCache:
        """Return the cache in a folder, begun now or by an earlier attempt.

        Raises:
            UserError: the folder holds another cache or other tensors, or cannot be written.
        """
        if (folder / CACHE_FILE).exists():
            cls._described(folder).check_equal(content)
            remove_partial_files(folder)
        else:
            if tensors := sorted(folder.glob("*.safetensors")):  # they could pass for shards
                raise UserError(
                    f"{folder} has {tensors[0].name} but no {CACHE_FILE} that says what is in it; choose another "
                    "folder, or remove it."
                )
            write_json(folder / CACHE_FILE, asdict(content))
        return cls(folder, content)

    @classmethod
    def open(cls, folder: Path) -> TeacherCache:
        """Return a complete cache.

        Raises:
            UserError: there is none in the folder, or shards are missing.
        """
        if not (folder / CACHE_FILE).is_file():
            raise UserError(f"{folder} is not a teacher cache, as it has no {CACHE_FILE}; make one with pvs teach.")
        cache = cls._described(folder)
        if missing := len(cache.missing()):
            raise UserError(
                f"The teacher cache {folder} lacks {missing:,} of {cache.content.shards:,} shards; run the command "
                "that began it again, which writes the missing ones."
            )
        return cache

    @classmethod
    def _described(cls, folder: Path) -> TeacherCache:
        path = folder / CACHE_FILE
        try:
            content = CacheContent(**read_json(path))
        except TypeError:
            raise UserError(f"{path} does not describe a teacher cache; make a new cache with pvs teach.") from None
        return cls(folder, content)

    def missing(self) -> list[int]:
        """Return the shards that have not been written."""
        present = {path.name for path in self.folder.glob("*.safetensors")}
        return [shard for shard in range(self.content.shards) if self._path(shard).name not in present]

    @property
    def tokens_done(self) -> int:
        """Number of positions in the shards that have been written."""
        left = sum(len(self.content.shard_samples(shard)) for shard in self.missing())
        return self.content.tokens - left * self.content.sequence_length

    def check_equal(self, wanted: CacheContent) -> None:
        """Refuse to continue this cache as another one.

        Raises:
            UserError: naming the first difference.
        """
        for name, value in asdict(wanted).items():
            have = getattr(self.content, name)
            if have != value:
                raise UserError(
                    f"{self.folder} holds a teacher cache made {_with(name, have, value)}; choose another folder, or "
                    "remove it."
                )

    def check_serves(self, wanted: CacheContent) -> None:
        """Refuse a training that this cache has no answers for; it may read part of the samples and fewer tokens.

        Args:
            wanted: The teacher, text, order and samples of the training, and how many tokens its loss needs.

        Raises:
            UserError: naming the first thing that differs.
        """
        have = self.content
        for name in ("teacher", "tokenizer", "data", "seed", "sequence_length", "vocab"):
            theirs, ours = getattr(have, name), getattr(wanted, name)
            if theirs != ours:
                raise UserError(
                    f"The teacher cache {self.folder} was made {_with(name, theirs, ours)}; make one for this "
                    "training with pvs teach."
                )
        if not have.first <= wanted.first <= wanted.end <= have.end:
            covered, read = (
                f"{sequences.first * have.sequence_length:,} to {sequences.end * have.sequence_length:,}"
                for sequences in (have, wanted)
            )
            raise UserError(
                f"The teacher cache {self.folder} covers the tokens {covered} of the training order, but this "
                f"training reads {read}; make one for these with pvs teach."
            )
        if wanted.top_k > have.top_k:
            raise UserError(
                f"The teacher cache {self.folder} keeps {have.top_k} tokens, fewer than top_k {wanted.top_k}; lower "
                "top_k, or make another cache with pvs teach."
            )

    def write(self, shard: int, answers: Sequence[Answers]) -> None:
        """Write a shard, with one entry of ``answers`` per sample, each with arrays [s, k], [s, k] and [s].

        Raises:
            UserError: an answer is not a number, or the disk is full or cannot be written.
        """
        content, value = self.content, _DTYPES[self.content.precision]
        assert len(answers) == len(content.shard_samples(shard))
        arrays = {
            _IDS: np.stack([sample.ids for sample in answers]).astype(_id_type(content.vocab)),
            _LOGPROBS: np.stack([sample.logprobs for sample in answers]).astype(value),
            _REST: np.stack([sample.rest for sample in answers]).astype(value),
        }
        if any(np.isnan(arrays[name]).any() for name in (_LOGPROBS, _REST)):
            raise UserError(
                f"The teacher's answers to samples {content.shard_samples(shard)[0]:,} and later are not numbers; is "
                "its checkpoint damaged?"
            )
        rows = (Answers(*row) for row in zip(*arrays.values(), strict=True))
        arrays[_CRC] = np.array([_checksum(row) for row in rows], dtype=np.uint32)
        write_bytes(self._path(shard), save(arrays))

    def read(self, sample: int) -> Answers:
        """Return the answers for one sample, given by its number in training order.

        Raises:
            UserError: the sample differs from its checksum, or its shard is missing or not one.
        """
        shard, row = divmod(sample - self.content.first, self.content.samples_per_shard)
        damaged = UserError(
            f"{self._path(shard)} is damaged at sample {sample:,}; remove this file and run the command that made the "
            "cache again, which writes only what is missing."
        )
        try:
            if shard != self._shard:
                self._shard, self._file = -1, safe_open(self._path(shard), framework="numpy")
                self._shard = shard
            answers = Answers(*(self._file.get_slice(name)[row] for name in (_IDS, _LOGPROBS, _REST)))
            checksum = int(self._file.get_slice(_CRC)[row])
        except (SafetensorError, OSError, IndexError):
            raise damaged from None
        if checksum != _checksum(answers):
            raise damaged
        return answers

    def kept_probability(self) -> float:
        """Return how probable the kept tokens are together, according to the teacher, on average over positions.

        A student learns nothing about how the rest is divided among the other tokens. Of a large cache only 256
        samples are read, at equal distances.

        Raises:
            UserError: as ``read``.
        """
        first, end = self.content.first, self.content.end
        chosen = np.unique(np.linspace(first, end - 1, min(end - first, _SAMPLES_MEASURED)).astype(int))
        left_out = [np.exp(self.read(int(sample)).rest.astype(np.float64)).mean() for sample in chosen]
        return 1 - float(np.mean(left_out))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process, which opens files itself."""
        return {**vars(self), "_shard": -1, "_file": None}

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06}.safetensors"


def _id_type(vocab: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocab <= 1 << 16 else np.uint32)


def _checksum(answers: Answers) -> int:
    crc = 0
    for array in answers:
        crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return crc


def _with(name: str, theirs: Any, ours: Any) -> str:
    """Return how a cache was made, in contrast to what is needed."""
    words = {
        "teacher": "from another teacher",
        "tokenizer": "with another tokenizer",
        "data": "from other data",
        "first": f"from sample {theirs:,}, not {ours:,}" if isinstance(ours, int) else "",
        "end": f"up to sample {theirs:,}, not {ours:,}" if isinstance(ours, int) else "",
    }
    return words.get(name) or f"with {name.replace('_', ' ')} {theirs}, not {ours}"
