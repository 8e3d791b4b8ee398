"""``pvs run``: the stages from a parent to a report, each done once and resumable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.calibration.tokens import TokenSet
from nemo_pvs.checkpoints.assets import tokenizer_folder
from nemo_pvs.checkpoints.detect import open_source
from nemo_pvs.checkpoints.huggingface import write_huggingface
from nemo_pvs.checkpoints.megatron import write_nemo
from nemo_pvs.checkpoints.parent import prepare_parent
from nemo_pvs.checkpoints.random import RandomSource
from nemo_pvs.checkpoints.source import WeightSource, fingerprint, shape_of
from nemo_pvs.checkpoints.stream import convert
from nemo_pvs.data.corpus import WIKIPEDIA_SAMPLE, read_documents
from nemo_pvs.data.split import split_documents
from nemo_pvs.data.tokenize import tokenize, tokenizer_hash
from nemo_pvs.errors import UserError
from nemo_pvs.evaluation.perplexity import perplexity
from nemo_pvs.evaluation.windows import validation_windows, write_validation_document
from nemo_pvs.files import write_text
from nemo_pvs.progress import progress
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.depth import layers_to_remove, plan_depth, scan_windows
from nemo_pvs.pruning.width import plan_width
from nemo_pvs.recipe import Recipe, Target
from nemo_pvs.stages import Stages
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.run import Trainer

STAGES = ("parent", "data", "calibrate", "prune", "random", "train", "evaluate", "report")


def arm_name(target: str, initialisation: str) -> str:
    """Return the folder name of an arm: ``width-pruned``."""
    return f"{target}-{initialisation}"


class Pipeline:
    """One run folder and the recipe that fills it."""

    def __init__(self, recipe: Recipe, folder: Path, force: tuple[str, ...] = ()) -> None:
        """Prepare to run ``recipe`` in ``folder``.

        Raises:
            UserError: a forced stage is unknown.
        """
        for stage in force:
            if stage.split("/")[0] not in STAGES:
                raise UserError(f"There is no stage {stage} to force; stages are {', '.join(STAGES)}.")
        self.recipe = recipe
        self.folder = folder
        self.stages = Stages(folder, force)
        self.results: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        """Do every stage that is not done yet."""
        self.prepare()
        with Trainer(self.folder / "train" / "launcher.log") as trainer:
            for name, target, initialisation in self._arms():
                self.train(trainer, name, target, initialisation)
        self.evaluate()

    def prepare_only(self) -> list[Path]:
        """Do every stage before training, and return the job files for ranks that something else starts."""
        self.prepare()
        jobs = []
        for name, target, initialisation in self._arms():
            job = self.job(name, target, initialisation)
            outputs = [job.folder, self.model(job.name)]
            self.stages.begin(
                f"train/{job.name}", self._training_inputs(name, target, initialisation), outputs, keep_partial=True
            )
            jobs.append(job.save())
        return jobs

    def prepare(self) -> None:
        """Do every stage that makes initial weights and token files."""
        write_text(self.folder / "recipe.yaml", yaml.safe_dump(self.recipe.model_dump(), sort_keys=False))
        self.parent()
        self.data()
        self.calibrate()
        for name, target in self.recipe.targets.items():
            self.prune(name, target)
            if "random" in self.recipe.arms:
                self.random(name)

    def parent(self) -> None:
        """Get the parent as a checkpoint folder, and check that the recipe can be done with it."""
        source, target = self.recipe.parent.source, self.folder / "parent"
        given = Path(source).is_dir()
        inputs = {"source": source, "fingerprint": fingerprint(open_source(source)) if given else None}

        def work() -> dict[str, Any]:
            path = prepare_parent(source, target)
            return {"path": str(path.resolve()) if given else "parent", "fingerprint": fingerprint(open_source(path))}

        self._stage("parent", inputs, [] if given else [target], work)
        parent = self.parent_source
        self.recipe.check(shape_of(parent), int(parent.config.get("max_position_embeddings", 0)))

    def data(self) -> None:
        """Split the corpus by document and tokenise each part; fix the validation windows."""
        recipe, folder = self.recipe, self.folder / "data"
        inputs = {
            "source": recipe.data.model_dump(),
            "files": _identity(recipe.data.source),
            "tokenizer": tokenizer_hash(self.tokenizer),
            "validation": [recipe.train.validation_samples, recipe.train.sequence_length],
        }

        def work() -> dict[str, Any]:
            documents = list(read_documents(recipe.data.source))
            splits = split_documents(documents, recipe.data.split.model_dump(), seed=recipe.data.seed)
            manifests = {}
            with progress("tokenise", "documents") as show:
                for name, part in splits.items():
                    manifests[name] = tokenize(part, self.tokenizer, folder / name, progress=show)
            wanted, available = int(recipe.train.tokens), manifests["train"]["tokens"]
            if wanted > available:
                raise UserError(
                    f"train.tokens is {wanted:,}, but the training split has {available:,} tokens; "
                    "take more text or train on fewer tokens."
                )
            windows = self.validation_tokens
            write_validation_document(windows, folder / "validation_windows", shape_of(self.parent_source).vocab)
            return {"splits": manifests, "validation_windows": windows.manifest}

        self._stage("data", inputs, [folder], work)

    def calibrate(self) -> None:
        """Measure importance, one dense pass for all width targets."""
        settings, folder = self.recipe.calibrate, self.folder / "scores"
        inputs = {
            "parent": self.results["parent"]["fingerprint"],
            "text": self._text("calibration"),
            "settings": settings.model_dump(include={"samples", "sequence_length", "seed"}),
        }

        def work() -> dict[str, Any]:
            tokens = self._calibration_tokens(settings.samples)
            with progress("calibrate", "layers") as show:
                scores = calibrate(self.parent_source, tokens, progress=show)
            scores.save(folder)
            return {"scores": scores.content_hash, "tokens": tokens.ids.numel()}

        self._stage("calibrate", inputs, [folder], work)

    def prune(self, name: str, target: Target) -> None:
        """Plan what a target keeps, and write it as a Hugging Face folder and as a NeMo checkpoint."""
        folder = self.pruned(name)
        shape = target.shape(shape_of(self.parent_source))
        inputs = {
            "parent": self.results["parent"]["fingerprint"],
            "method": target.method,
            "shape": shape.to_dict(),
            "scores": self.results["calibrate"]["scores"],
            "scan_samples": self.recipe.calibrate.scan_samples if target.method == "minitron-depth" else None,
        }

        def work() -> dict[str, Any]:
            source = self.parent_source
            result: dict[str, Any] = {}
            if target.method == "minitron-width":
                plan = plan_width(Scores.load(self.folder / "scores", source), shape)
            else:
                tokens = self._calibration_tokens(self.recipe.calibrate.scan_samples)
                with progress(f"scan windows of {layers_to_remove(shape_of(source), shape)} layers", "passes") as show:
                    scan = scan_windows(source, tokens, layers_to_remove(shape_of(source), shape), progress=show)
                plan = plan_depth(scan)
                result["search"] = {"tokens": scan.tokens_read, "flops": scan.flops, "losses": list(scan.losses)}
            folder.mkdir(parents=True)
            plan.save(folder / "plan.json")
            pruned = PrunedSource(source, plan)
            for write, place in ((write_huggingface, "huggingface"), (write_nemo, "nemo")):
                with progress(f"write {place}", "parameters") as show:
                    write(pruned, folder / place, progress=show)
            return {**result, "plan": plan.plan_hash, "fingerprint": fingerprint(pruned)}

        self._stage(f"prune/{name}", inputs, [folder], work)

    def random(self, name: str) -> None:
        """Draw the scratch baseline's initial weights for a target, as a NeMo checkpoint."""
        folder, seed = self.folder / "random" / name, self.recipe.train.seed
        pruned = open_source(self.pruned(name) / "huggingface")
        inputs = {"shape": shape_of(pruned).to_dict(), "seed": seed}

        def work() -> dict[str, Any]:
            drawn = RandomSource(pruned.config, seed, pruned.assets, torch.bfloat16)
            write_nemo(drawn, folder / "nemo")
            return {"fingerprint": fingerprint(drawn)}

        self._stage(f"random/{name}", inputs, [folder], work)

    def train(self, trainer: Trainer, name: str, target: Target, initialisation: str) -> None:
        """Train one arm on Megatron, and hand the result over as a Hugging Face folder."""
        arm = arm_name(name, initialisation)
        job = self.job(name, target, initialisation)
        inputs = self._training_inputs(name, target, initialisation)

        def work() -> dict[str, Any]:
            checkpoint = trainer.train(job)
            convert(checkpoint, self.model(arm), to="hf", overwrite=True)
            return {"fingerprint": fingerprint(open_source(self.model(arm)))}

        self._stage(f"train/{arm}", inputs, [job.folder, self.model(arm)], work, keep_partial=True)

    def evaluate(self) -> None:
        """Measure perplexity on the test split, and the validation loss of models that no training measured."""
        trained = {arm_name(name, initialisation) for name, _, initialisation in self._arms()}
        for label, path in self.models_to_evaluate().items():
            source = open_source(path)
            inputs = {
                "model": fingerprint(source),
                "text": self._text("test"),
                "settings": self.recipe.evaluate.model_dump(),
                "validation": self.results["data"]["validation_windows"]["ids_sha256"],
            }

            def work(source: WeightSource = source, label: str = label) -> dict[str, Any]:
                settings = self.recipe.evaluate
                test = TokenSet.from_token_file(
                    self.folder / "data" / "test",
                    samples=settings.samples,
                    sequence_length=settings.sequence_length,
                )
                texts = {"test": test}
                if label not in trained:  # training has measured the validation loss of these already
                    texts["validation"] = self.validation_tokens
                measured = {}
                for text, tokens in texts.items():
                    with progress(f"{text} loss of {label}", "layers") as show:
                        measured[text] = perplexity(source, tokens, progress=show)
                return measured

            self._stage(f"evaluate/{label}", inputs, [], work)

    def models_to_evaluate(self) -> dict[str, Path]:
        """Return every model of the run by label: the parent, each arm's initial weights, each trained arm."""
        models = {"parent": self.parent_path}
        for name, _, initialisation in self._arms():
            arm = arm_name(name, initialisation)
            models[f"{arm}-initial"] = self.initial(name, initialisation)
            models[arm] = self.model(arm)
        return models

    @property
    def parent_path(self) -> Path:
        """The parent's checkpoint folder."""
        return self.folder / self.results["parent"]["path"]

    @property
    def parent_source(self) -> WeightSource:
        """The parent."""
        return open_source(self.parent_path)

    @property
    def tokenizer(self) -> Path:
        """A folder with the parent's tokenizer."""
        return tokenizer_folder(self.parent_path)

    @property
    def validation_tokens(self) -> TokenSet:
        """The windows that every validation loss is measured on."""
        training = self.recipe.train
        return validation_windows(
            self.folder / "data" / "validation",
            samples=training.validation_samples,
            sequence_length=training.sequence_length,
        )

    def pruned(self, target: str) -> Path:
        """The folder of a pruned target: plan.json, huggingface/, nemo/."""
        return self.folder / "pruned" / target

    def initial(self, target: str, initialisation: str) -> Path:
        """The NeMo checkpoint that an arm starts from."""
        return (self.pruned(target) if initialisation == "pruned" else self.folder / "random" / target) / "nemo"

    def model(self, arm: str) -> Path:
        """The Hugging Face folder of a trained arm."""
        return self.folder / "models" / arm

    def job(self, name: str, target: Target, initialisation: str) -> TrainingJob:
        """Return the training job of an arm."""
        arm = arm_name(name, initialisation)
        data = self.folder.resolve() / "data"
        return TrainingJob(
            name=arm,
            folder=self.folder.resolve() / "train" / arm,
            initial=self.initial(name, initialisation).resolve(),
            data={"train": str(data / "train"), "validation": str(data / "validation_windows")},
            layout=target.layout,
            training=self.recipe.train,
        )

    def _arms(self) -> Iterator[tuple[str, Target, str]]:
        for name, target in self.recipe.targets.items():
            for initialisation in self.recipe.arms:
                yield name, target, initialisation

    def _training_inputs(self, name: str, target: Target, initialisation: str) -> dict[str, Any]:
        return {
            "initial": self.results[f"{'prune' if initialisation == 'pruned' else 'random'}/{name}"]["fingerprint"],
            "text": self._text("train"),
            "validation": self.results["data"]["validation_windows"]["ids_sha256"],
            "layout": target.layout.model_dump(),
            "training": self.recipe.train.model_dump(),
        }

    def _stage(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.results[name] = self.stages.run(name, *args, **kwargs)

    def _text(self, split: str) -> str:
        return str(self.results["data"]["splits"][split]["bin_sha256"])

    def _calibration_tokens(self, samples: int) -> TokenSet:
        settings = self.recipe.calibrate
        return TokenSet.from_token_file(
            self.folder / "data" / "calibration",
            samples=samples,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
        )


def _identity(source: str | list[str]) -> dict[str, list[int]]:
    """Return size and time of change of every input file, so that a changed corpus is tokenised again."""
    names = [source] if isinstance(source, str) else source
    paths = [Path(name) for name in names if name != WIKIPEDIA_SAMPLE]
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()}
