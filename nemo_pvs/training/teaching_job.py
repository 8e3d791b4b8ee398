"""TeachingJob: a teacher's forward pass over a range of samples as plain data, read by its ranks. Imports no NeMo."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_pvs.data.sample_index import index_text
from nemo_pvs.data.teacher_cache import CacheContent, CachePrecision, TeacherCache
from nemo_pvs.errors import UserError
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.system.files import read_json, write_json
from nemo_pvs.training.job import JOB_FILE, LOG_FILE, TrainingJob

_KIND = "teaching"


@dataclass(frozen=True)
class TeachingJob:
    """Everything that the ranks that write a teacher cache need to know."""

    name: str
    """Name in progress bars and messages."""
    folder: Path
    """Folder of the cache, in which an interrupted job continues."""
    teacher: Path
    """Checkpoint of the teacher, of any format."""
    text: str
    """Megatron .bin/.idx prefix of the training text."""
    index: Path
    """Folder of Megatron's index of the text."""
    content: CacheContent
    layout: Parallelism
    """TP x PP x DP; replicas write different shards."""
    micro_batch_size: int
    """Sequences per forward pass of a replica."""
    precision: str = "auto"
    """Arithmetic of the teacher, as in ``Training``."""

    @property
    def file(self) -> Path:
        """File of this job, from which its ranks read it."""
        return self.folder / JOB_FILE

    @property
    def log(self) -> Path:
        """Log file, with everything that NeMo and Megatron print."""
        return self.folder / LOG_FILE

    @property
    def cache(self) -> TeacherCache:
        """The cache, complete or not."""
        return TeacherCache(self.folder, self.content)

    @property
    def is_finished(self) -> bool:
        """Whether the cache is complete."""
        return not self.cache.missing()

    def build_index(self) -> None:
        """Build the index of the text unless it is there, so that ranks need not wait while the first builds it."""
        content = self.content
        index_text(
            self.text, self.index, sequence_length=content.sequence_length, seed=content.seed, samples=content.end
        )

    def save(self) -> Path:
        """Begin the cache, unless it is begun; write the job into its folder, and return the file's path.

        Raises:
            UserError: the folder holds another cache, or answers in another precision.
        """
        cache = TeacherCache.begin(self.folder, self.content)
        begun = read_json(self.file).get("precision") if self.file.exists() else self.precision
        if begun != self.precision and cache.tokens_done:
            raise UserError(
                f"{self.folder} holds answers that the teacher computed in precision {begun}, not {self.precision}; "
                "choose another folder, or remove it."
            )
        write_json(self.file, self.to_json())
        return self.file

    def to_json(self) -> dict[str, Any]:
        """Return the job as plain data."""
        paths = {name: str(getattr(self, name)) for name in ("folder", "teacher", "index")}
        return {"kind": _KIND, **asdict(self), **paths, "layout": self.layout.model_dump()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TeachingJob:
        """Undo ``to_json``."""
        return cls(
            name=values["name"],
            folder=Path(values["folder"]),
            teacher=Path(values["teacher"]),
            text=values["text"],
            index=Path(values["index"]),
            content=CacheContent(**values["content"]),
            layout=Parallelism.model_validate(values["layout"]),
            micro_batch_size=values["micro_batch_size"],
            precision=values["precision"],
        )


Job = TrainingJob | TeachingJob
"""What a launcher runs."""


def load_job(path: Path) -> Job:
    """Read a job of either kind that ``save`` wrote."""
    values = read_json(path)
    return TeachingJob.from_json(values) if values.get("kind") == _KIND else TrainingJob.load(path)


def content_for(
    training: Training,
    first_token: int,
    end_token: int,
    *,
    teacher: str,
    tokenizer: str,
    data: str,
    vocab: int,
    top_k: int,
    precision: CachePrecision = "fp16",
) -> CacheContent:
    """Return the content of a cache for training runs with these settings.

    Args:
        training: Settings of the runs, which give the order of the samples.
        first_token: First token, in training order; a multiple of the sequence length.
        end_token: One past the last token, likewise.
        teacher: Fingerprint of the teacher's weights.
        tokenizer: Hash of its tokenizer.
        data: Hash of the token file.
        vocab: Size of the vocabulary.
        top_k: Number of tokens for each position; of a small vocabulary all.
        precision: Type of the log-probabilities.
    """
    return CacheContent(
        teacher=str(teacher),
        tokenizer=tokenizer,
        data=data,
        seed=training.order_seed,
        sequence_length=training.sequence_length,
        first=first_token // training.sequence_length,
        end=end_token // training.sequence_length,
        vocab=vocab,
        top_k=min(top_k, vocab),
        precision=precision,
    )
