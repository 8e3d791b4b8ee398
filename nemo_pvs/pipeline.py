"""``pvs run``: the stages from a parent to a report, each done once and resumable."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.calibration.tokens import TokenSet
from nemo_pvs.checkpoint_ledger import tokens_read
from nemo_pvs.checkpoints.assets import asset_files, copy_asset, tokenizer_folder
from nemo_pvs.checkpoints.detect import open_source
from nemo_pvs.checkpoints.masks import Masks, NoMasks, masks_of
from nemo_pvs.checkpoints.megatron import write_nemo
from nemo_pvs.checkpoints.parent import prepare_parent
from nemo_pvs.checkpoints.random import RandomSource
from nemo_pvs.checkpoints.source import WeightSource, fingerprint, shape_of
from nemo_pvs.checkpoints.stream import convert
from nemo_pvs.data.tokenize import load_tokenizer, tokenizer_hash
from nemo_pvs.equal_terms import settle
from nemo_pvs.errors import UserError
from nemo_pvs.evaluation.perplexity import perplexity
from nemo_pvs.evaluation.windows import write_validation_document
from nemo_pvs.files import read_json, sha256_json, whole_folder, write_json, write_text
from nemo_pvs.layout import Layout
from nemo_pvs.masks_stage import (
    end_of_reading,
    is_trained_first,
    prune_by_stage,
    stage_job,
    stage_targets,
    train_stage,
)
from nemo_pvs.progress import progress
from nemo_pvs.prune_target import HUGGING_FACE, NEMO, prune_target, write_planned
from nemo_pvs.recipe import Arm, Recipe, Target
from nemo_pvs.recipe_blocks import DENSE, PARENT, Initialisation
from nemo_pvs.recipe_targets import check_recipe, expected_shape, is_sparse, needs_gradients, needs_scores, scans
from nemo_pvs.recipe_teacher import check_recipe_teacher, check_tokens
from nemo_pvs.reporting.ledger import LEDGER
from nemo_pvs.reporting.tokens_read import TokensRead
from nemo_pvs.run_data import RunData
from nemo_pvs.run_ledger import run_ledger
from nemo_pvs.run_masks import prepare_masks
from nemo_pvs.run_tasks import TASKS, measure_tasks, reads_text, search_score
from nemo_pvs.shape import Shape
from nemo_pvs.staged import ADAPT, Share, shares, stages_of
from nemo_pvs.staged_run import prune_in_stages
from nemo_pvs.stages import Stages
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.run import Trainer, is_finished

STAGES = ("parent", "data", "calibrate", "masks", "prune", "random", "train", "evaluate", "report")


def initial_label(arm: Arm) -> str:
    """Return what the evaluation of an arm's initial weights is called; all its budgets begin with the same."""
    return f"{arm.target}-{arm.initialisation}-initial"


