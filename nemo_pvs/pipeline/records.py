"""The results of a run's stages, one type per kind of stage, and the records of a run by stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from nemo_pvs.ledger.ledger import Charge
from nemo_pvs.planning.charges import Spent

RecordT = TypeVar("RecordT", bound="Record")


@dataclass(frozen=True)
class Record:
    """The result of a stage, stored in the run folder as JSON with a key for each field that has a value."""

    def to_json(self) -> dict[str, Any]:
        """Return the values as plain data."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if value is not None}

    @classmethod
    def from_json(cls: type[RecordT], values: Mapping[str, Any]) -> RecordT:
        """Undo ``to_json``."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


@dataclass(frozen=True)
class ParentRecord(Record):
    """The parent."""

    path: str
    """The checkpoint folder, relative to the run folder if it is inside it."""
    fingerprint: str


@dataclass(frozen=True)
class SplitTokens:
    """The tokens of a split: those of one token file, or of several."""

    description: Mapping[str, Any]
    """As in the token file's manifest; with several files also ``files``, a description of each."""

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return int(self.description["tokens"])

    @property
    def sha256(self) -> str:
        """The hash of the tokens."""
        return str(self.description["bin_sha256"])

    @property
    def tokenizer_sha256(self) -> str | None:
        """The hash of the tokenizer, if known."""
        return self.description.get("tokenizer_sha256")

    @property
    def files(self) -> list[SplitTokens]:
        """The individual token files."""
        return [SplitTokens(file) for file in self.description.get("files", [self.description])]


