"""A run folder: its recipe, the paths in it, and the records of its stages so far."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.huggingface.config import normal_config
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.assets import tokenizer_folder
from nemo_pvs.data.domain_order import DomainOrder
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import ON_CPU, Compute
from nemo_pvs.ledger.tokens_read import TokensRead
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from nemo_pvs.pipeline.records import CALIBRATE, DataRecord, Records
from nemo_pvs.pipeline.store import Stages
from nemo_pvs.pipeline.tokens import RunData
from nemo_pvs.planning.charges import tokens_read
from nemo_pvs.planning.learned import learned_target
from nemo_pvs.planning.rounds import RoundTraining, shares
from nemo_pvs.recipe.distillation import PARENT
from nemo_pvs.recipe.fields import Initialisation
from nemo_pvs.recipe.options import needs_gradients, vocabulary_of
from nemo_pvs.recipe.recipe import Arm, Recipe
from nemo_pvs.recipe.target import Target
from nemo_pvs.recipe.training import Training
from nemo_pvs.training import metrics
from nemo_pvs.training.job import CHECKPOINTS, METRICS_FILE, CarriedState, Loading, TrainingJob
from nemo_pvs.training.trainer import is_finished

HUGGING_FACE, NEMO = "huggingface", "nemo"
"""The folders of a pruned target that hold its checkpoints."""
PLAN, SETTINGS = "plan.json", "pruning.json"
"""The files of a pruned target that record how it was made."""
STAGES = ("parent", "data", "calibrate", "masks", "prune", "teacher", "random", "teach", "train", "evaluate", "report")


def check_forced(force: Sequence[str]) -> None:
    """Refuse names of stages to run again that no stage has.

    Raises:
        UserError: naming the first one.
    """
    for stage in force:
        if stage.split("/")[0] not in STAGES:
            raise UserError(f"There is no stage {stage} to force; choose from {', '.join(STAGES)}.")


class RunFolder:
    """A run folder, its recipe, and the records of the stages that have been completed."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        force: tuple[str, ...] | None = (),
        compute: Compute = ON_CPU,
    ) -> None:
        """Prepare to run ``recipe`` in ``folder``.

        Args:
            recipe: The recipe.
            folder: The run folder.
            force: Names of stages that are run again even if they are done; None as for ``Stages``.
            compute: Where and how layers run.

        Raises:
            UserError: a forced stage is unknown.
        """
        check_forced(force or ())
        self.recipe = recipe
        self.folder = folder
        self.compute = compute
        self.tokens = RunData(recipe, folder / "data")
        self.stages = Stages(folder, force)
        self.records = Records()
        self.finished_only = False

    @property
    def arms(self) -> list[Arm]:
        """The arms that are trained, measured and reported: all, or with ``finished_only`` those that are trained."""
        return [arm for arm in self.recipe.runs if not self.finished_only or is_finished(self.job(arm))]

    def tokens_of(self, target: str | None) -> RunData:
        """Return the token files of a target, which has its own if it prunes the vocabulary; None: of the parent."""
        if target is None or vocabulary_of(self.recipe.targets[target]) is None:
            return self.tokens
        return RunData(self.recipe, self.folder / "retokenised" / target)

    def data_of(self, target: str | None) -> DataRecord:
        """Return the description of a target's token files; None: of the parent's."""
        if target is None or vocabulary_of(self.recipe.targets[target]) is None:
            return self.records.data
        return self.records.retokenised(target)

    @property
    def parent_path(self) -> Path:
        """The parent's checkpoint folder."""
        return self.folder / self.records.parent.path

    @property
    def teacher_path(self) -> Path | None:
        """The checkpoint folder of the teacher, which may not exist yet; None without distillation."""
        distill, source = self.recipe.train.distill, self.recipe.parent.source
        if distill is None:
            return None
        if distill.teacher != PARENT:
            return Path(distill.teacher)
        return Path(source) if source and Path(source).is_dir() else self.folder / "parent"

    def teacher_of(self, target: str) -> Path | None:
        """Return the checkpoint folder of a target's teacher, which has the target's tokens; it may not exist yet."""
        if self.teacher_path is None or vocabulary_of(self.recipe.targets[target]) is None:
            return self.teacher_path
        return self.folder / "teachers" / target

    @property
    def parent_source(self) -> WeightSource:
        """The parent's weights."""
        return open_source(self.parent_path)

    @property
    def parent_config(self) -> Mapping[str, Any]:
        """The parent's config.json, also if the parent has not been trained yet."""
        parent = self.recipe.parent
        if parent.source is None:
            return normal_config(parent.config, "parent.config of the recipe")
        return self.parent_source.config

    @property
    def parent_shape(self) -> Shape:
        """The sizes of the parent."""
        return Layout.for_config(self.parent_config).shape(self.parent_config)

    @property
    def tokenizer(self) -> Path:
        """A folder with the parent's tokenizer."""
        stated = self.recipe.parent.tokenizer if self.recipe.parent.source is None else None
        return tokenizer_folder(Path(stated) if stated and not self.parent_path.exists() else self.parent_path)

    def tokenizer_of(self, target: str | None) -> Path:
        """Return a folder with a target's tokenizer: that of the pruned model if its vocabulary is pruned."""
        if target is None or vocabulary_of(self.recipe.targets[target]) is None:
            return self.tokenizer
        return self.pruned(target) / HUGGING_FACE

    def pruned(self, target: str) -> Path:
        """The folder of a pruned target: plan.json, huggingface/, nemo/."""
        return self.folder / "pruned" / target

    def initial(self, target: str, initialisation: Initialisation) -> Path:
        """The NeMo checkpoint that an arm starts from."""
        return (self.pruned(target) if initialisation == "pruned" else self.folder / "random" / target) / NEMO

    def model(self, arm: str) -> Path:
        """The Hugging Face folder of a trained arm."""
        return self.folder / "models" / arm

    def job(self, arm: Arm) -> TrainingJob:
        """Return the training job of an arm; for an arm that is pruned in rounds, that of its last share."""
        parts = shares(self.recipe, arm)
        initial = self.initial(arm.target, arm.initialisation)
        job = self.share_job(arm, parts[-1], arm.name, self.arm_folder(arm.name), initial, len(parts))
        return replace(job, keep=tuple(filter(None, self.evaluated_steps(arm))))

    def evaluated_steps(self, arm: Arm) -> list[int]:
        """Return the steps of an arm's training, before its last, after which it is evaluated on the tasks.

        An arm from random weights has nothing to recover and is evaluated at its end only. Of an arm that is pruned in
        rounds these are steps of the last share.
        """
        if not arm.takes_parent:
            return []
        steps = shares(self.recipe, arm)[-1].training.steps
        return sorted({round(share * steps) for share in self.recipe.evaluate.before_the_end} - {steps})

    def share_job(
        self, arm: Arm, share: RoundTraining, name: str, folder: Path, initial: Path, number: int = 1
    ) -> TrainingJob:
        """Return the job of one share of an arm's training.

        Args:
            arm: The arm.
            share: The share.
            name: Name of the job.
            folder: Folder of the training.
            initial: The NeMo checkpoint that it starts from.
            number: Number of the share, counted from 1.
        """
        plan = (initial.parent / PLAN).resolve()
        teacher = self.teacher_of(arm.target)
        before = self.share_folder(arm.target, number - 1) / CHECKPOINTS
        return TrainingJob(
            name=name,
            folder=folder,
            initial=initial.resolve(),
            data=self.training_data_of(arm.target),
            layout=arm.layout,
            training=share.training,
            first_token=share.first_token,
            first_step=share.first_step,
            all_steps=share.all_steps,
            teacher=teacher.resolve() if arm.training.distill and teacher else None,
            carried=CarriedState(before, plan if plan.exists() else None) if self.carries(arm, number) else None,
            loading=self.loading(arm),
        )

    def carries(self, arm: Arm, number: int) -> bool:
        """Return whether a share of an arm's training, counted from 1, continues with the previous optimizer state."""
        sliced = arm.initialisation == "pruned" and self.recipe.targets[arm.target].slice_optimizer_state
        return sliced and number > 1

    def arm_folder(self, arm: str) -> Path:
        """Return the folder of an arm's training; for an arm that is pruned in rounds, that of its last share."""
        return self.folder.resolve() / "train" / arm

    def share_folder(self, target: str, number: int) -> Path:
        """Return the folder of the training after a round, counted from 1, that is not the target's last."""
        return self.folder.resolve() / "train" / f"{target}-stages" / str(number)

    def loading(self, arm: Arm) -> Loading | None:
        """Return the initial domain shares of an arm and where it starts reading; None without domains.

        Pruned weights continue after the samples that mask learning has read, and with its final shares if the recipe
        gives none. Before mask learning is done such a job has no shares and cannot be trained.
        """
        start = Loading.at_the_start(arm.training)
        before = self.folder / "masks" / arm.target / "run" / METRICS_FILE
        learned = learned_target(self.recipe, self.recipe.targets[arm.target])
        if start is None or learned is None or arm.initialisation != "pruned":
            return start
        done = metrics.read(before).domains
        return at_the_end(done[-1], learned.training, start.shares) if done else start

    @property
    def training_data(self) -> dict[str, Any]:
        """Prefixes of the token files that training the parent reads, in the form of ``TrainingJob.data``."""
        return self.training_data_of(None)

    def training_data_of(self, target: str | None) -> dict[str, Any]:
        """Return the prefixes of the token files that training a target reads, in the form of ``TrainingJob.data``."""
        tokens = self.tokens_of(target)
        return {"train": tokens.training_paths, "validation": tokens.validation_paths}

    def text(self, split: str, target: str | None = None) -> str:
        """Return the hash of a split's tokens; with ``target``, of those that it is trained and measured on."""
        return self.data_of(target).splits[split].sha256

    def reads(self, arm: Arm) -> TokensRead | None:
        """Return the tokens that all shares of an arm read; None if several files are blended."""
        file = self.tokens_of(arm.target).training_file(self.data_of(arm.target).splits)
        return tokens_read(file, arm.training, arm.first_token) if file else None

    def calibration_of(self, target: Target) -> str:
        """Return the name of the stage that measures the scores of a target (``stages.calibrate.calibrations``)."""
        begun = self.stages.begun(CALIBRATE)
        separate = needs_gradients(target) and begun and "gradients" not in begun["inputs"]
        return f"{CALIBRATE}/gradients" if separate else CALIBRATE

    def calibration_tokens(self, samples: int, draw: int = 0) -> TokenSet:
        """Return ``samples`` sequences of the calibration split; each ``draw`` gives different ones."""
        settings = self.recipe.calibrate
        return TokenSet.from_token_file(
            self.tokens.prefix("calibration"),
            samples=samples,
            sequence_length=settings.sequence_length,
            seed=settings.seed + draw,
            windows=settings.windows,
        )


def at_the_end(last: Mapping[str, Any], training: Training, shares: Mapping[str, float] | None) -> Loading:
    """Return the state of the domains after a training's last step, given its last record of them.

    That record is of an earlier step if the training was killed between its last save and its last validation, or if
    the interval of validations does not divide its steps. What the steps after it read follows from its shares.

    Args:
        last: The record, as in ``Metrics.domains``.
        training: Settings of the training.
        shares: The shares to begin with instead of those at the end.
    """
    order = DomainOrder(
        dict.fromkeys(last["samples"], 0),
        last["shares"],
        last["samples"],
        batch=training.global_batch_size,
        seed=training.order_seed,
    )
    order.restore({"step": last["step"], "shares": last["shares"], "taken": last["samples"]})
    order.advance(max(last["step"], training.steps))
    return Loading(dict(shares or last["shares"]), order.taken)


def forget_optimizer(run: RunFolder, name: str, number: int) -> None:
    """Remove the checkpoints of a finished share of training, which only resuming needs; its weights are kept."""
    shutil.rmtree(run.share_folder(name, number) / "nemo", ignore_errors=True)
