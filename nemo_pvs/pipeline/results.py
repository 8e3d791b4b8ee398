"""Collect the measurements of a run's stages into the Results that the report shows."""

from __future__ import annotations

import os
import platform
import statistics
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.ledger.ledger import LEDGER, Ledger
from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.pipeline.records import (
    CALIBRATE,
    DataRecord,
    EvaluationRecord,
    PrunedRecord,
    Records,
    ScoresRecord,
    TasksRecord,
    TrainedRecord,
    data_stage,
    evaluation_stage,
)
from nemo_pvs.pipeline.stages.evaluate import initial_label
from nemo_pvs.planning.charges import count_masked
from nemo_pvs.planning.rounds import shares
from nemo_pvs.recipe.identity import read_origin
from nemo_pvs.recipe.recipe import Arm
from nemo_pvs.reporting.results import ArmResult, ParentResult, Point, Results
from nemo_pvs.training import metrics
from nemo_pvs.training.job import METRICS_FILE

_PACKAGES = ("nemo-pvs", "nemo-toolkit", "megatron-core", "torch", "transformers", "numpy")


def assemble(run: RunFolder) -> Results:
    """Return the results of a run whose stages are done."""
    recipe = run.recipe
    return Results(
        title=recipe.title,
        recipe_name=recipe.name,
        recipe=recipe.model_dump(),
        created=datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds"),
        environment=_environment(),
        hashes=_hashes(run.records),
        parent=_parent(run) if recipe.parent.source else None,
        arms=[_arm(run, arm) for arm in run.arms],
        unfinished=[_for_people(arm) for arm in recipe.runs if arm not in run.arms],
    )


def _parent(run: RunFolder) -> ParentResult:
    measured = run.records.evaluation("parent")
    assert measured.validation is not None
    return ParentResult(
        name=run.recipe.parent.name,
        shape=shape_of(run.parent_source),
        validation_loss=measured.validation.loss,
        test_perplexity=measured.test.perplexity,
        test_bits_per_byte=measured.test.bits_per_byte,
        text_losses=_losses(measured),
        origin=read_origin(run.parent_path),
    )


def _arm(run: RunFolder, arm: Arm) -> ArmResult:
    curve = _curve(run, arm)
    first_step = shares(run.recipe, arm)[-1].first_step
    start = first_step * arm.training.tokens_per_step
    before, after = run.records.evaluation(initial_label(arm)), run.records.evaluation(arm.name)
    assert before.validation is not None
    model = open_source(run.model(arm.name))
    layout = run.records.trained(arm.name).layout or arm.layout.model_dump()
    validation = [Point(point["step"], point["tokens"], point["loss"]) for point in curve.validation]
    if after.validation is not None:  # training was killed before it could measure the last point
        steps = arm.training.steps
        validation.append(Point(steps, steps * arm.training.tokens_per_step, after.validation.loss))
    speeds = [point["tokens_per_second"] for point in curve.training]
    seconds = metrics.training_seconds(curve, run.recipe.train.tokens_per_step)
    return ArmResult(
        name=_for_people(arm),
        target=arm.target,
        method=run.recipe.targets[arm.target].method,
        initialisation=arm.initialisation,
        shape=shape_of(model),
        parallel={name: layout[f"{name}_parallel"] for name in ("tensor", "pipeline", "data")},
        masked_parameters=count_masked(model),
        setting=arm.setting,
        validation=[
            *(point for point in validation if point.step <= first_step),
            Point(first_step, start, before.validation.loss),
            *(point for point in validation if point.step > first_step),
        ],
        training=[
            Point(point["step"], point["tokens"], point["loss"], point["learning_rate"]) for point in curve.training
        ],
        # The initial model of an arm that is pruned in rounds is pruned further before it could be compared.
        test_perplexity_before=None if first_step else before.test.perplexity,
        test_perplexity_after=after.test.perplexity,
        test_bits_per_byte_before=None if first_step else before.test.bits_per_byte,
        test_bits_per_byte_after=after.test.bits_per_byte,
        text_losses=_losses(after),
        before_the_end=_before_the_end(run.records, arm),
        ledger=Ledger.load(run.model(arm.name) / LEDGER),
        seconds=seconds if speeds else None,
        tokens_per_second=statistics.median(speeds) if speeds else None,
        mfu=_median("mfu", curve),
        peak_gigabytes=max((point.get("peak_gigabytes", 0.0) for point in curve.training), default=0.0) or None,
    )


def _median(key: str, curve: metrics.Metrics) -> float | None:
    """Return the median of what only some machines measure; None if this one did not."""
    values = [point[key] for point in curve.training if key in point]
    return statistics.median(values) if values else None


def _before_the_end(records: Records, arm: Arm) -> dict[int, str]:
    """Return the fingerprints of the models before and during an arm's training that were evaluated, by tokens."""
    for tasks in records.of(TasksRecord).values():
        return {int(tokens): model for tokens, model in (tasks.before_the_end or {}).get(arm.name, {}).items()}
    return {}


def _losses(measured: EvaluationRecord) -> dict[str, float]:
    return {name: text.loss for name, text in (measured.texts or {}).items()}


def _curve(run: RunFolder, arm: Arm) -> metrics.Metrics:
    """Return the metrics of an arm's whole training, joined over the shares of all rounds of pruning."""
    parts = shares(run.recipe, arm)
    between = run.folder / "train" / f"{arm.target}-stages"
    files = [*(between / str(number) / METRICS_FILE for number in range(1, len(parts))), run.job(arm).metrics]
    starts = [share.first_step for share in parts]
    return metrics.join_curves(zip(files, starts, strict=True), arm.training.tokens_per_step)


def _for_people(arm: Arm) -> str:
    """Return an arm's name for reports, such as ``width, random, equal total tokens, 50B``."""
    ending = arm.name.removeprefix(f"{arm.target}-{arm.initialisation}")
    if arm.setting:
        ending = ending.replace(arm.setting, arm.setting.replace("-", " "))
    return f"{arm.target}, {arm.initialisation}{ending.replace('-', ', ')}"


def _hashes(records: Records) -> dict[str, str]:
    """Return the content hash of every artefact of the run."""
    hashes = {"parent weights": records.parent.fingerprint} if evaluation_stage("parent") in records else {}
    for stage, scores in records.of(ScoresRecord).items():
        hashes["scores" if stage == CALIBRATE else f"scores with {_subject(stage)}"] = scores.scores
    splits = records.data.splits
    if tokenizer := next((split.tokenizer_sha256 for split in splits.values()), None):
        hashes["tokenizer"] = tokenizer
    hashes |= {f"{name} tokens": split.sha256 for name, split in splits.items()}
    for stage, data in records.of(DataRecord).items():
        if stage != data_stage():
            target = _subject(stage)
            hashes[f"tokenizer of {target}"] = str(data.splits["train"].tokenizer_sha256)
            hashes |= {f"{name} tokens of {target}": split.sha256 for name, split in data.splits.items()}
    for stage, pruned in records.of(PrunedRecord).items():
        if pruned.plan is not None:
            hashes[f"plan {_subject(stage)}"] = pruned.plan
    for stage, trained in records.of(TrainedRecord).items():
        hashes[f"model {_subject(stage)}"] = trained.fingerprint
    return hashes


def _subject(stage: str) -> str:
    """Return the target or the arm in the name of a stage; of several rounds of pruning the last one counts."""
    return stage.split("/")[1]


def _version(package: str) -> str:
    """Return the version of a package; copies not installed by pip, as in some containers, have none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
