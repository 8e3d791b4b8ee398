"""TrainingJob: one training run as plain data, written by the pipeline and read by the ranks. Imports no NeMo."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_pvs.data.sample_index import index_text
from nemo_pvs.model.shape import Shape
from nemo_pvs.recipe.efficient import PruningAware
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.sheared import MaskLearning
from nemo_pvs.recipe.training import Training
from nemo_pvs.system.files import read_json, write_json

JOB_FILE = "job.json"
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "log.txt"
MASKS_FILE = "masks.safetensors"
CHECKPOINTS = Path("nemo") / "checkpoints"
"""Inside the folder that NeMo itself cleans up when it resumes."""


@dataclass(frozen=True)
class LearnedMasks:
    """Masks that a run learns together with the weights (Sheared LLaMA, 2310.06694)."""

    target: Shape
    """Shape of the model that the masks keep."""
    how: MaskLearning

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return {"target": self.target.to_dict(), "how": self.how.model_dump()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LearnedMasks:
        """Undo ``to_json``."""
        return cls(Shape.from_dict(values["target"]), MaskLearning.model_validate(values["how"]))


@dataclass(frozen=True)
class CarriedState:
    """Source of a run's initial optimizer state: the training before the pruning."""

    checkpoints: Path
    """Checkpoint folder of that training."""
    plan: Path | None
    """The pruning plan; None if nothing was removed."""

    def to_json(self) -> dict[str, Any]:
        """Return the paths as plain data."""
        return {"checkpoints": str(self.checkpoints), "plan": self.plan and str(self.plan)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> CarriedState:
        """Undo ``to_json``."""
        return cls(Path(values["checkpoints"]), Path(values["plan"]) if values["plan"] else None)


@dataclass(frozen=True)
class Loading:
    """State in which a run with several domains begins; ``training.dynamic_loading`` controls how it changes."""

    shares: dict[str, float]
    """Initial share of each domain, by name."""
    samples: dict[str, int]
    """Number of samples of each domain that were read before."""

    @classmethod
    def at_the_start(cls, training: Training) -> Loading | None:
        """Return the state that the recipe sets for a first run; None without domains."""
        how = training.dynamic_loading
        if how is None:
            return None
        return cls(how.shares, dict.fromkeys(how.shares, 0))


@dataclass(frozen=True)
class TrainingJob:
    """Everything that the ranks of one run need to know."""

    name: str
    """Name of the run in progress bars and messages."""
    folder: Path
    """Folder for checkpoints, metrics and the log, from which an interrupted run is resumed."""
    initial: Path
    """NeMo checkpoint with the initial weights, pruned or random; it also determines the architecture."""
    data: dict[str, Any]
    """Megatron .bin/.idx prefixes of ``train`` (one, a list, or a list of alternating weights and prefixes) and
    ``validation``, which holds exactly the fixed windows; both by domain for a run with ``loading``."""
    layout: Parallelism
    training: Training
    first_token: int = 0
    """First token to read, counted in training order; a multiple of the sequence length."""
    first_step: int = 0
    """Steps of earlier jobs that this one continues, for the learning-rate schedule."""
    all_steps: int | None = None
    """Length of the learning-rate schedule in steps, if longer than this job."""
    teacher: Path | None = None
    """Checkpoint of the teacher, of any format, for ``training.distill``."""
    cache: Path | None = None
    """Folder of a teacher cache, from which its answers are read."""
    pruning: PruningAware | None = None
    """Options of a run that prunes while training."""
    masks: LearnedMasks | None = None
    """Options of a run that learns masks; its initial checkpoint is the model to mask."""
    carried: CarriedState | None = None
    """Source of the optimizer state if the run starts with that of another, which has taken ``first_step`` steps."""
    loading: Loading | None = None
    """Initial state of a run whose text is in domains; ``first_token`` is ignored then."""
    keep: tuple[int, ...] = ()
    """Steps after which a checkpoint is saved and kept, besides the newest ones."""

    @property
    def file(self) -> Path:
        """File of this job, from which its ranks read it."""
        return self.folder / JOB_FILE

    @property
    def metrics(self) -> Path:
        """Metrics file, with one JSON object per line and step."""
        return self.folder / METRICS_FILE

    @property
    def log(self) -> Path:
        """Log file, with everything that NeMo and Megatron print."""
        return self.folder / LOG_FILE

    @property
    def index(self) -> Path:
        """The folder of Megatron's index of the text, which all jobs of a run share, as they share the validation."""
        windows = self.data["validation"]
        return Path(windows if isinstance(windows, str) else next(iter(windows.values()))).parent / "index"

    @property
    def masks_file(self) -> Path:
        """File of the learned masks, written at the end of the run."""
        return self.folder / MASKS_FILE

    @property
    def checkpoints(self) -> Path:
        """The folder of NeMo checkpoints."""
        return self.folder / CHECKPOINTS

    def build_index(self) -> None:
        """Build the index of the text unless it is there, so that ranks need not wait while the first builds it."""
        train = self.data["train"]
        texts = train.values() if isinstance(train, dict) else [train]
        length = self.training.sequence_length
        samples = self.first_token // length + self.training.steps * self.training.global_batch_size
        for text in texts:
            index_text(text, self.index, sequence_length=length, seed=self.training.order_seed, samples=samples)

    def save(self) -> Path:
        """Write the job into its folder and return the file's path."""
        write_json(self.file, self.to_json())
        return self.file

    def to_json(self) -> dict[str, Any]:
        """Return the job as plain data; without ``cache`` and ``keep`` if not used, as ``tests/unchanged`` has it."""
        values = asdict(self)
        del values["cache"], values["keep"]
        return {
            **values,
            "folder": str(self.folder),
            "initial": str(self.initial),
            "layout": self.layout.model_dump(),
            "training": self.training.model_dump(),
            "teacher": self.teacher and str(self.teacher),
            **({"cache": str(self.cache)} if self.cache else {}),
            **({"keep": list(self.keep)} if self.keep else {}),
            "pruning": self.pruning and self.pruning.model_dump(),
            "masks": self.masks and self.masks.to_json(),
            "carried": self.carried and self.carried.to_json(),
        }

    @classmethod
    def load(cls, path: Path) -> TrainingJob:
        """Read a job that ``save`` wrote."""
        values = read_json(path)
        return cls(
            name=values["name"],
            folder=Path(values["folder"]),
            initial=Path(values["initial"]),
            data=values["data"],
            layout=Parallelism.model_validate(values["layout"]),
            training=Training.model_validate(values["training"]),
            first_token=values.get("first_token", 0),
            first_step=values.get("first_step", 0),
            all_steps=values.get("all_steps"),
            teacher=Path(values["teacher"]) if values.get("teacher") else None,
            cache=Path(values["cache"]) if values.get("cache") else None,
            pruning=PruningAware.model_validate(values["pruning"]) if values.get("pruning") else None,
            masks=LearnedMasks.from_json(values["masks"]) if values.get("masks") else None,
            carried=CarriedState.from_json(values["carried"]) if values.get("carried") else None,
            loading=Loading(**values["loading"]) if values.get("loading") else None,
            keep=tuple(values.get("keep", ())),
        )
