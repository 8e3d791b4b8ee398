"""``pvs run``: the stages from a parent to a report, each done once and resumable."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.convert import convert
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.masks import Masks, NoMasks, masks_of
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.checkpoints.transforms.random import RandomSource
from nemo_pvs.data.assets import asset_files
from nemo_pvs.data.tokenize import tokenizer_hash
from nemo_pvs.ledger.ledger import LEDGER
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from nemo_pvs.pipeline.checks import check_machine, check_text
from nemo_pvs.pipeline.earlier_records import adopt_earlier_records
from nemo_pvs.pipeline.folder import HUGGING_FACE, NEMO, RunFolder, forget_optimizer
from nemo_pvs.pipeline.ledger import run_ledger
from nemo_pvs.pipeline.run_look_ahead import look_ahead
from nemo_pvs.pipeline.stages.evaluate import ask_tasks, evaluate
from nemo_pvs.pipeline.stages.learned import prune_by_stage, stage_job, train_stage
from nemo_pvs.pipeline.stages.parent import check_parent, get_parent, known_parent
from nemo_pvs.pipeline.stages.rounds import prune_in_stages
from nemo_pvs.pipeline.stages.sheared import prepare_masks
from nemo_pvs.pipeline.stages.tasks import check_questions, check_tasks, reads_text, search_score
from nemo_pvs.pipeline.target import prune_target, write_planned
from nemo_pvs.pipeline.tokens import Splits
from nemo_pvs.planning.checks import check_training
from nemo_pvs.planning.equal_terms import settle
from nemo_pvs.planning.learned import first_of_each_stage, is_trained_first, untrained_first
from nemo_pvs.planning.parent_checks import check_costs
from nemo_pvs.planning.rounds import shares
from nemo_pvs.planning.targets import expected_shape
from nemo_pvs.recipe.options import ADAPT, is_sparse, needs_gradients, needs_scores, scans, stages_of
from nemo_pvs.recipe.recipe import Arm
from nemo_pvs.recipe.target import DENSE, Target
from nemo_pvs.system.files import write_text
from nemo_pvs.system.progress import progress
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.trainer import Trainer, is_finished


class Pipeline(RunFolder):
    """The stages of a run."""

    def run(self) -> None:
        """Do every stage that is not done yet."""
        with self._trainer() as trainer:
            self.prepare(trainer)
            for arm in self.recipe.runs:
                self.train(trainer, arm)
        evaluate(self)
        if self.recipe.evaluate.tasks:
            ask_tasks(self)

    def prepare_only(self) -> list[Path]:
        """Do every stage before training, and return the job files for ranks that something else starts.

        Where masks are to be learned, or targets are trained between their stages, these are the first jobs; call it
        again when they are done.
        """
        self._begin(trains_here=False)
        if jobs := self._mask_jobs() or self._make_initial_weights(None):
            return jobs
        for arm in self.recipe.runs:
            job = self.job(arm)
            outputs, precious = [job.folder, self.model(arm.name)], self.precious(arm)
            self.stages.begin(f"train/{arm.name}", self.arm_inputs(arm), outputs, keep_partial=True, precious=precious)
            jobs.append(job.save())
        return jobs

    def prepare(self, trainer: Trainer | None = None) -> None:
        """Do every stage that makes initial weights and token files; ``trainer`` where there is one already."""
        self._begin(trains_here=True)
        with nullcontext(trainer) if trainer else self._trainer() as running:
            self._make_initial_weights(running)

    def _begin(self, *, trains_here: bool) -> None:
        """Refuse what can be refused, then fix the recipe, the parent and the text.

        Nothing is written before everything has been checked that is known. Only a parent that must be fetched, and
        text that must be tokenised, come before the checks that need them.
        """
        adopt_earlier_records(self.folder, self.recipe.parent.source)
        known = known_parent(self)
        if known is None:
            look_ahead(self)
            get_parent(self)
        else:
            self.results["parent"] = known
        check_parent(self)
        self.recipe = settle(self.recipe, self.parent_shape)
        check_costs(self.recipe, self.parent_shape)
        check_tasks(self.recipe)
        if trains_here:
            check_machine([job for arm in self.recipe.runs if not is_finished(job := self.job(arm))])
        ahead = look_ahead(self)
        if "data" in ahead:
            self._check_text(ahead["data"]["splits"])
        if known is not None:
            get_parent(self)
        write_text(self.folder / "recipe.yaml", yaml.safe_dump(self.recipe.model_dump(), sort_keys=False))
        self.data()
        if "data" not in ahead:
            self._check_text(self.results["data"]["splits"])
            look_ahead(self)

    def _check_text(self, splits: Splits) -> None:
        test, calibration = self.tokens.prefix("test"), self.tokens.prefix("calibration")
        check_text(self.recipe, self.tokens, splits)
        check_questions(self.recipe, test, calibration, self.tokenizer)

    def _make_initial_weights(self, trainer: Trainer | None) -> list[Path]:
        """Make every arm's; without a trainer as far as that goes, and return the jobs that must be done first."""
        waiting = []
        if any(needs_scores(target) for target in self.recipe.targets.values()):
            self.calibrate()
        for name, target in untrained_first(self.recipe.targets):
            if is_trained_first(target):
                self.learn_masks(name, target, trainer)
            if target.method != DENSE or "pruned" in self.recipe.arms_of(name):
                job = self.prune(name, target, trainer)
                if job is not None:
                    waiting.append(job)
                    continue
            if "random" in self.recipe.arms_of(name):
                self.random(name, target)
        if waiting:
            return waiting
        # Now that their shapes are known, also those that scores decided.
        made = (name for name in self.recipe.targets if f"prune/{name}" in self.results)
        shapes = {name: shape_of(open_source(self.pruned(name) / HUGGING_FACE)) for name in made}
        self.recipe = settle(self.recipe, self.parent_shape, shapes)
        check_text(self.recipe, self.tokens, self.results["data"]["splits"])
        for name, shape in shapes.items():
            check_training(self.recipe.train, self.recipe.targets[name].layout, shape)
        return []

    def data(self) -> None:
        """Fix the validation windows, and tokenise the text unless it is tokenised already."""
        vocab = self.parent_shape.vocab

        def work() -> dict[str, Any]:
            splits = self.tokens.prepare(self.tokenizer, vocab)
            return {"splits": splits, "validation_windows": self.tokens.write_validation_windows(vocab)}

        self.stage("data", self.data_inputs(), [self.tokens.folder], work)

    def data_inputs(self) -> dict[str, Any]:
        """Return what token files and validation windows depend on.

        Raises:
            UserError: a token file is missing, or was made for another model.
        """
        train = self.recipe.train
        return {
            "source": self.recipe.data.model_dump(exclude={"token_ranges"}),
            "files": self.tokens.identity(self.tokenizer, self.parent_shape.vocab),
            "tokenizer": tokenizer_hash(self.tokenizer),
            "validation": [train.validation_samples, train.sequence_length],
        }

    def calibrate(self) -> None:
        """Measure importance, one dense pass for all targets, and one back where a target needs gradients."""
        settings, folder = self.recipe.calibrate, self.folder / "scores"

        def work() -> dict[str, Any]:
            tokens = self.calibration_tokens(settings.samples)
            with progress("calibrate", "layers") as show:
                scores = calibrate(
                    self.parent_source, tokens, gradients=self._gradients, **self.compute, progress=show
                )
            scores.save(folder)
            return {"scores": scores.content_hash, "tokens": tokens.ids.numel()}

        self.stage("calibrate", self.calibration_inputs(), [folder], work)

    def calibration_inputs(self) -> dict[str, Any]:
        """Return what the scores depend on."""
        return {
            "parent": self.results["parent"]["fingerprint"],
            "text": self.text("calibration"),
            "settings": self.recipe.calibrate.model_dump(include={"samples", "sequence_length", "seed"}),
            **({"gradients": True} if self._gradients else {}),
        }

    @property
    def _gradients(self) -> bool:
        return any(map(needs_gradients, self.recipe.targets.values()))

    def learn_masks(self, name: str, target: Target, trainer: Trainer | None = None) -> None:
        """Train the parent while it turns out what to keep of it for a target: masks are learned, or units go."""
        job, inputs = self.mask_job(name, target)

        def work() -> dict[str, Any]:
            with nullcontext(trainer) if trainer else self._trainer() as running:
                return train_stage(running, job, self.parent_source)

        outputs, precious = [job.folder.parent], [job.checkpoints]
        self.stage(f"masks/{name}", inputs, outputs, work, keep_partial=True, precious=precious, shared=True)

    def _mask_jobs(self) -> list[Path]:
        """Return the files of the jobs that learn masks and are not finished."""
        jobs = []
        for name in first_of_each_stage(self.recipe):
            job, inputs = self.mask_job(name, self.recipe.targets[name])
            outputs, precious = [job.folder.parent], [job.checkpoints]
            begun = self.stages.begin(f"masks/{name}", inputs, outputs, keep_partial=True, precious=precious) is None
            if begun and not is_finished(job):
                jobs.append(prepare_masks(job, self.parent_source))
        return jobs

    def mask_job(self, name: str, target: Target) -> tuple[TrainingJob, dict[str, Any]]:
        """Return the job that learns the masks of a target, and what the stage is made from."""
        shape = expected_shape(target, self.parent_shape).shape
        job, identity = stage_job(self.recipe, name, shape, self.folder / "masks" / name, self.training_data)
        return job, {
            "parent": self.results["parent"]["fingerprint"],
            "text": self.text("train"),
            "validation": self.results["data"]["validation_windows"]["ids_sha256"],
            **identity,
        }

    def prune(self, name: str, target: Target, trainer: Trainer | None = None) -> Path | None:
        """Prune to a target, into a Hugging Face folder and a NeMo checkpoint.

        Returns:
            Without a trainer, the job between two of its stages that must be done first, if there is one.
        """
        if stages_of(target) > 1:
            return prune_in_stages(self, trainer, name, target)
        folder, samples, learned = self.pruned(name), self._samples(target), self.results.get(f"masks/{name}")

        def work() -> dict[str, Any]:
            if learned:
                job, _ = self.mask_job(name, target)
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

        self.stage(f"prune/{name}", self.pruning_inputs(name, target), [folder], work, shared=True)
        return None

    def pruning_inputs(self, name: str, target: Target) -> dict[str, Any]:
        """Return what a pruned target depends on."""
        settings = self.recipe.calibrate
        reads = scans(target) or is_sparse(target) or reads_text(target) or target.method == ADAPT
        return {
            "parent": self.results["parent"]["fingerprint"],
            "method": target.method,
            "options": target.options,
            "shape": expected_shape(target, self.parent_shape).shape.to_dict(),
            "scores": self.results["calibrate"]["scores"] if needs_scores(target) else None,
            "text": [self.text("calibration"), self._samples(target), settings.sequence_length, settings.seed] * reads,
            **({"masks": learned["masks"]} if (learned := self.results.get(f"masks/{name}")) else {}),
        }

    def _samples(self, target: Target) -> int:
        settings = self.recipe.calibrate
        return settings.scan_samples if scans(target) else settings.samples

    def random(self, name: str, target: Target) -> None:
        """Draw the scratch baseline's initial weights for a target, under the same masks, as a NeMo checkpoint."""
        folder, seed, scheme = self.folder / "random" / name, self.recipe.train.seed, self.recipe.train.initialisation
        masks: Masks
        keep: WeightSource | None
        if target.method == DENSE:
            config, assets, masks, keep = self.parent_config, asset_files(self.tokenizer), NoMasks(), None
        else:
            pruned = open_source(self.pruned(name) / HUGGING_FACE)
            config, assets, masks = pruned.config, pruned.assets, masks_of(pruned)
            keep = pruned if target.keep_parent_embeddings else None
        shape = Layout.for_config(config).shape(config)

        def work() -> dict[str, Any]:
            drawn = RandomSource(config, seed, assets, torch.bfloat16, masks, keep, scheme)
            write_nemo(drawn, folder / NEMO)
            return {"fingerprint": fingerprint(open_source(folder / NEMO))}

        inputs = self.random_inputs(name, target, shape, masked=bool(masks.names))
        self.stage(f"random/{name}", inputs, [folder], work, shared=True)

    def random_inputs(self, name: str, target: Target, shape: Shape, *, masked: bool) -> dict[str, Any]:
        """Return what the random weights of a target depend on: its shape, and what they take of the pruned ones."""
        inputs: dict[str, Any] = {"shape": shape.to_dict(), "seed": self.recipe.train.seed}
        if self.recipe.train.initialisation != "megatron":
            inputs["initialisation"] = self.recipe.train.initialisation
        if masked or target.keep_parent_embeddings:
            inputs["pruned"] = [self.results[f"prune/{name}"]["fingerprint"], target.keep_parent_embeddings]
        return inputs

    def train(self, trainer: Trainer, arm: Arm) -> None:
        """Train one arm on Megatron, and hand the result over as a Hugging Face folder."""
        job = self.job(arm)

        def work() -> dict[str, Any]:
            checkpoint = trainer.train(job)
            convert(checkpoint, self.model(arm.name), to="hf", overwrite=True)
            layout = arm.layout.model_dump()
            return {"fingerprint": fingerprint(open_source(self.model(arm.name))), "layout": layout}

        outputs, precious = [job.folder, self.model(arm.name)], self.precious(arm)
        self.stage(f"train/{arm.name}", self.arm_inputs(arm), outputs, work, keep_partial=True, precious=precious)
        if arm.initialisation == "pruned" and (number := stages_of(self.recipe.targets[arm.target])) > 1:
            forget_optimizer(self, arm.target, number - 1)
        model = open_source(self.model(arm.name))
        ledger = run_ledger(self.recipe, arm, self.results, self.parent_shape, model, self.reads(arm))
        for folder in outputs:  # beside the model, so that what is pruned from it inherits its cost
            ledger.save(folder / LEDGER)

    def _trainer(self) -> Trainer:
        return Trainer(self.folder / "train" / "launcher.log")

    def precious(self, arm: Arm) -> list[Path]:
        """Return what the training of an arm must not remove unasked."""
        return [self.job(arm).checkpoints, self.model(arm.name)]

    def arm_inputs(self, arm: Arm) -> dict[str, Any]:
        """Return what a trained arm depends on."""
        made = self.results[f"{'prune' if arm.initialisation == 'pruned' else 'random'}/{arm.target}"]
        return self.training_inputs(arm, shares(self.recipe, arm)[-1], str(made["fingerprint"]))