@dataclass(frozen=True)
class DataRecord(Record):
    """The tokenised text."""

    splits: Mapping[str, SplitTokens]
    """For train, validation, calibration and test."""
    validation_windows: Mapping[str, Any]
    """The manifest of the windows that validation losses are measured on."""

    @property
    def windows_sha256(self) -> str:
        """The hash of the validation windows."""
        return str(self.validation_windows["ids_sha256"])

    def to_json(self) -> dict[str, Any]:
        """Return the values as plain data."""
        splits = {name: dict(split.description) for name, split in self.splits.items()}
        return {"splits": splits, "validation_windows": dict(self.validation_windows)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DataRecord:
        """Undo ``to_json``."""
        splits = {name: SplitTokens(description) for name, description in values["splits"].items()}
        return cls(splits, values["validation_windows"])


@dataclass(frozen=True)
class TeacherRecord(Record):
    """The parent with the tokens that a target keeps."""

    fingerprint: str


@dataclass(frozen=True)
class ScoresRecord(Record):
    """The importance scores of a calibration."""

    scores: str
    """Content hash of the scores."""
    tokens: int
    """Number of tokens that they were measured on."""


@dataclass(frozen=True)
class MasksRecord(Record):
    """The training that learned which parts of the parent to keep."""

    checkpoint: str
    """Name of the last checkpoint."""
    masks: str
    """The hash of the masks, or of the remaining units."""


@dataclass(frozen=True)
class PrunedRecord(Record):
    """A pruned model."""

    fingerprint: str
    plan: str | None = None
    """The hash of the plan, or of the settings of a method without one; None for the parent itself."""
    search: Spent | None = None
    """Cost of a search for layers."""
    calibration: Spent | None = None
    """Cost of calibration during pruning."""
    charges: tuple[Charge, ...] | None = None
    """For a round of pruning: the cost of everything up to and including this pruning."""

    def to_json(self) -> dict[str, Any]:
        """Return the values as plain data."""
        values = super().to_json()
        for name, spent in (("search", self.search), ("calibration", self.calibration)):
            if spent is not None:
                values[name] = spent.to_json()
        if self.charges is not None:
            values["charges"] = [asdict(charge) for charge in self.charges]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PrunedRecord:
        """Undo ``to_json``."""
        search, calibration, charges = (values.get(name) for name in ("search", "calibration", "charges"))
        return cls(
            values["fingerprint"],
            values.get("plan"),
            None if search is None else Spent.from_json(search),
            None if calibration is None else Spent.from_json(calibration),
            None if charges is None else tuple(Charge(**charge) for charge in charges),
        )


@dataclass(frozen=True)
class RandomRecord(Record):
    """Random initial weights."""

    fingerprint: str


@dataclass(frozen=True)
class TaughtRecord(Record):
    """A cache of a teacher's answers."""

    content: str
    """Hash of the description of what it holds."""
    kept: float
    """Share of the teacher's probability that its tokens hold."""


@dataclass(frozen=True)
class TrainedRecord(Record):
    """A trained model."""

    fingerprint: str
    layout: dict[str, Any] | None = None
    """Parallel layout of the training; None for training between rounds of pruning."""


@dataclass(frozen=True)
class MeasuredLoss:
    """The loss of a model on a text in nats per token, its perplexity and bits per byte (``layerwise.perplexity``)."""

    loss: float
    loss_stderr: float | None
    tokens: int | None
    perplexity: float
    perplexity_stderr: float | None
    bits_per_byte: float | None = None
    bits_per_byte_stderr: float | None = None
    bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the values as plain data, without bits per byte if they were not measured."""
        values = asdict(self)
        if self.bits_per_byte is None:
            for name in ("bits_per_byte", "bits_per_byte_stderr", "bytes"):
                del values[name]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MeasuredLoss:
        """Undo ``to_json``."""
        return cls(**values)


@dataclass(frozen=True)
class EvaluationRecord(Record):
    """The measurements of a model."""

    test: MeasuredLoss
    validation: MeasuredLoss | None = None
    """None if training measured it."""
    texts: Mapping[str, MeasuredLoss] | None = None
    """On the recipe's ``evaluate.texts``, by name."""

    def to_json(self) -> dict[str, Any]:
        """Return the values as plain data."""
        values: dict[str, Any] = {"test": self.test.to_json()}
        if self.validation is not None:
            values["validation"] = self.validation.to_json()
        if self.texts is not None:
            values["texts"] = {name: measured.to_json() for name, measured in self.texts.items()}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EvaluationRecord:
        """Undo ``to_json``."""
        validation, texts = values.get("validation"), values.get("texts")
        return cls(
            MeasuredLoss.from_json(values["test"]),
            None if validation is None else MeasuredLoss.from_json(validation),
            None if texts is None else {name: MeasuredLoss.from_json(text) for name, text in texts.items()},
        )


@dataclass(frozen=True)
class TasksRecord(Record):
    """The answers to a recipe's tasks, which are kept in separate files."""

    before_the_end: dict[str, dict[str, str]] | None = None
    """By arm: fingerprints of the models that were evaluated before and during its training, by the number of tokens
    that they had been trained on."""


class Records:
    """The records of a run by stage name, in the order in which stages were completed."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}

    def __contains__(self, stage: str) -> bool:
        return stage in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __setitem__(self, stage: str, record: Record) -> None:
        self._records[stage] = record

    def of(self, kind: type[RecordT]) -> dict[str, RecordT]:
        """Return the records of one type by stage name."""
        return {stage: record for stage, record in self._records.items() if isinstance(record, kind)}

    @property
    def parent(self) -> ParentRecord:
        """The parent."""
        return self._get("parent", ParentRecord)

    @property
    def data(self) -> DataRecord:
        """The text in the parent's tokens."""
        return self._get(data_stage(), DataRecord)

    def retokenised(self, target: str) -> DataRecord:
        """The text in the tokens of a target whose vocabulary is pruned."""
        return self._get(data_stage(target), DataRecord)

    def scores(self, stage: str) -> ScoresRecord:
        """The scores of a calibration (``RunFolder.calibration_of``)."""
        return self._get(stage, ScoresRecord)

    def masks(self, target: str) -> MasksRecord:
        """The training that learned which parts of the parent a target keeps."""
        return self._get(masks_stage(target), MasksRecord)

    def pruned(self, target: str, number: int | None = None) -> PrunedRecord:
        """A pruned target; with ``number``, one of its rounds before the last, counted from 1."""
        return self._get(prune_stage(target, number), PrunedRecord)

    def random(self, target: str) -> RandomRecord:
        """The random weights of a target."""
        return self._get(random_stage(target), RandomRecord)

    def trained(self, arm: str) -> TrainedRecord:
        """A trained arm."""
        return self._get(train_stage(arm), TrainedRecord)

    def evaluation(self, model: str) -> EvaluationRecord:
        """The measurements of a model, by its label."""
        return self._get(evaluation_stage(model), EvaluationRecord)

    def _get(self, stage: str, kind: type[RecordT]) -> RecordT:
        record = self._records[stage]
        assert isinstance(record, kind), (stage, record)
        return record


CALIBRATE = "calibrate"
"""The name of the stage that measures importance scores."""


def data_stage(target: str | None = None) -> str:
    """Return the name of the stage that tokenises the text; with ``target``, in the tokens that it keeps."""
    return "data" if target is None else f"data/{target}"


def teacher_stage(target: str) -> str:
    """Return the name of the stage that writes the teacher of a target whose vocabulary is pruned."""
    return f"teacher/{target}"


def masks_stage(target: str) -> str:
    """Return the name of the stage that learns which parts of the parent a target keeps."""
    return f"masks/{target}"


def prune_stage(target: str, number: int | None = None) -> str:
    """Return the name of the stage that prunes a target; ``number`` is set for rounds before the last, from 1."""
    return f"prune/{target}" if number is None else f"prune/{target}/stage-{number}"


def random_stage(target: str) -> str:
    """Return the name of the stage that draws a target's random weights."""
    return f"random/{target}"


def teach_stage(number: int) -> str:
    """Return the name of the stage that writes a cache of a teacher's answers, counted from 1."""
    return f"teach/{number}"


def train_stage(arm: str) -> str:
    """Return the name of the stage that trains an arm."""
    return f"train/{arm}"


def share_stage(target: str, number: int) -> str:
    """Return the name of the stage that trains after a round of pruning, counted from 1, that is not the last."""
    return f"train/{target}/stage-{number}"


def evaluation_stage(model: str) -> str:
    """Return the name of the stage that measures a model, by its label."""
    return f"evaluate/{model}"