class Pipeline:
    """One run folder and the recipe that fills it."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        force: tuple[str, ...] = (),
        compute: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare to run ``recipe`` in ``folder``; ``compute`` says where layers run (``pruning.job.Job``).

        Raises:
            UserError: a forced stage is unknown.
        """
        for stage in force:
            if stage.split("/")[0] not in STAGES:
                raise UserError(f"There is no stage {stage} to force; stages are {', '.join(STAGES)}.")
        self.recipe = recipe
        self.folder = folder
        self.compute = compute or {}
        self.tokens = RunData(recipe, folder / "data")
        self.stages = Stages(folder, force)
        self.results: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        """Do every stage that is not done yet."""
        with self._trainer() as trainer:
            self.prepare(trainer)
            for arm in self.recipe.runs:
                self.train(trainer, arm)
        self.evaluate()
        if self.recipe.evaluate.tasks:
            self.tasks()

    def prepare_only(self) -> list[Path]:
        """Do every stage before training, and return the job files for ranks that something else starts.

        Where masks are to be learned, these are the first jobs; call it again when they are done.
        """
        self._begin()
        if jobs := self._mask_jobs():
            return jobs
        self._make_initial_weights()
        for arm in self.recipe.runs:
            job = self.job(arm)
            outputs = [job.folder, self.model(arm.name)]
            self.stages.begin(
                f"train/{arm.name}",
                self._training_inputs(arm),
                outputs,
                keep_partial=True,
                precious=[job.checkpoints, self.model(arm.name)],
            )
            jobs.append(job.save())
        return jobs

    def prepare(self, trainer: Trainer | None = None) -> None:
        """Do every stage that makes initial weights and token files; ``trainer`` where there is one already."""
        self._begin()
        self._make_initial_weights(trainer)

    def _begin(self) -> None:
        write_text(self.folder / "recipe.yaml", yaml.safe_dump(self.recipe.model_dump(), sort_keys=False))
        self.parent()
        self.recipe = settle(self.recipe, self.parent_shape)
        self.data()

    def _make_initial_weights(self, trainer: Trainer | None = None) -> None:
        if any(needs_scores(target) for target in self.recipe.targets.values()):
            self.calibrate()
        for name, target in self.recipe.targets.items():
            if is_trained_first(target):
                self.learn_masks(name, target, trainer)
            if target.method != DENSE or "pruned" in self.recipe.arms_of(name):
                self.prune(name, target, trainer)
            if "random" in self.recipe.arms_of(name):
                self.random(name, target)
        # Now that their shapes are known, also those that scores decided.
        made = (name for name in self.recipe.targets if f"prune/{name}" in self.results)
        shapes = {name: shape_of(open_source(self.pruned(name) / HUGGING_FACE)) for name in made}
        self.recipe = settle(self.recipe, self.parent_shape, shapes)
        self.tokens.check_end(self.results["data"]["splits"], end_of_reading(self.recipe))

    def parent(self) -> None:
        """Get the parent as a checkpoint folder, and check that the recipe can be done with it."""
        parent, target = self.recipe.parent, self.folder / "parent"
        source = parent.source
        if source is None:
            assert parent.config is not None
            assert parent.tokenizer is not None
            inputs: dict[str, Any] = {"config": parent.config, "tokenizer": tokenizer_hash(Path(parent.tokenizer))}
            self.stage("parent", inputs, [target], self._describe_parent)
        else:
            given = Path(source).is_dir()
            inputs = {"source": source, "fingerprint": fingerprint(open_source(source)) if given else None}

            def work() -> dict[str, Any]:
                path = prepare_parent(source, target)
                place = str(path.resolve()) if given else "parent"
                return {"path": place, "fingerprint": fingerprint(open_source(path))}

            self.stage("parent", inputs, [] if given else [target], work)
        self._check_parent()
        check_recipe(self.recipe, self.parent_shape, int(self.parent_config.get("max_position_embeddings", 0)))
        check_recipe_teacher(self.recipe, self.parent_shape)
        distill = self.recipe.train.distill
        if distill and distill.teacher != PARENT:
            check_tokens(Path(distill.teacher), self.tokenizer)

    def _describe_parent(self) -> dict[str, Any]:
        """Put down the config and the tokenizer of a parent that is yet to be trained."""
        parent = self.recipe.parent
        with whole_folder(self.folder / "parent") as partial:
            write_json(partial / "config.json", parent.config)
            for asset in asset_files(Path(str(parent.tokenizer))):
                copy_asset(asset, partial)
        return {"path": "parent", "fingerprint": sha256_json(parent.config)}

    def _check_parent(self) -> None:
        stated = self.recipe.parent.config
        if stated is not None and Layout.for_config(stated).shape(stated) != self.parent_shape:
            raise UserError(
                f"parent.config of the recipe is [{Layout.for_config(stated).shape(stated)}], but "
                f"{self.recipe.parent.name} is [{self.parent_shape}]; mend one of them, or leave parent.config out."
            )
        tokens = len(load_tokenizer(self.tokenizer))
        if tokens > self.parent_shape.vocab:
            raise UserError(
                f"The tokenizer in {self.tokenizer} has {tokens:,} tokens, but the parent's vocabulary has "
                f"{self.parent_shape.vocab:,}; give the tokenizer that belongs to the parent."
            )

    def data(self) -> None:
        """Fix the validation windows, and tokenise the text unless it is tokenised already."""
        recipe, vocab = self.recipe, self.parent_shape.vocab
        inputs = {
            "source": recipe.data.model_dump(exclude={"token_ranges"}),
            "files": self.tokens.identity(self.tokenizer, vocab),
            "tokenizer": tokenizer_hash(self.tokenizer),
            "validation": [recipe.train.validation_samples, recipe.train.sequence_length],
        }

        def work() -> dict[str, Any]:
            splits = self.tokens.prepare(self.tokenizer, vocab)
            self.tokens.check_end(splits, end_of_reading(self.recipe))
            windows = self.tokens.validation_windows
            write_validation_document(windows, self.tokens.folder / "validation_windows", vocab)
            return {"splits": splits, "validation_windows": windows.manifest}

        self.stage("data", inputs, [self.tokens.folder], work)
        self.tokens.check_end(self.results["data"]["splits"], end_of_reading(self.recipe))

    def calibrate(self) -> None:
        """Measure importance, one dense pass for all targets, and one back where a target needs gradients."""
        settings, folder = self.recipe.calibrate, self.folder / "scores"
        gradients = any(map(needs_gradients, self.recipe.targets.values()))
        inputs = {
            "parent": self.results["parent"]["fingerprint"],
            "text": self.text("calibration"),
            "settings": settings.model_dump(include={"samples", "sequence_length", "seed"}),
            **({"gradients": True} if gradients else {}),
        }

        def work() -> dict[str, Any]:
            tokens = self.calibration_tokens(settings.samples)
            with progress("calibrate", "layers") as show:
                scores = calibrate(self.parent_source, tokens, gradients=gradients, **self.compute, progress=show)
            scores.save(folder)
            return {"scores": scores.content_hash, "tokens": tokens.ids.numel()}

        self.stage("calibrate", inputs, [folder], work)

    def learn_masks(self, name: str, target: Target, trainer: Trainer | None = None) -> None:
        """Train the parent while it turns out what to keep of it for a target: masks are learned, or units go."""
        job, inputs = self._mask_job(name, target)

        def work() -> dict[str, Any]:
            with nullcontext(trainer) if trainer else self._trainer() as running:
                return train_stage(running, job, self.parent_source)

        outputs, precious = [job.folder.parent], [job.checkpoints]
        self.stage(f"masks/{name}", inputs, outputs, work, keep_partial=True, precious=precious, shared=True)

    def _mask_jobs(self) -> list[Path]:
        """Return the files of the jobs that learn masks and are not finished."""
        jobs = []
        for name in stage_targets(self.recipe):
            job, inputs = self._mask_job(name, self.recipe.targets[name])
            outputs, precious = [job.folder.parent], [job.checkpoints]
            begun = self.stages.begin(f"masks/{name}", inputs, outputs, keep_partial=True, precious=precious) is None
            if begun and not is_finished(job):
                jobs.append(prepare_masks(job, self.parent_source))
        return jobs

    def _mask_job(self, name: str, target: Target) -> tuple[TrainingJob, dict[str, Any]]:
        """Return the job that learns the masks of a target, and what the stage is made from."""
        shape = expected_shape(target, self.parent_shape).shape
        job, identity = stage_job(self.recipe, name, shape, self.folder / "masks" / name, self._training_data)
        return job, {
            "parent": self.results["parent"]["fingerprint"],
            "text": self.text("train"),
            "validation": self.results["data"]["validation_windows"]["ids_sha256"],
            **identity,
        }

    def prune(self, name: str, target: Target, trainer: Trainer | None = None) -> None:
        """Prune to a target, into a Hugging Face folder and a NeMo checkpoint."""
        if stages_of(target) > 1:
            prune_in_stages(self, trainer, name, target)
            return
        folder, settings = self.pruned(name), self.recipe.calibrate
        samples = settings.scan_samples if scans(target) else settings.samples
        reads = scans(target) or is_sparse(target) or reads_text(target) or target.method == ADAPT
        inputs = {
            "parent": self.results["parent"]["fingerprint"],
            "method": target.method,
            "options": target.options,
            "shape": expected_shape(target, self.parent_shape).shape.to_dict(),
            "scores": self.results["calibrate"]["scores"] if needs_scores(target) else None,
            "text": [self.text("calibration"), samples, settings.sequence_length, settings.seed] * reads,
            **({"masks": learned["masks"]} if (learned := self.results.get(f"masks/{name}")) else {}),
        }

        def work() -> dict[str, Any]:
            if learned:
                job, _ = self._mask_job(name, target)
                return write_planned(*prune_by_stage(job, learned["checkpoint"], self.parent_source), folder)
            source, text, questions = self.parent_source, self.tokens.prefix("calibration"), self.folder / "questions"
            return prune_target(
                target,
                source,
                folder,
                tokens=lambda: self.calibration_tokens(samples),
                scores=lambda: Scores.load(self.folder / "scores", source),
                task_score=lambda: search_score(target, text, self.tokenizer, questions / name, self.compute),
                compute=self.compute,
                draw=lambda iteration: self.calibration_tokens(samples, iteration),
            )

        self.stage(f"prune/{name}", inputs, [folder], work, shared=True)

    def random(self, name: str, target: Target) -> None:
        """Draw the scratch baseline's initial weights for a target, under the same masks, as a NeMo checkpoint."""
        folder, seed = self.folder / "random" / name, self.recipe.train.seed
        masks: Masks
        keep: WeightSource | None
        if target.method == DENSE:
            config, assets, masks, keep = self.parent_config, asset_files(self.tokenizer), NoMasks(), None
        else:
            pruned = open_source(self.pruned(name) / HUGGING_FACE)
            config, assets, masks = pruned.config, pruned.assets, masks_of(pruned)
            keep = pruned if target.keep_parent_embeddings else None
        inputs: dict[str, Any] = {"shape": Layout.for_config(config).shape(config).to_dict(), "seed": seed}
        if masks.names or keep:
            inputs["pruned"] = [self.results[f"prune/{name}"]["fingerprint"], target.keep_parent_embeddings]

        def work() -> dict[str, Any]:
            drawn = RandomSource(config, seed, assets, torch.bfloat16, masks, keep)
            write_nemo(drawn, folder / NEMO)
            return {"fingerprint": fingerprint(drawn)}

        self.stage(f"random/{name}", inputs, [folder], work, shared=True)

    def train(self, trainer: Trainer, arm: Arm) -> None:
        """Train one arm on Megatron, and hand the result over as a Hugging Face folder."""
        job = self.job(arm)

        def work() -> dict[str, Any]:
            checkpoint = trainer.train(job)
            convert(checkpoint, self.model(arm.name), to="hf", overwrite=True)
            layout = arm.layout.model_dump()
            return {"fingerprint": fingerprint(open_source(self.model(arm.name))), "layout": layout}

        outputs = [job.folder, self.model(arm.name)]
        self.stage(
            f"train/{arm.name}",
            self._training_inputs(arm),
            outputs,
            work,
            keep_partial=True,
            precious=[job.checkpoints, self.model(arm.name)],
        )
        model = open_source(self.model(arm.name))
        ledger = run_ledger(self.recipe, arm, self.results, self.parent_shape, model, self.reads(arm))
        for folder in outputs:  # beside the model, so that what is pruned from it inherits its cost
            ledger.save(folder / LEDGER)

    def evaluate(self) -> None:
        """Measure perplexity on the test split, and the validation loss of models that no training measured."""
        trained = {arm.name for arm in self.recipe.runs}
        for label, path in self.models_to_evaluate().items():
            source = open_source(path)
            inputs = {
                "model": fingerprint(source),
                "text": self.text("test"),
                "settings": self.recipe.evaluate.model_dump(include={"samples", "sequence_length"}),
                "validation": self.results["data"]["validation_windows"]["ids_sha256"],
            }

            def work(source: WeightSource = source, label: str = label) -> dict[str, Any]:
                settings = self.recipe.evaluate
                test = TokenSet.from_token_file(
                    self.tokens.prefix("test"),
                    samples=settings.samples,
                    sequence_length=settings.sequence_length,
                )
                texts = {"test": test}
                if label not in trained:  # training has measured the validation loss of these already
                    texts["validation"] = self.tokens.validation_windows
                measured = {}
                for text, tokens in texts.items():
                    with progress(f"{text} loss of {label}", "layers") as show:
                        measured[text] = perplexity(source, tokens, **self.compute, progress=show)
                return measured

            self.stage(f"evaluate/{label}", inputs, [], work, shared=True)

    def tasks(self) -> None:
        """Ask the tasks of the recipe of the parent and of every trained arm; the report finds the answers."""
        settings, folder = self.recipe.evaluate, self.folder / TASKS
        models = [path for label, path in self.models_to_evaluate().items() if not label.endswith("-initial")]
        inputs = {
            "models": [fingerprint(open_source(path)) for path in models],
            "text": self.text("test"),
            "tasks": settings.model_dump(include={"tasks", "task_limit"}),
        }

        def work() -> dict[str, Any]:
            measure_tasks(settings, models, self.tokens.prefix("test"), self.tokenizer, folder, self.compute)
            return {}

        self.stage("evaluate/tasks", inputs, [folder], work, keep_partial=True)

    def models_to_evaluate(self) -> dict[str, Path]:
        """Return every model of the run by label: the parent, each arm's initial weights, each trained arm."""
        models = {"parent": self.parent_path} if self.recipe.parent.source else {}
        for arm in self.recipe.runs:
            models[initial_label(arm)] = self.initial(arm.target, arm.initialisation)
            models[arm.name] = self.model(arm.name)
        return models

    @property
    def parent_path(self) -> Path:
        """The parent's checkpoint folder."""
        return self.folder / self.results["parent"]["path"]

    @property
    def teacher_path(self) -> Path | None:
        """The checkpoint folder of the teacher, if arms are distilled; the parent's before there is one, too."""
        distill, source = self.recipe.train.distill, self.recipe.parent.source
        if distill is None:
            return None
        if distill.teacher != PARENT:
            return Path(distill.teacher)
        return Path(source) if source and Path(source).is_dir() else self.folder / "parent"

    @property
    def parent_source(self) -> WeightSource:
        """The parent."""
        return open_source(self.parent_path)

    @property
    def parent_config(self) -> Mapping[str, Any]:
        """The config.json of the parent, which may be yet to be trained."""
        if self.recipe.parent.source:
            return self.parent_source.config
        config: dict[str, Any] = read_json(self.parent_path / "config.json")
        return config

    @property
    def parent_shape(self) -> Shape:
        """The sizes of the parent."""
        return Layout.for_config(self.parent_config).shape(self.parent_config)

    @property
    def tokenizer(self) -> Path:
        """A folder with the parent's tokenizer."""
        return tokenizer_folder(self.parent_path)

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
        """Return the training job of an arm; of one made in stages, its last share."""
        last = shares(self.recipe, arm)[-1]
        return self.share_job(arm, last, arm.name, Path(arm.name), self.initial(arm.target, arm.initialisation))

    def share_job(self, arm: Arm, share: Share, name: str, folder: Path, initial: Path) -> TrainingJob:
        """Return the job of a share of an arm's training, in a folder below ``train/``."""
        return TrainingJob(
            name=name,
            folder=self.folder.resolve() / "train" / folder,
            initial=initial.resolve(),
            data=self._training_data,
            layout=arm.layout,
            training=share.training,
            first_token=share.first_token,
            first_step=share.first_step,
            all_steps=share.all_steps,
            teacher=self.teacher_path.resolve() if arm.training.distill and self.teacher_path else None,
        )

    def _trainer(self) -> Trainer:
        return Trainer(self.folder / "train" / "launcher.log")

    @property
    def _training_data(self) -> dict[str, Any]:
        return {
            "train": self.tokens.training_paths,
            "validation": str(self.tokens.folder.resolve() / "validation_windows"),
        }

    def _training_inputs(self, arm: Arm) -> dict[str, Any]:
        made = self.results[f"{'prune' if arm.initialisation == 'pruned' else 'random'}/{arm.target}"]
        return self.training_inputs(arm, shares(self.recipe, arm)[-1], str(made["fingerprint"]))

    def training_inputs(self, arm: Arm, share: Share, initial: str) -> dict[str, Any]:
        """Return what the result of a share of an arm's training depends on.

        A run may go on in another layout, so that is no part of it; ``initial`` is its weights' fingerprint.
        """
        return {
            "initial": initial,
            "text": self.text("train"),
            "validation": self.results["data"]["validation_windows"]["ids_sha256"],
            "first_token": share.first_token,
            **({"part": [share.first_step, share.all_steps]} if share.all_steps else {}),
            "training": share.training.identity,
            **({"teacher": fingerprint(open_source(teacher))} if (teacher := self.job(arm).teacher) else {}),
        }

    def stage(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Do a stage, or take its result from its record (``Stages.run``)."""
        self.results[name] = self.stages.run(name, *args, **kwargs)

    def text(self, split: str) -> str:
        """Return the hash of a split's tokens."""
        return str(self.results["data"]["splits"][split]["bin_sha256"])

    def reads(self, arm: Arm) -> TokensRead | None:
        """Return which tokens an arm is trained on, of all its shares; None where several files are blended."""
        last = shares(self.recipe, arm)[-1]
        file = self.tokens.training_file(self.results["data"]["splits"])
        return replace(tokens_read(file, last.training, last.first_token), first=arm.first_token) if file else None

    def calibration_tokens(self, samples: int, draw: int = 0) -> TokenSet:
        """Return sequences of the calibration split; another ``draw`` gives others."""
        settings = self.recipe.calibrate
        return TokenSet.from_token_file(
            self.tokens.prefix("calibration"),
            samples=samples,
            sequence_length=settings.sequence_length,
            seed=settings.seed + draw,
        )
