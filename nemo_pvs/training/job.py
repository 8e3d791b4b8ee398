"""TrainingJob: one training run as plain data, written by the pipeline and read by the ranks. Imports no NeMo."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
"""Inside the folder that NeMo tidies up itself when it resumes."""


@dataclass(frozen=True)
class LearnedMasks:
    """What a run learns beside its weights."""

    target: Shape
    """What the masks are to leave of the model."""
    how: MaskLearning

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"target": self.target.to_dict(), "how": self.how.model_dump()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LearnedMasks:
        """Undo ``to_json``."""
        return cls(Shape.from_dict(values["target"]), MaskLearning.model_validate(values["how"]))


@dataclass(frozen=True)
class CarriedState:
    """Where a run takes its optimizer's first state from: the training that came before a pruning."""

    checkpoints: Path
    """Folder of checkpoints of that training."""
    plan: Path | None
    """The plan of the pruning; None where nothing was removed."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"checkpoints": str(self.checkpoints), "plan": self.plan and str(self.plan)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> CarriedState:
        """Undo ``to_json``."""
        return cls(Path(values["checkpoints"]), Path(values["plan"]) if values["plan"] else None)


@dataclass(frozen=True)
class Loading:
    """Where a run that reads domains begins; ``training.dynamic_loading`` says how it goes on."""

    shares: dict[str, float]
    """Of the domains, by name."""
    samples: dict[str, int]
    """Samples of each domain that were read before."""

    @classmethod
    def at_the_start(cls, training: Training) -> Loading | None:
        """Return where a training begins by the recipe alone; None for one text."""
        how = training.dynamic_loading
        if how is None:
            return None
        return cls(how.shares, dict.fromkeys(how.shares, 0))


@dataclass(frozen=True)
class TrainingJob:
    """Everything that the ranks of one run need to know."""

    name: str
    """What progress and messages call the run."""
    folder: Path
    """Where checkpoints, metrics and the log go; also where an interrupted run is resumed from."""
    initial: Path
    """NeMo checkpoint with the initial weights: pruned, or drawn at random. Fixes the architecture too."""
    data: dict[str, Any]
    """Megatron .bin/.idx prefixes of ``train`` (one, a list, or a list of weights and prefixes by turns) and
    ``validation``, which holds exactly the fixed windows; both by domain for a run with ``loading``."""
    layout: Parallelism
    training: Training
    first_token: int = 0
    """Where in the training data, in the order of training, the run begins to read; whole sequences."""
    first_step: int = 0
    """Steps of other jobs that this one goes on from, for the learning rate."""
    all_steps: int | None = None
    """Steps that the learning rate's schedule runs over, where they are more than this job's."""
    teacher: Path | None = None
    """The checkpoint, of any format, that a run with ``training.distill`` learns from."""
    pruning: PruningAware | None = None
    """What is removed while the run trains."""
    masks: LearnedMasks | None = None
    """Of a run that learns masks (Sheared LLaMA); its initial checkpoint is the model that they are for."""
    carried: CarriedState | None = None
    """Of a run that goes on with the optimizer's state of another, which has taken ``first_step`` steps."""
    loading: Loading | None = None
    """Of a run whose text is in domains; ``first_token`` does not count then."""

    @property
    def metrics(self) -> Path:
        """One JSON object a line: what was measured at which step."""
        return self.folder / METRICS_FILE

    @property
    def log(self) -> Path:
        """Everything that NeMo and Megatron print."""
        return self.folder / LOG_FILE

    @property
    def masks_file(self) -> Path:
        """The learned masks, when the run is finished."""
        return self.folder / MASKS_FILE

    @property
    def checkpoints(self) -> Path:
        """The folder of NeMo checkpoints."""
        return self.folder / CHECKPOINTS

    def save(self) -> Path:
        """Write the job into its folder and return the file."""
        path = self.folder / JOB_FILE
        write_json(path, self.to_json())
        return path

    def to_json(self) -> dict[str, Any]:
        """Return the job as plain data."""
        return {
            **asdict(self),
            "folder": str(self.folder),
            "initial": str(self.initial),
            "layout": self.layout.model_dump(),
            "training": self.training.model_dump(),
            "teacher": self.teacher and str(self.teacher),
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
            pruning=PruningAware.model_validate(values["pruning"]) if values.get("pruning") else None,
            masks=LearnedMasks.from_json(values["masks"]) if values.get("masks") else None,
            carried=CarriedState.from_json(values["carried"]) if values.get("carried") else None,
            loading=Loading(**values["loading"]) if values.get("loading") else None,
        )
